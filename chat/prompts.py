"""From messages to the token ids of a prompt."""

from typing import Any


def prompt_ids(processor: Any, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
    """The token ids of a conversation with a generation prompt, image tokens expanded. Images are not opened.

    Args:
        processor: a `DSVLProcessor`.
        messages: the conversation as the chat template takes it. Only the `type` of image parts is read.
        variables: of the chat template, such as `enable_thinking=False`.
    """
    tokenizer, image = processor.tokenizer, processor.image_token_id
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [copy for token in ids for copy in [token] * (processor.image_seq_length if token == image else 1)]
