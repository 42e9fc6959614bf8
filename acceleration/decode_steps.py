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

from ..cache_dsvl import cached_images, cached_positions, cached_types, remember_types
from ..masks_dsvl import AttentionMask, DecodeMask, by_layer_type, visibilities
from ..modeling_dsvl import scale_logits
from ..transformers_dsvl import CACHE
from ..utils.transformers_names import DynamicLayer
from .decoder_run import layer_types
from .shared_images import shares_images

RESERVED = 256  # tokens to come for which masks are reserved at once; a multiple of 8, as kernels want rows of masks aligned
# Up to this many keys a kernel of sdpa, which reads the keys of a head one after the other, is faster than plain products.
FEW_KEYS = 4096
# What `generate` hands on to every step, or to the prefill only.
KNOWN_INPUTS = frozenset(
    (
        *(CACHE, "attention_mask", "position_ids", "use_cache", "mm_token_type_ids", "mm_encoder_outputs", "image_cache"),
        *("logits_to_keep", "num_tiles", "pixel_values", "pixel_attention_mask", "spatial_shapes"),
    )
)


@dataclass
class StepMask(AttentionMask):
    """`"mmca"` for one text query of each row, on a GPU: the two softmaxes are those of two queries, in one call of sdpa. It
    launches few kernels, which matters where the host is slower than the device.

    Attributes:
        bias: (batch, 1, 2 x group, reserved keys), for the query heads of a key-value head, first in the text branch, then
            in the image branch: 0 for a member, -inf for others; 0 everywhere in an image branch without a member.
        sees: (batch, 1, 2, 1, 1), 0 for such a branch, else 1; None if there is none.
        plain: the same as plain products, for more than `FEW_KEYS`.
    """

    bias: torch.Tensor
    sees: torch.Tensor | None
    plain: DecodeMask

    @classmethod
    def build(cls, plain: DecodeMask, group: int, dtype: torch.dtype) -> "StepMask":
        """From the same mask as plain products.

        Args:
            group: the number of query heads of a key-value head.
            dtype: of the queries.
        """
        bias = plain.bias[:, :, 0, 0, 0].to(dtype).repeat_interleave(group, dim=1)[:, None]
        sees = plain.sees[:, None, :, :, 0, 0].to(dtype)
        return cls(bias, None if bool(sees.all()) else sees, plain)

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
        batch, heads, queries, head_dim = query.shape
        kv_heads, keys = key.shape[1:3]
        group = heads // kv_heads
        if softcap is not None or dropout > 0 or keys > FEW_KEYS or 2 * group != self.bias.shape[2]:
            options: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "softcap": softcap}
            return self.plain.attend(backend, module, query, key, value, **options)
        # The queries of a key-value head, once for each branch, are queries of one head.
        rows = query.view(batch, kv_heads, 1, group, head_dim).expand(-1, -1, 2, -1, -1)
        output = nn.functional.scaled_dot_product_attention(
            rows.reshape(batch, kv_heads, 2 * group, head_dim),
            key,
            value,
            attn_mask=self.bias[..., :keys].to(query.dtype),
            scale=scaling,
        ).view(batch, kv_heads, 2, group, -1)
        if self.sees is not None:
            output = output * self.sees
        return output.sum(2).view(batch, queries, heads, -1), None


def takes_sdpa(config: Any, device: torch.device) -> bool:
    """Whether steps use `StepMask`. On a CPU plain products are faster (two to four times, for 16 rows)."""
    return device.type == "cuda" and config._attn_implementation == "sdpa"


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
        self._cache, self._held = model_kwargs[CACHE], int(model_kwargs[CACHE].get_seq_length())
        self._positions = model_kwargs["position_ids"][:, -1:].to(self._embeddings.weight.device)
        attention_mask = model_kwargs.get("attention_mask")
        is_padded = attention_mask is not None and not bool(attention_mask[:, : self._held].all())
        # (batch, reserved tokens) each; None where it is not needed
        self._seen = attention_mask[:, : self._held].to(self._positions.device).bool() if is_padded else None
        self._types, self._token_positions = cached_types(self._cache), cached_positions(self._cache)
        self._may_hold_images = cached_images(self._cache)
        if model.config.multimodal_attention == "mmca" and self._may_hold_images is None:
            self._may_hold_images = bool((self._types == 1).any())
        self._has_masks = model.config.multimodal_attention == "mmca" and bool(self._may_hold_images)
        self._inputs: dict[str, Any] = {}
        self._reserved = 0

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run a step.

        Args:
            tokens: (batch,), the last token of each row.

        Returns:
            Logits, (batch, vocabulary).
        """
        self._held += 1
        if self._held > self._reserved:
            self._reserve()
        self._positions = self._positions + 1
        inputs = self._inputs
        if self._has_masks:
            by_type = dict.fromkeys(layer_types(self._decoder), self._placeholder[..., : self._held])
            inputs = inputs | {"attention_mask": by_layer_type(by_type)}
        elif self._seen is not None:
            inputs = inputs | {"attention_mask": self._seen[:, : self._held]}
        hidden = self._decoder(
            inputs_embeds=self._embeddings(tokens.to(self._positions.device)[:, None]),
            position_ids=self._positions,
            **inputs,
            **{CACHE: self._cache},
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        if self._types is not None:
            positions = self._token_positions
            if positions is not None:
                positions[:, self._held - 1] = self._positions[:, 0]
                positions = positions[:, : self._held]
            remember_types(self._cache, self._types[:, : self._held], self._may_hold_images, positions)
        return scale_logits(self._model.lm_head(hidden[:, -1]), self._model.config.text_config)

    def _reserve(self) -> None:
        """Reserve masks, modality and positions for this token and those to come."""
        held = self._held - 1
        self._reserved = (self._held // RESERVED + 1) * RESERVED
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
        dtype, config = self._embeddings.weight.dtype, self._decoder.config
        exact = torch.promote_types(dtype, torch.float32)
        bias = torch.zeros(members.shape, dtype=exact, device=members.device).masked_fill(~members & sees, -torch.inf)
        mask: AttentionMask = DecodeMask(*(part[:, :, None, None, None] for part in (bias, sees.to(exact))))
        if takes_sdpa(config, bias.device):
            kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            mask = StepMask.build(mask, config.num_attention_heads // kv_heads, dtype)
        self._inputs = {"multimodal_masks": dict.fromkeys(layer_types(self._decoder), mask)}
        self._placeholder = torch.zeros(len(bias), 1, 1, self._reserved, dtype=torch.int8, device=bias.device)


def can_step(model: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether the steps of a generation can be those of `DecodeSteps`: with a dynamic KV cache in which every token sees all
    tokens before, with no other inputs than a decoder needs, and if nothing is hooked to a `forward` that they do not call.

    Args:
        model: a `DSVLForConditionalGeneration`.
        model_kwargs: the arguments that `generate` keeps, before the prefill.
    """
    cache, position_ids, mask = (model_kwargs.get(name) for name in (CACHE, "position_ids", "attention_mask"))
    if not (
        model_kwargs.keys() <= KNOWN_INPUTS
        and model_kwargs.get("use_cache")
        and isinstance(cache, DynamicCache)
        and not cache.offloading
        and all(isinstance(one, DynamicLayer) and not one.is_sliding for one in cache.layers)
        and not any(hasattr(one, "build_mask") for one in cache.layers)
        and position_ids is not None
        and position_ids.ndim == 2
        and (mask is None or mask.ndim == 2)
        and model.config.multimodal_attention in ("mmca", "causal")
        and not model.model.compiles_layers
        and not any(map(_is_hooked, (model, model.model)))
    ):
        return False
    image_cache = model_kwargs.get("image_cache")
    if image_cache is not None and shares_images(cache, image_cache, model.model):
        return False
    prompt = torch.empty((1, 1, 0), dtype=model.dtype, device=position_ids.device)
    seen = visibilities(model.config.text_config, prompt, None, None)
    return all(one.is_causal and one.local_size is None for one in seen.values())


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module is more than its class's `forward`."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    return any(hooks) or "forward" in vars(module) or module._compiled_call_impl is not None


__all__ = ["DecodeSteps", "StepMask", "can_step"]
