"""Who attends to whom under MMCA: what transformers lets a query see, told apart by modality, for one forward call.

The definition is in attention_dsvl.py, whose functions compute what these masks say. All layers of a type share one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from .cache_dsvl import cached_images
from .kernels_dsvl import FusedMask, can_fuse, fuse_mask
from .transformers_dsvl import ALL_MASK_ATTENTION_FUNCTIONS
from .visibility_dsvl import HIDDEN, IMAGE, TEXT, Visibility, visible_edges

# Bits of a code: the key takes part in the text softmax, in the image softmax, and ...
IN_TEXT, IN_IMAGE = 1, 2
# ... the row's text (image) softmax is uniform over the keys that take part in it ("mmca_reference" only).
UNIFORM_TEXT, UNIFORM_IMAGE = 4, 8


def key_codes(visibility: Visibility, token_types: torch.Tensor) -> torch.Tensor:
    """In which softmax each key takes part: (batch, 1, 1, keys), int8, `IN_TEXT`, `IN_IMAGE` or, where hidden, 0."""
    return (visibility.key_types(token_types) + 1)[:, None, None].to(torch.int8)


def mmca_codes(visibility: Visibility, token_types: torch.Tensor, text_alone: bool = False) -> torch.Tensor:
    """`"mmca"` as a dense tensor of codes: (batch, 1, queries, keys), int8.

    Args:
        visibility: what transformers lets a query see.
        token_types: (batch, positions up to the last query), 1 = image.
        text_alone: whether no query is known to be an image token.
    """
    codes = key_codes(visibility, token_types)
    if visibility.q_length > 1 or not visibility.is_causal:  # else the one query sees whatever is there
        codes = codes * visibility.dense()
    if not text_alone:
        is_text = (_query_types(visibility, token_types) == TEXT)[:, None, :, None]
        codes = torch.where(is_text, codes, _own_key(visibility) * IN_IMAGE)
    return codes.to(torch.int8)


def mmca_reference_codes(visibility: Visibility, token_types: torch.Tensor) -> torch.Tensor:
    """`"mmca_reference"` as a dense tensor of codes: (batch, 1, queries, keys), int8.

    The released code adds `finfo.min` once for causality and once for modality. Where a set is empty, every key that was
    hidden once is left with the same score, so the softmax is uniform over the keys j <= i of any kind, padding included,
    and the future keys of the set's own kind. An image query replaces its image softmax by itself, not its text softmax.
    """
    keys = visibility.key_types(token_types)[:, None, None, :]
    visible, own = visibility.dense(), _own_key(visibility)
    past = visibility.query_positions()[:, None] >= visibility.key_positions()
    codes = torch.zeros(1, dtype=torch.int8, device=keys.device)
    for kind, bit, uniform_bit in ((TEXT, IN_TEXT, UNIFORM_TEXT), (IMAGE, IN_IMAGE, UNIFORM_IMAGE)):
        members = visible & (keys == kind)
        empty = ~members.any(-1, keepdim=True)
        codes = codes + torch.where(empty, (past | (keys == kind)) * (bit + uniform_bit), members * bit)
    is_image = (_query_types(visibility, token_types) == IMAGE)[:, None, :, None]
    return torch.where(is_image, (codes & (IN_TEXT | UNIFORM_TEXT)) + own * IN_IMAGE, codes).to(torch.int8)


def _own_key(visibility: Visibility) -> torch.Tensor:
    return visibility.query_positions()[:, None] == visibility.key_positions()


def _query_types(visibility: Visibility, token_types: torch.Tensor) -> torch.Tensor:
    """The modality of every query, `HIDDEN` where padded: (batch, queries)."""
    last = slice(token_types.shape[1] - visibility.q_length, token_types.shape[1])
    types = token_types[:, last]
    return types if visibility.padding is None else types.masked_fill(~visibility.padding[:, last], HIDDEN)


def sees_images(token_types: torch.Tensor, cache: Cache | None, known: bool | None = None) -> bool:
    """Whether any key is an image token; what the caller knows of the new tokens, or a cache of its own, is not asked of the
    device again.

    Args:
        token_types: of the whole sequence, (batch, positions), 1 = image.
        known: whether any of the new tokens is an image token, if that is known.
    """
    if torch.compiler.is_compiling():
        return True
    cached = None if cache is None else cached_images(cache)
    if known or cached:
        return True
    if known is not None and (cache is None or cached is not None):
        return False
    return bool((token_types == 1).any())


def coded_masks(
    visible: dict[str | None, Visibility], token_types: torch.Tensor, multimodal_attention: str, text_alone: bool = False
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The codes of a forward call, as a decoder takes its `attention_mask`: a tensor, or one for each layer type."""
    codes = mmca_reference_codes if multimodal_attention == "mmca_reference" else partial(mmca_codes, text_alone=text_alone)
    return by_layer_type({layer_type: codes(v, token_types) for layer_type, v in visible.items()})


# Where less than this is added to a cache, one product with all of it is cheaper than to gather it by modality (on a CPU).
_FEW = 16


def few_queries(visible: dict[str | None, Visibility], queries: int) -> bool:
    """Whether so many queries are to be computed by codes and `StepMask`: one, or a few that follow a cache."""
    after_cache = all(isinstance(v.q_offset, torch.Tensor) or v.q_offset > 0 for v in visible.values())
    return queries == 1 or (queries <= _FEW and after_cache)


def by_layer_type(masks: dict[str | None, torch.Tensor]) -> Any:
    """Decoders with layer types take a dict of masks, the others one tensor."""
    return masks.get(None, masks)


@dataclass
class StepMask:
    """`"mmca"` for few queries: what is added to the scores of the text and of the image branch, ready for every layer."""

    bias: torch.Tensor  # (batch, 2, 1, 1, queries, keys): 0 for a key that takes part, -inf for others; 0 where none does
    sees: torch.Tensor  # (batch, 2, 1, 1, queries, 1): 0 where no key takes part, else 1

    @classmethod
    def of(cls, codes: torch.Tensor, dtype: torch.dtype) -> "StepMask":
        """From a (batch, 1, queries, keys) tensor of `mmca_codes`, for scores of a dtype."""
        # The two bits are made where the codes are: a list of them would be copied there.
        bits = torch.arange(IN_TEXT, IN_IMAGE + 1, dtype=codes.dtype, device=codes.device)[:, None, None]
        members = (codes & bits).bool()[:, :, None, None]
        sees = members.any(-1, keepdim=True)
        dtype = torch.promote_types(dtype, torch.float32)
        bias = torch.zeros(members.shape, dtype=dtype, device=codes.device).masked_fill(~members & sees, -torch.inf)
        return cls(bias, sees.to(dtype))

    def to(self, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> "StepMask":
        """Move every tensor: a model spread over devices by accelerate calls this."""
        return StepMask(self.bias.to(device, non_blocking=non_blocking), self.sees.to(device, non_blocking=non_blocking))


@dataclass
class MultimodalMask:
    """`"mmca"` for many queries: where text and image tokens are, and the backend's masks over the gathered tokens.

    Queries and keys are those of one forward call. Slots past a row's own count are filled with other tokens of the row:
    as queries their result is thrown away, as keys the masks hide them.
    """

    text_queries: torch.Tensor  # (batch, text queries) the gathered queries, as rows of the flattened (batch x queries)
    text_keys: torch.Tensor  # (batch, text keys) as rows of (batch x keys)
    image_keys: torch.Tensor  # (batch, image keys)
    text_filled: torch.Tensor | None  # (batch, text queries, 1, 1), which slots of these are filled; None where all are
    own_key: torch.Tensor  # (queries,) index of each query's own key
    text_mask: Any  # what the backend takes; None where it is plainly causal, for which sdpa has the fastest kernels
    image_mask: Any
    sees_image: torch.Tensor | None  # (batch, text queries, 1, 1); None where the backend itself gives 0 for no key
    # On a CPU under sdpa: the image branch in parts, (first query, last, image keys in reach, mask or None for all of them).
    image_parts: list[tuple[int, int, int, torch.Tensor | None]] | None = None

    def to(self, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> "MultimodalMask":
        """Move every tensor: a model spread over devices by accelerate calls this."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                value = value.to(device, non_blocking=non_blocking)
            elif hasattr(value, "to"):  # a BlockMask
                value = value.to(device)
            elif field.name == "image_parts":
                value = None
            moved[field.name] = value
        return MultimodalMask(**moved)

    def let_lengths_vary(self) -> None:
        """Tell the compiler that there are more or fewer text and image tokens in the next batch."""
        slots = (self.text_queries, self.text_keys, self.image_keys, self.text_filled, self.sees_image)
        for states, dims in [*((part, [1]) for part in slots), (self.text_mask, [2, 3]), (self.image_mask, [2, 3])]:
            if isinstance(states, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(states, dims)


def multimodal_mask(
    visibility: Visibility,
    token_types: torch.Tensor,
    text_config: PreTrainedConfig,
    dtype: torch.dtype,
    training: bool = False,
    image_queries: int = 0,
    compiled: bool = False,
) -> MultimodalMask | FusedMask:
    """Tell the modalities of one forward call apart, for the fused kernels where these apply and else for the backend.

    Args:
        visibility: what transformers lets a query see.
        token_types: (batch, positions up to the last query), 1 = image.
        text_config: the decoder's; `_attn_implementation` is "sdpa" or "flex_attention".
        dtype: the dtype of the attention scores (an additive mask has it).
        training: whether the decoder drops weights, if it is configured to.
        image_queries: how many of the queries are known to be image tokens; it saves the fused kernels memory.
        compiled: whether it is for compiled layers, which are to take the next call's mask too.
    """
    backend = text_config._attn_implementation
    key_types = visibility.key_types(token_types)
    is_text = _query_types(visibility, token_types) == TEXT
    if backend == "sdpa" and can_fuse(text_config, dtype, visibility.device, training):
        edges = visible_edges(visibility)
        if edges is not None:
            own_key = visibility.query_positions() - visibility.kv_offset
            rows = is_text.numel() - image_queries
            fused = fuse_mask(is_text, key_types == TEXT, key_types == IMAGE, own_key, *edges, rows=rows)
            if compiled:
                torch._dynamo.maybe_mark_dynamic(fused.room, 0)
            return fused
    visibility = visibility.settled()
    # A length of 1 would be a graph of its own.
    least = 2 if compiled else 1
    gathered, whole = _gather_indices((is_text, key_types == TEXT, key_types == IMAGE), least)
    (text_queries, is_text_query), (text_keys, has_text_key), (image_keys, has_image_key) = gathered
    q_positions, kv_positions = text_queries + visibility.q_offset, text_keys + visibility.kv_offset
    image_positions = image_keys + visibility.kv_offset

    def sees_text(batch: Any, head: Any, q: Any, k: Any) -> torch.Tensor:
        seen = visibility.mask_function(batch, head, q_positions[batch, q], kv_positions[batch, k])
        return seen & has_text_key[batch, k]

    def sees_image(batch: Any, head: Any, q: Any, k: Any) -> torch.Tensor:
        seen = visibility.mask_function(batch, head, q_positions[batch, q], image_positions[batch, k])
        return seen & has_image_key[batch, k]

    def build(function: Callable, keys: torch.Tensor) -> Any:
        return ALL_MASK_ATTENTION_FUNCTIONS[backend](
            batch_size=visibility.batch_size,
            q_length=text_queries.shape[1],
            kv_length=keys.shape[1],
            mask_function=function,
            attention_mask=None,
            allow_is_causal_skip=False,
            dtype=dtype,
            device=visibility.device,
        )

    # With nothing cached, the gathered text queries and keys are the same tokens in the same order: among themselves
    # they are causal. (In an unwritten static cache, keys past the queries are hidden and so never gathered.)
    starts_empty = isinstance(visibility.q_offset, int) and visibility.q_offset == 0
    same_text = starts_empty and text_queries.shape == text_keys.shape
    # ... for which no causal kernel of sdpa caps scores.
    softcapped = getattr(text_config, "attn_logit_softcapping", None) is not None
    plainly_causal = visibility.is_causal and same_text and not softcapped
    text_mask = None if plainly_causal else build(sees_text, text_keys)
    image_mask, any_image, image_parts = build(sees_image, image_keys), None, None
    if backend == "sdpa":
        if visibility.device.type == "cpu" and not compiled and not torch.compiler.is_compiling():
            image_parts = _image_parts(image_mask)
        any_image = image_mask.any(-1, keepdim=True)
        image_mask = image_mask | ~any_image  # a row without a key is NaN in some kernels; its result is not used
    first_row = torch.arange(visibility.batch_size, device=visibility.device)[:, None]
    mask = MultimodalMask(
        text_queries=text_queries + first_row * visibility.q_length,
        text_keys=text_keys + first_row * visibility.kv_length,
        image_keys=image_keys + first_row * visibility.kv_length,
        text_filled=None if whole and not compiled else is_text_query[:, :, None, None],
        own_key=visibility.query_positions() - visibility.kv_offset,
        text_mask=text_mask,
        image_mask=image_mask,
        sees_image=None if any_image is None else any_image.transpose(1, 2),
        image_parts=image_parts,
    )
    if compiled:
        mask.let_lengths_vary()
    return mask


# Fewer queries are not worth a call of their own.
_LEAST_PART = 256


def _image_parts(mask: torch.Tensor) -> list[tuple[int, int, int, torch.Tensor | None]]:
    """Cut a (batch, 1, text queries, image keys) mask where an image comes into sight: the queries before need not be
    multiplied with it, and those that see all that came until then need no mask."""
    queries, keys = mask.shape[2:]
    seen = mask.any(0)[0]
    reach = torch.where(seen.any(-1), keys - seen.flip(-1).to(torch.uint8).argmax(-1), 0)
    cuts = [0]
    for place in (reach.diff().nonzero()[:, 0] + 1).tolist():
        if place - cuts[-1] >= _LEAST_PART and queries - place >= _LEAST_PART:
            cuts.append(place)
    parts: list[tuple[int, int, int, torch.Tensor | None]] = []
    for first, last in zip(cuts, [*cuts[1:], queries], strict=True):
        in_reach = int(reach[first:last].max())
        part = mask[:, :, first:last, :in_reach]
        # A row without a key is NaN in some kernels; its result is not used.
        parts.append((first, last, in_reach, None if part.all() else part | ~part.any(-1, keepdim=True)))
    return parts


def _gather_indices(kinds: Sequence[torch.Tensor], least: int = 1) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], bool]:
    """Where the members of each kind (batch, tokens) are.

    Returns:
        For each kind the indices of each row's members, in order, and which of these slots are filled: both (batch, slots),
        at least so many. A slot that is not filled holds some other index of the row, and none twice. And whether every
        slot of the first kind is known to be filled.
    """
    counts = torch.stack([members.sum(-1) for members in kinds])
    # A compiled graph cannot ask how many there are, so it gets a slot for each token. Asked of all kinds at once: the
    # device is waited for.
    known = None if torch.compiler.is_compiling() else counts.tolist()
    gathered = []
    for number, members in enumerate(kinds):
        slots = members.shape[1] if known is None else max(*known[number], least)
        index = members.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :slots]
        gathered.append((index, torch.arange(slots, device=members.device) < counts[number][:, None]))
    return gathered, known is not None and min(known[0]) == gathered[0][0].shape[1]
