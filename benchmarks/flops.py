"""Floating-point operations (FLOPs) of a training step and of an attention layer.

Counted are the matrix products that the step requires (2 FLOPs for a multiplication and addition), not those that a program
executes: no recomputation for gradient checkpointing, logits of supervised tokens only, each causal pair of the attention
once. Both models get the same number, so that their MFU is proportional to their speed. (That MMCA has fewer pairs than
causal attention is ignored unless `pairs` are given, and that Llava's projector has a second layer in any case.)
"""

import torch
from models import Shape

# Dense bf16 without sparsity, from data sheets. The first match counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312}


def peak_tflops(device: str) -> float | None:
    """Peak TFLOP/s of a device; None if it is not in the table."""
    return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in device), None)


def adapter_channels(shape: Shape) -> int:
    """Sum of input and output widths of a decoder layer's linear layers: q, k, v, o, gate, up and down."""
    return 4 * 2 * shape.hidden + 3 * (shape.hidden + shape.intermediate)


def step_flops(shape: Shape, supervised: int, lora_rank: int = 0, pairs: int | None = None) -> float:
    """FLOPs of a training step, forward and backward.

    The backward pass of a linear layer costs as much as its forward pass for the gradient of its input, if a preceding
    parameter is trained, and the same for the gradient of its weight, if this is trained. The backward pass of a product of
    two activations, as in attention, costs twice its forward pass.

    Args:
        shape: of model and batch.
        supervised: number of supervised tokens of the batch.
        lora_rank: rank of adapters at all linear layers of the decoder; 0 for none.
        pairs: of the batch's attention (`attention_pairs`), *optional*, defaults to those of causal attention.
    """
    images, tokens = shape.batch * shape.images, shape.batch * shape.tokens
    image_tokens, width = images * shape.per_image, shape.vision_hidden
    patch_embedding = images * shape.patches * 3 * shape.patch_size**2 * width
    tower_maps = image_tokens * (4 * width**2 + 2 * width * shape.vision_intermediate)
    tower_attention = image_tokens * shape.per_image * 2 * width
    decoder_maps = tokens * (4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate)
    pairs = shape.batch * shape.tokens * (shape.tokens + 1) // 2 if pairs is None else pairs
    multiplications_and_backward = (
        (
            patch_embedding + shape.vision_layers * (tower_maps + tower_attention),
            0,
        ),  # frozen, and nothing before it is trained
        (image_tokens * width * shape.hidden, 1),  # the projector: its weight
        (shape.layers * decoder_maps, 1),  # frozen: its input
        (shape.layers * pairs * 2 * shape.hidden, 2),  # attention: q k^T and p v, both factors of each
        (shape.layers * tokens * lora_rank * adapter_channels(shape), 2),  # adapters: input and weight
        (supervised * shape.hidden * shape.vocabulary, 1),  # the head, frozen: its input
    )
    return float(sum(2 * count * (1 + backward) for count, backward in multiplications_and_backward))


def attention_pairs(token_types: torch.Tensor, kind: str) -> int:
    """The number of pairs of a query and a key that an attention computes by its definition.

    Args:
        token_types: (batch, tokens), 1 = image, without padding.
        kind: a `multimodal_attention`. With "mmca" an image query has no pairs: its output is its own value. With
            "mmca_reference" it attends to the text before it; rows with a uniform softmax are not counted.
    """
    batch, tokens = token_types.shape
    if kind == "causal":
        return batch * tokens * (tokens + 1) // 2
    is_text = (token_types == 0).long()
    pairs = is_text * torch.arange(1, tokens + 1, device=is_text.device)  # a text query attends to all keys up to itself
    if kind == "mmca_reference":
        pairs = pairs + (1 - is_text) * is_text.cumsum(1)
    return int(pairs.sum())


def attention_flops(pairs: int, heads: int, head_dim: int, backward: bool) -> float:
    """FLOPs of an attention layer: q k^T and p v, and in the backward pass both factors of each."""
    return float(2 * 2 * pairs * heads * head_dim * (3 if backward else 1))


def supervised_tokens(labels: torch.Tensor) -> int:
    """The number of supervised tokens of labels (batch, tokens); the first token of a row is never predicted."""
    return int((labels[:, 1:] != -100).sum())
