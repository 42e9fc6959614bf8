"""Whether the images of a call of `generate` may come from an image KV cache."""

from itertools import accumulate
from typing import Any

import torch

from ...transformers_dsvl import CACHE
from .text_prefill import can_extend

# Options that need more of a prompt than its text, or decode in a way that takes no image KV cache.
_OTHER_WAYS = (
    *("output_attentions", "output_hidden_states", "prefill_chunk_size"),
    *("assistant_early_exit", "dola_layers", "penalty_alpha"),
)


def takes_image_cache(model: Any, input_ids: torch.Tensor | None, lengths: list[int], kwargs: dict[str, Any]) -> bool:
    """Whether `generate` may get an image KV cache instead of pixels: see `generate` and `ImageReuse.prefill`.

    Args:
        input_ids: of the prompts, and of the conversation before with a KV cache.
        lengths: the number of tokens of each tile of the new images.
        kwargs: the other arguments of `generate`.
    """

    def option(name: str) -> Any:
        if name in kwargs:
            return kwargs[name]
        given = getattr(kwargs.get("generation_config"), name, None)
        return getattr(model.generation_config, name, None) if given is None else given

    mask, cache = kwargs.get("attention_mask"), kwargs.get(CACHE)
    if (
        input_ids is None
        or kwargs.get("inputs_embeds") is not None
        or kwargs.get("custom_generate") is not None
        or option("use_cache") is False
        or any(option(name) for name in _OTHER_WAYS)
        or (mask is not None and mask.ndim != 2)
    ):
        return False
    past = int(cache.get_seq_length()) if cache is not None else 0
    copies = max(option("num_beams") or 1, option("num_return_sequences") or 1)
    if past > 0 and (copies > 1 or not can_extend(cache)):
        return False
    is_whole = mask is None or mask.shape[1] == input_ids.shape[1]
    new = input_ids[:, past:] if is_whole else input_ids
    is_image = new == model.config.image_token_id
    ends_with_text = ~is_image[:, -1] if new.shape[1] else new.new_zeros(len(new), dtype=torch.bool)
    if mask is not None:
        ends_with_text = ends_with_text & mask[:, -1].bool().to(new.device)
    *counts, all_end = torch.cat([is_image.sum(-1), ends_with_text.all().long()[None]]).tolist()
    # If images and tokens do not match, the ordinary way says so.
    whole_rows = {0, *accumulate(lengths)}
    return bool(all_end) and sum(counts) == sum(lengths) and whole_rows.issuperset(accumulate(counts))


__all__ = ["takes_image_cache"]
