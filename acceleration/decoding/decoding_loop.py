"""The loop of greedy search and sampling, whose steps cost the host less than those of transformers.

With a dynamic KV cache the steps are those of `RecordedSteps` on a GPU, and else of `DecodeSteps`. With a static one they
are compiled: those of `StaticSteps`, or of transformers where layers have windows.

After every token transformers asks the device whether the answer ends, and waits. Until the host has prepared and queued
the next step, the device idles: with a static cache and a compiled step, a third of the time. On a GPU the next step is
queued first. The end of the answer is seen one step late, and that step is undone.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import EosTokenCriteria, GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from ...inputs_dsvl import AsyncHostCopy
from ...transformers_dsvl import CACHE
from ...utils.cache_cropping import can_crop, crop
from ...utils.transformers_names import BaseStreamer
from ..recording import let_compiled_functions_record, recording
from .decode_steps import DecodeSteps, can_step
from .recorded_steps import RecordedSteps, can_record
from .static_steps import StaticSteps, can_step_static
from .text_turns import prefill_text


def sample(
    model: Any,
    run: Callable,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy search and sampling, with the results of `GenerationMixin._sample`.

    Args:
        model: a `DSVLForConditionalGeneration`.
        run: its `GenerationMixin._sample`, for cases in which this loop does not apply (outputs with scores, assistants,
            synchronized GPUs; sliding windows, a cache that is neither dynamic nor static).
        input_ids, ...: the arguments of `GenerationMixin._sample`.
    """
    cache: Any = model_kwargs.get(CACHE)
    applies = (
        not generation_config.return_dict_in_generate
        and not generation_config.is_assistant
        and not synced_gpus
        and stopping_criteria.max_length is not None
    )
    is_kept = getattr(cache, "_is_user_defined", False)
    may_step_back = not is_kept or can_crop(cache)
    is_compiled = applies and may_step_back and model._valid_auto_compile_criteria(model_kwargs, generation_config)
    is_static = is_compiled and can_step_static(model, model_kwargs)
    if not is_compiled and not (applies and can_step(model, model_kwargs)):
        options = dict(synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        return run(input_ids, logits_processor, stopping_criteria, generation_config, **options)

    runs_ahead = is_compiled or (may_step_back and waits(input_ids) and all(map(_may_be_late, stopping_criteria)))
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad_token = generation_config._pad_token_tensor
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    first_length = input_ids.shape[1] + 1
    pending: StepResult | None = None  # the last step that the host has not read
    is_late = False
    outputs = prefill_text(model, input_ids, generation_config, model_kwargs)
    if outputs is None:
        outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    logits = outputs.logits[:, -1]
    steps: Any = None
    if is_compiled and not is_static:
        steps = _TransformersSteps(model, outputs, model_kwargs, generation_config, input_ids)
    del outputs
    with model._optimize_model_for_decode(), ExitStack() as at_end:
        while True:
            # A copy: the next run of a CUDA graph overwrites its outputs, and the logits of a whole prompt may be large.
            logits = logits.to(input_ids.device, torch.float32, copy=True)
            scores = logits_processor(input_ids, logits)
            if generation_config.do_sample:
                with recording:
                    tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            if pads and pad_token is not None:
                tokens = torch.where(unfinished, tokens, pad_token.to(tokens.device))
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            step = StepResult(unfinished, tokens, streamer)
            is_first = input_ids.shape[1] == first_length
            # The first token is not delayed by a compilation.
            if (is_first or not runs_ahead) and step.is_last():
                break
            if pending is not None and pending.is_last():
                is_late = True
                break
            pending = step if runs_ahead and not is_first else None
            if input_ids.shape[1] >= stopping_criteria.max_length:
                if pending is not None:
                    pending.is_last()  # which streams its tokens
                break
            if steps is None:
                more = stopping_criteria.max_length - input_ids.shape[1]
                if is_static:
                    steps = StaticSteps.compiled(model, model_kwargs, generation_config.compile_config)
                elif can_record(model, model_kwargs, more):
                    steps = RecordedSteps(model, model_kwargs, more)
                    if is_kept:
                        at_end.callback(steps.close)
                else:
                    steps = DecodeSteps(model, model_kwargs)
            logits = steps(tokens[:, None])[:, -1]
    if is_late:
        input_ids = input_ids[:, :-1]
        if can_crop(cache):  # else only this call uses it
            crop(cache, int(cache.get_seq_length()) - 1)
    if streamer is not None:
        streamer.end()
    return input_ids


def waits(tokens: torch.Tensor) -> bool:
    """Whether the host waits for a device when it reads a tensor."""
    return tokens.is_cuda


def _may_be_late(criterion: Any) -> bool:
    """Whether a stopping criterion may be asked about a token after the last: if it decides by the tokens alone, or says so
    by an attribute `may_be_late`."""
    return isinstance(criterion, (EosTokenCriteria, MaxLengthCriteria)) or getattr(criterion, "may_be_late", False)


class _TransformersSteps:
    """transformers' compiled steps with a static KV cache, for what `StaticSteps` does not know, as sliding windows."""

    def __init__(
        self,
        model: Any,
        outputs: Any,
        model_kwargs: dict[str, Any],
        generation_config: GenerationConfig,
        input_ids: torch.Tensor,
    ) -> None:
        let_compiled_functions_record(model.device)
        self._model, self._forward = model, model.get_compiled_call(generation_config.compile_config)
        self._kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        self._ids = input_ids

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `DecodeSteps`, for a new token of each row."""
        self._ids = torch.cat([self._ids, tokens], dim=1)
        inputs = self._model.prepare_inputs_for_generation(self._ids, next_sequence_length=1, **self._kwargs)
        outputs = self._forward(**inputs, return_dict=True)
        self._kwargs = self._model._update_model_kwargs_for_generation(outputs, self._kwargs)
        return outputs.logits


class StepResult:
    """The results of a step, which are copied to the host asynchronously."""

    def __init__(self, unfinished: torch.Tensor, tokens: torch.Tensor, streamer: BaseStreamer | None) -> None:
        self._unfinished = AsyncHostCopy(unfinished)
        self._tokens = None if streamer is None else AsyncHostCopy(tokens)
        self._streamer = streamer

    def is_last(self) -> bool:
        """Stream the tokens; return whether every answer has ended."""
        if self._streamer is not None and self._tokens is not None:
            self._streamer.put(torch.tensor(self._tokens.tolist()))
        return not any(self._unfinished.tolist())


__all__ = ["sample"]
