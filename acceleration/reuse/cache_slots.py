"""Slots of a KV cache for the new tokens of prompts, which hold their images before the decoder runs their text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack
from transformers import DynamicCache, StaticCache

from ...utils.transformers_names import DynamicLayer, StaticLayer

SLOT_MULTIPLE = 64  # for aligned products


def slots_of(cache: Any, past: int, rows: int, tokens: int) -> int | None:
    """How many slots of a KV cache a prompt sees.

    Args:
        past: the number of tokens that the cache holds.
        rows, tokens: of the prompts.

    Returns:
        Their number, `past` included; None for a cache of another kind than dynamic or static without sliding windows.
    """
    total = past + tokens
    layers = cache.layers
    # Rows of several lengths leave a trace of their padding in a slot behind them.
    slots = -(-(total + (rows > 1)) // SLOT_MULTIPLE) * SLOT_MULTIPLE
    if isinstance(cache, DynamicCache):
        is_plain = all(isinstance(one, DynamicLayer) and not one.is_sliding for one in layers)
        return slots if is_plain and not cache.offloading and not any(hasattr(one, "prompt") for one in layers) else None
    if not isinstance(cache, StaticCache) or not all(isinstance(one, StaticLayer) and not one.is_sliding for one in layers):
        return None
    length = layers[0].max_cache_len
    return None if total + (rows > 1) > length or getattr(cache, "offloading", False) else min(slots, length)


@dataclass
class CacheSlots:
    """The slots of all layers.

    Attributes:
        keys, values: (layers, batch, key-value heads, slots, head_dim), in one tensor, or for each layer one.
        past, tokens: how many tokens the cache held, and how many are new.
    """

    keys: Sequence[torch.Tensor] | torch.Tensor
    values: Sequence[torch.Tensor] | torch.Tensor
    past: int
    tokens: int

    @classmethod
    def extend(
        cls, cache: Any, past: int, tokens: int, slots: int, images: tuple[torch.Tensor, torch.Tensor] | None
    ) -> "CacheSlots":
        """Let a KV cache hold new tokens: their images, and anything at the places of their text.

        Args:
            past, tokens, slots: as for `slots_of`, and what it returns.
            images: the keys and values of the slots after the `past` tokens, (layers, batch, key-value heads, slots,
                head_dim), for new images; without them the cache holds tokens.
        """
        total = past + tokens
        if isinstance(cache, StaticCache):
            for number, layer in enumerate(cache.layers):
                new_states = () if images is None else (images[0][number], images[1][number])
                if not layer.is_initialized:
                    layer.lazy_initialization(*new_states)
                for kept, new in zip((layer.keys, layer.values), new_states, strict=False):
                    kept[:, :, past:slots].copy_(new)
                layer.cumulative_length.fill_(total)
            keys, values = ([getattr(layer, name)[:, :, :slots] for layer in cache.layers] for name in _PARTS)
            return cls(keys, values, past, tokens)
        if past == 0:
            assert images is not None
            return cls(*images, past, tokens)
        own: list[list[torch.Tensor]] = []
        for part, name in enumerate(_PARTS):
            states = None if images is None else images[part].unbind()
            own.append([])
            # Layer by layer, so that the old states and the new ones are in memory for one layer only.
            for number, layer in enumerate(cache.layers):
                kept = getattr(layer, name)
                empty = (*kept.shape[:2], slots - past, kept.shape[3])
                grown = torch.cat([kept, kept.new_zeros(empty) if states is None else states[number]], 2)
                own[part].append(grown)
                setattr(layer, name, grown[:, :, :total])
        return cls(own[0], own[1], past, tokens)

    def write(self, cache: Any, index: torch.Tensor, filled: torch.Tensor | None, count: int, *states: torch.Tensor) -> None:
        """Write the keys and values of the text, (layers, batch, text, key-value heads, head_dim); an empty dynamic cache
        gets its layers now, while the device runs the text.

        Args:
            cache: the KV cache.
            index: (batch, text), the slots.
            filled: (batch, text), False for what is no token, at the beginning; None if all are.
            count: the number of tokens of a single row.
        """
        rows = index.shape[0]
        if rows == 1:
            index = index[0, -count:]
        elif filled is not None:
            index = torch.where(filled, index, self.past + self.tokens)
        for part, new in zip((self.keys, self.values), states, strict=True):
            new = new.transpose(2, 3)
            if rows == 1 and isinstance(part, torch.Tensor):
                part.index_copy_(3, index, new[..., -count:, :])
                continue
            for kept, own in zip(part, new, strict=True):
                if rows == 1:
                    kept.index_copy_(2, index, own[..., -count:, :])
                else:
                    kept.scatter_(2, index[:, None, :, None].expand(own.shape), own)
        if not isinstance(self.keys, torch.Tensor):
            return
        while len(cache.layers) < len(self.keys):
            cache.layers.append(cache.layer_class_to_replicate())
        total = self.past + self.tokens
        for layer, keys, values in zip(cache.layers, own_tensors(self.keys), own_tensors(self.values), strict=True):
            layer.keys, layer.values = keys[:, :, :total], values[:, :, :total]
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True


def own_tensors(views: Sequence[torch.Tensor] | torch.Tensor) -> list[torch.Tensor]:
    """The same memory as tensors that are no parts of others: a compiled graph would be tied to where they begin."""
    return [from_dlpack(to_dlpack(view)) for view in views]


_PARTS = "keys", "values"

__all__ = ["CacheSlots", "own_tensors", "slots_of"]
