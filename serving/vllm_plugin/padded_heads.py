"""MMCA by padded heads: one ordinary causal attention call of any engine computes both branches.

Behind the D numbers of a key-value head stand, after rotary positions (with marks a and b, see `branch_marks`),

    K' = [K, -b * is_image, -b * is_text, 0, ...]        V' = [V, is_image, 0, ...]

and each query head becomes two of the same key-value head, one for each branch:

    Q_text = [Q, a, 0, 0, ...]        Q_image = [Q, 0, a, 0, ...]

A key of the branch's modality adds exactly 0 to the score, any other -a * b, whose weight underflows to 0. The additional
number of an output is the sum of the weights of image keys: 1 where the image branch sees an image, 0 where it sees none and
is dropped. Image queries take their own value. As the mask is in the keys and values, whatever the engine does with a KV
cache needs no change. The definition is in attention_dsvl.py. This file needs torch alone.
"""

import math

import torch

# Scaled score that another modality's key gets, at least: far below any real score, whose differences are a few hundred.
MARKED_SCORE = 2048.0
# With softcapping it saturates instead: tanh(8) is 1 within float32's rounding, and exp(2 * 8), by which kernels compute it,
# does not overflow.
MARKED_SOFTCAPS = 8.0
# A key of the other modality then keeps a weight of exp(-cap - score), relative to the best of the branch's own. exp(-30)
# times a hundred thousand keys is below float32's rounding; a smaller cap would let the other modality leak in.
LEAST_SOFTCAP = 30.0
# Below 448, the largest number of a KV cache in 8 bits.
LARGEST_KEY_MARK = 256.0
# Numbers behind a head that are used, and heads for each query head.
EXTRA = 2
# What to do with a model that vLLM does not serve.
ELSEWHERE = "Serve this model by dsvl serve --engine transformers."


def branch_marks(scale: float, softcap: float | None = None) -> tuple[float, float]:
    """The marks (a, b) of queries and keys: powers of two, which every floating-point type holds exactly, and whose product
    scales to `MARKED_SCORE` at least, or to `MARKED_SOFTCAPS` times the cap.

    Args:
        scale: what the kernel multiplies scores with.
        softcap: of scores, *optional*; None or 0 if there is none.

    Raises:
        ValueError: for a cap below `LEAST_SOFTCAP`.
    """
    if softcap and softcap < LEAST_SOFTCAP:
        raise ValueError(
            f"attn_logit_softcapping={softcap} is too small for padded heads: a key of the other modality would keep a "
            f"weight of exp(-{softcap}); expected at least {LEAST_SOFTCAP:g}. {ELSEWHERE}"
        )
    exponent = math.ceil(math.log2((MARKED_SOFTCAPS * softcap if softcap else MARKED_SCORE) / scale))
    key_mark = min(2.0 ** (exponent - exponent // 2), LARGEST_KEY_MARK)
    return 2.0**exponent / key_mark, key_mark


def pad_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_image: torch.Tensor,
    padded_size: int,
    marks: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values whose ordinary attention `merge_heads` turns into MMCA's.

    Args:
        query: (tokens, heads, head_dim), after rotary positions.
        key, value: (tokens, key-value heads, head_dim).
        is_image: (tokens,), bool.
        padded_size: at least head_dim + 2, a head size that the kernel takes.
        marks: of `branch_marks`.

    Returns:
        Queries (tokens, 2 * heads, padded_size); keys and values (tokens, key-value heads, padded_size).
    """
    tokens, heads, head_dim = query.shape
    kv_heads, extra = key.shape[1], padded_size - head_dim
    query_mark, key_mark = marks
    branches = query.new_zeros(EXTRA, extra)
    branches.fill_diagonal_(query_mark)
    query = query.view(tokens, kv_heads, 1, heads // kv_heads, head_dim).expand(-1, -1, EXTRA, -1, -1)
    behind = branches[None, None, :, None].expand(tokens, kv_heads, -1, heads // kv_heads, -1)
    image = is_image.to(key.dtype)
    key_marks = torch.stack([image, 1 - image], dim=-1) * -key_mark
    return (
        torch.cat([query, behind], dim=-1).view(tokens, EXTRA * heads, padded_size),
        _append(key, key_marks, padded_size),
        _append(value, image[:, None], padded_size),
    )


def merge_heads(output: torch.Tensor, value: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
    """MMCA's output from that of the padded heads.

    Args:
        output: (tokens, 2 * heads, padded_size).
        value: (tokens, key-value heads, head_dim), as given to `pad_heads`.
        is_image: (tokens,), bool.

    Returns:
        (tokens, heads, head_dim)
    """
    tokens, kv_heads, head_dim = value.shape
    branches = output.view(tokens, kv_heads, EXTRA, -1, output.shape[-1])
    text, image = branches[:, :, 0, :, :head_dim], branches[:, :, 1, :, :head_dim]
    sees_image = branches[:, :, 1, :, head_dim : head_dim + 1] > 0.5
    merged = text + torch.where(sees_image, image, 0)
    own = value[:, :, None].expand_as(merged)
    return torch.where(is_image[:, None, None, None], own, merged).flatten(1, 2)


def _append(states: torch.Tensor, numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers (tokens, any) behind every head of (tokens, heads, head_dim), and zeros up to a size."""
    tokens, heads, head_dim = states.shape
    zeros = numbers.new_zeros(tokens, size - head_dim - numbers.shape[1])
    return torch.cat([states, torch.cat([numbers, zeros], dim=-1)[:, None].expand(-1, heads, -1)], dim=-1)


__all__ = ["ELSEWHERE", "EXTRA", "LEAST_SOFTCAP", "branch_marks", "merge_heads", "pad_heads"]
