"""Queries of text tokens alone.

Under `"mmca"` the output of an image token is its own value: its query is multiplied with nothing. With hundreds of images
the projection of these queries is 1/12 of a LLaMA's linear layers. Here the projection runs over text tokens, and the others
get a query of zero. Results and gradients are the same: the gradient of an unused query is zero.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...attention_dsvl import attention_modules
from ...inputs_dsvl import gather_unique_rows


class TextQueries:
    """The `forward` of an attention module, and the hooks of its `q_proj`.

    Only masks with `text_rows` (see `FusedMask` and `GatheredMask`) say which tokens are text; with another one, and for a
    text without images, the projection runs as it is.

    Args:
        attention: the attention module.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention
        replaced = attention.__dict__.get("forward")
        self.forward: Callable = replaced or MethodType(type(attention).forward, attention)
        self.rows: torch.Tensor | None = None
        self.shape: torch.Size | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Find the text tokens in the mask of this layer's type. Not a hook of the attention, which would not be part of its
        compiled graph."""
        masks = kwargs.get("multimodal_masks")
        mask = None if masks is None else masks[getattr(self.attention.config, "_layer_type", None)]
        self.rows = getattr(mask, "text_rows", None)
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.rows = self.shape = None

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
        if isinstance(attention.forward, TextQueries):
            continue
        queries = attention.forward = TextQueries(attention)
        projection.register_forward_pre_hook(queries.gather)
        projection.register_forward_hook(queries.scatter)


__all__ = ["TextQueries", "skip_image_queries"]
