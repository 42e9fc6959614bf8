"""Decoder layers compiled for training: one graph for all of them, which serves the next batch too."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class CompiledDecoderLayers:
    """Compiles the layers of a decoder while it is in training mode.

    Layers of one kind share a graph, and so do batches of one shape, with any number of images (none, too) at any position
    and any labels; a second graph serves all other lengths. The vision tower, the projector and the loss are not compiled.
    In evaluation mode nothing is: every length and every layer's cache would be a graph of its own. Parameters keep their
    names, and nothing of it is saved.

    Sets `torch._dynamo.config.optimize_ddp` to False for the process: torch would cut graphs at the buckets of
    `DistributedDataParallel`, which does not work with gradient checkpointing. Gradients are sent between layers anyway.

    Args:
        decoder: the language model.
        options: of `torch.compile`.

    Raises:
        ValueError: if the decoder does not keep its layers in a list `layers`.
    """

    def __init__(self, decoder: PreTrainedModel, options: dict[str, Any]) -> None:
        if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            raise ValueError(
                f"{type(decoder).__name__} has no list of layers to compile one by one; compile the whole model by "
                "torch.compile."
            )
        torch._dynamo.config.optimize_ddp = False
        self.decoder, self.options = decoder, options

    def switch(self, training: bool) -> None:
        """Use the compiled layers in training mode, the others in evaluation mode."""
        for layer in self.decoder.layers:  # type: ignore[union-attr]
            if not training:
                layer._compiled_call_impl = None
            elif layer._compiled_call_impl is None:
                layer.compile(**self.options)


__all__ = ["CompiledDecoderLayers"]
