"""Checks of a forward call's inputs against each other, by shapes and dtypes alone: nothing here waits for a device.

What only the values tell is checked with the placeholders (images_dsvl.py), once the device has got its work.
"""

from typing import Any

import torch
from transformers import Cache

# What a sequence that does not fit its types may come from.
PEFT_HINT = (
    "(PEFT's prompt tuning, p-tuning and prefix tuning put virtual tokens before a sequence without its mm_token_type_ids; "
    "use LoRA, or another method that adapts weights.)"
)


def check_sequence(inputs_embeds: torch.Tensor, attention_mask: Any, cache: Cache | None) -> None:
    """Refuse a batch of nothing, and a two-dimensional mask of another shape than the sequence.

    Args:
        inputs_embeds: (batch, tokens, hidden), of the new tokens.
        attention_mask: (batch, tokens, cached ones included), or what is handed through.

    Raises:
        ValueError: naming both shapes.
    """
    batch, tokens = inputs_embeds.shape[:2]
    if inputs_embeds.numel() == 0:
        raise ValueError(
            f"The inputs hold {batch} rows of {tokens} tokens, so there is nothing to compute; pass at least one token of "
            "one row."
        )
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return
    fixed = cache is not None and cache.is_compileable  # its length lies on the device, and masks may be as long as it
    past = int(cache.get_seq_length()) if cache is not None and not fixed else 0
    rows, length = attention_mask.shape
    if rows != batch or length < past + tokens or (length > past + tokens and not fixed):
        raise ValueError(
            f"attention_mask is of shape {(rows, length)}, but the inputs hold {batch} rows of {tokens} tokens"
            + (f" after {past} cached ones" if past else "")
            + f"; pass the mask of the whole sequence, {(batch, past + tokens)}."
        )


def check_token_types(types: torch.Tensor | None, inputs_embeds: torch.Tensor, cache: Cache | None) -> torch.Tensor | None:
    """`mm_token_type_ids` as int64.

    Args:
        types: (batch, new tokens) or (batch, tokens, cached ones included), integers or booleans.
        inputs_embeds: (batch, new tokens, hidden).

    Returns:
        `types` as int64.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for another dtype, or another shape than the sequence's.
    """
    if types is None:
        return None
    if not isinstance(types, torch.Tensor):
        raise TypeError(f"mm_token_type_ids is a {type(types).__name__}; pass a tensor of integers.")
    if types.is_floating_point() or types.is_complex():
        raise ValueError(f"mm_token_type_ids are {types.dtype}; pass integers, 1 for image tokens and 0 for all others.")
    types = types.long()
    batch, tokens = inputs_embeds.shape[:2]
    if types.shape == (batch, tokens):
        return types
    past = int(cache.get_seq_length()) if cache is not None else 0
    if types.shape != (batch, past + tokens):
        expected = f"{(batch, tokens)}" + (f", or {(batch, past + tokens)} with the {past} cached tokens" if past else "")
        raise ValueError(
            f"mm_token_type_ids are of shape {tuple(types.shape)}, but the inputs hold {batch} rows of {tokens} tokens; "
            f"expected {expected}. {PEFT_HINT}"
        )
    return types


def check_labels(name: str, labels: torch.Tensor, inputs: torch.Tensor) -> None:
    """Refuse labels that are not of the inputs' shape.

    Args:
        name: `labels` or `shift_labels`.
        labels: (batch, tokens).
        inputs: `input_ids` or `inputs_embeds`, (batch, tokens, ...).

    Raises:
        ValueError: naming both shapes.
    """
    if labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"{name} are of shape {tuple(labels.shape)}, but the inputs of {tuple(inputs.shape[:2])}; pass one label for "
            "each token, -100 where nothing is supervised."
        )


__all__ = ["PEFT_HINT", "check_labels", "check_sequence", "check_token_types"]
