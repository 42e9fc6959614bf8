"""Messages to the tokens of a prompt."""

from typing import Any


def prompt_ids(processor: Any, messages: list[dict[str, Any]]) -> list[int]:
    """The tokens of a conversation that waits for an answer, as the processor has them, no image looked at.

    Args:
        processor: a `DSVLProcessor`.
        messages: the conversation as the chat template takes it; of its images, no more than the `type` is read.
    """
    tokenizer, image = processor.tokenizer, processor.image_token_id
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not begun)["input_ids"]
    return [copy for token in ids for copy in [token] * (processor.image_seq_length if token == image else 1)]
