"""Turns of text alone behind the tokens of a KV cache, by the compiled functions of `compile_text_prefill`."""

from typing import Any

import torch

from ...cache_dsvl import cached_images, cached_types
from ...modeling_dsvl import DSVLCausalLMOutputWithPast, scale_logits
from ...transformers_dsvl import CACHE
from ..attention.gathered_mask import Slots
from ..reuse.text_prefill import can_extend, new_tokens, remember_prompt
from .decode_steps import KNOWN_INPUTS, is_hooked


def prefill_text(
    model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> DSVLCausalLMOutputWithPast | None:
    """Run the new tokens of a turn.

    Args:
        model: a `DSVLForConditionalGeneration`.
        input_ids: of the whole conversation, or the new ones with the mask or the positions of all.
        generation_config, model_kwargs: those of the decode loop, before the prefill.

    Returns:
        `logits` of the last token of each row, (batch, 1, vocabulary), and the KV cache; None where this is no such turn, or
        the compiled functions do not take it. Then nothing has happened.
    """
    cache, mask, position_ids = (model_kwargs.get(name) for name in (CACHE, "attention_mask", "position_ids"))
    inputs = ("image_cache", "mm_encoder_outputs", "pixel_values")
    if (
        cache is None
        or model.model.image_reuse.compiled is None
        or not model_kwargs.keys() <= KNOWN_INPUTS
        or any(model_kwargs.get(name) is not None and len(model_kwargs[name]) > 0 for name in inputs)
        or getattr(generation_config, "prefill_chunk_size", None)
        or model.training
        or position_ids is None
        or position_ids.ndim != 2
        or (mask is not None and mask.ndim != 2)
        or any(map(is_hooked, (model, model.model)))
    ):
        return None
    compiled, decoder = model.model.image_reuse.compiled, model.model.language_model
    past = int(cache.get_seq_length())
    new = new_tokens(input_ids, past, mask, position_ids)
    rows, tokens = new.shape
    if past == 0 or tokens < 2 or not can_extend(cache):
        return None
    slots = compiled.slots_for(decoder, cache, past, rows, tokens)
    if slots is None:
        return None
    device = decoder.get_input_embeddings().weight.device
    new, position_ids = new.to(device), position_ids[:, -tokens:].to(device).expand(rows, tokens)
    is_image = new == model.config.image_token_id
    is_text = ~is_image
    if mask is not None:
        mask = mask.to(device)
        is_text = is_text & mask[:, past:].bool()
    images, counts, ends_with_text = torch.stack([is_image.sum(-1), is_text.sum(-1), is_text[:, -1].long()]).tolist()
    if any(images) or not all(ends_with_text):
        return None
    text = Slots.gather(is_text, counts, model.model.image_reuse.text_multiple)
    types, may_hold_images = cached_types(cache), cached_images(cache)
    hidden = compiled.prefill(decoder, None, cache, past, slots, new, is_image, position_ids, mask, text, counts, 1)
    remember_prompt(model.config, cache, past, types, is_image.long(), mask, position_ids, may_hold_images)
    logits = scale_logits(model.lm_head(hidden[:, -1:]), model.config.text_config)
    return DSVLCausalLMOutputWithPast(logits=logits, **{CACHE: cache})


__all__ = ["prefill_text"]
