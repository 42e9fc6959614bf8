"""Decode steps over a dynamic KV cache on a GPU: recorded as a CUDA graph, and replayed.

A step starts hundreds of kernels, and a GPU computes them faster than the host starts them. A recorded step is one call for
the host. Its kernels read and write the same memory each time, so keys and values get room for tokens to come, and the cache
holds the part of it that is filled. A recording belongs to one generation: it knows the weights by their addresses.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ...cache_dsvl import cached_images, cached_positions, cached_types, remember_types
from ...transformers_dsvl import CACHE
from ...utils.transformers_names import DynamicLayer, StaticLayer
from ..recording import record
from .decode_steps import RESERVED, is_hooked
from .static_steps import StaticSteps, run_step

logger = logging.getLogger(__name__)

PLAIN_STEPS = 2  # before the recording: kernels are loaded, and prepared at their first use
LEAST_STEPS = 6  # a recording takes about as long as two plain steps


class RecordedSteps:
    """The steps of a generation after its prefill, one token of each row at a time.

    After every step the KV cache holds the keys and values of its tokens, and knows their modality and positions, as after
    one of `DecodeSteps`; until `close`, in memory for more tokens.

    Args:
        model: a `DSVLForConditionalGeneration`.
        model_kwargs: the arguments that `generate` keeps, after the prefill, of a generation for which `can_record`.
        more: how many steps there are at most.
    """

    def __init__(self, model: Any, model_kwargs: dict[str, Any], more: int) -> None:
        self._model, self._cache = model, model_kwargs[CACHE]
        self._mask, self._position = model_kwargs.get("attention_mask"), model_kwargs["position_ids"][:, -1:]
        self._first, self._end = self.held, self.held + more
        self._make_room()

    @property
    def held(self) -> int:
        """The number of tokens in the KV cache."""
        return int(self._cache.get_seq_length())

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run a step.

        Args:
            tokens: (batch, 1), the last token of each row.

        Returns:
            Logits, (batch, 1, vocabulary). The next step overwrites them.
        """
        if self._steps.held == self._steps.capacity:
            self._make_room()
        logits = self._steps(tokens)
        self._show_filled()
        return logits

    def close(self) -> None:
        """Give back what is not filled, after the last step."""
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    def _make_room(self) -> None:
        """Move the KV cache into memory that has room for the next tokens."""
        held = self.held
        self._room: Any = Cache(layers=[StaticLayer(min(held + RESERVED, self._end)) for _ in self._cache.layers])
        for own, layer in zip(self._room.layers, self._cache.layers, strict=True):
            own.update(layer.keys, layer.values)
            layer.keys, layer.values = own.keys[:, :, :held], own.values[:, :, :held]  # one layer twice at a time
        if (types := cached_types(self._cache)) is not None:
            remember_types(self._room, types, cached_images(self._cache), cached_positions(self._cache))
        mask = self._mask
        if mask is not None:
            mask = nn.functional.pad(mask[:, : self._first], (0, held - self._first), value=1)
        kept = {CACHE: self._room, "attention_mask": mask, "position_ids": self._position + (held - self._first)}
        self._steps = StaticSteps(self._model, kept, _RecordedRun())

    def _show_filled(self) -> None:
        """Let the KV cache hold what is filled."""
        held = self._steps.held
        for own, layer in zip(self._room.layers, self._cache.layers, strict=True):
            layer.keys, layer.values = own.keys[:, :, :held], own.values[:, :, :held]
        if (types := cached_types(self._room)) is not None:
            remember_types(self._cache, types, cached_images(self._room), cached_positions(self._room))


class _RecordedRun:
    """`run_step` for one model and KV cache, recorded after some calls."""

    def __init__(self) -> None:
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._inputs: tuple[torch.Tensor, torch.Tensor]
        self._logits: torch.Tensor

    def __call__(self, model: Any, cache: Any, tokens: torch.Tensor, length: torch.Tensor, *fixed: Any) -> torch.Tensor:
        self._calls += 1
        if self._calls == PLAIN_STEPS + 1:
            self._inputs = tokens.clone(), length.clone()
            try:
                self._replay, self._logits = record(lambda: run_step(model, cache, *self._inputs, *fixed), tokens.device)
            except RuntimeError as error:  # a quantized layer that waits for the GPU, say; a plain step raises what is wrong
                logger.warning("Decode steps are not recorded, and slower: %s", error)
        if self._replay is None:
            return run_step(model, cache, tokens, length, *fixed)
        for own, given in zip(self._inputs, (tokens, length), strict=True):
            own.copy_(given)
        self._replay()
        return self._logits


def on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def can_record(model: Any, model_kwargs: dict[str, Any], more: int) -> bool:
    """Whether the steps of a generation with a dynamic KV cache, for which `can_step`, can be those of `RecordedSteps`, and
    are worth it: on one GPU, if nothing but kernels runs in a step.

    Args:
        model: a `DSVLForConditionalGeneration`.
        model_kwargs: the arguments that `generate` keeps, after the prefill.
        more: how many steps there are at most.
    """
    weight = model.get_input_embeddings().weight
    parts = model.get_input_embeddings(), model.model.language_model, model.lm_head
    return (
        more >= LEAST_STEPS
        and on_gpu(weight)
        and not model.training
        and not torch.is_autocast_enabled(weight.device.type)
        and model.config.text_config._attn_implementation in ("sdpa", "eager")
        and all(getattr(type(layer), "update", None) is DynamicLayer.update for layer in model_kwargs[CACHE].layers)
        and all(one.device == weight.device for part in parts for one in part.parameters())
        and not any(is_hooked(module) for part in parts for module in part.modules())
    )


__all__ = ["RecordedSteps", "can_record"]
