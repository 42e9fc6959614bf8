"""One forward call of a decoder over tokens that see nothing cached, with attention of our own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from ..masks_dsvl import AttentionMask, by_layer_type, own_values
from ..transformers_dsvl import CACHE
from ..utils.transformers_names import DynamicLayer


class _NewTokens(DynamicLayer):
    """A cache layer that keeps the keys and values of one forward call, and shows the decoder nothing else."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


@dataclass
class OwnValueMask(AttentionMask):
    """The attention of image tokens under `"mmca"`: each gets its own value."""

    def attend(
        self, backend: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        return own_values(query, value), None


def head_size(text_config: Any) -> int:
    """Channels of a decoder's heads."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def run_decoder(
    decoder: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor,
    masks: Mapping[str | None, AttentionMask],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.device]]:
    """Run a decoder without a cache, and keep its keys and values.

    Args:
        inputs_embeds: (batch, tokens, hidden).
        position_ids: (batch or 1, tokens).
        masks: for each layer type, or for None, the mask that computes the attention.

    Returns:
        The last hidden state, (batch, tokens, hidden); each layer's keys and values of these tokens: (layers, batch,
        tokens, key-value heads, head_dim); and the device of each layer.

    Raises:
        ValueError: if the layers' keys and values are not all of one shape.
    """
    cache = Cache(layer_class_to_replicate=_NewTokens)
    placeholder = torch.zeros(
        len(inputs_embeds), 1, 1, inputs_embeds.shape[1], dtype=torch.int8, device=inputs_embeds.device
    )
    hidden = decoder(
        inputs_embeds=inputs_embeds,
        attention_mask=by_layer_type({layer_type: placeholder for layer_type in masks}),
        multimodal_masks=masks,
        position_ids=position_ids,
        **{CACHE: cache},
        use_cache=True,
        return_dict=True,
    ).last_hidden_state
    keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    layers = decoder.config.num_hidden_layers
    # Compared, not put into a set, which would make a graph of every length.
    if len(keys) != layers or any(one.shape != part[0].shape for part in (keys, values) for one in part):
        raise ValueError(
            f"{type(decoder).__name__} keeps keys of {len({k.shape for k in keys})} shapes in {len(keys)} of its {layers} "
            "layers; images can be reused where all layers keep keys and values of one shape. Pass pixel_values instead."
        )
    here = inputs_embeds.device
    stacked = (torch.stack([states.to(here) for states in part]).transpose(2, 3) for part in (keys, values))
    return hidden, *stacked, [states.device for states in keys]


def stored(factor: torch.Tensor) -> torch.Tensor:
    """A factor of a product, in memory before it.

    The compiler writes some products itself, and computes a factor that is not in memory once for each element of the
    product: the rotation of a query again for each key, or a cosine again for each head and layer.
    """
    if not torch.compiler.is_compiling():
        return factor
    factor = factor.contiguous()
    return factor.as_strided(factor.shape, factor.stride())


def layers_of(decoder: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder.

    Raises:
        ValueError: if the decoder does not keep them in a list `layers`.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(decoder).__name__} has no list of layers to change one by one; to compile it, compile the whole model "
            "by torch.compile."
        )
    return layers


def layer_types(decoder: PreTrainedModel) -> list[str | None]:
    """The type of each layer; None where a decoder does not distinguish layer types."""
    return getattr(decoder.config, "layer_types", None) or [None] * decoder.config.num_hidden_layers


__all__ = ["OwnValueMask", "head_size", "layer_types", "layers_of", "run_decoder", "stored"]
