"""The floating-point operations that a training step at a shape is worth, whichever model computes it, and an attention.

Counted are the matrix products of the mathematics (2 operations a multiplication and addition), not what a program does: no
recomputation for checkpointing, logits of supervised tokens only, every causal pair of the decoder's attention once. Both
models are credited with the same number, so that their MFU differs as their speed does. (MMCA needs fewer pairs than
causal attention, and Llava's projector has a second layer: neither is counted.)
"""

import torch
from models import Shape

# Dense bf16, without sparsity, by the makers' data sheets. First match wins.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312}


def peak_tflops(device: str) -> float | None:
    """What the device could do at best; None if it is not in the table."""
    return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in device), None)


def adapter_channels(shape: Shape) -> int:
    """Inputs and outputs of a decoder layer's linear maps: q, k, v, o (each hidden to hidden), gate, up and down."""
    return 4 * 2 * shape.hidden + 3 * (shape.hidden + shape.intermediate)


def step_flops(shape: Shape, supervised: int, lora_rank: int = 0) -> float:
    """Operations of one training step: forward and backward.

    A map of activations by a weight costs its forward once more for the gradient of its input, if anything before it
    learns, and once more for the gradient of its weight, if that is trained. A product of two activations, as attention has
    two, costs twice its forward.

    Args:
        shape: of models and batch.
        supervised: label tokens of the whole batch.
        lora_rank: of adapters at every linear map of the decoder; 0 for none.
    """
    images, tokens = shape.batch * shape.images, shape.batch * shape.tokens
    image_tokens, width = images * shape.per_image, shape.vision_hidden
    patch_embedding = images * shape.patches * 3 * shape.patch_size**2 * width
    tower_maps = image_tokens * (4 * width**2 + 2 * width * shape.vision_intermediate)
    tower_attention = image_tokens * shape.per_image * 2 * width
    decoder_maps = tokens * (4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate)
    causal_pairs = shape.batch * shape.tokens * (shape.tokens + 1) // 2
    multiplications_and_backward = (
        (patch_embedding + shape.vision_layers * (tower_maps + tower_attention), 0),  # frozen, nothing before it learns
        (image_tokens * width * shape.hidden, 1),  # the projector: its weight
        (shape.layers * decoder_maps, 1),  # frozen: its input
        (shape.layers * causal_pairs * 2 * shape.hidden, 2),  # attention: q k^T and p v, both factors of each
        (shape.layers * tokens * lora_rank * adapter_channels(shape), 2),  # adapters: input and weight
        (supervised * shape.hidden * shape.vocabulary, 1),  # the head, frozen: its input
    )
    return float(sum(2 * count * (1 + backward) for count, backward in multiplications_and_backward))


def attention_pairs(token_types: torch.Tensor, kind: str) -> int:
    """How many scores of a query and a key exist by the definition of an attention.

    Args:
        token_types: (batch, tokens), 1 = image; nothing is padded.
        kind: a `multimodal_attention`. Under "mmca" an image query has none: it is its own value. Under "mmca_reference" it
            sees the text before it; the uniform rows are not counted.
    """
    batch, tokens = token_types.shape
    if kind == "causal":
        return batch * tokens * (tokens + 1) // 2
    is_text = (token_types == 0).long()
    pairs = is_text * torch.arange(1, tokens + 1, device=is_text.device)  # a text query: every key up to its own, in one set
    if kind == "mmca_reference":
        pairs = pairs + (1 - is_text) * is_text.cumsum(1)
    return int(pairs.sum())


def attention_flops(pairs: int, heads: int, head_dim: int, backward: bool) -> float:
    """Operations of one layer's attention: q k^T and p v, and for the backward pass both factors of each."""
    return float(2 * 2 * pairs * heads * head_dim * (3 if backward else 1))


def supervised_tokens(labels: torch.Tensor) -> int:
    """How many tokens of (batch, tokens) labels are learnt; the first of a row has nothing before it to learn it from."""
    return int((labels[:, 1:] != -100).sum())
