"""The fastest mask for one layer type of a forward call."""

import torch
from transformers import PreTrainedConfig

from ..masks_dsvl import AttentionMask, Visibility
from .attention.fused_mask import FusedMask
from .attention.gathered_mask import GatheredMask
from .parallel.image_parallelism import split_mask


def build_mask(
    visibility: Visibility,
    token_types: torch.Tensor,
    text_config: PreTrainedConfig,
    dtype: torch.dtype,
    training: bool = False,
    image_queries: int = 0,
    compiled: bool = False,
) -> AttentionMask | None:
    """A mask for many queries under `"mmca"`: for the fused kernels where they apply, else over gathered tokens.

    Args:
        visibility: what transformers lets a query see.
        token_types: (batch, positions up to the last query), 1 = image.
        text_config: the decoder's; `_attn_implementation` is "sdpa" or "flex_attention".
        dtype: of the attention scores.
        training: whether attention dropout applies.
        image_queries: how many of the queries are known to be image tokens; it saves the fused kernels memory.
        compiled: whether the decoder layers are compiled, so that the next batch's mask must fit the same graph.
    """
    split = split_mask()
    if split is not None:
        return split
    fused = FusedMask.build(visibility, token_types, text_config, dtype, training, image_queries, compiled)
    return fused or GatheredMask.build(visibility, token_types, text_config, dtype, compiled)


__all__ = ["build_mask"]
