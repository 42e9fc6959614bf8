"""Multi-modal causal attention as in DeepSpeed-VisualChat's released code (`multimodal_attention="mmca_reference"`):
N x N score matrices, additive masks, two softmaxes in float32, and one product with the values. Key-value heads are repeated
for grouped queries.
"""

import psutil
import torch


def additive_masks(token_types: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The additive masks of the text and the image softmax, two tensors (batch, 1, tokens, tokens).

    The lowest number is added once for causality and once for modality. If all keys of a modality are masked, those that are
    masked once get equal weights. An image query attends to itself in the image softmax.

    Args:
        token_types: (batch, tokens), 1 = image, without padding.
        dtype: of the scores.
    """
    tokens, lowest = token_types.shape[1], torch.finfo(dtype).min
    hidden = torch.full((tokens, tokens), lowest, dtype=dtype, device=token_types.device)
    is_image = token_types == 1
    text = hidden.triu(1) + is_image[:, None, None, :].to(dtype) * lowest
    image = hidden.triu(1) + (~is_image[:, None, None, :]).to(dtype) * lowest
    return text, torch.where(is_image[:, None, :, None], hidden.fill_diagonal_(0), image)


def released_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masks: tuple[torch.Tensor, torch.Tensor], scaling: float
) -> torch.Tensor:
    """The output (batch, tokens, heads, head_dim) for a query (batch, heads, tokens, head_dim), and keys and values with the
    same number of heads or a fraction of it."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    text, image = ((scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype) for mask in masks)
    return ((text + image) @ value).transpose(1, 2)


def needed_bytes(batch: int, heads: int, tokens: int, dtype: torch.dtype, backward: bool) -> int:
    """An upper bound of the memory of `released_attention` and its masks."""
    float32, own = 4, dtype.itemsize  # bytes per element
    # The backward pass needs both softmaxes in float32, and a gradient of their size.
    per_pair = (3 if backward else 2) * float32 + 4 * own
    return tokens**2 * batch * (heads * per_pair + 3 * own)


def free_bytes() -> int:
    """Free memory of the GPU, or of the machine without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available
