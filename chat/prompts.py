"""From messages to the token ids of a prompt."""

from collections.abc import Sequence
from typing import Any

import torch

from ..positions_dsvl import image_positions


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


def count_positions(config: Any, input_ids: Sequence[int]) -> int:
    """How many positions a prompt takes.

    Args:
        config: a `DSVLConfig`.
        input_ids: the token ids of one row without padding, image tokens expanded.
    """
    if config.image_positions == "token":
        return len(input_ids)
    types = (torch.tensor([list(input_ids)]) == config.image_token_id).long()
    return int(image_positions(types, config.image_seq_length)[0, -1]) + 1
