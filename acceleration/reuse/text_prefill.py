"""The attention of a prompt's text over images that are encoded already, and the KV cache that it leaves."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache

from ...cache_dsvl import cached_types, remember_types, whole_positions
from ...masks_dsvl import AttentionMask, Visibility, attention_scores, softmax, weighted_values, with_keys
from ...transformers_dsvl import ALL_ATTENTION_FUNCTIONS
from ...utils.transformers_names import DynamicLayer, StaticLayer
from ..attention.gathered_mask import Slots, gathered_branch_mask
from .shared_images import SharedImagesLayer

# Up to this many queries, a compiled decoder uses plain products: the kernels of sdpa occupy too little of a GPU.
FEW_QUERIES = 128


@dataclass
class CopiedImages:
    """The rotated images of all rows, which are copied into a KV cache.

    Attributes:
        keys, values: (layers, batch, image slots, key-value heads, head_dim).
        whole: memory for the keys and values of all tokens, (layers, batch x tokens + 1, key-value heads, head_dim).
        text_rows: rows of `whole` for the text slots, (batch x text slots,).
    """

    keys: torch.Tensor
    values: torch.Tensor
    whole: tuple[torch.Tensor, torch.Tensor]
    text_rows: torch.Tensor

    @classmethod
    def build(
        cls, keys: torch.Tensor, values: torch.Tensor, image: Slots, text: Slots, tokens: int, padded: bool
    ) -> "CopiedImages":
        """From the states (layers, batch x image slots, key-value heads, head_dim). The large copies start here.

        Args:
            tokens: of a row.
            padded: whether some of them are padding.
        """
        batch = len(image.index)
        whole = [
            _reserve(states, batch * tokens, padded).index_copy_(1, _rows_or_spare(image, tokens), states)
            for states in (keys, values)
        ]
        keys, values = keys.unflatten(1, (batch, -1)), values.unflatten(1, (batch, -1))
        return cls(keys, values, (whole[0], whole[1]), _rows_or_spare(text, tokens))

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    def of_layer(self, number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (batch, image slots, key-value heads, head_dim)."""
        return self.keys[number].to(device), self.values[number].to(device)

    def fill(self, cache: Cache, keys: torch.Tensor, values: torch.Tensor, devices: list[torch.device]) -> None:
        """Let a cache hold images and text after what it holds (layers, batch, text slots, key-value heads, head_dim).

        Args:
            devices: of the layers.
        """
        whole = []
        for part, states in zip(self.whole, (keys, values), strict=True):
            part.index_copy_(1, self.text_rows, states.flatten(1, 2))
            whole.append(part[:, :-1].unflatten(1, (keys.shape[1], -1)).transpose(2, 3))
        for number, device in enumerate(devices):
            _fill_layer(cache, number, whole[0][number].to(device), whole[1][number].to(device))


@dataclass
class EarlierTokens:
    """The tokens that a KV cache holds already, of earlier turns.

    Attributes:
        cache: the KV cache, whose layers hold all tokens in their order.
        text, image: the slots of its tokens.
        types: the modality of its tokens, (batch, tokens).
    """

    cache: Any
    text: Slots
    image: Slots
    types: torch.Tensor

    @classmethod
    def build(cls, cache: Any, attention_mask: torch.Tensor | None) -> "EarlierTokens":
        """From a KV cache that `can_extend`, and the mask of the whole sequence."""
        tokens, known = int(cache.get_seq_length()), cached_types(cache)
        assert known is not None  # `can_extend` asks for them
        types = known[:, :tokens]
        real = torch.ones_like(types, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[:, :tokens].to(types.device).bool()
        kinds = (types != 1) & real, (types == 1) & real
        counts = torch.stack([kind.sum(-1) for kind in kinds]).tolist()
        text, image = (Slots.gather(kind, count) for kind, count in zip(kinds, counts, strict=True))
        return cls(cache, text, image, types)

    @property
    def tokens(self) -> int:
        return self.types.shape[1]

    def of_layer(self, number: int, slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of some tokens, (batch, key-value heads, slots, head_dim)."""
        layer = self.cache.layers[number]
        if slots.filled is None and slots.index.shape[1] in (0, self.tokens):  # none, or all in their order
            count = slots.index.shape[1]
            return layer.keys[:, :, :count], layer.values[:, :, :count]
        index = slots.index.to(layer.keys.device)[:, None, :, None]
        return layer.keys.take_along_dim(index, 2), layer.values.take_along_dim(index, 2)


def can_extend(cache: Any) -> bool:
    """Whether a prompt with encoded images can be computed behind the tokens of a KV cache: a dynamic or static one that
    holds every token in its order and knows which of them are image tokens."""
    tokens, types = int(cache.get_seq_length()), cached_types(cache)
    return (
        isinstance(cache, (DynamicCache, StaticCache))
        and not getattr(cache, "offloading", False)
        and all(isinstance(layer, (DynamicLayer, StaticLayer)) and not layer.is_sliding for layer in cache.layers)
        and not any(isinstance(layer, SharedImagesLayer) for layer in cache.layers)
        and types is not None
        and types.shape[1] >= tokens
    )


def new_tokens(
    input_ids: torch.Tensor, past: int, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """The tokens behind those of a KV cache.

    Args:
        input_ids: (batch, tokens), of the whole sequence; or these tokens alone, with the mask or the positions of all.
        past: the number of tokens that the cache holds.

    Raises:
        ValueError: if there are none.
    """
    of_all = [one.shape[1] for one in (attention_mask, position_ids) if one is not None]
    if past == 0 or max(of_all, default=0) > input_ids.shape[1]:
        return input_ids
    if input_ids.shape[1] <= past:
        raise ValueError(
            f"input_ids hold {input_ids.shape[1]} tokens, but the KV cache {past} already; pass the whole conversation, or "
            "the new tokens with the attention mask of all, or an empty KV cache."
        )
    return input_ids[:, past:]


def remember_prompt(
    config: Any,
    cache: Cache,
    past: int,
    earlier_types: torch.Tensor | None,
    token_types: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    may_hold_images: bool | None,
) -> None:
    """Keep modality and positions of a prompt's tokens in its KV cache.

    Args:
        config: a `DSVLConfig`.
        past: how many tokens the cache held before, of `earlier_types` (batch, at least past).
        token_types, position_ids: of the prompt's tokens, (batch, tokens).
        attention_mask: of all tokens, (batch, past + tokens).
        may_hold_images: whether any token may be an image token, if that is known.
    """
    if past > 0 and earlier_types is not None:
        token_types = torch.cat([earlier_types[:, :past].to(token_types.device), token_types], dim=1)
    positions = None
    if getattr(config, "image_positions", "token") == "image":  # older code has no field
        positions = whole_positions(position_ids, token_types, attention_mask, cache if past > 0 else None)
    remember_types(cache, token_types, may_hold_images, positions)


@dataclass
class TextPrefillMask(AttentionMask):
    """The mask of one layer type.

    Attributes:
        images: the keys and values of the images of a layer, by `of_layer`; and their `dtype`.
        text_mask, image_mask: the backend's masks; None where attention is causal.
        sees_image: (batch, text slots, 1, 1), False where no image is visible; None where the backend returns 0 there.
        earlier: the tokens before the prompt, if the KV cache holds some.
    """

    images: Any
    text_mask: Any
    image_mask: Any
    sees_image: torch.Tensor | None
    earlier: EarlierTokens | None = None

    @classmethod
    def build(
        cls,
        visibility: Visibility,
        text: Slots,
        image: Slots,
        images: Any,
        backend: str,
        softcapped: bool,
        earlier: EarlierTokens | None = None,
    ) -> "TextPrefillMask":
        """From the visibility of the whole prompt and the tokens of both kinds."""
        text_keys, own_keys_from = text, 0
        if earlier is not None:
            text_keys, own_keys_from = earlier.text.followed_by(text, earlier.tokens), earlier.text.index.shape[1]
            image = earlier.image.followed_by(image, earlier.tokens)
        image_filled = image.filled
        if visibility.padding is not None:  # an image token may be masked as well
            seen = visibility.padding.gather(1, image.index)
            image_filled = seen if image_filled is None else seen & image_filled
        image = Slots(image.index, image_filled)
        dtype = images.dtype
        is_causal = visibility.is_causal and text.filled is None and backend != "eager" and not softcapped
        text_mask = None
        if not is_causal or earlier is not None:
            text_mask = gathered_branch_mask(visibility, backend, dtype, text, text_keys, own_keys_from)
        image_mask, sees_image = gathered_branch_mask(visibility, backend, dtype, text, image), None
        if backend == "sdpa":
            image_mask, sees_image = with_keys(image_mask)
            text_mask, image_mask = _additive(text_mask, dtype), _additive(image_mask, dtype)
        elif backend == "eager":
            sees_image = (image_mask == 0).any(-1, keepdim=True).transpose(1, 2)
        return cls(images, text_mask, image_mask, sees_image, earlier)

    def attend(
        self, backend: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        keys, values = (part.transpose(1, 2) for part in self.images.of_layer(module.layer_idx, key.device))
        if self.earlier is not None:
            for_images, for_text = ((keys, values), self.earlier.image), ((key, value), self.earlier.text)
            (keys, values), (key, value) = (
                [torch.cat(both, 2) for both in zip(self.earlier.of_layer(module.layer_idx, slots), new, strict=True)]
                for new, slots in (for_images, for_text)
            )
        image_output = self.attend_images(backend, module, query, keys, values, **kwargs)
        return _branch(backend, module, query, key, value, self.text_mask, **kwargs) + image_output, None

    def attend_images(
        self, backend: str, module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The result over the images, (batch, queries, heads, head_dim)."""
        output = _branch(backend, module, query, keys, values, self.image_mask, **kwargs)
        return output if self.sees_image is None else torch.where(self.sees_image, output, 0)

    def to(self, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> "TextPrefillMask":
        """Move the masks. The images of a layer are moved when it runs."""
        return super().to(device, non_blocking=non_blocking)


def _branch(
    backend: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> torch.Tensor:
    """One softmax, by a backend's mask; None is causal."""
    is_few = torch.compiler.is_compiling() and backend == "sdpa" and query.shape[2] <= FEW_QUERIES
    if backend == "eager" or (is_few and mask is not None):
        return masked_attention(module, query, key, value, mask, **kwargs)
    return ALL_ATTENTION_FUNCTIONS["sdpa" if mask is None else backend](module, query, key, value, mask, **kwargs)[0]


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


def _reserve(states: torch.Tensor, rows: int, padded: bool) -> torch.Tensor:
    """Memory for the keys or values of all tokens, and a last row for empty slots; zero if some tokens are padding.

    Args:
        states: of the images, (layers, tokens, heads, head_dim).
        rows: the number of tokens.
    """
    reserved = states.new_empty(len(states), rows + 1, *states.shape[-2:])
    return reserved.zero_() if padded else reserved


def _fill_layer(cache: Cache, number: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Let a layer of a cache hold these (batch, heads, tokens, head_dim), after what it holds."""
    layer: Any = cache.layers[number] if number < len(cache.layers) else None
    if cache.offloading or type(layer) is not DynamicLayer or layer.is_initialized:
        cache.update(keys, values, number)
        return
    # The result of `update`, without its copy.
    layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
    layer.is_initialized = True


def _rows_or_spare(slots: Slots, tokens: int) -> torch.Tensor:
    """Rows of (batch x tokens), and the one after them for empty slots: (batch x slots,)."""
    rows = slots.rows(tokens)
    return (rows if slots.filled is None else torch.where(slots.filled, rows, len(rows) * tokens)).flatten()


__all__ = [
    "CopiedImages",
    "EarlierTokens",
    "TextPrefillMask",
    "can_extend",
    "image_token_order",
    "masked_attention",
    "new_tokens",
    "remember_prompt",
]
