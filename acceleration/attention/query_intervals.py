"""The interval of keys that each query sees, modality aside."""

from types import FunctionType
from typing import Any

import torch

from ...masks_dsvl import Visibility
from ...utils.transformers_names import sliding_window_causal_mask_function

# Pairs of query and key for which a mask function is called at once.
PAIRS_AT_ONCE = 2**24


def query_intervals(visibility: Visibility) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """The index of the first key that each query sees and the index after the last: (batch, queries) each.

    Causality, sliding windows and packed documents are known without looking at values. Any other mask function is called
    for every pair, and the result is read on the host, once for each forward call.

    Returns:
        (None, None) if every query sees all keys up to its own; None if the keys of some query are not an interval, or if an
        interval starts or ends before that of an earlier query.
    """
    if visibility.is_causal:
        return None, None
    window = window_size(visibility)
    if window is None:
        return None if torch.compiler.is_compiling() else intervals_by_calling(visibility)
    positions = visibility.query_positions()
    since = positions + 1 - window
    if visibility.document_start is not None:
        since = torch.maximum(since, visibility.document_start)
    shape = visibility.batch_size, visibility.q_length
    first, last = since - visibility.kv_offset, positions + 1 - visibility.kv_offset
    return first.clamp(min=0).expand(shape), last.expand(shape)


def window_size(visibility: Visibility) -> int | None:
    """How many positions before and including its own a query sees of its document; None if that is unknown."""
    whole = visibility.undivided or visibility
    if whole.is_causal:
        return whole.kv_offset + whole.kv_length
    if whole.local_size is None or torch.compiler.is_compiling():  # which does not look into functions
        return None
    window = sliding_window_causal_mask_function(whole.local_size)
    return whole.local_size if _same(whole.mask_function, window) else None


def _same(one: Any, other: Any) -> bool:
    """Whether two functions run the same code over the same numbers."""
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        return one.__code__ is other.__code__ and _same(
            *(tuple(c.cell_contents for c in f.__closure__ or ()) for f in (one, other))
        )
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) is int and one == other


def intervals_by_calling(visibility: Visibility) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As `query_intervals`, by calling the mask function for every pair."""
    rows, keys, device = visibility.batch_size, visibility.kv_length, visibility.device
    batch = torch.arange(rows, device=device)[:, None, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    q_positions = visibility.query_positions()[None, :, None]
    kv_positions = visibility.key_positions()[None, None]
    first, last, counts = [], [], []
    for part in q_positions.split(max(PAIRS_AT_ONCE // (rows * keys), 1), dim=1):
        seen = visibility.mask_function(batch, head, part, kv_positions).expand(rows, part.shape[1], keys).to(torch.uint8)
        first.append(seen.argmax(-1))
        last.append(keys - seen.flip(-1).argmax(-1))
        counts.append(seen.sum(-1))
    since, up_to, count = (torch.cat(part, dim=1) for part in (first, last, counts))
    is_interval = (count > 0) & (count == up_to - since)
    never_back = (since.diff(dim=1) >= 0).all() & (up_to.diff(dim=1) >= 0).all()
    return (since, up_to) if bool(is_interval.all() & never_back) else None


__all__ = ["intervals_by_calling", "query_intervals", "window_size"]
