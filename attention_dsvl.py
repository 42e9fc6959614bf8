"""Multi-modal causal attention (MMCA): what a query may see, and the attention functions that compute it.

Every token is text or image. For query i let T(i) be the text keys and I(i) the image keys that the decoder's own mask
lets it see (causal, unpadded, inside the window and the packed document). Then (DeepSpeed-VisualChat, arXiv 2309.14327)

    text query   softmax over T(i) . V  +  softmax over I(i) . V      an empty set adds 0
    image query  its own value

No decoder is changed. transformers' mask builders say what is visible (`visibilities`), this file adds the modality, and
the attention modules of the decoder find our functions because the configuration they see is a `RoutedConfig`. Three ways
compute the same thing:

* `FusedMask`, for many queries on an NVIDIA GPU under "sdpa": one kernel (see kernels_dsvl.py).
* `MultimodalMask`, for many queries elsewhere: text queries are gathered once, and the chosen backend (eager, sdpa,
  flex_attention) runs twice, over the gathered text keys and over the gathered image keys. Image queries take part in no
  product.
* `StepMask`, for few queries, as in a decode step: one product, two softmaxes whose weights are added before the values are
  read. A tensor of codes says the same, and is what `"mmca_reference"` is computed by.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, Cache, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kernels_dsvl import FusedMask, can_fuse, fuse_mask, fused_attention
from .visibility_dsvl import HIDDEN, IMAGE, TEXT, ConfigView, Visibility, visible_edges

# Bits of a code: the key takes part in the text softmax, in the image softmax, and ...
IN_TEXT, IN_IMAGE = 1, 2
# ... the row's text (image) softmax is uniform over the keys that take part in it ("mmca_reference" only).
UNIFORM_TEXT, UNIFORM_IMAGE = 4, 8

BACKENDS = ("eager", "sdpa", "flex_attention")


def routed_name(backend: str) -> str:
    """The name under which the decoder's modules find the MMCA function of a backend.

    It is registered in a table that all models of a process share, and the remote code of two checkpoints may be two
    versions of this file: each copy registers under its own module's name.
    """
    return f"mmca_{backend}:{__name__}"


# ----------------------------------------------------------------------------------------------------------------------
# Routing: the decoder's attention modules see a configuration that names our functions.


class RoutedConfig(ConfigView):
    """The view that leads a decoder's attention modules to the MMCA functions."""

    def __init__(self, text_config: PreTrainedConfig, dsvl_config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(text_config)
        # Layers of one type are alike: a graph that is compiled for one of them must not know its number.
        layer_types = getattr(text_config, "layer_types", None)
        self.__dict__.update(_dsvl_config=dsvl_config, _layer_type=layer_types[layer_idx] if layer_types else None)

    @property
    def _attn_implementation(self) -> str:
        backend = self._text_config._attn_implementation or "eager"
        if self._dsvl_config.multimodal_attention == "causal":
            return backend
        if backend not in BACKENDS:
            raise ValueError(
                f"attn_implementation={backend!r} cannot compute multimodal_attention="
                f"{self._dsvl_config.multimodal_attention!r}; choose one of {', '.join(map(repr, BACKENDS))}."
            )
        return routed_name(backend)


def route_attention(language_model: nn.Module, dsvl_config: PreTrainedConfig) -> None:
    """Let every self-attention module of a decoder find the MMCA functions.

    Raises:
        ValueError: if the decoder does not route all of its attention through transformers' `AttentionInterface`.
    """
    modules: list[Any] = [
        module
        for module in language_model.modules()
        if all(hasattr(module, name) for name in ("config", "layer_idx", "is_causal"))
    ]
    layers = dsvl_config.text_config.num_hidden_layers
    if not getattr(language_model, "_supports_attention_backend", False) or len(modules) != layers:
        raise ValueError(
            f"{type(language_model).__name__} cannot carry multimodal_attention={dsvl_config.multimodal_attention!r}: "
            f"{len(modules)} of its {layers} layers route attention through transformers' AttentionInterface; choose "
            "another decoder (Llama, Qwen, Mistral, Gemma, Phi3 ... do), or multimodal_attention='causal'."
        )
    for module in modules:
        module.__dict__["config"] = RoutedConfig(language_model.config, dsvl_config, module.layer_idx)


# ----------------------------------------------------------------------------------------------------------------------
# Masks


def mmca_codes(visibility: Visibility, token_types: torch.Tensor) -> torch.Tensor:
    """`"mmca"` as a dense tensor of codes: (batch, 1, queries, keys), int8."""
    keys = visibility.key_types(token_types)[:, None, None, :]
    visible, own = visibility.dense(), _own_key(visibility)
    codes = (visible & (keys == TEXT)) * IN_TEXT + (visible & (keys == IMAGE)) * IN_IMAGE
    is_image = (_query_types(visibility, token_types) == IMAGE)[:, None, :, None]
    return torch.where(is_image, own * IN_IMAGE, codes).to(torch.int8)


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
    return token_types[:, token_types.shape[1] - visibility.q_length :]


def sees_pictures(token_types: torch.Tensor, past_key_values: Cache | None, known: bool | None = None) -> bool:
    """Whether any key is an image token; what the caller knows of the new tokens, or a cache of its own, is not asked of the
    device again."""
    if torch.compiler.is_compiling():
        return True
    seen = getattr(past_key_values, "sees_pictures", None) is True or known is True
    if not seen and (known is None or past_key_values is not None):
        seen = bool((token_types == 1).any())
    if past_key_values is not None:
        past_key_values.sees_pictures = seen
    return seen


def coded_masks(
    visible: dict[str | None, Visibility], token_types: torch.Tensor, multimodal_attention: str
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The codes of a forward call, as a decoder takes its `attention_mask`: a tensor, or one for each layer type."""
    codes = mmca_reference_codes if multimodal_attention == "mmca_reference" else mmca_codes
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
        members = torch.stack([(codes & bit).bool() for bit in (IN_TEXT, IN_IMAGE)], dim=1)[:, :, :, None]
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
    is_text: torch.Tensor  # (batch, queries); all others, padding too, have their own value
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
        varying = [(self.text_queries, [1]), (self.text_keys, [1]), (self.image_keys, [1]), (self.sees_image, [1])]
        for states, dims in [*varying, (self.text_mask, [2, 3]), (self.image_mask, [2, 3])]:
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
        text_config: the decoder's; `_attn_implementation` is one of `BACKENDS`.
        dtype: the dtype of the attention scores (an additive mask has it).
        training: whether the decoder drops weights, if it is configured to.
        image_queries: how many of the queries are known to be image tokens; it saves the fused kernels memory.
        compiled: whether it is for compiled layers, which are to take the next call's mask too.
    """
    backend = text_config._attn_implementation or "eager"
    key_types = visibility.key_types(token_types)
    q_types = _query_types(visibility, token_types)
    if visibility.padding is not None:
        q_padding = visibility.padding[:, token_types.shape[1] - visibility.q_length : token_types.shape[1]]
        q_types = q_types.masked_fill(~q_padding, HIDDEN)
    is_text = q_types == TEXT
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
    text_queries, _ = _gather_index(is_text, least)
    text_keys, has_text_key = _gather_index(key_types == TEXT, least)
    image_keys, has_image_key = _gather_index(key_types == IMAGE, least)
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
    plainly_causal = visibility.is_causal and same_text and backend != "eager" and not softcapped
    text_mask = None if plainly_causal else build(sees_text, text_keys)
    image_mask, any_image, image_parts = build(sees_image, image_keys), None, None
    if backend == "sdpa":
        if visibility.device.type == "cpu" and not compiled and not torch.compiler.is_compiling():
            image_parts = _image_parts(image_mask)
        any_image = image_mask.any(-1, keepdim=True)
        image_mask = image_mask | ~any_image  # a row without a key is NaN in some kernels; its result is not used
    elif backend == "eager":
        any_image = (image_mask == 0).any(-1, keepdim=True)
    first_row = torch.arange(visibility.batch_size, device=visibility.device)[:, None]
    gathered = MultimodalMask(
        text_queries=text_queries + first_row * visibility.q_length,
        text_keys=text_keys + first_row * visibility.kv_length,
        image_keys=image_keys + first_row * visibility.kv_length,
        is_text=is_text,
        own_key=visibility.query_positions() - visibility.kv_offset,
        text_mask=text_mask,
        image_mask=image_mask,
        sees_image=None if any_image is None else any_image.transpose(1, 2),
        image_parts=image_parts,
    )
    if compiled:
        gathered.let_lengths_vary()
    return gathered


# Fewer queries are not worth a call of their own.
_LEAST_PART = 256


def _image_parts(mask: torch.Tensor) -> list[tuple[int, int, int, torch.Tensor | None]]:
    """Cut a (batch, 1, text queries, image keys) mask where a picture comes into sight: the queries before need not be
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


def _gather_index(members: torch.Tensor, least: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices of each row's members, in order, and which of these slots are filled: both (batch, slots), at least so
    many.

    A slot that is not filled holds some other index of the row, and none twice.
    """
    counts = members.sum(-1)
    # A compiled graph cannot ask how many there are, so it gets a slot for each token.
    slots = members.shape[1] if torch.compiler.is_compiling() else max(int(counts.max()), least)
    index = members.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :slots]
    return index, torch.arange(slots, device=members.device) < counts[:, None]


class _TakeRows(torch.autograd.Function):
    """`rows[index]` of (rows, ...) for an index that names no row twice, so that its backward adds nothing up.

    Autograd's own backward of `index_select` adds atomically, which costs more than the attention.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy(0, index, gradient), None


def take_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`rows[index]` of (rows, ...), for an index that names no row twice."""
    return _TakeRows.apply(rows, index)


# ----------------------------------------------------------------------------------------------------------------------
# Attention functions


def _attention(backend: str) -> Callable:
    """The attention function that the decoder's modules find under the name of `backend`."""

    def mmca_attention_forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        multimodal_masks: dict[str | None, MultimodalMask | FusedMask | StepMask] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # No picture in sight: the decoder's own attention, to the bit.
        if attention_mask is None or getattr(attention_mask, "dtype", None) != torch.int8:
            return _plain_attention(backend, module)(module, query, key, value, attention_mask, **kwargs)
        for unsupported in ("s_aux", "position_bias"):
            if kwargs.get(unsupported) is not None:
                raise ValueError(
                    f"{type(module).__name__} uses {unsupported} in its attention, which MMCA does not define; choose "
                    "another decoder, or multimodal_attention='causal'."
                )
        if multimodal_masks is None:
            if attention_mask.shape[2] != query.shape[2]:  # these are not the codes of its queries
                raise ValueError(
                    f"{type(module).__name__} was not handed multimodal_masks: this decoder's layers do not pass keyword "
                    "arguments on to their attention; choose another decoder, or multimodal_attention='causal'."
                )
            output, weights = _coded_attention(module, query, key, value, attention_mask, **kwargs)
            return output, weights if backend == "eager" else None
        mask = multimodal_masks[getattr(module.config, "_layer_type", None)]
        if isinstance(mask, StepMask):
            output, weights = _step_attention(module, query, key, value, mask, **kwargs)
            return output, weights if backend == "eager" else None
        if isinstance(mask, FusedMask):
            return fused_attention(query, key, value, mask, kwargs["scaling"], kwargs.get("softcap")), None
        if callable(mask):  # an attention of its own (reuse_dsvl.py, text_prefill_dsvl.py)
            return mask(backend, module, query, key, value, **kwargs)
        return _gathered_attention(backend, module, query, key, value, mask, **kwargs)

    return mmca_attention_forward


def _plain_attention(backend: str, module: nn.Module) -> Callable:
    if backend != "eager":
        return ALL_ATTENTION_FUNCTIONS[backend]
    # Each decoder has an eager function of its own, which it hands to the interface as the default.
    return sys.modules[type(module).__module__].eager_attention_forward


def _gathered_attention(
    backend: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MultimodalMask,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """MMCA by two calls of a backend over gathered tokens.

    Args:
        query: (batch, heads, queries, head_dim); key, value: (batch, key-value heads, keys, head_dim).

    Returns:
        (batch, queries, heads, head_dim), and for the eager backend the weights (batch, heads, queries, keys).
    """
    text_query = _take(query, mask.text_queries)

    def branch(keys: torch.Tensor, branch_mask: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if backend == "eager":
            attend = _eager_attention
        else:
            attend = ALL_ATTENTION_FUNCTIONS["sdpa" if branch_mask is None else backend]
        return attend(module, text_query, _take(key, keys), _take(value, keys), branch_mask, **kwargs)

    output, text_weights = branch(mask.text_keys, mask.text_mask)
    if mask.image_parts is None:
        image_output, image_weights = branch(mask.image_keys, mask.image_mask)
    else:
        image_key, image_value, image_weights = _take(key, mask.image_keys), _take(value, mask.image_keys), None
        parts = [output.new_zeros(len(output), last - first, *output.shape[2:]) for first, last, _, _ in mask.image_parts]
        for number, (first, last, keys, part_mask) in enumerate(mask.image_parts):
            if keys:
                states = text_query[:, :, first:last], image_key[:, :, :keys], image_value[:, :, :keys]
                options = kwargs | {"is_causal": False}
                parts[number] = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, part_mask, **options)[0]
        image_output = torch.cat(parts, dim=1)
    if mask.sees_image is not None:
        image_output = torch.where(mask.sees_image, image_output, 0)
        if image_weights is not None:
            image_weights = torch.where(mask.sees_image.transpose(1, 2), image_weights, 0)
    own = (value if value.shape[2] == query.shape[2] else value.index_select(2, mask.own_key)).transpose(1, 2)
    if query.shape[1] != value.shape[1]:
        own = own.repeat_interleave(query.shape[1] // value.shape[1], dim=2)
    spread = _put(output + image_output, mask.text_queries, query.shape[2])
    output = torch.where(mask.is_text[:, :, None, None], spread, own)
    if backend != "eager" or text_weights is None or image_weights is None:
        return output, None
    return output, _dense_weights(mask, key.shape[2], text_weights, image_weights)


def _take(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Tokens of (batch, heads, tokens, head_dim) by their (batch, slots) rows: (batch, heads, slots, head_dim)."""
    tokens = states.transpose(1, 2).flatten(0, 1)  # as a decoder's projections lie in memory
    return take_rows(tokens, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


def _put(states: torch.Tensor, rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """(batch, slots, heads, head_dim) back to the tokens that they were taken from: (batch, tokens, heads, head_dim)."""
    out = states.new_zeros(states.shape[0] * tokens, *states.shape[2:])
    return out.index_copy(0, rows.flatten(), states.flatten(0, 1)).unflatten(0, (-1, tokens))


def _dense_weights(mask: MultimodalMask, keys: int, text_weights: torch.Tensor, image_weights: torch.Tensor) -> torch.Tensor:
    """The two branches' weights in one (batch, heads, queries, keys) tensor, for `output_attentions`."""
    batch, heads, slots, _ = text_weights.shape
    weights = text_weights.new_zeros(batch, heads, slots, keys)
    for rows, branch in ((mask.text_keys, text_weights), (mask.image_keys, image_weights)):
        index = (rows % keys)[:, None, None, :].expand(-1, heads, slots, -1)
        weights = weights.scatter_add(3, index, branch)
    queries = mask.is_text.shape[1]
    weights = _put(weights.transpose(1, 2), mask.text_queries, queries).transpose(1, 2)
    own = weights.new_zeros(queries, keys).scatter(1, mask.own_key[:, None], 1.0)
    return torch.where(mask.is_text[:, None, :, None], weights, own)


def _eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = _softmax(_scores(query, key, scaling, softcap) + _grouped(mask, key), query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return _weighted_values(weights, value)


def _step_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: StepMask,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One product, two softmaxes, and one product of the sum of their weights: keys and values are read once."""
    weights = (_scores(query, key, scaling, softcap)[:, None] + mask.bias[..., : key.shape[2]]).softmax(-1)
    if dropout > 0:
        weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return _weighted_values((weights * mask.sees).sum(1).to(query.dtype), value)


def _coded_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    codes: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One product, two softmaxes: the sum of the text and the image branch, by a (batch, 1, queries, keys) of codes."""
    scores, codes = _scores(query, key, scaling, softcap), _grouped(codes, key)
    weights = torch.zeros((), dtype=query.dtype, device=query.device)
    for member_bit, uniform_bit in ((IN_TEXT, UNIFORM_TEXT), (IN_IMAGE, UNIFORM_IMAGE)):
        members, uniform = (codes & member_bit).bool(), (codes & uniform_bit).bool()
        any_member = members.any(-1, keepdim=True)
        # The released code's uniform rows pass the softmax's gradient on, hence not a plain constant.
        branch = torch.where(uniform, scores - scores.detach(), scores)
        branch = branch.masked_fill(~members & any_member, -torch.inf)
        branch = torch.where(any_member, _softmax(branch, query.dtype), 0)
        weights = weights + nn.functional.dropout(branch, p=dropout, training=module.training)
    return _weighted_values(weights, value)


# Scores and weights are kept as (batch, key-value heads, query heads of each, queries, keys): a key-value head is never
# copied for the queries that share it, which are multiplied with it as if they were more queries of one head.


def _scores(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    batch, heads, queries, head_dim = query.shape
    group = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], group * queries, head_dim) * scaling
    scores = torch.matmul(rows, key.transpose(-1, -2)).unflatten(2, (group, queries))
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _grouped(mask: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return mask[:, :, None, :, : key.shape[2]]


def _softmax(scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(dtype)


def _weighted_values(weights: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, kv_heads, group, queries, _ = weights.shape
    output = torch.matmul(weights.flatten(2, 3), value).view(batch, kv_heads * group, queries, -1)
    return output.transpose(1, 2).contiguous(), weights.flatten(1, 2)


for _backend in BACKENDS:
    AttentionInterface.register(routed_name(_backend), _attention(_backend))
