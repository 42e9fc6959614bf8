"""Decode steps over a dynamic KV cache: what a step needs is kept from the step before, and not built again.

A generated token is text, so masks only grow, by a text key that all later tokens see. `DecodeSteps` reserves masks and
modality for tokens to come, and hands each step the part that it needs. It calls the decoder directly: the checks of a
forward call's inputs have nothing to find in a step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from ...cache_dsvl import cached_images, cached_positions, cached_types, remember_types
from ...masks_dsvl import AttentionMask, by_layer_type, visibilities
from ...modeling_dsvl import scale_logits
from ...transformers_dsvl import CACHE
from ...utils.cache_cropping import crop
from ...utils.transformers_names import DynamicLayer
from ..attention.few_queries import few_queries, takes_few_queries
from ..decoder_run import layer_types, stored
from ..reuse.shared_images import shares_images

RESERVED = 256  # tokens to come for which masks are reserved at once
# What `generate` hands on to every step, or to the prefill only.
KNOWN_INPUTS = frozenset(
    (
        *(CACHE, "attention_mask", "position_ids", "use_cache", "mm_token_type_ids", "mm_encoder_outputs", "image_cache"),
        *("logits_to_keep", "num_tiles", "pixel_values", "pixel_attention_mask", "spatial_shapes"),
    )
)


@dataclass
class StepMask(AttentionMask):
    """`"mmca"` for the text queries of a step, as `DecodeMask`, by fewer operations: the host's work for each counts.

    Attributes:
        bias: (batch, 2, queries or 1, reserved keys), added to the scores of the text and the image branch: 0 for a member,
            -inf for others; 0 everywhere in an image branch without a member.
        sees: (batch, 2, 1, 1), 0 for such a branch, else 1; None if there is none.
        last: (1, queries), the index of the last key that each query sees, for the kernels; None without them.
    """

    bias: torch.Tensor
    sees: torch.Tensor | None
    last: torch.Tensor | None = None

    def for_queries(self, first: int | torch.Tensor, count: int) -> "StepMask":
        """The mask of `count` queries, the first of which has this index among the keys: of later keys, none is seen."""
        index = first + torch.arange(count, device=self.bias.device)
        is_later = torch.arange(self.bias.shape[-1], device=index.device) > index[:, None]
        return StepMask(self.bias.masked_fill(is_later, -torch.inf), self.sees)

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
    ) -> tuple[torch.Tensor, None]:
        if self.last is not None:
            if takes_few_queries(query, key, value, dropout):
                seen = self.bias, self.sees, self.last, None
                return few_queries(query, key, value, *seen, scaling, softcap or 0.0, None), None
            plain = self.for_queries(self.last[0, 0], query.shape[2])
            return plain.attend(backend, module, query, key, value, scaling=scaling, dropout=dropout, softcap=softcap)
        batch, heads, queries, head_dim = query.shape
        keys = key.shape[2]
        key, value = key.reshape(-1, keys, head_dim), value.reshape(-1, keys, value.shape[-1])
        rows = stored(query.reshape(len(key), -1, head_dim))  # the query heads of each key-value head
        scores = torch.bmm(rows, key.transpose(1, 2)).view(batch, 1, heads * queries, keys)
        bias = self.bias[..., :keys]
        if queries > 1:
            scores, bias = scores.unflatten(2, (heads, queries)), bias[:, :, None]
        if softcap is not None:
            scores, scaling = torch.tanh(scores * (scaling / softcap)), softcap
        weights = torch.add(bias, scores, alpha=scaling).softmax(-1)
        if dropout > 0:
            weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        if self.sees is not None:
            weights = weights * (self.sees if queries == 1 else self.sees[:, :, None])
        weights = stored(weights.sum(1).to(query.dtype).view(len(key), -1, keys))
        output = torch.bmm(weights, value).view(batch, heads, queries, -1)
        return output.transpose(1, 2) if queries > 1 else output.view(batch, 1, heads, -1), None


class DecodeSteps:
    """The steps of a generation after its prefill.

    After every step the KV cache knows the modality of its tokens, and their positions where images share them.

    Args:
        model: a `DSVLForConditionalGeneration`.
        model_kwargs: the arguments that `generate` keeps, after the prefill, of a generation for which `can_step`.
    """

    def __init__(self, model: Any, model_kwargs: dict[str, Any]) -> None:
        self._model, self._decoder = model, model.model.language_model
        self._embeddings = model.get_input_embeddings()
        self._cache, self.held = model_kwargs[CACHE], int(model_kwargs[CACHE].get_seq_length())
        self._positions = model_kwargs["position_ids"][:, -1:].to(self._embeddings.weight.device)
        attention_mask = model_kwargs.get("attention_mask")
        # (batch, reserved tokens) each; None where it is not needed
        self._seen: torch.Tensor | None = None
        if attention_mask is not None and not bool(attention_mask[:, : self.held].all()):
            self._seen = attention_mask[:, : self.held].to(self._positions.device).bool()
        self._types, self._token_positions = cached_types(self._cache), cached_positions(self._cache)
        self._may_hold_images = cached_images(self._cache)
        if model.config.multimodal_attention == "mmca" and self._may_hold_images is None:
            self._may_hold_images = self._types is None or bool((self._types == 1).any())
        self._has_masks = model.config.multimodal_attention == "mmca" and bool(self._may_hold_images)
        self._inputs: dict[str, Any] = {}
        self._reserved = 0

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run a step.

        Args:
            tokens: (batch, new tokens), the last tokens of each row.

        Returns:
            Logits, (batch, new tokens, vocabulary).
        """
        held, new_tokens = self.held, tokens.shape[1]
        self.held += new_tokens
        if self.held > self._reserved:
            self._reserve(held)
        if new_tokens == 1 and self._positions.shape[1] == 1:
            self._positions = self._positions + 1
        else:
            more = torch.arange(1, new_tokens + 1, device=self._positions.device)
            self._positions = self._positions[:, -1:] + more
        inputs = self._inputs
        if self._has_masks:
            by_type = dict.fromkeys(layer_types(self._decoder), self._placeholder[..., : self.held])
            inputs = inputs | {"attention_mask": by_layer_type(by_type)}
            if new_tokens > 1:
                inputs["multimodal_masks"] = dict.fromkeys(by_type, self._mask.for_queries(held, new_tokens))
        elif self._seen is not None:
            inputs = inputs | {"attention_mask": self._seen[:, : self.held]}
        hidden = self._decoder(
            inputs_embeds=self._embeddings(tokens.to(self._positions.device)),
            position_ids=self._positions,
            **inputs,
            **{CACHE: self._cache},
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        if self._types is not None:
            positions = self._token_positions
            if positions is not None:
                positions[:, held : self.held] = self._positions
                positions = positions[:, : self.held]
            remember_types(self._cache, self._types[:, : self.held], self._may_hold_images, positions)
        return scale_logits(self._model.lm_head(hidden), self._model.config.text_config)

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens."""
        if count:
            self.held -= count
            self._positions = self._positions[:, :1] + (self._positions.shape[1] - 1 - count)
            crop(self._cache, self.held)

    def _reserve(self, held: int) -> None:
        """Reserve masks, modality and positions for the tokens after the `held` ones of the cache, and those to come."""
        self._reserved = (self.held // RESERVED + 1) * RESERVED
        more = (0, self._reserved - held)
        if self._seen is not None:
            self._seen = nn.functional.pad(self._seen[:, :held], more, value=True)
        if self._types is not None:
            self._types = nn.functional.pad(self._types[:, :held].to(self._positions.device), more)  # they are text
        if self._token_positions is not None:
            self._token_positions = nn.functional.pad(self._token_positions[:, :held], more)
        if not self._has_masks:
            return
        assert self._types is not None
        members = torch.stack([self._types != 1, self._types == 1], dim=1)
        if self._seen is not None:
            members = members & self._seen[:, None]
        sees = members.any(-1, keepdim=True)
        dtype = torch.promote_types(self._embeddings.weight.dtype, torch.float32)
        bias = torch.zeros(members.shape, dtype=dtype, device=members.device).masked_fill(~members & sees, -torch.inf)
        self._mask = StepMask(bias[:, :, None], None if bool(sees.all()) else sees[:, :, None].to(dtype))
        self._inputs = {"multimodal_masks": dict.fromkeys(layer_types(self._decoder), self._mask)}
        self._placeholder = torch.zeros(len(bias), 1, 1, self._reserved, dtype=torch.int8, device=bias.device)


def can_step(model: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether the steps of a generation can be those of `DecodeSteps`: with a dynamic KV cache in which every token sees all
    tokens before, with no other inputs than a decoder needs, and if nothing is hooked to a `forward` that they do not call.

    Args:
        model: a `DSVLForConditionalGeneration`.
        model_kwargs: the arguments that `generate` keeps, before the prefill.
    """
    cache, image_cache = model_kwargs.get(CACHE), model_kwargs.get("image_cache")
    return (
        isinstance(cache, DynamicCache)
        and not cache.offloading
        and all(isinstance(one, DynamicLayer) and not one.is_sliding for one in cache.layers)
        and not any(hasattr(one, "build_mask") for one in cache.layers)
        and takes_plain_steps(model, model_kwargs)
        and not (image_cache is not None and shares_images(cache, image_cache, model.model))
    )


def takes_plain_steps(model: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether every token sees all tokens before, a step has no other inputs than a decoder needs, and nothing is hooked to
    a `forward` that is not called; the arguments are those of `can_step`."""
    position_ids, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if not (
        model_kwargs.keys() <= KNOWN_INPUTS
        and model_kwargs.get("use_cache")
        and position_ids is not None
        and position_ids.ndim == 2
        and (mask is None or mask.ndim == 2)
        and model.config.multimodal_attention in ("mmca", "causal")
        and not model.model.compiles_layers
        and not any(map(is_hooked, (model, model.model)))
    ):
        return False
    compiled = model.model.image_reuse.compiled
    if compiled is not None and compiled.is_causal:
        return True
    prompt = torch.empty((1, 1, 0), dtype=model.dtype, device=position_ids.device)
    seen = visibilities(model.config.text_config, prompt, None, None)
    return all(one.is_causal and one.local_size is None for one in seen.values())


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module is more than its class's `forward`."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    return any(hooks) or "forward" in vars(module) or module._compiled_call_impl is not None


__all__ = ["KNOWN_INPUTS", "DecodeSteps", "StepMask", "can_step", "is_hooked", "takes_plain_steps"]
