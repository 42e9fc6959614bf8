"""Attention masks of MMCA: which key a query sees, by modality.

transformers' own mask builders say what a query may see (causality, padding, sliding windows, packed documents, static
caches). `visibilities` asks them; `build_masks` adds the modality. The definition of MMCA is in attention_dsvl.py.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionMaskInterface, Cache, PreTrainedConfig

from .acceleration_dsvl import acceleration
from .cache_dsvl import cached_images
from .configuration_dsvl import ATTENTION_LAYER_TYPES
from .positions_dsvl import document_starts, token_positions
from .transformers_dsvl import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    CACHE,
    causal_mask_function,
    create_masks_for_generate,
    sdpa_mask,
)

# The modality of a key. Text and image are those of `mm_token_type_ids`; a padded or unwritten key is hidden.
HIDDEN, TEXT, IMAGE = -1, 0, 1

# Bits of a code, the value of a (query, key) pair: the key is in the text softmax, in the image softmax, ...
IN_TEXT, IN_IMAGE = 1, 2
# ... and the text (image) softmax of this query is uniform ("mmca_reference" only).
UNIFORM_TEXT, UNIFORM_IMAGE = 4, 8

# Up to this many queries after a cache, one product with all keys is cheaper than two calls of a backend (on a CPU).
_FEW_QUERIES = 16

# All models of a process share transformers' registries, and the remote code of two checkpoints may be two versions of this
# file: each copy registers under its own module's name.
_CAPTURE = f"dsvl_visibility:{__name__}"


# ----------------------------------------------------------------------------------------------------------------------
# Visibility: what transformers lets a query see


class ConfigView:
    """A live view of a decoder's configuration; a subclass names another attention implementation.

    Everything else is read from and written to the configuration behind it, so `set_attn_implementation`, deepcopy and
    pickle need no special case, and config.json never contains our names.
    """

    def __init__(self, text_config: PreTrainedConfig) -> None:
        self.__dict__["_text_config"] = text_config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_text_config" not in self.__dict__:  # during copy and unpickling
            raise AttributeError(name)
        return getattr(self.__dict__["_text_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._text_config, name, value)


class _CapturingConfig(ConfigView):
    """The view that makes transformers' mask builders return a `Visibility` instead of a mask."""

    _attn_implementation = _CAPTURE

    def get_text_config(self, *args: Any, **kwargs: Any) -> "_CapturingConfig":
        return self


@dataclass
class Visibility:
    """Which key a query may see, modality aside. Positions count from the start of the sequence.

    Attributes:
        mask_function: (batch, head, query position, key position) to bool, elementwise on tensors.
        batch_size, q_length, kv_length: of the forward call.
        q_offset: position of the first query.
        kv_offset: position of the first key (a sliding cache drops earlier ones).
        padding: (batch, positions), False where padded.
        is_causal: whether only causality and padding hide a key.
        device: of the masks.
        local_size: size of the sliding window, if any.
        document_start: with packed documents, (batch, positions), the position at which the document of a token begins.
        undivided: with packed documents, the visibility without their borders.
    """

    mask_function: Callable
    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int | torch.Tensor
    kv_offset: int
    padding: torch.Tensor | None
    is_causal: bool
    device: torch.device
    local_size: int | None = None
    document_start: torch.Tensor | None = None
    undivided: "Visibility | None" = None

    def key_types(self, token_types: torch.Tensor) -> torch.Tensor:
        """The modality of every key, `HIDDEN` where padded or not yet written: (batch, keys)."""
        end = self.kv_offset + self.kv_length
        types = token_types
        if self.padding is not None:
            if self.padding.shape[1] < types.shape[1]:
                raise ValueError(
                    f"attention_mask covers {self.padding.shape[1]} tokens, but the sequence has {types.shape[1]}, cached "
                    "ones included; pass the mask of the whole sequence."
                )
            types = types.masked_fill(~self.padding[:, : types.shape[1]], HIDDEN)
        if types.shape[1] < end:
            types = nn.functional.pad(types, (0, end - types.shape[1]), value=HIDDEN)
        return types[:, self.kv_offset : end]

    def query_types(self, token_types: torch.Tensor) -> torch.Tensor:
        """The modality of every query, `HIDDEN` where padded: (batch, queries)."""
        last = slice(token_types.shape[1] - self.q_length, token_types.shape[1])
        types = token_types[:, last]
        return types if self.padding is None else types.masked_fill(~self.padding[:, last], HIDDEN)

    def query_positions(self) -> torch.Tensor:
        """(queries,)"""
        return torch.arange(self.q_length, device=self.device) + self.q_offset

    def key_positions(self) -> torch.Tensor:
        """(keys,)"""
        return torch.arange(self.kv_length, device=self.device) + self.kv_offset

    def own_keys(self) -> torch.Tensor:
        """Whether a key is the query's own: (queries, keys)."""
        return self.query_positions()[:, None] == self.key_positions()

    def dense(self) -> torch.Tensor:
        """Everything as one boolean tensor: (batch, 1, queries, keys)."""
        return sdpa_mask(
            batch_size=self.batch_size,
            q_length=self.q_length,
            kv_length=self.kv_length,
            q_offset=self.q_offset,
            kv_offset=self.kv_offset,
            mask_function=self.mask_function,
            attention_mask=self.padding,
            allow_is_causal_skip=False,
            device=self.device,
        )

    def divided(self, document_ids: torch.Tensor) -> "Visibility":
        """The visibility within packed documents: (batch or 1, queries), one id for the tokens of a document, which differs
        from its neighbours'."""
        begins = document_starts(document_ids.to(self.device).expand(self.batch_size, -1))
        documents, mask_function = begins.cumsum(-1), self.mask_function

        def within(batch: Any, head: Any, q: Any, k: Any) -> torch.Tensor:
            return mask_function(batch, head, q, k) & (documents[batch, q] == documents[batch, k])

        start = torch.where(begins, self.query_positions(), 0).cummax(-1).values
        return replace(self, mask_function=within, is_causal=False, document_start=start, undivided=self)


def _capture_visibility(
    mask_function: Callable,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Visibility:
    is_causal = mask_function is causal_mask_function or (
        allow_is_causal_skip and (local_size is None or kv_length <= local_size)
    )
    return Visibility(
        mask_function=mask_function,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        padding=attention_mask,
        is_causal=is_causal,
        device=torch.device(device),
        local_size=local_size,
    )


AttentionMaskInterface.register(_CAPTURE, _capture_visibility)


def visibilities(
    text_config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    document_ids: torch.Tensor | None = None,
) -> dict[str | None, Visibility]:
    """Ask transformers' mask builders what is visible.

    Args:
        text_config: the decoder's.
        inputs_embeds: (batch, new tokens, any); its shape, dtype and device count.
        attention_mask: (batch, tokens, cached ones included), 0 where padded.
        cache: the KV cache, if any.
        document_ids: (batch or 1, tokens), of packed rows, without a cache.

    Returns:
        A visibility for each layer type; under the key None where the decoder does not distinguish layer types.
    """
    built = create_masks_for_generate(
        config=_CapturingConfig(text_config),
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        **{CACHE: cache},
        position_ids=None,  # in which it would look for documents, and wait for the device
    )
    visible = built if isinstance(built, dict) else {None: built}
    return visible if document_ids is None else {kind: one.divided(document_ids) for kind, one in visible.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Codes: MMCA as one integer for each pair of query and key


def key_codes(visibility: Visibility, token_types: torch.Tensor) -> torch.Tensor:
    """In which softmax each key is: (batch, 1, 1, keys), int8; `IN_TEXT`, `IN_IMAGE`, or 0 where hidden."""
    return (visibility.key_types(token_types) + 1)[:, None, None].to(torch.int8)


def mmca_codes(visibility: Visibility, token_types: torch.Tensor, text_alone: bool = False) -> torch.Tensor:
    """`"mmca"` as codes: (batch, 1, queries, keys), int8.

    Args:
        visibility: what transformers lets a query see.
        token_types: (batch, positions up to the last query), 1 = image.
        text_alone: whether it is known that no query is an image token.
    """
    codes = key_codes(visibility, token_types)
    if visibility.q_length > 1 or not visibility.is_causal:  # else the one query sees every key
        codes = codes * visibility.dense()
    if not text_alone:
        is_text = (visibility.query_types(token_types) == TEXT)[:, None, :, None]
        codes = torch.where(is_text, codes, visibility.own_keys() * IN_IMAGE)
    return codes.to(torch.int8)


def mmca_reference_codes(visibility: Visibility, token_types: torch.Tensor) -> torch.Tensor:
    """`"mmca_reference"` as codes: (batch, 1, queries, keys), int8.

    The released code adds `finfo.min` once for causality and once for modality. Where a set is empty, every key that was
    hidden once has the same score, so the softmax is uniform over the keys j <= i of any kind, padding included, and the
    future keys of the set's own kind. An image query replaces its image softmax by itself, not its text softmax.
    """
    keys = visibility.key_types(token_types)[:, None, None, :]
    visible, own = visibility.dense(), visibility.own_keys()
    past = visibility.query_positions()[:, None] >= visibility.key_positions()
    codes = torch.zeros(1, dtype=torch.int8, device=keys.device)
    for kind, bit, uniform_bit in ((TEXT, IN_TEXT, UNIFORM_TEXT), (IMAGE, IN_IMAGE, UNIFORM_IMAGE)):
        members = visible & (keys == kind)
        empty = ~members.any(-1, keepdim=True)
        codes = codes + torch.where(empty, (past | (keys == kind)) * (bit + uniform_bit), members * bit)
    is_image = (visibility.query_types(token_types) == IMAGE)[:, None, :, None]
    return torch.where(is_image, (codes & (IN_TEXT | UNIFORM_TEXT)) + own * IN_IMAGE, codes).to(torch.int8)


# ----------------------------------------------------------------------------------------------------------------------
# Masks: each computes its attention


class AttentionMask:
    """What the layers of one type get for a forward call: a dataclass that computes their attention."""

    def attend(
        self,
        backend: str,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention of one layer.

        Args:
            backend: "eager", "sdpa" or "flex_attention".
            module: the decoder's attention module.
            query: (batch, heads, queries, head_dim).
            key, value: (batch, key-value heads, keys, head_dim), as the KV cache returns them.
            scaling, dropout, softcap, kwargs: as transformers passes them.

        Returns:
            The output, (batch, queries, heads, head_dim), and the weights, (batch, heads, queries, keys), or None.
        """
        raise NotImplementedError

    def to(self, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> Any:
        """Move the tensors and block masks among the fields. accelerate calls this for a model on several devices."""
        moved = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                value = value.to(device, non_blocking=non_blocking)
            elif hasattr(value, "to"):  # a BlockMask
                value = value.to(device)
            moved[field.name] = value
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass
class CodedMask(AttentionMask):
    """Attention by codes: one product, two softmaxes. For "eager", which returns weights, and for "mmca_reference"."""

    codes: torch.Tensor  # (batch, 1, queries, keys)

    def attend(
        self,
        backend: str,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores, codes = attention_scores(query, key, scaling, softcap), self.codes[:, :, None, :, : key.shape[2]]
        weights = torch.zeros((), dtype=query.dtype, device=query.device)
        for member_bit, uniform_bit in ((IN_TEXT, UNIFORM_TEXT), (IN_IMAGE, UNIFORM_IMAGE)):
            members, uniform = (codes & member_bit).bool(), (codes & uniform_bit).bool()
            any_member = members.any(-1, keepdim=True)
            # The released code's uniform rows pass on the gradient of the softmax, so they are not a plain constant.
            branch = torch.where(uniform, scores - scores.detach(), scores)
            branch = branch.masked_fill(~members & any_member, -torch.inf)
            branch = torch.where(any_member, softmax(branch, query.dtype), 0)
            weights = weights + nn.functional.dropout(branch, p=dropout, training=module.training)
        return weighted_values(weights, value)


@dataclass
class DecodeMask(AttentionMask):
    """`"mmca"` for few queries, as in a decode step: one product, two softmaxes, and one product of their summed weights.

    Attributes:
        bias: (batch, 2, 1, 1, queries, keys), added to the scores of the text and the image branch: 0 for a member, -inf for
            others; 0 everywhere if there is no member.
        sees: (batch, 2, 1, 1, queries, 1), 0 where a branch has no member, else 1.
    """

    bias: torch.Tensor
    sees: torch.Tensor

    @classmethod
    def from_codes(cls, codes: torch.Tensor, dtype: torch.dtype) -> "DecodeMask":
        """From `mmca_codes`, for scores of a dtype."""
        # Made on the device of the codes: a list of the two bits would be copied there.
        bits = torch.arange(IN_TEXT, IN_IMAGE + 1, dtype=codes.dtype, device=codes.device)[:, None, None]
        members = (codes & bits).bool()[:, :, None, None]
        sees = members.any(-1, keepdim=True)
        dtype = torch.promote_types(dtype, torch.float32)
        bias = torch.zeros(members.shape, dtype=dtype, device=codes.device).masked_fill(~members & sees, -torch.inf)
        return cls(bias, sees.to(dtype))

    def attend(
        self,
        backend: str,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = attention_scores(query, key, scaling, softcap)
        weights = (scores[:, None] + self.bias[..., : key.shape[2]]).softmax(-1)
        if dropout > 0:
            weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        return weighted_values((weights * self.sees).sum(1).to(query.dtype), value)


@dataclass
class BranchMasks(AttentionMask):
    """`"mmca"` for many queries: the backend runs twice, over the text keys and over the image keys.

    Attributes:
        text, image: the backend's masks.
        sees_image: (batch, queries, 1, 1); None where the backend itself returns 0 for a query without keys.
        is_text: (batch, queries, 1, 1), whether a query is text. Others get their own value.
        own_key: (queries,), index of each query's own key.
    """

    text: Any
    image: Any
    sees_image: torch.Tensor | None
    is_text: torch.Tensor
    own_key: torch.Tensor

    @classmethod
    def build(cls, visibility: Visibility, token_types: torch.Tensor, backend: str) -> "BranchMasks":
        """For a backend, "sdpa" or "flex_attention"."""
        key_types, sees_image = visibility.key_types(token_types), None
        if backend == "sdpa":
            visible, by_key = visibility.dense(), key_types[:, None, None]
            text, image = visible & (by_key == TEXT), visible & (by_key == IMAGE)
            (text, _), (image, sees_image) = with_keys(text), with_keys(image)
        else:

            def of_type(kind: int) -> Any:
                def sees(batch: Any, head: Any, q: Any, k: Any) -> torch.Tensor:
                    visible = visibility.mask_function(batch, head, q, k)
                    return visible & (key_types[batch, k - visibility.kv_offset] == kind)

                return ALL_MASK_ATTENTION_FUNCTIONS[backend](
                    batch_size=visibility.batch_size,
                    q_length=visibility.q_length,
                    kv_length=visibility.kv_length,
                    q_offset=visibility.q_offset,
                    kv_offset=visibility.kv_offset,
                    mask_function=sees,
                    attention_mask=None,
                    device=visibility.device,
                )

            text, image = of_type(TEXT), of_type(IMAGE)
        return cls(
            text=text,
            image=image,
            sees_image=sees_image,
            is_text=(visibility.query_types(token_types) == TEXT)[:, :, None, None],
            own_key=visibility.query_positions() - visibility.kv_offset,
        )

    def attend(
        self, backend: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        attend = ALL_ATTENTION_FUNCTIONS[backend]
        text, image = (attend(module, query, key, value, mask, **kwargs)[0] for mask in (self.text, self.image))
        output = text + (image if self.sees_image is None else torch.where(self.sees_image, image, 0))
        return torch.where(self.is_text, output, own_values(query, value, self.own_key)), None


def with_keys(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A boolean mask (batch, 1, queries, keys) in which a query without keys sees all, as some kernels return NaN for it, in
    the gradients too; and which queries have keys, (batch, queries, 1, 1)."""
    has_keys = mask.any(-1, keepdim=True)
    return mask | ~has_keys, has_keys.transpose(1, 2)


def own_values(query: torch.Tensor, value: torch.Tensor, own_key: torch.Tensor | None = None) -> torch.Tensor:
    """The value of each query's own key, as an attention function returns it: (batch, queries, heads, head_dim).

    Args:
        query: (batch, heads, queries, head_dim).
        value: (batch, key-value heads, keys, head_dim).
        own_key: (queries,), index of each query's own key; not needed if keys and queries are the same tokens.
    """
    if own_key is not None and value.shape[2] != query.shape[2]:
        value = value.index_select(2, own_key)
    own, group = value.transpose(1, 2), query.shape[1] // value.shape[1]
    return own if group == 1 else own.repeat_interleave(group, dim=2)


def plain_attention(backend: str, module: nn.Module) -> Callable:
    """The decoder's own attention function."""
    if backend != "eager":
        return ALL_ATTENTION_FUNCTIONS[backend]
    # Each decoder has an eager function of its own, which it hands to the interface as the default.
    return sys.modules[type(module).__module__].eager_attention_forward


# Scores and weights are (batch, key-value heads, query heads of each, queries, keys): a key-value head is not copied for the
# queries that share it.


def attention_scores(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """Scaled, capped scores of (batch, heads, tokens, head_dim)."""
    heads, queries, head_dim = query.shape[1:]
    group = heads // key.shape[1]
    rows = query.reshape(len(query), key.shape[1], group * queries, head_dim) * scaling
    scores = torch.matmul(rows, key.transpose(-1, -2)).unflatten(2, (group, queries))
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def softmax(scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Over keys, in float32 at least."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(dtype)


def weighted_values(weights: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (batch, queries, heads, head_dim), and the weights (batch, heads, queries, keys) on which it depends."""
    batch, kv_heads, group, queries, keys = weights.shape
    weights = weights.flatten(1, 2)
    output = torch.matmul(weights.view(batch, kv_heads, group * queries, keys), value)
    return output.view(batch, kv_heads * group, queries, -1).transpose(1, 2).contiguous(), weights


# ----------------------------------------------------------------------------------------------------------------------
# The masks of a forward call


def step_codes(
    text_config: PreTrainedConfig,
    multimodal_attention: str,
    token_types: torch.Tensor,
    dtype: torch.dtype,
    attention_mask: torch.Tensor | None,
    cache: Cache,
) -> Any:
    """The codes of a decode step with a static cache, made outside of its compiled graph.

    Returns:
        A tensor (batch, 1, 1, keys), or one for each layer type.
    """
    embeds = torch.empty((len(token_types), 1, 0), dtype=dtype, device=token_types.device)
    visible = visibilities(text_config, embeds, attention_mask, cache)
    codes = mmca_reference_codes if multimodal_attention == "mmca_reference" else mmca_codes
    return by_layer_type({kind: codes(one, token_types) for kind, one in visible.items()})


def masks_from_codes(codes: Any, multimodal_attention: str, dtype: torch.dtype) -> dict[str | None, AttentionMask]:
    """Masks of a decode step, from `step_codes`."""
    by_type = codes if isinstance(codes, dict) else {None: codes}
    if multimodal_attention == "mmca_reference":
        return {kind: CodedMask(one) for kind, one in by_type.items()}
    return {kind: DecodeMask.from_codes(one, dtype) for kind, one in by_type.items()}


def build_masks(
    text_config: PreTrainedConfig,
    multimodal_attention: str,
    token_types: torch.Tensor,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    cache: Cache | None,
    document_ids: torch.Tensor | None,
    image_queries: int | None,
    training: bool,
    compiled: bool,
) -> tuple[Any, dict[str | None, AttentionMask]]:
    """The masks of a forward call.

    Args:
        text_config: the decoder's.
        multimodal_attention: "mmca" or "mmca_reference".
        token_types: of the whole sequence, (batch, tokens, cached ones included), 1 = image.
        inputs_embeds: of the new tokens, (batch, new tokens, hidden).
        attention_mask, cache: as `forward` got them.
        document_ids: (batch or 1, tokens), of packed rows.
        image_queries: how many of the new tokens are image tokens, if that is known.
        training: whether attention dropout applies.
        compiled: whether the decoder layers are compiled for training.

    Returns:
        The decoder's `attention_mask`, four-dimensional, so that the decoder does not build its own; and the mask of each
        layer type.
    """
    dtype, queries = inputs_embeds.dtype, inputs_embeds.shape[1]
    visible = visibilities(text_config, inputs_embeds, attention_mask, cache, document_ids)
    backend = text_config._attn_implementation or "eager"
    placeholders = by_layer_type({kind: key_codes(one, token_types) for kind, one in visible.items()})
    follows_cache = all(isinstance(one.q_offset, torch.Tensor) or one.q_offset > 0 for one in visible.values())
    is_few = queries == 1 or (queries <= _FEW_QUERIES and follows_cache)
    build_fast = getattr(acceleration(), "build_mask", None)
    layers = getattr(cache, "layers", None) or [None]
    build_own = getattr(layers[0], "build_mask", None)  # of a cache that stores tokens in an order of its own

    def build(one: Visibility) -> AttentionMask:
        if build_own is not None and (mask := build_own(one, token_types, layers)) is not None:
            return mask
        if multimodal_attention == "mmca_reference":
            return CodedMask(mmca_reference_codes(one, token_types))
        if is_few or backend == "eager":
            codes = mmca_codes(one, token_types, text_alone=image_queries == 0)
            return DecodeMask.from_codes(codes, dtype) if is_few else CodedMask(codes)
        if build_fast is not None:
            mask = build_fast(one, token_types, text_config, dtype, training, image_queries or 0, compiled)
            if mask is not None:
                return mask
        return BranchMasks.build(one, token_types, backend)

    return placeholders, {kind: build(one) for kind, one in visible.items()}


def decoder_masks(text_config: PreTrainedConfig, inputs_embeds: torch.Tensor, document_ids: torch.Tensor | None) -> Any:
    """An `attention_mask` for the decoder's own attention, without padding and cache, where its positions do not count
    tokens: it would take positions that do not grow by one for packed documents.

    Args:
        text_config: the decoder's.
        inputs_embeds: (batch, tokens, hidden).
        document_ids: (batch, tokens), of packed rows.

    Raises:
        ValueError: if documents cannot be separated in this decoder.
    """
    layer_types = set(getattr(text_config, "layer_types", None) or ())
    if document_ids is not None and (unknown := sorted(layer_types - {*ATTENTION_LAYER_TYPES, "chunked_attention"})):
        raise ValueError(
            f"document_ids cannot be separated by the layers of type {', '.join(unknown)} of text_config.model_type="
            f"{text_config.model_type!r}; pass rows of one conversation each."
        )
    masks = create_masks_for_generate(
        config=text_config,
        inputs_embeds=inputs_embeds,
        attention_mask=None,
        position_ids=None if document_ids is None else token_positions(document_ids),
        **{CACHE: None},
    )
    # None is causal attention, but from a mask of its own the decoder does not look for documents.
    return torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device) if masks is None else masks


def sequence_may_hold_images(token_types: torch.Tensor, cache: Cache | None, new_images: bool | None) -> bool:
    """Whether any token of a sequence may be an image token. The device is asked only if nothing else tells.

    Args:
        token_types: of the whole sequence, (batch, tokens), 1 = image.
        cache: the KV cache, which may remember it.
        new_images: whether any of the new tokens is an image token, if that is known.
    """
    if torch.compiler.is_compiling():
        return True
    cached = None if cache is None else cached_images(cache)
    if new_images or cached:
        return True
    if new_images is not None and (cache is None or cached is not None):
        return False
    return bool((token_types == 1).any())


def by_layer_type(masks: dict[str | None, torch.Tensor]) -> Any:
    """As a decoder takes its `attention_mask`: a dict if it distinguishes layer types, else a tensor."""
    return masks.get(None, masks)


__all__ = ["AttentionMask", "BranchMasks", "CodedMask", "DecodeMask", "Visibility", "build_masks", "visibilities"]
