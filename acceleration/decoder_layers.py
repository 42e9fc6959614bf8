"""Decoder layers compiled for training: one graph for all of them, which serves the next batch too."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention.text_queries import TextQueries
from .decoder_run import layers_of
from .memory.frozen_linear import FrozenLinear
from .memory.tiled_mlp import checkpointed_tile, tiles_of


class CompiledDecoderLayers:
    """Compiles the layers of a decoder while it is in training mode.

    Layers of one kind share a graph, and so do batches of one shape, with any number of images (none, too) at any position
    and any labels; a second graph serves all other lengths. The vision tower, the projector and the loss are not compiled.
    In evaluation mode nothing is: every length and every layer's cache would be a graph of its own. Parameters keep their
    names, and nothing of it is saved. A layer whose memory is reduced (memory/tiled_mlp.py, attention/text_queries.py) is
    compiled in parts: attention, norms, and the MLP or a tile of it. Under ZeRO-3, layers must be gathered at once
    (`deepspeed.utils.set_z3_leaf_modules`), as `dsvl train` has it.

    Sets `torch._dynamo.config.optimize_ddp` to False for the process: torch would cut graphs at the buckets of
    `DistributedDataParallel`, which does not work with gradient checkpointing. Gradients are sent between layers anyway.

    Args:
        decoder: the language model.
        options: of `torch.compile`.

    Raises:
        ValueError: if the decoder does not keep its layers in a list `layers`.
    """

    def __init__(self, decoder: PreTrainedModel, options: dict[str, Any]) -> None:
        layers_of(decoder)
        torch._dynamo.config.optimize_ddp = False
        _checkpoint_autograd_functions()
        self.decoder, self.options = decoder, options
        self.others: list[nn.Module] = []  # modules that are not the decoder's

    def switch(self, training: bool) -> None:
        """Use the compiled layers in training mode, the others in evaluation mode."""
        parts = list(self.others)
        for layer in layers_of(self.decoder):
            tiles = tiles_of(layer)
            if tiles is not None:
                tiles.tile = torch.compile(checkpointed_tile, **self.options) if training else checkpointed_tile
            own = compiled_parts(layer)
            if own != [layer]:
                _use_as_written(layer)
            parts += own
        for module in parts:
            if training:
                _compile(module, self.options)
            else:
                _use_as_written(module)


@functools.cache
def _checkpoint_autograd_functions() -> None:
    """Let checkpoints in graphs hold for autograd functions, as of attention and of 8-bit layers, with torch 2.10 and 2.11.

    There the operations of a checkpoint are marked to be computed again, but not those of autograd functions in it, whose
    results are kept from forward to backward. `TagActivationCheckpoint.tag_nodes` (torch/_higher_order_ops/wrap.py) is made
    to mark these as well. It is a method in earlier releases, which mark all, and not there in later ones, which mark what
    runs.
    """
    from torch._functorch.autograd_function import autograd_function_apply
    from torch._higher_order_ops import wrap

    tags: Any = wrap.TagActivationCheckpoint
    tag_nodes = vars(tags).get("tag_nodes")
    if not isinstance(tag_nodes, staticmethod):
        return

    def tag_inner(graph: Any) -> None:
        for node in graph.graph.nodes:
            if node.target is autograd_function_apply:
                forward = graph.get_submodule(node.args[0].target)
                for inner in forward.graph.nodes:
                    inner.meta |= {name: node.meta[name] for name in ("ac_graph_id", "recompute") if name in node.meta}
                tag_inner(forward)

    def tag_all(graph: Any, *args: Any, **kwargs: Any) -> Any:
        tag_inner(tag_nodes.__func__(graph, *args, **kwargs))
        return graph

    tags.tag_nodes = staticmethod(tag_all)


def _compile(module: nn.Module, options: dict[str, Any]) -> None:
    if _gathered_at_once(module):
        if "forward" not in module.__dict__:
            module.forward = torch.compile(module.forward, **options)  # type: ignore[method-assign]
    elif module._compiled_call_impl is None:
        module.compile(**options)


def _use_as_written(module: nn.Module) -> None:
    if _gathered_at_once(module):
        module.__dict__.pop("forward", None)
    module._compiled_call_impl = None


def _gathered_at_once(module: nn.Module) -> bool:
    """Whether ZeRO-3 gathers all weights of a module before it is entered, by hooks, which its graph skips.

    What `deepspeed.utils.z3_leaf_module` returns, which this does not import.
    """
    return getattr(module, "_z3_leaf", False)


def compile_8_bit_tower(model: Any) -> None:
    """Also compile what is in 8 bits in the vision tower of a model whose decoder layers are compiled, in training mode: the
    host would take longer over each rounding than a GPU.

    Args:
        model: a `DSVLForConditionalGeneration`.
    """
    compiled = model.model._compiled_layers
    compiled.others = list(parts_in_8_bits(model.model.vision_tower))
    compiled.switch(model.training)


def parts_in_8_bits(tower: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold linear layers in 8 bits: attention and MLP of each layer. Not whole layers, whose outputs
    transformers collects by hooks that a graph would not run."""
    for module in tower.modules():
        if any(isinstance(child, FrozenLinear) for child in module.children()):
            yield module


def compiled_parts(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that are graphs of their own: the layer itself, if a graph can hold it with its checkpoint."""
    tiles = tiles_of(layer)
    skips_queries = any(isinstance(module.__dict__.get("forward"), TextQueries) for module in layer.children())
    if tiles is None and not skips_queries:
        return [layer]
    return [module for module in layer.children() if tiles is None or module is not tiles.mlp]


__all__ = ["CompiledDecoderLayers", "compile_8_bit_tower", "parts_in_8_bits"]
