"""A KV cache that knows the modality of what it holds.

MMCA needs to know of every cached key whether it is text or image. The modality is kept in the cache's own first layer,
beside its keys: that layer becomes an instance of a subclass of its class, whose operations (`reorder_cache`, `crop`, ...)
move the modality as they move the keys. This works for every kind of cache, for a caller's own too, and for copies.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers import Cache


def cached_types(cache: Cache | None) -> torch.Tensor | None:
    """The modality of the tokens in a cache, (batch, tokens), 1 = image; None if it is not known."""
    return getattr(_first_layer(cache), "mm_token_type_ids", None)


def cached_images(cache: Cache | None) -> bool | None:
    """Whether a cache may hold image tokens, without asking the device; None if it is not known."""
    return getattr(_first_layer(cache), "may_hold_images", None)


def remember_types(cache: Cache | None, types: torch.Tensor, may_hold_images: bool | None) -> None:
    """Keep the modality of all tokens of a cache in it.

    Args:
        cache: nothing is done without one, or if it has no layer yet.
        types: (batch, tokens), 1 = image.
        may_hold_images: whether any of these may be 1, if that is known.
    """
    layer = _first_layer(cache)
    if layer is None:
        return
    if not hasattr(layer, "mm_token_type_ids"):
        layer.__class__ = _with_modality(type(layer))
    layer.mm_token_type_ids, layer.may_hold_images = types, may_hold_images


def _first_layer(cache: Cache | None) -> Any:
    layers = getattr(cache, "layers", None)
    return layers[0] if layers else None


_CLASSES: dict[type, type] = {}


def _with_modality(layer_class: type) -> type:
    """The subclass of a layer class that moves `mm_token_type_ids` with the keys."""
    if layer_class not in _CLASSES:
        members: dict[str, Any] = {name: _moving(layer_class, name) for name in _MOVES if hasattr(layer_class, name)}
        members |= {
            "__module__": __name__,
            "__doc__": f"`{layer_class.__name__}` that keeps the modality of its tokens beside its keys.",
            "__reduce__": lambda self: (_restored, (layer_class,), self.__dict__),
            "mm_token_type_ids": None,
            "may_hold_images": None,
        }
        _CLASSES[layer_class] = type(layer_class.__name__, (layer_class,), members)
    return _CLASSES[layer_class]


def _restored(layer_class: type) -> Any:
    """An empty layer for `copy` and `pickle`, which fill it: its class is made at run time, so they cannot name it."""
    return object.__new__(_with_modality(layer_class))


# What a layer's methods do to its rows or tokens, done to the modality. A layer has those that its class defines.
_MOVES: dict[str, Callable] = {
    "reorder_cache": lambda layer, types, beam_idx: types[beam_idx.to(types.device)],
    "batch_select_indices": lambda layer, types, indices: types[torch.as_tensor(indices, device=types.device)],
    "batch_repeat_interleave": lambda layer, types, repeats: types.repeat_interleave(repeats, dim=0),
    "crop": lambda layer, types, tokens_to_remove: types[:, : int(layer.get_seq_length())],
    "reset": lambda layer, types: None,
}


def _moving(layer_class: type, name: str) -> Callable:
    move_keys, move_types = getattr(layer_class, name), _MOVES[name]

    @wraps(move_keys)
    def move(self: Any, *args: Any, **kwargs: Any) -> None:
        move_keys(self, *args, **kwargs)
        if self.mm_token_type_ids is not None:
            self.mm_token_type_ids = move_types(self, self.mm_token_type_ids, *args, **kwargs)
            if self.mm_token_type_ids is None:
                self.may_hold_images = None

    return move


__all__ = ["cached_images", "cached_types", "remember_types"]
