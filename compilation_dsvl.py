"""The decoder's layers compiled for training: one graph for all of them, which holds for the next batch too."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class DSVLCompilationMixin:
    """What `DSVLModel` does to have its decoder's layers compiled."""

    language_model: PreTrainedModel
    training: bool

    _layer_compilation: dict[str, Any] | None = None  # the options of `torch.compile`, once it was asked for

    @property
    def compiles_layers(self) -> bool:
        """Whether the decoder's layers run compiled as things are."""
        return self._layer_compilation is not None and self.training

    def compile_decoder_layers(self, **options: Any) -> None:
        """Let `torch.compile` have the decoder's layers while the model is in training mode.

        Layers of one kind share a graph, and batches of one shape too, however many images they hold (none, as well),
        wherever these are and whatever is supervised; a second graph takes all other lengths. The vision tower, the
        projector and the loss run as they are written, and so does all of the model in evaluation mode, where every length
        and every layer's cache would be a graph of its own. Parameters keep their names, and nothing of it is saved.

        For all of the process, torch is told not to cut graphs for `DistributedDataParallel` (`optimize_ddp`).

        Args:
            options: of `torch.compile`.

        Raises:
            ValueError: if the decoder does not keep its layers in a list `layers`.
        """
        if not isinstance(getattr(self.language_model, "layers", None), nn.ModuleList):
            raise ValueError(
                f"{type(self.language_model).__name__} has no list of layers to compile one by one; compile the whole model "
                "by torch.compile."
            )
        # Torch would cut a graph where DDP's buckets end, for gradients to be sent early, and refuse one with checkpointing:
        # between layers they are sent early as it is.
        torch._dynamo.config.optimize_ddp = False
        self._layer_compilation = options
        self._switch_layers()

    def _switch_layers(self) -> None:
        """To their compiled form in training mode, and back."""
        if self._layer_compilation is None:
            return
        for layer in self.language_model.layers:
            if not self.training:
                layer._compiled_call_impl = None
            elif layer._compiled_call_impl is None:
                layer.compile(**self._layer_compilation)


__all__ = ["DSVLCompilationMixin"]
