"""`"mmca"` by the fused kernels, where they apply."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...masks_dsvl import IMAGE, TEXT, AttentionMask, Visibility
from .kernel_choice import can_fuse
from .kernels import fused_attention
from .query_intervals import query_intervals
from .token_lists import TokenLists


@dataclass
class FusedMask(AttentionMask):
    """The mask of the fused kernels; all layers of a type share it.

    Attributes:
        lists: tokens by modality, and what each sees.
        dtype: of queries, keys and values in the kernels; under autocast, rotary positions leave float32.
        text_rows: (text queries,), rows of the flattened (batch x queries); None if their number is unknown.
    """

    lists: TokenLists
    dtype: torch.dtype
    text_rows: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        visibility: Visibility,
        token_types: torch.Tensor,
        text_config: PreTrainedConfig,
        dtype: torch.dtype,
        training: bool,
        image_queries: int,
        compiled: bool,
    ) -> "FusedMask | None":
        """For one layer type; None where the kernels do not apply. For the arguments see `masks.build_mask`."""
        if visibility.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        if text_config._attn_implementation != "sdpa" or not can_fuse(text_config, dtype, visibility.device, training):
            return None
        intervals = query_intervals(visibility)
        if intervals is None:
            return None
        key_types = visibility.key_types(token_types)
        is_text = visibility.query_types(token_types) == TEXT
        lists = TokenLists.build(
            is_text,
            key_types == TEXT,
            key_types == IMAGE,
            visibility.query_positions() - visibility.kv_offset,
            *intervals,
            rows=is_text.numel() - image_queries,
        )
        text_rows = None
        if image_queries > 0 or compiled:  # a compiled graph takes batches without images, too
            text_rows = (~is_text).flatten().to(torch.uint8).argsort(stable=True)[: is_text.numel() - image_queries]
        if compiled:
            torch._dynamo.maybe_mark_dynamic(lists.capacity, 0)
            torch._dynamo.maybe_mark_dynamic(text_rows, 0)
        return cls(lists, dtype, text_rows)

    def attend(
        self, backend: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (states.to(self.dtype) for states in (query, key, value))
        return fused_attention(query, key, value, self.lists, kwargs["scaling"], kwargs.get("softcap")), None

    def to(self, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> "FusedMask":
        """Move every tensor. accelerate calls this for a model on several devices."""
        moved = [tensor.to(device, non_blocking=non_blocking) for tensor in self.lists.tensors]
        rows = None if self.text_rows is None else self.text_rows.to(device, non_blocking=non_blocking)
        return FusedMask(TokenLists.of(moved, self.lists.windowed), self.dtype, rows)


__all__ = ["FusedMask"]
