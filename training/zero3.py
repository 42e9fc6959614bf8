"""ZeRO-3: which weights are gathered together, and loading without partitions."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..transformers_dsvl import is_deepspeed_zero3_enabled
from ..utils.transformers_names import set_hf_deepspeed_config, unset_hf_deepspeed_config
from .adapters import base_model
from .deepspeed_config import PREFETCHED_LAYERS, weights_at_once, whole_size
from .fsdp import layer_classes, layers


def weights_to_prefetch(model: nn.Module) -> int:
    """The number of weights that ZeRO-3 gathers in advance (`stage3_prefetch_bucket_size`): those of two of the largest
    layers. transformers' "auto" is less than one linear layer (`0.9 * hidden_size ** 2`).

    Args:
        model: partitioned or not.
    """
    return PREFETCHED_LAYERS * max(sum(map(whole_size, one.parameters())) for one in layers(model))


def prefetch_layers(model: nn.Module) -> None:
    """Set `weights_to_prefetch` in transformers' DeepSpeed configuration, if it leaves their number to it ("auto")."""
    configuration = _zero3_configuration()
    zero = {} if configuration is None else configuration.config["zero_optimization"]
    if zero.get("stage3_prefetch_bucket_size") == "auto":
        zero["stage3_prefetch_bucket_size"] = weights_to_prefetch(model)


def gather_layer_by_layer(model: nn.Module) -> None:
    """Have ZeRO-3 gather the weights of a layer before the layer is entered, all at once; and those of a tower, where
    `weights_at_once` says so.

    By itself it gathers linear layer by linear layer, for each of which the host runs hooks and waits for earlier gathers;
    and a layer that gathers within cannot be compiled. A tower's layers are small: the GPU would wait for the host at each.
    A frozen tower runs before the decoder's layers keep anything, so that its weights do not add to the peak of memory.

    Args:
        model: the model, with or without adapters, of which is known what is trained, before `deepspeed.initialize`.
    """
    import deepspeed

    for layer in deepspeed.utils.set_z3_leaf_modules(model, layer_classes(model)):
        layer.register_forward_pre_hook(_let_inputs_have_gradients)
    tower = base_model(model).model.vision_tower
    if weights_at_once(tower):
        deepspeed.utils.set_z3_leaf_module(tower, True)
    # torch's attention, in the pooling head of SigLIP's towers, reads weights of its child. In a forward pass of its engine
    # DeepSpeed notices this by itself, but not in `generate`.
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            for parameter in module.out_proj.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
    _trace_plain_linear_layers()


@functools.cache
def _trace_plain_linear_layers() -> None:
    """Have `torch.compile` trace linear layers as torch's own, where DeepSpeed has its own function for them.

    That function asks in its backward pass whether a weight is partitioned, in a graph by guards on numbers that differ in
    every layer: with torch 2.11 each would be a graph of its own, up to the limit. Of a graph for a whole layer the weights
    are inputs, which it does not keep from forward to backward pass.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    @torch.compiler.substitute_in_graph(zero3_linear_wrap)
    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch._C._nn.linear(input, weight, bias)


def _let_inputs_have_gradients(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let a layer that is trained compute the gradients of its inputs, though nothing before it is trained.

    DeepSpeed reduces the gradients of its weights in a full backward hook (runtime/zero/stage3.py), which torch calls before
    these are computed if no input has a gradient.
    """
    states = inputs[0]
    if not torch.is_grad_enabled() or states.requires_grad or not any(p.requires_grad for p in layer.parameters()):
        return None
    return (states.detach().requires_grad_(), *inputs[1:])


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Load weights unpartitioned while ZeRO-3 is enabled."""
    kept = _zero3_configuration()
    if kept is not None:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            set_hf_deepspeed_config(kept)


def _zero3_configuration() -> Any | None:
    """transformers' DeepSpeed configuration of this process, if it is for ZeRO-3."""
    from ..utils.transformers_names import _hf_deepspeed_config_weak_ref as configuration

    return configuration() if is_deepspeed_zero3_enabled() else None


__all__ = ["gather_layer_by_layer", "prefetch_layers", "weights_to_prefetch", "without_zero3"]
