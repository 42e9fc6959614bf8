"""The rotation of a decoder's keys (rotary positions), applied after the decoder has run."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from ...attention_dsvl import attention_modules
from ..decoder_run import OwnValueMask, layer_types, run_decoder, stored

# Elements of keys that are rotated at once. A rotation takes about four times their memory while it runs.
ROTATED_AT_ONCE = 400_000_000


def rotate_keys(apply: Callable, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """A decoder's `apply_rotary_pos_emb` for keys (batch, heads, tokens, head_dim), without queries."""
    return apply(keys[:0], keys, cos, sin)[1]


@dataclass
class KeyRotation:
    """How a decoder rotates its keys, as `probe_rotation` has found.

    Attributes:
        decoder: the language model.
        dtype: of the keys.
        rotated: for each layer, whether its keys are rotated at all.
        per_type: whether the decoder has positions for each layer type.
        scaling: by layer type, the factor of cosine and sine (YaRN scales attention by it). Keys at position 0 have it
            already.
    """

    decoder: PreTrainedModel
    dtype: torch.dtype
    rotated: list[bool]
    per_type: bool
    scaling: dict[str | None, float]

    def __call__(
        self,
        keys: torch.Tensor,
        position_ids: torch.Tensor,
        rotate: Callable = rotate_keys,
        in_parts: bool = True,
    ) -> torch.Tensor:
        """Keys at position 0 (layers, tokens, heads, head_dim), rotated to their positions (tokens,); in parts, unless a
        compiled function does it, which needs no more memory."""
        kinds = layer_types(self.decoder) if self.per_type else [None] * len(keys)
        groups = {kind: [n for n, k in enumerate(kinds) if k == kind and self.rotated[n]] for kind in self.scaling}
        if any(len(layers) == len(keys) for layers in groups.values()):
            return self._rotate(keys, position_ids, kinds[0], rotate, in_parts)
        rotated = keys.clone()
        for kind, layers in groups.items():
            if layers:
                rotated[layers] = self._rotate(keys[layers], position_ids, kind, rotate, in_parts)
        return rotated

    def _rotate(
        self, keys: torch.Tensor, position_ids: torch.Tensor, kind: str | None, rotate: Callable, in_parts: bool
    ) -> torch.Tensor:
        turn = self._turn(position_ids, kind, keys.dtype)
        keys = keys.transpose(1, 2)  # as a decoder has them: (layers for batch, heads, tokens, head_dim)
        if not in_parts:
            return rotate(turn.apply, keys, turn.cos, turn.sin).transpose(1, 2)
        parts = keys.split(max(1, ROTATED_AT_ONCE // max(keys[0].numel(), 1)))
        done = [rotate(turn.apply, part, turn.cos, turn.sin) for part in parts]
        return (done[0] if len(done) == 1 else torch.cat(done)).transpose(1, 2)

    def turns(self, position_ids: torch.Tensor) -> list["Turn | None"]:
        """The rotation of each layer to positions (tokens,), without the decoder; None where keys are not rotated."""
        kinds = layer_types(self.decoder) if self.per_type else [None] * len(self.rotated)
        by_kind = {kind: self._turn(position_ids, kind, self.dtype) for kind in dict.fromkeys(kinds)}
        return [by_kind[kind] if rotated else None for kind, rotated in zip(kinds, self.rotated, strict=True)]

    def _turn(self, position_ids: torch.Tensor, kind: str | None, keys_dtype: torch.dtype) -> "Turn":
        scaling = self.scaling[kind]
        dtype = keys_dtype if scaling == 1 else torch.promote_types(keys_dtype, torch.float32)
        cos, sin = cosine_and_sine(self.decoder, position_ids[None], dtype, kind if self.per_type else None)
        if scaling != 1:
            cos, sin = (cos / scaling).to(keys_dtype), (sin / scaling).to(keys_dtype)
        return Turn(self._apply, stored(cos), stored(sin))

    @cached_property
    def _apply(self) -> Callable:
        """The decoder's `apply_rotary_pos_emb`."""
        return sys.modules[type(attention_modules(self.decoder)[0]).__module__].apply_rotary_pos_emb


@dataclass
class Turn:
    """The rotation of one layer's keys to the positions of some tokens.

    Attributes:
        apply: the decoder's `apply_rotary_pos_emb`.
        cos, sin: (1, tokens, rotated dimensions).
    """

    apply: Callable
    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, keys: torch.Tensor, tokens: slice) -> torch.Tensor:
        """Keys (tokens, heads, head_dim) of a slice of the tokens."""
        cos, sin = (table[:, tokens].to(keys.device) for table in (self.cos, self.sin))
        return rotate_keys(self.apply, keys.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1)


def cosine_and_sine(
    decoder: PreTrainedModel, position_ids: torch.Tensor, dtype: torch.dtype, layer_type: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's own, for positions (1, tokens), of a layer type where it has several."""
    like = torch.empty(0, dtype=dtype, device=position_ids.device)
    return decoder.rotary_emb(like, position_ids, *([] if layer_type is None else [layer_type]))


@torch.no_grad()
def probe_rotation(decoder: PreTrainedModel, like: torch.Tensor) -> KeyRotation:
    """Find how a decoder's keys and values change with the position of image tokens, by running it.

    Args:
        like: a tensor of the dtype and on the device of the decoder's inputs.

    Raises:
        ValueError: if they change in any other way than by the decoder's `apply_rotary_pos_emb`, or not at all.
    """

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"Images cannot be reused with {type(decoder).__name__}: {reason}. Pass pixel_values instead of a "
            "image KV cache."
        )

    home = sys.modules[type(attention_modules(decoder)[0]).__module__]
    if not hasattr(decoder, "rotary_emb") or not hasattr(home, "apply_rotary_pos_emb"):
        raise refuse("it has no rotary_emb, or no apply_rotary_pos_emb beside its attention")
    shape = (1, 4, decoder.config.hidden_size)
    embeds = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    positions = torch.tensor([1, 2, 11, 60], device=like.device)
    attention = dict.fromkeys(layer_types(decoder), OwnValueMask())
    _, keys, values, _ = run_decoder(decoder, embeds, torch.zeros_like(positions)[None], attention)
    _, moved_keys, moved_values, _ = run_decoder(decoder, embeds, positions[None], attention)

    per_type = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    kinds = list(dict.fromkeys(layer_types(decoder))) if per_type else [None]
    first = {kind: cosine_and_sine(decoder, positions[None] * 0, torch.float32, kind)[0] for kind in kinds}
    scaling = {kind: float(cosine.flatten()[0]) for kind, cosine in first.items()}
    rotation = KeyRotation(decoder, keys.dtype, [True] * len(keys), per_type, scaling)
    try:
        rotated_keys = rotation(keys[:, 0], positions)
    except (RuntimeError, TypeError) as error:
        raise refuse(f"its apply_rotary_pos_emb does not take its keys as they are ({error})") from error

    def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """For each layer, relative to the largest number."""
        apart, size = (one - other).abs().flatten(1).amax(1), other.abs().flatten(1).amax(1)
        return (apart / size.clamp(min=torch.finfo(size.dtype).tiny)).float()

    tolerance = 16 * torch.finfo(like.dtype).eps
    by_rotation, unmoved, of_values = torch.stack(
        [distance(rotated_keys, moved_keys[:, 0]), distance(keys, moved_keys), distance(values, moved_values)]
    ).tolist()
    wrong = [
        layer
        for layer, (rotated, same, value) in enumerate(zip(by_rotation, unmoved, of_values, strict=True))
        if not (min(rotated, same) < tolerance and value < tolerance)
    ]
    if wrong:
        raise refuse(f"in its layers {wrong} positions change image tokens by more than a rotation of their keys")
    rotation.rotated = [rotated <= same for rotated, same in zip(by_rotation, unmoved, strict=True)]
    return rotation


__all__ = ["KeyRotation", "Turn", "probe_rotation", "rotate_keys"]
