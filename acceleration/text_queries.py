"""Queries of text tokens alone.

Under `"mmca"` the output of an image token is its own value: its query is multiplied with nothing. With hundreds of images
the projection of these queries is 1/12 of a LLaMA's linear layers. Here the projection runs over text tokens, and the others
get a query of zero. Results and gradients are the same: the gradient of an unused query is zero.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention_dsvl import attention_modules
from ..inputs_dsvl import gather_unique_rows


class TextQueries:
    """The hooks of an attention module and of its `q_proj`.

    Only masks with `text_rows` (see `FusedMask` and `GatheredMask`) say which tokens are text; with another one, and for a
    text without images, the projection runs as it is.
    """

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None
        self.shape: torch.Size | None = None

    def begin(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the attention: find the text tokens in the mask of its layer type."""
        masks = kwargs.get("multimodal_masks")
        mask = None if masks is None else masks[getattr(attention.config, "_layer_type", None)]
        self.rows = getattr(mask, "text_rows", None)

    def gather(self, projection: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """Before the projection: its input without other tokens."""
        if self.rows is None:
            return None
        self.shape = args[0].shape[:-1]
        return (gather_unique_rows(args[0].flatten(0, -2), self.rows),)

    def scatter(self, projection: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """After the projection: a query of zero for the others."""
        if self.rows is None or self.shape is None:
            return None
        queries = output.new_zeros(self.shape.numel(), output.shape[-1]).index_copy(0, self.rows, output)
        return queries.view(*self.shape, -1)

    def end(self, attention: nn.Module, args: tuple, output: Any) -> None:
        """After the attention: keep no tensor."""
        self.rows = self.shape = None


def skip_image_queries(decoder: PreTrainedModel) -> None:
    """Let every attention module of a decoder project the queries of text tokens alone, where its mask allows it.

    Raises:
        ValueError: if its queries have no projection of their own, `q_proj`.
    """
    for attention in attention_modules(decoder):
        projection = getattr(attention, "q_proj", None)
        if not isinstance(projection, nn.Module):
            raise ValueError(
                f"{type(attention).__name__} has no q_proj, so the queries of image tokens cannot be skipped; omit it."
            )
        if any(isinstance(getattr(hook, "__self__", None), TextQueries) for hook in projection._forward_hooks.values()):
            continue
        hooks = TextQueries()
        attention.register_forward_pre_hook(hooks.begin, with_kwargs=True)
        attention.register_forward_hook(hooks.end)
        projection.register_forward_pre_hook(hooks.gather)
        projection.register_forward_hook(hooks.scatter)


__all__ = ["TextQueries", "skip_image_queries"]
