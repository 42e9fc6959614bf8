"""A small model that drafts tokens for a larger one."""

from typing import Any

import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from ...cache_dsvl import cached_positions
from ...transformers_dsvl import CACHE
from .decode_steps import DecodeSteps, takes_plain_steps
from .static_steps import StaticSteps


class DraftModel:
    """Drafts by greedy search of a `DSVLForConditionalGeneration`, which has encoded the same images for itself.

    A draft ends before a token whose probability is below `assistant_confidence_threshold` of the model's generation
    configuration, and after `num_assistant_tokens` of it.

    Args:
        model: the small model.
        input_ids: (1, tokens), the prompt, with that of earlier turns.
        model_kwargs: the arguments that `generate` keeps of the large model's generation, for which `can_draft`.
        is_static: whether to compile its steps, over a static KV cache as large as the large model's.
        compile_config: how; *optional*, defaults to the model's way.
        never: a token that is never generated.

    Raises:
        ValueError: if the large model's KV cache holds images, or tokens that are not in `input_ids`.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
        is_static: bool,
        compile_config: CompileConfig | None,
        never: int,
    ) -> None:
        settings = model.generation_config
        self.longest = int(settings.num_assistant_tokens or 20)  # the default of transformers
        threshold = settings.assistant_confidence_threshold
        self._confidence = 0.4 if threshold is None else threshold  # the default of transformers
        self._model, self._compile_config, self._is_static = model, compile_config, is_static
        self._ids, encoded = input_ids, (model_kwargs.get("mm_encoder_outputs") or {}).get("assistant")
        self._images = None if encoded is None else {"image": encoded}
        self._never = torch.tensor([never], device=input_ids.device)
        tokens = sum(map(len, encoded.pooler_output)) if encoded is not None else 0
        mask = model_kwargs.get("attention_mask")
        if (mask is not None and mask.shape[1] > input_ids.shape[1]) or tokens != int((input_ids == never).sum()):
            raise ValueError(
                "A draft model needs the whole conversation, but the KV cache holds images or tokens that were not passed "
                "with it; pass them again without the cache, or draft by prompt_lookup_num_tokens."
            )
        config = model.config.text_config
        capacity = model_kwargs[CACHE].layers[0].max_cache_len if is_static else 0
        self._cache = StaticCache(config=config, max_cache_len=capacity) if is_static else DynamicCache(config=config)
        self._steps: StaticSteps | DecodeSteps | None = None
        self._seen: list[int] = input_ids[0].tolist()  # the tokens in the cache

    def propose(self, sequence: list[int], most: int) -> list[int]:
        """See `Drafts`."""
        steps = self._steps or self._start()
        same = 0
        for one, other in zip(self._seen, sequence, strict=False):
            if one != other:
                break
            same += 1
        steps.rewind(len(self._seen) - same)
        del self._seen[same:]
        draft: list[int] = []
        logits = None
        for token in sequence[same:]:  # at most two: those that the large model chose
            logits = self._step(token)
        while logits is not None and len(draft) < most:
            scores = logits.float().index_fill(0, self._never, -torch.inf)
            probability, best = scores.softmax(-1).max(-1)
            token = int(best)
            if float(probability) < self._confidence:
                break
            draft.append(token)
            if len(draft) == most or len(self._seen) + 1 > getattr(steps, "capacity", len(self._seen) + 1):
                break
            logits = self._step(token)
        return draft

    def _step(self, token: int) -> torch.Tensor:
        assert self._steps is not None
        self._seen.append(token)
        return self._steps(self._ids.new_tensor([[token]]))[0, -1]

    def _start(self) -> StaticSteps | DecodeSteps:
        """Run the prompt."""
        self._model(self._ids, mm_encoder_outputs=self._images, **{CACHE: self._cache}, use_cache=True, logits_to_keep=1)
        positions = cached_positions(self._cache)
        if positions is None:
            positions = torch.arange(self._ids.shape[1], device=self._ids.device)[None]
        kept = {CACHE: self._cache, "position_ids": positions}
        if self._is_static:
            self._steps = StaticSteps.compiled(self._model, kept, self._compile_config)
        else:
            self._steps = DecodeSteps(self._model, kept)
        return self._steps


def can_draft(model: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> bool:
    """Whether `DraftModel` can draft with a model for greedy search, in a generation without padding.

    Args:
        model: the small model; None if there is none.
        generation_config, model_kwargs: of the large model's generation.
    """
    mask = model_kwargs.get("attention_mask")
    is_dsvl = model is not None and hasattr(model, "get_image_features") and hasattr(model.config, "multimodal_attention")
    if not is_dsvl or generation_config.do_sample:
        return False
    if mask is not None and not bool(mask.all()):
        return False
    if model.generation_config.num_assistant_tokens_schedule not in (None, "constant"):
        return False
    positions = model_kwargs.get("position_ids")
    own = {CACHE: DynamicCache(config=model.config.text_config), "use_cache": True, "position_ids": positions}
    return takes_plain_steps(model, own)


__all__ = ["DraftModel", "can_draft"]
