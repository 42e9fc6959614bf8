"""Decoding one token at a time while the host runs ahead of the device.

transformers looks after every token whether the answer ends, and waits for the device to say so; until the host has then
prepared and queued the next step, the device has nothing to do. With a static cache and a compiled step that is a third of
the time. Here the next step is queued first, and the answer's end is seen one step late and undone.
"""

from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from .cache_dsvl import cached_images, cached_types, remember_types
from .images_dsvl import HostCopy
from .transformers_dsvl import CACHE, BaseStreamer, StaticLayer


class DSVLDecodingMixin(GenerationMixin):
    """Greedy search and sampling; see `GenerationMixin._sample`, whose results these are."""

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        cache: Any = model_kwargs.get(CACHE)
        runs_ahead = (
            self._valid_auto_compile_criteria(model_kwargs, generation_config)
            and not generation_config.return_dict_in_generate
            and not generation_config.is_assistant
            and not synced_gpus
            and stopping_criteria.max_length is not None
            and (not getattr(cache, "_is_user_defined", False) or can_crop(cache))
        )
        if not runs_ahead:
            options = dict(synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **options)

        model_forward = self.get_compiled_call(generation_config.compile_config)
        pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        pad_token = generation_config._pad_token_tensor
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        first_length = input_ids.shape[1] + 1
        unseen: _Step | None = None  # the last step that the host has not looked at
        came_late = False
        outputs = self._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        with self._optimize_model_for_decode():
            while True:
                model_kwargs = self._update_model_kwargs_for_generation(outputs, model_kwargs)
                # A copy: what a CUDA graph returned is overwritten by its next run.
                logits = outputs.logits[:, -1].to(input_ids.device, torch.float32, copy=True)
                del outputs
                scores = logits_processor(input_ids, logits)
                if generation_config.do_sample:
                    tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
                else:
                    tokens = scores.argmax(-1)
                if pads and pad_token is not None:
                    tokens = torch.where(unfinished, tokens, pad_token.to(tokens.device))
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
                unfinished = unfinished & ~stopping_criteria(input_ids, None)
                step = _Step(unfinished, tokens, streamer)
                is_first = input_ids.shape[1] == first_length
                if is_first and step.was_the_last():  # who waits for the first token need not wait for a compilation
                    break
                if unseen is not None and unseen.was_the_last():
                    came_late = True
                    break
                unseen = None if is_first else step
                if input_ids.shape[1] >= stopping_criteria.max_length:
                    if unseen is not None:
                        unseen.was_the_last()  # and is streamed
                    break
                inputs = self.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
                outputs = model_forward(**inputs, return_dict=True)
        if came_late:
            input_ids = input_ids[:, :-1]
            if can_crop(cache):  # else it is nobody else's
                crop(cache, int(cache.get_seq_length()) - 1)
        if streamer is not None:
            streamer.end()
        return input_ids


class _Step:
    """What the host will want to know of a step."""

    def __init__(self, unfinished: torch.Tensor, tokens: torch.Tensor, streamer: BaseStreamer | None) -> None:
        self._unfinished = HostCopy(unfinished)
        self._tokens = None if streamer is None else HostCopy(tokens)
        self._streamer = streamer

    def was_the_last(self) -> bool:
        """Hand its tokens on; tell whether every answer ended with it."""
        if self._streamer is not None and self._tokens is not None:
            self._streamer.put(torch.tensor(self._tokens.tolist()))
        return not any(self._unfinished.tolist())


def can_crop(cache: Cache) -> bool:
    """Whether tokens can be taken off the end with no trace. A layer with a window has forgotten what would come back."""

    def layer_can(layer: Any) -> bool:
        if _is_full_static(layer):
            return True
        if not layer.is_croppable:
            return False
        return not getattr(layer, "is_sliding", False) or layer.get_seq_length() < layer.sliding_window

    return all(layer_can(layer) for layer in cache.layers)


def crop(cache: Cache, length: int) -> None:
    """Forget all but the first `length` tokens of a cache that can be cropped."""
    surplus = int(cache.get_seq_length()) - length
    if surplus:
        for layer in cache.layers:
            if _is_full_static(layer):  # what lies beyond is hidden by causality until it is written again
                layer.cumulative_length.fill_(length)
            else:
                layer.crop(-surplus)
    if (types := cached_types(cache)) is not None:  # a step may have told them before it ran
        remember_types(cache, types[:, :length], cached_images(cache))


def _is_full_static(layer: Any) -> bool:
    """Whether it is a static layer without a window, which transformers crops from 5.24 on alone."""
    return isinstance(layer, StaticLayer) and not layer.is_sliding


__all__ = ["DSVLDecodingMixin"]
