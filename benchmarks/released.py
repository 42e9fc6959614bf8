"""The released arithmetic of multi-modal causal attention, as DeepSpeed-VisualChat computes it, from its definition
(`multimodal_attention="mmca_reference"`): whole N x N matrices of scores, masks that are added to them, two softmaxes in
float32, one product with the values. A key-value head is repeated for the queries that share it.
"""

import psutil
import torch


def additive_masks(token_types: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What is added to the scores of the text and of the image softmax: two (batch, 1, tokens, tokens).

    The lowest number is added once for causality and once for modality. Where all keys of a set are hidden, those that were
    hidden once are left alike, which makes the softmax uniform over them. An image query's image softmax is itself.

    Args:
        token_types: (batch, tokens), 1 = image; nothing is padded.
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
    """(batch, tokens, heads, head_dim) of a query (batch, heads, tokens, head_dim) and its keys and values, which have as
    many heads or a fraction of them."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    text, image = ((scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype) for mask in masks)
    return ((text + image) @ value).transpose(1, 2)


def needed_bytes(batch: int, heads: int, tokens: int, dtype: torch.dtype, backward: bool) -> int:
    """An upper bound of the memory that `released_attention` and its masks take."""
    wide, own = 4, dtype.itemsize  # bytes of a float32 and of a state
    # For the backward pass both softmaxes are kept in float32, and a gradient like them comes to it.
    a_pair = (3 if backward else 2) * wide + 4 * own
    return tokens**2 * batch * (heads * a_pair + 3 * own)


def free_bytes() -> int:
    """Of the GPU's memory if there is one, else of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available
