"""Multi-modal causal attention (MMCA): its definition, and how a decoder computes it without being changed.

Every token is text or image. For query i let T(i) be the text keys and I(i) the image keys that the decoder's own mask
lets it see (causal, not padded, inside the window and the packed document). Then (DeepSpeed-VisualChat, arXiv 2309.14327)

    text query   softmax over T(i) . V  +  softmax over I(i) . V      an empty set adds 0
    image query  its own value

The attention modules of the decoder read a `RoutedConfig`, which names an attention function registered here. That function
lets the mask of the module's layer type compute the attention. masks_dsvl.py builds the masks:

* `DecodeMask`, for few queries, as in a decode step;
* `BranchMasks`, for many queries with "sdpa" and "flex_attention"; the package's acceleration has faster ones;
* `CodedMask`, for "eager", whose weights a caller may want, and for "mmca_reference".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig

from .masks_dsvl import AttentionMask, ConfigView, plain_attention

BACKENDS = ("eager", "sdpa", "flex_attention")


def routed_name(backend: str) -> str:
    """The name under which the decoder's modules find the MMCA function of a backend.

    All models of a process share the table in which it is registered, and the remote code of two checkpoints may be two
    versions of this file: each copy registers under its own module's name.
    """
    return f"mmca_{backend}:{__name__}"


class RoutedConfig(ConfigView):
    """The view of a decoder's configuration that leads its attention modules to the MMCA functions."""

    def __init__(self, text_config: PreTrainedConfig, dsvl_config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(text_config)
        # Layers of one type are alike: a graph that is compiled for one of them must not depend on its index.
        layer_types = getattr(text_config, "layer_types", None)
        self.__dict__.update(_dsvl_config=dsvl_config, _layer_type=layer_types[layer_idx] if layer_types else None)

    @property
    def _attn_implementation(self) -> str:
        backend = self._text_config._attn_implementation or "eager"
        if self._dsvl_config.multimodal_attention == "causal":
            return backend
        if backend not in BACKENDS:
            raise ValueError(
                f"attn_implementation={backend!r} cannot compute multimodal_attention="
                f"{self._dsvl_config.multimodal_attention!r}; choose one of {', '.join(map(repr, BACKENDS))}."
            )
        return routed_name(backend)


def attention_modules(language_model: nn.Module) -> list[Any]:
    """The self-attention modules of a decoder, in order."""
    names = ("config", "layer_idx", "is_causal")
    return [module for module in language_model.modules() if all(hasattr(module, name) for name in names)]


def route_attention(language_model: nn.Module, dsvl_config: PreTrainedConfig) -> None:
    """Let every self-attention module of a decoder find the MMCA functions.

    Raises:
        ValueError: if the decoder does not route all of its attention through transformers' `AttentionInterface`.
    """
    modules = attention_modules(language_model)
    layers = dsvl_config.text_config.num_hidden_layers
    if not getattr(language_model, "_supports_attention_backend", False) or len(modules) != layers:
        raise ValueError(
            f"{type(language_model).__name__} does not support multimodal_attention={dsvl_config.multimodal_attention!r}: "
            f"{len(modules)} of its {layers} layers route attention through transformers' AttentionInterface; choose "
            "another decoder (Llama, Qwen, Mistral, Gemma, Phi3 ... do), or multimodal_attention='causal'."
        )
    for module in modules:
        module.__dict__["config"] = RoutedConfig(language_model.config, dsvl_config, module.layer_idx)


def _attention(backend: str) -> Callable:
    """The attention function that the decoder's modules find under the name of `backend`."""

    def mmca_attention_forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        multimodal_masks: dict[str | None, AttentionMask] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if multimodal_masks is None:
            # No image in the sequence: the decoder's own attention, bit for bit.
            if isinstance(attention_mask, torch.Tensor) and attention_mask.dtype == torch.int8:
                raise ValueError(  # it is the placeholder of `build_masks`
                    f"{type(module).__name__} was not handed multimodal_masks: the layers of this decoder do not pass "
                    "keyword arguments on to their attention; choose another decoder, or multimodal_attention='causal'."
                )
            return plain_attention(backend, module)(module, query, key, value, attention_mask, **kwargs)
        for unsupported in ("s_aux", "position_bias"):
            if kwargs.get(unsupported) is not None:
                raise ValueError(
                    f"{type(module).__name__} uses {unsupported} in its attention, which MMCA does not define; choose "
                    "another decoder, or multimodal_attention='causal'."
                )
        mask = multimodal_masks[getattr(module.config, "_layer_type", None)]
        output, weights = mask.attend(backend, module, query, key, value, **kwargs)
        return output, weights if backend == "eager" else None

    return mmca_attention_forward


for _backend in BACKENDS:
    AttentionInterface.register(routed_name(_backend), _attention(_backend))


__all__ = ["BACKENDS", "RoutedConfig", "attention_modules", "route_attention", "routed_name"]
