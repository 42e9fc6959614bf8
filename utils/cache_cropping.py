"""Removing tokens from the end of a KV cache."""

from typing import Any

from transformers import Cache

from ..cache_dsvl import cached_images, cached_positions, cached_types, remember_types
from .transformers_names import StaticLayer


def can_crop(cache: Cache) -> bool:
    """Whether tokens can be removed from the end without a trace. A full sliding window has dropped earlier tokens."""

    def layer_can(layer: Any) -> bool:
        if _is_full_static(layer):
            return True
        if not layer.is_croppable:
            return False
        return not getattr(layer, "is_sliding", False) or layer.get_seq_length() < layer.sliding_window

    return all(layer_can(layer) for layer in cache.layers)


def crop(cache: Cache, length: int) -> None:
    """Keep the first `length` tokens of a cache that can be cropped."""
    surplus = int(cache.get_seq_length()) - length
    if surplus:
        for layer in cache.layers:
            if _is_full_static(layer):  # later keys are hidden by causality until they are overwritten
                layer.cumulative_length.fill_(length)
            else:
                layer.crop(-surplus)
    if (types := cached_types(cache)) is not None:  # a step may have written them before it ran
        positions = cached_positions(cache)
        kept = None if positions is None else positions[:, :length]
        remember_types(cache, types[:, :length], cached_images(cache), kept)


def _is_full_static(layer: Any) -> bool:
    """Whether it is a static layer without a window, which transformers itself crops from 5.24 on."""
    return isinstance(layer, StaticLayer) and not layer.is_sliding


__all__ = ["can_crop", "crop"]
