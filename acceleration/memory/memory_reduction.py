"""Training with hundreds of images in the memory of one GPU: `model.reduce_memory`."""

from typing import Any

from ..attention.text_queries import skip_image_queries as skip_queries
from .activation_offloading import offload_activations
from .tiled_mlp import tile_mlp


def reduce_memory(model: Any, mlp_tile: int | None = None, offload: bool = False, skip_image_queries: bool = False) -> None:
    """Let a decoder train in less memory and time, with the same losses and gradients; meant for activation checkpointing.

    Args:
        model: a `DSVLModel`.
        mlp_tile: run the MLPs over tiles of this number of tokens, *optional*, defaults to None: over all at once.
        offload: keep what is saved for the backward pass (with activation checkpointing, the inputs of the layers) in pinned
            memory of the host, *optional*, defaults to False. The copies overlap with computation.
        skip_image_queries: do not project queries of image tokens, which `"mmca"` does not use, *optional*, defaults to
            False. Applies to "sdpa" and "flex_attention".

    Raises:
        ValueError: if the decoder or its attention do not allow it.
    """
    attention = model.config.multimodal_attention
    if skip_image_queries and attention != "mmca":
        raise ValueError(
            f"multimodal_attention={attention!r} uses the queries of image tokens; omit skip_image_queries, "
            "or choose 'mmca'."
        )
    decoder = model.language_model
    if skip_image_queries:
        skip_queries(decoder)
    if mlp_tile is not None:
        tile_mlp(decoder, mlp_tile)
    if offload:
        offload_activations(decoder)
    if model._compiled_layers is not None:
        model._compiled_layers.switch(model.training)


__all__ = ["reduce_memory"]
