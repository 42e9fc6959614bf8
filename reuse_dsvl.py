"""Exact image reuse: what a decoder computes for an image is kept, and put into any prompt at any place.

Under `"mmca"` an image token attends to itself alone, so its path through the decoder depends on its image. Positions
enter in one way, as the rotation of its keys; that can be done later. `encode_images` runs the unmodified decoder over
image tokens at position 0, where the rotation is the identity; `ImageRotation` turns the keys to where they are used, by
the decoder's own function. text_prefill_dsvl.py runs the rest of a prompt, its text, over them.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from .attention_dsvl import RoutedConfig
from .image_cache_dsvl import ImageKVCache, changing_ropes
from .images_dsvl import DSVLImagesMixin
from .masks_dsvl import by_layer_type
from .transformers_dsvl import CACHE, DynamicLayer

ROTATED_AT_ONCE = 400_000_000  # elements of keys; a rotation takes about four times their memory while it runs


# ----------------------------------------------------------------------------------------------------------------------
# Running a decoder over tokens that see nothing that is cached


class _NewTokens(DynamicLayer):
    """A cache layer that keeps the keys and values of one forward call, and shows the decoder nothing else."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


def run_decoder(
    decoder: PreTrainedModel, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, attention: dict[str | None, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.device]]:
    """One forward call of a decoder whose self-attention is computed by our functions.

    Args:
        inputs_embeds: (batch, tokens, hidden).
        position_ids: (batch or 1, tokens).
        attention: for each layer type, or for None, what `mmca_attention_forward` calls.

    Returns:
        The last hidden state, (batch, tokens, hidden); each layer's keys and values of these tokens: (layers, batch,
        tokens, key-value heads, head_dim); and where each layer runs, as a decoder may be spread over devices.

    Raises:
        ValueError: if the layers' keys and values are not all of one shape.
    """
    cache = Cache(layer_class_to_replicate=_NewTokens)
    codes = torch.zeros(len(inputs_embeds), 1, 1, inputs_embeds.shape[1], dtype=torch.int8, device=inputs_embeds.device)
    hidden = decoder(
        inputs_embeds=inputs_embeds,
        attention_mask=by_layer_type({layer_type: codes for layer_type in attention}),
        multimodal_masks=attention,
        position_ids=position_ids,
        **{CACHE: cache},
        use_cache=True,
        return_dict=True,
    ).last_hidden_state
    keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    layers = decoder.config.num_hidden_layers
    if len(keys) != layers or len({k.shape for k in keys}) > 1 or len({v.shape for v in values}) > 1:
        raise ValueError(
            f"{type(decoder).__name__} keeps keys of {len({k.shape for k in keys})} shapes in {len(keys)} of its {layers} "
            "layers; images can be reused where all layers keep keys and values of one shape. Pass pixel_values instead."
        )
    here = inputs_embeds.device
    stacked = (torch.stack([states.to(here) for states in part]).transpose(2, 3) for part in (keys, values))
    return hidden, *stacked, [states.device for states in keys]


def own_value(
    backend: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What attention gives an image token under `"mmca"`: its own value, in the shape of an attention function's output."""
    return value.transpose(1, 2).repeat_interleave(query.shape[1] // value.shape[1], dim=2), None


def layer_types(decoder: PreTrainedModel) -> list[str | None]:
    """The type of each layer; None where a decoder does not tell layers apart."""
    return getattr(decoder.config, "layer_types", None) or [None] * decoder.config.num_hidden_layers


# ----------------------------------------------------------------------------------------------------------------------
# Rotation


def turn_keys(rotate: Callable, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """A decoder's `apply_rotary_pos_emb` for keys (batch, heads, tokens, head_dim), without queries."""
    return rotate(keys[:0], keys, cos, sin)[1]


@dataclass
class ImageRotation:
    """How a decoder rotates its keys, as a probe has shown.

    Attributes:
        dtype: of the keys.
        rotated: for each layer, whether its keys are rotated at all.
        per_type: whether the decoder has positions for each layer type.
        scaling: by layer type, what cosine and sine are multiplied with (YaRN scales attention so); the keys at position 0
            hold it already.
    """

    decoder: PreTrainedModel
    dtype: torch.dtype
    rotated: list[bool]
    per_type: bool
    scaling: dict[str | None, float]

    def __call__(self, keys: torch.Tensor, position_ids: torch.Tensor, turn: Callable = turn_keys) -> torch.Tensor:
        """Keys at position 0 (layers, tokens, heads, head_dim), turned to their positions (tokens,)."""
        kinds = layer_types(self.decoder) if self.per_type else [None] * len(keys)
        groups = {kind: [n for n, k in enumerate(kinds) if k == kind and self.rotated[n]] for kind in self.scaling}
        if any(len(layers) == len(keys) for layers in groups.values()):
            return self._turn(keys, position_ids, kinds[0], turn)
        turned = keys.clone()
        for kind, layers in groups.items():
            if layers:
                turned[layers] = self._turn(keys[layers], position_ids, kind, turn)
        return turned

    def _turn(self, keys: torch.Tensor, position_ids: torch.Tensor, kind: str | None, turn: Callable) -> torch.Tensor:
        scaling = self.scaling[kind]
        dtype = keys.dtype if scaling == 1 else torch.promote_types(keys.dtype, torch.float32)
        cos, sin = cosine_and_sine(self.decoder, position_ids[None], dtype, kind if self.per_type else None)
        if scaling != 1:
            cos, sin = (cos / scaling).to(keys.dtype), (sin / scaling).to(keys.dtype)
        rotate = sys.modules[type(attention_module(self.decoder)).__module__].apply_rotary_pos_emb
        # As a decoder has them: (layers for batch, heads, tokens, head_dim).
        parts = keys.transpose(1, 2).split(max(1, ROTATED_AT_ONCE // max(keys[0].numel(), 1)))
        turned = [turn(rotate, part, cos, sin) for part in parts]
        return (turned[0] if len(turned) == 1 else torch.cat(turned)).transpose(1, 2)


def attention_module(decoder: PreTrainedModel) -> nn.Module:
    """One of the self-attention modules that MMCA is routed through."""
    return next(module for module in decoder.modules() if isinstance(module.__dict__.get("config"), RoutedConfig))


def cosine_and_sine(
    decoder: PreTrainedModel, position_ids: torch.Tensor, dtype: torch.dtype, layer_type: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's own, for positions (1, tokens), of a layer type where it has several."""
    like = torch.empty(0, dtype=dtype, device=position_ids.device)
    return decoder.rotary_emb(like, position_ids, *([] if layer_type is None else [layer_type]))


@torch.no_grad()
def probe_rotation(decoder: PreTrainedModel, like: torch.Tensor) -> ImageRotation:
    """See how a decoder's keys and values change with the position of image tokens.

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

    home = sys.modules[type(attention_module(decoder)).__module__]
    if not hasattr(decoder, "rotary_emb") or not hasattr(home, "apply_rotary_pos_emb"):
        raise refuse("it has no rotary_emb, or no apply_rotary_pos_emb beside its attention")
    shape = (1, 4, decoder.config.hidden_size)
    embeds = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    positions = torch.tensor([1, 2, 11, 60], device=like.device)
    attention = dict.fromkeys(layer_types(decoder), own_value)
    _, keys, values, _ = run_decoder(decoder, embeds, torch.zeros_like(positions)[None], attention)
    _, moved_keys, moved_values, _ = run_decoder(decoder, embeds, positions[None], attention)

    per_type = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    kinds = list(dict.fromkeys(layer_types(decoder))) if per_type else [None]
    first = {kind: cosine_and_sine(decoder, positions[None] * 0, torch.float32, kind)[0] for kind in kinds}
    scaling = {kind: float(cosine.flatten()[0]) for kind, cosine in first.items()}
    rotation = ImageRotation(decoder, keys.dtype, [True] * len(keys), per_type, scaling)
    try:
        turned = rotation(keys[:, 0], positions)
    except (RuntimeError, TypeError) as error:
        raise refuse(f"its apply_rotary_pos_emb does not take its keys as they are ({error})") from error

    def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """For each layer, relative to the largest number."""
        apart, size = (one - other).abs().flatten(1).amax(1), other.abs().flatten(1).amax(1)
        return (apart / size.clamp(min=torch.finfo(size.dtype).tiny)).float()

    tolerance = 16 * torch.finfo(like.dtype).eps
    by_rotation, unmoved, of_values = torch.stack(
        [distance(turned, moved_keys[:, 0]), distance(keys, moved_keys), distance(values, moved_values)]
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


# ----------------------------------------------------------------------------------------------------------------------
# The model's part


class DSVLReuseMixin(DSVLImagesMixin):
    """What `DSVLModel` does to reuse images."""

    language_model: PreTrainedModel

    _image_rotation: tuple[torch.dtype, ImageRotation] | None = None
    _run_decoder: Callable = staticmethod(run_decoder)
    _turn_keys: Callable = staticmethod(turn_keys)
    _text_step = 1  # to which multiple the text of prompts is padded
    _fingerprint: tuple[str, list[nn.Parameter], list[int]] | None = None

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor, chunk_size: int = 16) -> ImageKVCache:
        """Run tower, projector and decoder over images alone, for `generate(..., image_cache=...)`.

        Args:
            pixel_values: (images, 3, height, width), any float dtype.
            chunk_size: how many images go through at once.

        Raises:
            ValueError: if there is no image, or this model's images cannot be reused exactly.
        """
        if len(pixel_values) == 0:
            raise ValueError("pixel_values hold no image, of which an image KV cache could be made; pass at least one.")
        self.image_rotation(pixel_values.device)  # refuses what cannot be reused
        attention = dict.fromkeys(layer_types(self.language_model), own_value)
        parts: list[ImageKVCache] = []
        fingerprint = self.image_fingerprint()
        for chunk in pixel_values.split(chunk_size):
            encoded = self.encode_pixels(chunk).pooler_output
            embeds = torch.stack(encoded).to(self.language_model.get_input_embeddings().weight.dtype)
            zeros = torch.zeros(1, embeds.shape[1], dtype=torch.long, device=embeds.device)
            _, keys, values, _ = run_decoder(self.language_model, embeds, zeros, attention)
            parts.append(ImageKVCache(keys, values, fingerprint))
        return ImageKVCache.cat(parts)

    def image_rotation(self, device: torch.device) -> ImageRotation:
        """How the decoder rotates keys; the first call runs eight tokens through it, to see.

        Raises:
            ValueError: if an image's keys and values depend on more than the image, or it cannot be seen how.
        """
        ropes = changing_ropes(self.config.text_config)
        for wrong, depends in (
            (self.config.multimodal_attention != "mmca", f"multimodal_attention={self.config.multimodal_attention!r}"),
            (self.config.reversed_images, "reversed_images=True"),
            (bool(ropes), f"positions of the kind {', '.join(ropes)}"),
        ):
            if wrong:
                raise ValueError(
                    f"With {depends} what the decoder computes for an image depends on more than the image, so it "
                    "cannot be reused; pass pixel_values instead of an image KV cache."
                )
        dtype = self.language_model.get_input_embeddings().weight.dtype
        if self._image_rotation is None or self._image_rotation[0] != dtype:
            like = torch.empty(0, dtype=dtype, device=device)
            self._image_rotation = (dtype, probe_rotation(self.language_model, like))
        return self._image_rotation[1]

    def compile_text_prefill(self, **options: Any) -> None:
        """Let `torch.compile` have what `generate(..., image_cache=...)` runs of the decoder, and the rotation of keys.

        The first prompt then waits for the compilation. On a GPU the decoder is recorded as a CUDA graph besides, once for
        each number of images and every 32 tokens of text, and what follows spares Python's time and the launches'.

        Args:
            options: of `torch.compile`; `mode` is "reduce-overhead" on a GPU, unless given.
        """
        if self.language_model.device.type == "cuda" and not options.keys() & {"mode", "options"}:
            options["mode"] = "reduce-overhead"
        self._run_decoder = torch.compile(run_decoder, **options)
        if options.get("mode") in ("reduce-overhead", "max-autotune"):  # no graph may read what another will overwrite
            options["mode"] = "default"
        self._turn_keys = torch.compile(turn_keys, **options)
        self._text_step = 32

    def image_fingerprint(self) -> str:
        """What ties an image KV cache to this model: a hash of its configuration and of samples of every weight on which an
        image depends. It is taken anew when a weight has changed, or `train()` or `eval()` was called."""
        if self._fingerprint is not None and [p._version for p in self._fingerprint[1]] == self._fingerprint[2]:
            return self._fingerprint[0]
        table = self.language_model.get_input_embeddings().weight
        parts = (self.vision_tower, self.multi_modal_projector, self.language_model)
        parameters = {
            f"{number}.{name}": p
            for number, part in enumerate(parts)
            for name, p in part.named_parameters()
            if p is not table and not p.is_meta  # offloaded
        }
        digest = hashlib.sha256(json.dumps(_lasting(self.config.to_dict()), sort_keys=True, default=str).encode())
        digest.update(json.dumps({name: list(p.shape) for name, p in parameters.items()}).encode())
        samples = [p.detach().flatten()[:: max(1, p.numel() // 64)][:64].float() for p in parameters.values()]
        digest.update(torch.cat([sample.to(samples[0].device) for sample in samples]).cpu().numpy().tobytes())
        self._fingerprint = (digest.hexdigest(), list(parameters.values()), [p._version for p in parameters.values()])
        return self._fingerprint[0]

    def rotation_of(self, cache: ImageKVCache) -> ImageRotation:
        """How the keys of a cache are rotated.

        Raises:
            ValueError: if the cache is not of this model, or not in its dtype and on its device.
        """
        if cache.fingerprint != self.image_fingerprint():
            raise ValueError(
                f"The image KV cache was encoded by another model (fingerprint {cache.fingerprint[:12]}, this one's is "
                f"{self.image_fingerprint()[:12]}), or by this one before its weights changed; encode the images again."
            )
        device = self.language_model.device
        if device not in (cache.device, torch.device("meta")):
            raise ValueError(
                f"The image KV cache is on {cache.device}, but the model on {device}; pass image_cache.to(model.device)."
            )
        rotation = self.image_rotation(cache.device)
        if cache.dtype != rotation.dtype:
            raise ValueError(
                f"The image KV cache is {cache.dtype}, but the decoder's keys are {rotation.dtype}; pass "
                f"image_cache.to({rotation.dtype})."
            )
        return rotation


# What a configuration says of a checkpoint's history, its vocabulary and how it is run, but not of what it computes.
_PASSING = ("architectures", "auto_map", "dtype", "image_token_id", "transformers_version", "use_cache", "vocab_size")


def _lasting(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        key: _lasting(value)
        for key, value in config.items()
        if key not in _PASSING and not str(key).startswith("_") and not str(key).endswith("_token_id")
    }


__all__ = ["DSVLReuseMixin"]
