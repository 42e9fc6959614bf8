"""The attention of a prompt's text over images that are encoded already, and the KV cache that it leaves."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..masks_dsvl import AttentionMask, Visibility, attention_scores, softmax, weighted_values, with_keys
from ..transformers_dsvl import ALL_ATTENTION_FUNCTIONS
from ..utils.transformers_names import DynamicLayer
from .gathered_mask import Slots, gathered_branch_mask

# Up to this many queries, a compiled decoder uses plain products: the kernels of sdpa occupy too little of a GPU.
FEW_QUERIES = 128


@dataclass
class TextPrefillMask(AttentionMask):
    """The mask of one layer type.

    Attributes:
        keys, values: of the images, (layers, batch, image slots, key-value heads, head_dim).
        text_mask, image_mask: the backend's masks; None where attention is causal.
        sees_image: (batch, text slots, 1, 1), False where no image is visible; None where the backend returns 0 there.
    """

    keys: torch.Tensor
    values: torch.Tensor
    text_mask: Any
    image_mask: Any
    sees_image: torch.Tensor | None

    @classmethod
    def build(
        cls,
        visibility: Visibility,
        text: Slots,
        image: Slots,
        keys: torch.Tensor,
        values: torch.Tensor,
        backend: str,
        softcapped: bool,
    ) -> "TextPrefillMask":
        """From the visibility of the whole prompt and the tokens of both kinds."""
        image_filled = image.filled
        if visibility.padding is not None:  # an image token may be masked as well
            seen = visibility.padding.gather(1, image.index)
            image_filled = seen if image_filled is None else seen & image_filled
        image = Slots(image.index, image_filled)
        dtype = keys.dtype
        is_causal = visibility.is_causal and text.filled is None and backend != "eager" and not softcapped
        text_mask = None
        if not is_causal:
            text_mask = gathered_branch_mask(visibility, backend, dtype, text, text, empty_sees_itself=True)
        image_mask, sees_image = gathered_branch_mask(visibility, backend, dtype, text, image), None
        if backend == "sdpa":
            image_mask, sees_image = with_keys(image_mask)
            text_mask, image_mask = _additive(text_mask, dtype), _additive(image_mask, dtype)
        elif backend == "eager":
            sees_image = (image_mask == 0).any(-1, keepdim=True).transpose(1, 2)
        return cls(keys, values, text_mask, image_mask, sees_image)

    def attend(
        self, backend: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        is_few = torch.compiler.is_compiling() and backend == "sdpa" and query.shape[2] <= FEW_QUERIES

        def branch(key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
            if backend == "eager" or (is_few and mask is not None):
                return masked_attention(module, query, key, value, mask, **kwargs)
            return ALL_ATTENTION_FUNCTIONS["sdpa" if mask is None else backend](module, query, key, value, mask, **kwargs)[0]

        keys, values = (part[module.layer_idx].transpose(1, 2).to(key.device) for part in (self.keys, self.values))
        image_output = branch(keys, values, self.image_mask)
        if self.sees_image is not None:
            image_output = torch.where(self.sees_image, image_output, 0)
        return branch(key, value, self.text_mask) + image_output, None

    def to(self, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> "TextPrefillMask":
        """Move the masks. Keys and values of a layer are moved when it runs."""
        moved = super().to(device, non_blocking=non_blocking)
        moved.keys, moved.values = self.keys, self.values
        return moved


def masked_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """One product and one softmax, by an additive mask (batch, 1, queries, keys)."""
    weights = softmax(attention_scores(query, key, scaling, softcap) + mask[:, :, None, :, : key.shape[2]], query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return weighted_values(weights, value)[0]


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as an additive one, which sdpa would make of it in every layer."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def image_token_order(image_counts: list[int], tile_lengths: Sequence[Sequence[int]], copies: int) -> torch.Tensor | None:
    """The index in the image KV cache of the token at each image slot, row by row; None if it is their order there. Rows
    with fewer image tokens than others get any before theirs.

    Args:
        image_counts: the number of image tokens of each row.
        tile_lengths: of the images in the image KV cache, the number of tokens of each tile.
        copies: the number of consecutive rows with the same images.

    Raises:
        ValueError: if image tokens and images do not match.
    """
    if not tile_lengths:
        raise ValueError("The image KV cache holds no image; omit it.")
    lengths = list(map(sum, tile_lengths))
    counts = image_counts[::copies]
    ends = {0, *accumulate(lengths)}
    if sum(counts) != sum(lengths) or not ends.issuperset(accumulate(counts)):
        sizes = sorted(set(lengths))
        size = f"{sizes[0]} tokens" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} tokens"
        raise ValueError(
            f"The samples hold {counts} image tokens, {sum(counts)} in all, but there are {len(lengths)} images of "
            f"{size} in the image KV cache; pass as many as the texts name, in the order of their tokens "
            "(image_cache[[0, 2]] picks some), and do not truncate image tokens."
        )
    slots = max(counts)
    if copies == 1 and all(count == slots for count in counts):
        return None
    order = torch.zeros(len(counts), slots, dtype=torch.long)
    for row, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        order[row, slots - count :] = torch.arange(end - count, end)
    return order.repeat_interleave(copies, dim=0).flatten()


def reserve(states: torch.Tensor, rows: int, padded: bool) -> torch.Tensor:
    """Memory for the keys or values of all tokens, and a last row for empty slots; zero if some tokens are padding.

    Args:
        states: of the images, (layers, tokens, heads, head_dim).
        rows: the number of tokens.
    """
    reserved = states.new_empty(len(states), rows + 1, *states.shape[-2:])
    return reserved.zero_() if padded else reserved


def fill_layer(cache: Cache, number: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Let a layer of an empty cache hold these (batch, heads, tokens, head_dim)."""
    layer: Any = cache.layers[number] if number < len(cache.layers) else None
    if cache.offloading or type(layer) is not DynamicLayer:
        cache.update(keys, values, number)
        return
    # The result of `update`, without its copy.
    layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
    layer.is_initialized = True


__all__ = ["TextPrefillMask", "fill_layer", "image_token_order", "masked_attention", "reserve"]
