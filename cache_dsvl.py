"""A KV cache that knows the modality, and where images share positions the position, of what it holds.

MMCA needs to know of every cached key whether it is text or image, and `image_positions="image"` where positions go on. Both
are kept in the cache's own first layer, beside its keys: that layer becomes an instance of a subclass of its class, whose
operations (`reorder_cache`, `crop`, ...) move them as they move the keys. This works for every kind of cache, for a caller's
own too, and for copies.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers import Cache


def cached_types(cache: Cache | None) -> torch.Tensor | None:
    """The modality of the tokens in a cache, (batch, tokens), 1 = image; None if it is not known."""
    return getattr(_first_layer(cache), "mm_token_type_ids", None)


def cached_positions(cache: Cache | None) -> torch.Tensor | None:
    """The positions of the tokens in a cache, (batch, tokens), -1 where padded; None if they are not known, as under
    `image_positions="token"`."""
    return getattr(_first_layer(cache), "token_positions", None)


def cached_images(cache: Cache | None) -> bool | None:
    """Whether a cache may hold image tokens, without asking the device; None if it is not known."""
    return getattr(_first_layer(cache), "may_hold_images", None)


def remember_types(
    cache: Cache | None, types: torch.Tensor, may_hold_images: bool | None, positions: torch.Tensor | None = None
) -> None:
    """Keep the modality of all tokens of a cache in it, and their positions.

    Args:
        cache: nothing is done without one, or if it has no layer yet.
        types: (batch, tokens), 1 = image.
        may_hold_images: whether any of these may be 1, if that is known.
        positions: (batch, tokens), -1 where padded, if they are known and not the count of tokens.
    """
    layer = _first_layer(cache)
    if layer is None:
        return
    if not hasattr(layer, "mm_token_type_ids"):
        layer.__class__ = _with_modality(type(layer))
    layer.mm_token_type_ids, layer.may_hold_images, layer.token_positions = types, may_hold_images, positions


def known_positions(cache: Cache | None, rows: int, past: int) -> torch.Tensor | None:
    """The positions of the `past` tokens in a cache, (rows, past), -1 where padded; None if they are not known."""
    if past == 0:
        return torch.empty((rows, 0), dtype=torch.long)
    positions = None if torch.compiler.is_compiling() else cached_positions(cache)
    is_known = positions is not None and positions.shape[0] == rows and positions.shape[1] >= past
    return positions[:, :past] if is_known and positions is not None else None


def whole_positions(
    position_ids: torch.Tensor | None, types: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
) -> torch.Tensor | None:
    """The positions of a whole sequence, for a cache to remember: (batch, tokens), -1 where padded; None if those of the
    cached tokens are not known.

    Args:
        position_ids: (batch or 1, tokens), of the new tokens or of all.
        types: of the whole sequence, (batch, tokens).
        attention_mask: (batch, at least tokens), 0 where padded.
        cache: the KV cache before the new tokens.
    """
    if position_ids is None:
        return None
    rows, total = types.shape
    position_ids = position_ids[:, :total]
    past = total - position_ids.shape[1]
    cached, positions = known_positions(cache, rows, past), position_ids.expand(rows, -1)
    if attention_mask is not None:
        positions = positions.masked_fill(~attention_mask[:, past:total].to(positions.device, torch.bool), -1)
    if past == 0 or cached is None:
        return positions if past == 0 else None
    return torch.cat([cached.to(positions), positions], dim=1)


def _first_layer(cache: Cache | None) -> Any:
    layers = getattr(cache, "layers", None)
    return layers[0] if layers else None


_CLASSES: dict[type, type] = {}


def _with_modality(layer_class: type) -> type:
    """The subclass of a layer class that moves `mm_token_type_ids` and `token_positions` with the keys."""
    if layer_class not in _CLASSES:
        members: dict[str, Any] = {name: _moving(layer_class, name) for name in _MOVES if hasattr(layer_class, name)}
        members |= {
            "__module__": __name__,
            "__doc__": f"`{layer_class.__name__}` that keeps modality and positions of its tokens beside its keys.",
            "__reduce__": lambda self: (_restored, (layer_class,), self.__dict__),
            "mm_token_type_ids": None,
            "token_positions": None,
            "may_hold_images": None,
        }
        _CLASSES[layer_class] = type(layer_class.__name__, (layer_class,), members)
    return _CLASSES[layer_class]


def _restored(layer_class: type) -> Any:
    """An empty layer for `copy` and `pickle`, which fill it: its class is made at run time, so they cannot name it."""
    return object.__new__(_with_modality(layer_class))


# What a layer's methods do to its rows or tokens, done to the modality and the positions. A layer has those that its class
# defines.
_MOVES: dict[str, Callable] = {
    "reorder_cache": lambda layer, kept, beam_idx: kept[beam_idx.to(kept.device)],
    "batch_select_indices": lambda layer, kept, indices: kept[torch.as_tensor(indices, device=kept.device)],
    "batch_repeat_interleave": lambda layer, kept, repeats: kept.repeat_interleave(repeats, dim=0),
    "crop": lambda layer, kept, tokens_to_remove: kept[:, : int(layer.get_seq_length())],
    "reset": lambda layer, kept: None,
}


def _moving(layer_class: type, name: str) -> Callable:
    move_keys, move_kept = getattr(layer_class, name), _MOVES[name]

    @wraps(move_keys)
    def move(self: Any, *args: Any, **kwargs: Any) -> None:
        move_keys(self, *args, **kwargs)
        for kept in ("mm_token_type_ids", "token_positions"):
            if (states := getattr(self, kept)) is not None:
                setattr(self, kept, move_kept(self, states, *args, **kwargs))
        if self.mm_token_type_ids is None:
            self.may_hold_images = None

    return move


__all__ = ["cached_images", "cached_positions", "cached_types", "known_positions", "remember_types", "whole_positions"]
