"""Decoder layers compiled for training: one graph for all of them, which serves the next batch too."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .decoder_run import layers_of
from .tiled_mlp import checkpointed_tile, tiles_of


class CompiledDecoderLayers:
    """Compiles the layers of a decoder while it is in training mode.

    Layers of one kind share a graph, and so do batches of one shape, with any number of images (none, too) at any position
    and any labels; a second graph serves all other lengths. The vision tower, the projector and the loss are not compiled.
    In evaluation mode nothing is: every length and every layer's cache would be a graph of its own. Parameters keep their
    names, and nothing of it is saved. A layer whose MLP runs in tiles (tiled_mlp.py) is compiled in parts: attention, norms,
    and a tile of the MLP.

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
        self.decoder, self.options = decoder, options

    def switch(self, training: bool) -> None:
        """Use the compiled layers in training mode, the others in evaluation mode."""
        for layer in layers_of(self.decoder):
            tiles = tiles_of(layer)
            if tiles is not None:
                tiles.tile = torch.compile(checkpointed_tile, **self.options) if training else checkpointed_tile
                layer._compiled_call_impl = None
            for module in [layer] if tiles is None else _parts(layer, tiles.mlp):
                if not training:
                    module._compiled_call_impl = None
                elif module._compiled_call_impl is None:
                    module.compile(**self.options)


def _parts(layer: nn.Module, mlp: nn.Module) -> list[nn.Module]:
    """What is compiled of a layer with a tiled MLP, whose hooks no graph can hold: each of its other modules."""
    return [module for module in layer.children() if module is not mlp]


__all__ = ["CompiledDecoderLayers"]
