"""Decode steps over a dynamic KV cache on a GPU: recorded as a CUDA graph, and replayed.

A step starts hundreds of kernels, and a GPU computes them faster than the host starts them. A recorded step is one call for
the host. Its kernels read and write the same memory each time, so keys and values get room for tokens to come, and the cache
holds the part of it that is filled. A recording belongs to one generation: it knows the weights by their addresses.
"""

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import Cache, DynamicCache

from ...cache_dsvl import cached_images, cached_positions, cached_types, remember_types
from ...transformers_dsvl import CACHE
from ...utils.transformers_names import DynamicLayer, StaticLayer
from ..recording import Recording, WaitsForDevice
from .decode_steps import RESERVED, is_hooked
from .static_steps import StaticSteps, run_step

logger = logging.getLogger(__name__)

PLAIN_STEPS = 2  # before the recording: kernels are loaded, and prepared at their first use
LEAST_STEPS = 6  # a recording takes about as long as two plain steps

# Whether the host waits for the GPU in a step of a model.
_WAITS: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


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
        self._room: Any = None
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
        for own, layer in zip(self._room.layers, self._cache.layers, strict=True):
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            own.keys = own.values = None  # so that one layer is there twice at a time

    def _make_room(self) -> None:
        """Move the KV cache into memory that has room for the next tokens."""
        held, before = self.held, self._room
        capacity = held + RESERVED if self._end - held >= RESERVED + LEAST_STEPS else self._end
        self._room = Cache(layers=[StaticLayer(capacity) for _ in self._cache.layers])
        for number, (own, layer) in enumerate(zip(self._room.layers, self._cache.layers, strict=True)):
            own.update(layer.keys, layer.values)
            layer.keys, layer.values = own.keys[:, :, :held], own.values[:, :, :held]
            if before is not None:
                before.layers[number].keys = before.layers[number].values = None
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
        self._recording: Recording | None = None
        self._inputs: tuple[torch.Tensor, torch.Tensor]

    def __call__(self, model: Any, cache: Any, tokens: torch.Tensor, length: torch.Tensor, *fixed: Any) -> torch.Tensor:
        self._calls += 1
        if self._calls == PLAIN_STEPS + 1 and not _WAITS[model]:
            self._inputs = tokens.clone(), length.clone()
            try:
                self._recording = Recording(lambda: run_step(model, cache, *self._inputs, *fixed), tokens.device)
            except torch.OutOfMemoryError as error:  # another generation may find the memory
                logger.warning("Decode steps of this answer are not recorded, and slower: %s", error)
            except RuntimeError as error:  # of a library that waits unseen, say; a plain step raises what is wrong
                _does_wait(model, str(error))
        if self._recording is None:
            if self._calls != PLAIN_STEPS or model in _WAITS:
                return run_step(model, cache, tokens, length, *fixed)
            with WaitsForDevice() as waits:
                logits = run_step(model, cache, tokens, length, *fixed)
            _WAITS[model] = False
            if waits.found:
                _does_wait(model, "a layer waits for the GPU")
            return logits
        for own, given in zip(self._inputs, (tokens, length), strict=True):
            own.copy_(given)
        self._recording.replay()
        return self._recording.output


def _does_wait(model: Any, reason: str) -> None:
    """Do not record a model's steps from now on."""
    _WAITS[model] = True
    logger.warning("Decode steps of this model are not recorded, and slower: %s", reason)


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
    weight, cache = model.get_input_embeddings().weight, model_kwargs[CACHE]
    parts = model.get_input_embeddings(), model.model.language_model, model.lm_head
    return (
        more >= LEAST_STEPS
        and on_gpu(weight)
        and not _WAITS.get(model, False)
        and not model.training
        and not torch.is_autocast_enabled(weight.device.type)
        and model.config.text_config._attn_implementation in ("sdpa", "eager")
        and getattr(cache.update, "__func__", None) is DynamicCache.update
        and all(getattr(type(layer), "update", None) is DynamicLayer.update for layer in cache.layers)
        and all(one.device == weight.device for part in parts for one in part.parameters())
        and not _has_any_global_hook()
        and not any(is_hooked(module) for part in parts for module in part.modules())
    )


__all__ = ["RecordedSteps", "can_record"]
