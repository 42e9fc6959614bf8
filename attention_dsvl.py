"""Multi-modal causal attention (MMCA): the functions that compute it, and how a decoder finds them.

Every token is text or image. For query i let T(i) be the text keys and I(i) the image keys that the decoder's own mask
lets it see (causal, unpadded, inside the window and the packed document). Then (DeepSpeed-VisualChat, arXiv 2309.14327)

    text query   softmax over T(i) . V  +  softmax over I(i) . V      an empty set adds 0
    image query  its own value

No decoder is changed. transformers' mask builders say what is visible (visibility_dsvl.py), masks_dsvl.py adds the modality,
and the attention modules of the decoder find our functions because the configuration they see is a `RoutedConfig`. Three
ways compute the same thing, each by a mask of its own:

* `FusedMask`, for many queries on an NVIDIA GPU under "sdpa": one kernel (see kernels_dsvl.py).
* `MultimodalMask`, for many queries elsewhere: text queries are gathered once, and the chosen backend (sdpa,
  flex_attention) runs twice, over the gathered text keys and over the gathered image keys. Image queries take part in no
  product.
* `StepMask`, for few queries, as in a decode step: one product, two softmaxes whose weights are added before the values are
  read. A tensor of codes says the same; "eager", whose weights a caller may want with their gradients, and
  `"mmca_reference"` are computed by it.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig

from .kernels_dsvl import FusedMask, fused_attention
from .masks_dsvl import IN_IMAGE, IN_TEXT, UNIFORM_IMAGE, UNIFORM_TEXT, MultimodalMask, StepMask
from .transformers_dsvl import ALL_ATTENTION_FUNCTIONS
from .visibility_dsvl import ConfigView

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
        # No image in sight: the decoder's own attention, to the bit.
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
        return _gathered_attention(backend, module, query, key, value, mask, **kwargs), None

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
) -> torch.Tensor:
    """MMCA by two calls of a backend over gathered tokens.

    Args:
        query: (batch, heads, queries, head_dim); key, value: (batch, key-value heads, keys, head_dim).

    Returns:
        (batch, queries, heads, head_dim).
    """
    text_query = _take(query, mask.text_queries)

    def branch(keys: torch.Tensor, branch_mask: Any) -> torch.Tensor:
        attend = ALL_ATTENTION_FUNCTIONS["sdpa" if branch_mask is None else backend]
        return attend(module, text_query, _take(key, keys), _take(value, keys), branch_mask, **kwargs)[0]

    output = branch(mask.text_keys, mask.text_mask)
    if mask.image_parts is None:
        image_output = branch(mask.image_keys, mask.image_mask)
    else:
        image_key, image_value = _take(key, mask.image_keys), _take(value, mask.image_keys)
        parts = []
        for first, last, keys, part_mask in mask.image_parts:
            if keys == 0:
                parts.append(output.new_zeros(len(output), last - first, *output.shape[2:]))
                continue
            states = text_query[:, :, first:last], image_key[:, :, :keys], image_value[:, :, :keys]
            options = kwargs | {"is_causal": False}
            parts.append(ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, part_mask, **options)[0])
        image_output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    sees = mask.sees_image
    output = output + image_output if sees is None else torch.addcmul(output, image_output, sees)
    own = (value if value.shape[2] == query.shape[2] else value.index_select(2, mask.own_key)).transpose(1, 2)
    if query.shape[1] != value.shape[1]:
        own = own.repeat_interleave(query.shape[1] // value.shape[1], dim=2)
    own, rows = own.flatten(0, 1), mask.text_queries.flatten()
    if mask.text_filled is not None:
        output = torch.where(mask.text_filled, output, take_rows(own, rows).view_as(output))
    return own.index_copy(0, rows, output.flatten(0, 1)).unflatten(0, (-1, query.shape[2]))


def _take(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Tokens of (batch, heads, tokens, head_dim) by their (batch, slots) rows: (batch, heads, slots, head_dim)."""
    tokens = states.transpose(1, 2).flatten(0, 1)  # as a decoder's projections lie in memory
    return take_rows(tokens, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


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
    """One product and one softmax, by a (batch, 1, queries, keys) mask that is added to the scores."""
    weights = _softmax(_scores(query, key, scaling, softcap) + _grouped(mask, key), query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return _weighted_values(weights, value)[0]


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
    batch, kv_heads, group, queries, keys = weights.shape
    weights = weights.flatten(1, 2)  # as they are returned: the output depends on this tensor, so that it gets a gradient
    output = torch.matmul(weights.view(batch, kv_heads, group * queries, keys), value)
    return output.view(batch, kv_heads * group, queries, -1).transpose(1, 2).contiguous(), weights


for _backend in BACKENDS:
    AttentionInterface.register(routed_name(_backend), _attention(_backend))
