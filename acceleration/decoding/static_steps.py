"""Decode steps over a static KV cache, as one compiled function of fixed shapes.

What a step needs besides its tokens is made once, after the prefill: which of the cache's keys are text and image tokens,
and where positions go on. A generated token is text, and later keys are hidden by their index, so nothing changes between
two steps but the tokens and the number of tokens in the cache. The host's work for a step is small, and the graph has few
inputs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, StaticCache

from ...cache_dsvl import cached_images, cached_positions, cached_types, remember_types
from ...masks_dsvl import by_layer_type
from ...modeling_dsvl import scale_logits
from ...transformers_dsvl import CACHE
from ...utils.transformers_names import StaticLayer
from ..attention.kernel_choice import has_step_kernels
from ..decoder_run import layer_types
from ..recording import let_compiled_functions_record
from .decode_steps import StepMask, takes_plain_steps
from .row_product import OneRow


class StaticSteps:
    """The steps of a generation after its prefill, over a KV cache of fixed shape.

    After every step the KV cache knows the modality of its tokens, and their positions where images share them.

    Args:
        model: a `DSVLForConditionalGeneration`.
        model_kwargs: the arguments that `generate` keeps, after the prefill, of a generation for which `can_step_static`.
        run: `run_step`, or what runs it.
    """

    def __init__(self, model: Any, model_kwargs: dict[str, Any], run: Callable) -> None:
        self._model, self._cache, self._run = model, model_kwargs[CACHE], run
        device, capacity = model.get_input_embeddings().weight.device, int(self._cache.layers[0].keys.shape[2])
        self._in_kernel = has_step_kernels(device, model.dtype)
        self.capacity, self.held = capacity, int(self._cache.get_seq_length())
        self._length = torch.tensor(self.held, device=device)
        # Positions go on by one for each token.
        self._offset = model_kwargs["position_ids"][:, -1:].to(device) + 1 - self.held
        mask = model_kwargs.get("attention_mask")
        self._seen: torch.Tensor | None = None  # (batch, capacity); None if every token of the prompt is seen
        if mask is not None and not bool(mask[:, : self.held].all()):
            self._seen = _extended(mask[:, : self.held].to(device).bool(), capacity, value=True)
        types, self._may_hold_images = cached_types(self._cache), cached_images(self._cache)
        self._types = None if types is None else _extended(types[:, : self.held].to(device), capacity, value=0)
        self._token_positions = cached_positions(self._cache)
        if self._token_positions is not None:
            known = self._token_positions[:, : self.held].to(device)
            later = self._offset + torch.arange(self.held, capacity, device=device)
            self._token_positions = torch.cat([known, later.expand(len(known), -1)], dim=1)
        self._bias: torch.Tensor | None = None
        self._sees: torch.Tensor | None = None
        if model.config.multimodal_attention == "mmca":
            self._make_masks()

    @classmethod
    def compiled(cls, model: Any, model_kwargs: dict[str, Any], compile_config: CompileConfig | None) -> "StaticSteps":
        """Steps that are compiled by a configuration; None is the model's way."""
        let_compiled_functions_record(model.device)
        return cls(
            model, model_kwargs, compiled_step(_hashable((compile_config or model._default_compile_config()).to_dict()))
        )

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run a step.

        Args:
            tokens: (batch, new tokens), the last tokens of each row.

        Returns:
            Logits, (batch, new tokens, vocabulary). On a GPU the next step overwrites them.
        """
        logits = self._run(
            *(self._model, self._cache, tokens.to(self._length.device)),
            *(self._length, self._offset, self._seen, self._bias, self._sees),
            self._in_kernel,
        )
        self._go_to(self.held + tokens.shape[1])
        return logits

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens."""
        if count:
            self._go_to(self.held - count)

    def close(self) -> None:
        """Tell the cache how many tokens it holds, after the last step."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self.held)

    def _go_to(self, held: int) -> None:
        self._length = self._length + (held - self.held)
        self.held = held
        if self._types is not None:
            positions = None if self._token_positions is None else self._token_positions[:, :held]
            remember_types(self._cache, self._types[:, :held], self._may_hold_images, positions)

    def _make_masks(self) -> None:
        """The biases of both softmaxes for keys of the prompt, and of all text that may follow."""
        if self._may_hold_images is None and self._types is not None:
            self._may_hold_images = bool((self._types == 1).any())
        if not self._may_hold_images:
            return
        assert self._types is not None  # the prefill has told them
        members = torch.stack([self._types != 1, self._types == 1], dim=1)
        if self._seen is not None:
            members = members & self._seen[:, None]
        sees = members.any(-1, keepdim=True)
        dtype = torch.promote_types(self._model.dtype, torch.float32)
        bias = torch.zeros(members.shape, dtype=dtype, device=members.device).masked_fill(~members & sees, -torch.inf)
        self._bias = bias[:, :, None]
        self._sees = None if bool(sees.all()) else sees[:, :, None].to(dtype)


def run_step(
    model: Any,
    cache: Any,
    tokens: torch.Tensor,
    length: torch.Tensor,
    offset: torch.Tensor,
    seen: torch.Tensor | None,
    bias: torch.Tensor | None,
    sees: torch.Tensor | None,
    in_kernel: bool,
) -> torch.Tensor:
    """The function that is compiled, or recorded: logits of (batch, new tokens).

    Args:
        length: the number of tokens in the cache.
        offset: (batch or 1, 1), the position of a token less its index in the cache.
        seen: (batch, capacity), False where padded.
        bias: (batch, 2, 1, capacity), see `StepMask`, without the mask of later keys.
        sees: see `StepMask`.
        in_kernel: whether kernels compute what they can, see `OneRow` and `StepMask`.
    """
    for layer in cache.layers:  # which may have run further in the step before
        layer.cumulative_length.copy_(length)
    decoder = model.model.language_model
    index = length + torch.arange(tokens.shape[1], device=tokens.device)
    mask: dict[str, Any] = {"attention_mask": seen}
    if bias is not None:
        types = layer_types(decoder)
        whole = StepMask(bias, sees, last=index[None])
        step_mask = whole if in_kernel else whole.for_queries(length, tokens.shape[1])
        placeholder = torch.zeros(len(bias), 1, 1, bias.shape[-1], dtype=torch.int8, device=tokens.device)
        mask = {
            "attention_mask": by_layer_type(dict.fromkeys(types, placeholder)),
            "multimodal_masks": dict.fromkeys(types, step_mask),
        }
    # Entered for one row alone, as not every call is traced within such a mode.
    with OneRow(in_kernel) if tokens.numel() == 1 else nullcontext():
        hidden = decoder(
            inputs_embeds=model.get_input_embeddings()(tokens),
            position_ids=offset + index,
            **mask,
            **{CACHE: cache},
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        return scale_logits(model.lm_head(hidden), model.config.text_config)


@lru_cache
def compiled_step(options: tuple) -> Callable:
    """`run_step`, compiled with these options of `torch.compile`; one for all models, which the compiler tells apart."""
    known: dict[str, Any] = {name: dict(value) if isinstance(value, tuple) else value for name, value in options}
    # Nothing varies within a generation, and with symbols for sizes the step of another batch size would be slower.
    return torch.compile(run_step, **known | {"dynamic": False})


def _hashable(options: dict[str, Any]) -> tuple:
    return tuple((name, tuple(value.items()) if isinstance(value, dict) else value) for name, value in options.items())


def _extended(rows: torch.Tensor, length: int, value: int | bool) -> torch.Tensor:
    """Rows (batch, tokens) for `length` tokens."""
    return nn.functional.pad(rows, (0, length - rows.shape[1]), value=value)


def can_step_static(model: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether the compiled steps of a generation can be those of `StaticSteps`: with a static KV cache without windows, and
    otherwise as `can_step` asks.

    Args:
        model: a `DSVLForConditionalGeneration`.
        model_kwargs: the arguments that `generate` keeps, before the prefill.
    """
    cache = model_kwargs.get(CACHE)
    return (
        isinstance(cache, StaticCache)
        and all(isinstance(layer, StaticLayer) and not layer.is_sliding for layer in cache.layers)
        and model.config.text_config._attn_implementation in ("sdpa", "eager")
        and takes_plain_steps(model, model_kwargs)
    )


__all__ = ["StaticSteps", "can_step_static", "compiled_step", "run_step"]
