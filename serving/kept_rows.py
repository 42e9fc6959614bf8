"""The KV caches of requests between two batches: taken out of the batch that pauses, and joined for the one that resumes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ..cache_dsvl import cached_images, cached_positions, cached_types, remember_types
from ..utils.transformers_names import DynamicLayer, DynamicSlidingWindowLayer


@dataclass
class KeptRow:
    """The KV cache of one request, without padding.

    Attributes:
        tokens: how many tokens it holds.
        layers: keys and values, (key-value heads, tokens, head_dim); with a sliding window those of its last tokens.
        types: the modality of its tokens, (tokens,); None if the cache did not record it, as under `"causal"`.
        positions: of its tokens, (tokens,); None if they are counted.
        may_hold_images: whether any token is an image token, as far as the host knows.
    """

    tokens: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    types: torch.Tensor | None
    positions: torch.Tensor | None
    may_hold_images: bool | None

    @property
    def nbytes(self) -> int:
        """Its memory."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)


def can_take(cache: Any) -> bool:
    """Whether rows can be taken out of a KV cache."""
    return isinstance(cache, DynamicCache) and not cache.offloading and all(map(_holds_last_tokens, cache.layers))


def take_rows(cache: DynamicCache, tokens: dict[int, int], beginning: int = 0) -> list[KeptRow]:
    """Take rows out of a KV cache, which is empty then: layer by layer, so that both are in memory for one layer only.

    Args:
        cache: one for which `can_take`.
        tokens: row -> how many tokens it has: the first `beginning`, and the others at the end. Between them is padding.
        beginning (*optional*, defaults to 0): the number of tokens before the padding; without sliding windows.
    """
    held = int(cache.get_seq_length())
    types, positions, may_hold_images = cached_types(cache), cached_positions(cache), cached_images(cache)

    def own(whole: torch.Tensor, count: int) -> torch.Tensor:
        """The tokens of a row (..., stored tokens, any), of whose last axis but one the first may have been dropped."""
        stored = whole.shape[-2]
        if beginning == 0 or count >= stored:
            return whole[..., stored - min(count, stored) :, :].clone()
        return torch.cat([whole[..., :beginning, :], whole[..., stored - (count - beginning) :, :]], dim=-2)

    def own_figures(figures: torch.Tensor | None, row: int, count: int) -> torch.Tensor | None:
        return None if figures is None else own(figures[row, :held, None], count)[:, 0]

    rows = [
        KeptRow(count, [], own_figures(types, row, count), own_figures(positions, row, count), may_hold_images)
        for row, count in tokens.items()
    ]
    for layer in cache.layers:
        keys, values = layer.keys, layer.values
        layer.reset()
        for kept, (row, count) in zip(rows, tokens.items(), strict=True):
            kept.layers.append((own(keys[row], count), own(values[row], count)))
    return rows


def join_rows(rows: Sequence[KeptRow], text_config: Any) -> DynamicCache:
    """One KV cache of several rows, padded on the left. The rows are empty then.

    Args:
        rows: of one model; all with a recorded modality, or none.
        text_config: the decoder's.
    """
    cache = DynamicCache(config=text_config)
    longest, number = max(row.tokens for row in rows), len(rows[0].layers)
    types, positions = (
        _padded([getattr(row, name) for row in rows], fill) for name, fill in (("types", 0), ("positions", -1))
    )
    may_hold_images = None if any(row.may_hold_images is None for row in rows) else any(row.may_hold_images for row in rows)
    for index in range(number):
        own = [row.layers.pop(0) for row in rows]
        keys, values = (_padded([one[part] for one in own], 0) for part in (0, 1))
        assert keys is not None and values is not None
        del own
        cache.update(keys[:, :, :0], values[:, :, :0], index)  # which makes the layer
        layer: Any = cache.layers[index]
        layer.keys, layer.values = keys, values
        if layer.is_sliding:
            layer.cumulative_length = longest
    if types is not None:
        remember_types(cache, types, may_hold_images, positions)
    return cache


def copy_row(row: KeptRow, copies: int, text_config: Any) -> DynamicCache:
    """A KV cache of so many copies of a row, which stays as it is.

    Args:
        text_config: the decoder's.
    """
    cache = DynamicCache(config=text_config)
    for index, states in enumerate(row.layers):
        cache.update(*(one.expand(copies, -1, -1, -1) for one in states), index)
    if row.types is not None:
        positions = None if row.positions is None else row.positions.expand(copies, -1)
        remember_types(cache, row.types.expand(copies, -1), row.may_hold_images, positions)
    return cache


def _holds_last_tokens(layer: Any) -> bool:
    """Whether a layer holds the last tokens of each row in their order."""
    if not isinstance(layer, DynamicLayer) or hasattr(layer, "prompt") or not layer.is_initialized:
        return False
    return not layer.is_sliding or (isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past)


def _padded(rows: list[Any], fill: int) -> torch.Tensor | None:
    """Rows (tokens,) or (heads, tokens, head_dim), padded on the left to one tensor; None if one is None."""
    if any(row is None for row in rows):
        return None
    axis = 0 if rows[0].ndim == 1 else 1
    longest = max(row.shape[axis] for row in rows)
    shape = list(rows[0].shape)
    shape[axis] = longest
    joined = rows[0].new_full((len(rows), *shape), fill)
    for whole, row in zip(joined, rows, strict=True):
        whole.narrow(axis, longest - row.shape[axis], row.shape[axis]).copy_(row)
    return joined


__all__ = ["KeptRow", "can_take", "copy_row", "join_rows", "take_rows"]
