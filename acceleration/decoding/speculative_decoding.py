"""Speculative decoding: a draft of the next tokens is cheap, and one forward call of the model says how much of it is right.

Drafts come from the sequence itself (prompt lookup) or from a small model. The steps that judge them are those of
`DecodeSteps` and `StaticSteps`, so that an image KV cache, an image library and a static cache with a compiled step work as
in greedy search. With a static cache, a step is compiled for one token and for the longest draft; shorter ones are padded.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", https://arxiv.org/abs/2211.17192; Saxena,
"Prompt Lookup Decoding", https://github.com/apoorvumang/prompt-lookup-decoding
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from ...generation_dsvl import NoImageToken
from ...transformers_dsvl import CACHE
from ...utils.cache_cropping import can_crop
from ...utils.transformers_names import BaseStreamer
from ..recording import recording
from .decode_steps import DecodeSteps, can_step
from .draft_model import DraftModel, can_draft
from .static_steps import StaticSteps, can_step_static


class Drafts(Protocol):
    """What proposes tokens.

    Attributes:
        longest: the number of tokens of the longest draft.
    """

    longest: int

    def propose(self, sequence: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow a sequence, which begins with the sequence of the call before."""
        ...


class PromptLookup:
    """Drafts from the sequence itself: what followed the last tokens where they occurred before, the latest time.

    Args:
        longest: tokens of the longest draft.
        ngram: how many last tokens are looked for; if they did not occur, one less, and so on.
        never: a token that is never generated. A draft ends before it.
    """

    def __init__(self, longest: int, ngram: int, never: int) -> None:
        self.longest, self._never = longest, never
        self._follows: list[dict[tuple[int, ...], int]] = [{} for _ in range(ngram)]
        self._indexed = 0  # tokens whose predecessors are in the tables

    def propose(self, sequence: list[int], most: int) -> list[int]:
        """See `Drafts`."""
        for end in range(self._indexed, len(sequence)):
            for size, table in enumerate(self._follows[:end], start=1):
                table[tuple(sequence[end - size : end])] = end
        self._indexed = len(sequence)
        for size in range(min(len(self._follows), len(sequence)), 0, -1):
            start = self._follows[size - 1].get(tuple(sequence[-size:]))
            if start is None:
                continue
            draft = sequence[start : start + most]
            if self._never in draft:
                draft = draft[: draft.index(self._never)]
            if draft:
                return draft
        return []


def decode_speculatively(
    model: Any,
    run: Callable,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    inputs_tensor: torch.Tensor | None = None,
    assistant_model: Any = None,
    assistant_tokenizer: Any = None,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Speculative decoding with the tokens of greedy search; with prompt lookup, sampling too.

    Args:
        model: a `DSVLForConditionalGeneration`.
        run: its `GenerationMixin._assisted_decoding`, for cases in which this loop does not apply (outputs with scores,
            drafts of other kinds, sampling with a draft model, synchronized GPUs, sliding windows). With an image KV cache,
            an earlier turn or a static KV cache those are decoded without drafts.
        input_ids, ...: the arguments of `GenerationMixin._assisted_decoding`.

    Raises:
        ValueError: for a batch of several rows.
    """
    if len(input_ids) > 1:
        raise ValueError(
            f"Drafts (prompt_lookup_num_tokens, assistant_model) for a batch of {len(input_ids)} rows: a step checks the "
            "draft of one row; call generate for each row, or drop the drafts."
        )
    cache: Any = model_kwargs.get(CACHE)
    applies = (
        not generation_config.return_dict_in_generate
        and not synced_gpus
        and stopping_criteria.max_length is not None
        and getattr(generation_config, "assistant_ensemble_weight", None) is None
        and cache is not None
        and can_crop(cache)
    )
    is_static = (
        applies
        and model._valid_auto_compile_criteria(model_kwargs, generation_config)
        and can_step_static(model, model_kwargs)
    )
    makes_drafts = _looks_up(generation_config, assistant_model) or (
        assistant_tokenizer is None and can_draft(assistant_model, generation_config, model_kwargs)
    )
    if not makes_drafts or not (is_static or (applies and can_step(model, model_kwargs))):
        # `run` does not take an image KV cache, gives wrong tokens after a KV cache that is not empty, and writes its last
        # drafts behind the end of a static one (transformers 5.24).
        is_untaken = model_kwargs.get("image_cache") is not None or (
            cache is not None and (cache.is_compileable or int(cache.get_seq_length()) > 0)
        )
        if is_untaken:
            options = dict(synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
            return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **options)
        return run(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            inputs_tensor=inputs_tensor,
            assistant_model=assistant_model,
            assistant_tokenizer=assistant_tokenizer,
            tokenizer=tokenizer,
            **model_kwargs,
        )

    drafts: Drafts
    if assistant_model is None:
        ngram = generation_config.max_matching_ngram_size or 2
        drafts = PromptLookup(generation_config.prompt_lookup_num_tokens, ngram, model.config.image_token_id)
    else:
        compile_config = generation_config.compile_config if is_static else None
        never = model.config.image_token_id
        drafts = DraftModel(assistant_model, input_ids, model_kwargs, is_static, compile_config, never)
    sequence: list[int] = input_ids[0].tolist()
    longest = stopping_criteria.max_length
    draft: list[int] = []
    steps: StaticSteps | DecodeSteps | None = None
    outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    logits = outputs.logits[:, -1:]
    del outputs
    with model._optimize_model_for_decode():
        while True:
            scores = _processed(logits_processor, input_ids, draft, logits[0, : len(draft) + 1])
            if generation_config.do_sample:
                with recording:
                    chosen = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0].tolist()
            else:
                chosen = scores.argmax(-1).tolist()
            is_last, start = False, len(sequence)
            for number, token in enumerate(chosen):
                sequence.append(token)
                input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], dim=1)
                is_last = bool(stopping_criteria(input_ids, None)) or len(sequence) >= longest
                if is_last or (number < len(draft) and draft[number] != token):
                    break
            if streamer is not None:
                streamer.put(torch.tensor(sequence[start:]))
            if steps is not None:
                steps.rewind(steps.held - (len(sequence) - 1))
            if is_last:
                break
            if steps is None:
                if is_static:
                    steps = StaticSteps.compiled(model, model_kwargs, generation_config.compile_config)
                else:
                    steps = DecodeSteps(model, model_kwargs)
            draft = drafts.propose(sequence, min(drafts.longest, longest - len(sequence) - 1))
            padding = 0
            if isinstance(steps, StaticSteps) and draft:
                padding = drafts.longest - len(draft)
                if steps.held + drafts.longest + 1 > steps.capacity:
                    draft, padding = [], 0  # the longest draft does not fit any more
            tokens = [sequence[-1], *draft, *[sequence[-1]] * padding]
            logits = steps(input_ids.new_tensor([tokens]))
    if isinstance(steps, StaticSteps):
        steps.close()
    if streamer is not None:
        streamer.end()
    return input_ids


def _looks_up(generation_config: GenerationConfig, assistant_model: Any) -> bool:
    """Whether drafts come from the sequence itself, and from nothing else."""
    others = [getattr(generation_config, name, None) for name in ("assistant_early_exit", "use_mtp", "speculation_type")]
    return generation_config.prompt_lookup_num_tokens is not None and assistant_model is None and not any(others)


def _processed(
    processors: LogitsProcessorList, input_ids: torch.Tensor, draft: Sequence[int], logits: torch.Tensor
) -> torch.Tensor:
    """The scores after each token of a draft, (1 + draft, vocabulary)."""
    scores = logits.to(input_ids.device, torch.float32, copy=True)
    if all(isinstance(one, NoImageToken) for one in processors):  # it asks for no token before
        return processors(input_ids, scores)
    sequence = torch.cat([input_ids, input_ids.new_tensor([list(draft)])], dim=1) if draft else input_ids
    known = input_ids.shape[1]
    rows = [processors(sequence[:, : known + number], scores[number : number + 1]) for number in range(len(scores))]
    return torch.cat(rows)


__all__ = ["Drafts", "PromptLookup", "decode_speculatively"]
