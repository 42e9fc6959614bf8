"""MMCA of one text query of each row over a static KV cache, for compiled decode steps: two Triton kernels.

The first reads each key and value once, up to the last one that is seen, and not the whole cache; both softmaxes of MMCA are
rows of one block of queries. A program has the query heads of one key-value head and a part of the keys, as a single row has
too few heads for a GPU (Flash-Decoding; Dao, Haziza, Massa and Sizov, 2023). The second merges the parts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..attention.kernels import MAX_HEAD_DIM, block_width, jit, load_rows, tanh_scores, tl, triton
from ..operators import operator_namespace

PARTS = 64  # of the keys, at most


@jit
def _step_attention_kernel(
    Q, K, V, Bias, Last, Acc, Sums, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_bias, num_heads,
    SM_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_PARTS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Unnormalized outputs, row maxima and row sums of both branches over one part of the keys.

    Names are those of attention/kernels.py. Rows are the query heads of a key-value head for the text keys, then for the
    image keys, BLOCK_G for each branch. num_heads counts key-value heads.
    """
    off_b, off_h = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    rows = tl.arange(0, 2 * BLOCK_G)
    branch, head = rows // BLOCK_G, rows % BLOCK_G
    is_head = head < GROUP_SIZE
    q = load_rows(Q + tl.program_id(0).to(tl.int64) * GROUP_SIZE * HEAD_DIM, head, HEAD_DIM, HEAD_DIM, BLOCK_D, is_head)
    K += off_b.to(tl.int64) * stride_kb + off_h.to(tl.int64) * stride_kh
    V += off_b.to(tl.int64) * stride_vb + off_h.to(tl.int64) * stride_vh
    Bias += (2 * off_b + branch).to(tl.int64) * stride_bias
    num_keys = tl.load(Last).to(tl.int32) + 1
    part = tl.cdiv(tl.cdiv(num_keys, NUM_PARTS), BLOCK_N) * BLOCK_N
    lo = tl.program_id(1) * part
    hi = tl.minimum(lo + part, num_keys)
    acc = tl.zeros([2 * BLOCK_G, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([2 * BLOCK_G], dtype=tl.float32)
    m_i = tl.full([2 * BLOCK_G], float("-inf"), dtype=tl.float32)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < hi
        k = load_rows(K, offs_n, stride_kn, HEAD_DIM, BLOCK_D, mask_n)
        v = load_rows(V, offs_n, stride_vn, HEAD_DIM, BLOCK_D, mask_n)
        bias = tl.load(Bias[:, None] + offs_n[None, :], mask=mask_n[None, :], other=float("-inf"))
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP > 0:
            qk = tanh_scores(qk, SM_SCALE, SOFTCAP) * (SOFTCAP * 1.4426950408889634) + bias
        else:
            qk = qk * (SM_SCALE * 1.4426950408889634) + bias
        m_ij = tl.maximum(m_i, tl.max(qk, 1))
        m_finite = tl.where(m_ij == float("-inf"), 0.0, m_ij)  # a part may have no key of a branch
        p = tl.exp2(qk - m_finite[:, None])
        alpha = tl.exp2(m_i - m_finite)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_ij
    # (batch, heads, branches, parts) rows of HEAD_DIM numbers, and of two
    saved = ((tl.program_id(0) * GROUP_SIZE + head) * 2 + branch).to(tl.int64) * NUM_PARTS + tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(Acc + saved[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=is_head[:, None] & (offs_d < HEAD_DIM)[None, :])
    tl.store(Sums + 2 * saved, m_i, mask=is_head)
    tl.store(Sums + 2 * saved + 1, l_i, mask=is_head)


@jit
def _merge_parts_kernel(
    Acc, Sums, Sees, Out, num_heads, HEAD_DIM: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SEES: tl.constexpr,
):  # fmt: skip
    """The output of one query head, the sum of both branches; num_heads counts query heads."""
    off_b = tl.program_id(0) // num_heads
    offs_d, parts = tl.arange(0, BLOCK_D), tl.arange(0, NUM_PARTS)
    mask_d = offs_d < HEAD_DIM
    out = tl.zeros([BLOCK_D], dtype=tl.float32)
    for branch in tl.static_range(2):
        saved = (tl.program_id(0) * 2 + branch).to(tl.int64) * NUM_PARTS + parts
        m_i, l_i = tl.load(Sums + 2 * saved), tl.load(Sums + 2 * saved + 1)
        acc = tl.load(Acc + saved[:, None] * HEAD_DIM + offs_d[None, :], mask=mask_d[None, :], other=0.0)
        weight = tl.exp2(m_i - tl.max(m_i, 0))
        branch_out = tl.sum(acc * weight[:, None], 0) / tl.sum(l_i * weight, 0)
        if HAS_SEES:
            branch_out *= tl.load(Sees + off_b * 2 + branch).to(tl.float32)
        out += branch_out
    tl.store(Out + tl.program_id(0).to(tl.int64) * HEAD_DIM + offs_d, out.to(Out.dtype.element_ty), mask=mask_d)


def launch_step_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    sees: torch.Tensor | None,
    last: torch.Tensor,
    scaling: float,
    softcap: float,
    parts: int,
    kernels: tuple[Any, Any] = (_step_attention_kernel, _merge_parts_kernel),
) -> torch.Tensor:
    """The attention of one text query of each row.

    Args:
        query: (batch, heads, head_dim), contiguous, bfloat16 or float16.
        key, value: (batch, key-value heads, keys, head_dim), with contiguous channels, in the query's dtype.
        bias: (batch, 2, 1, keys or more), float32, contiguous: of the text and the image branch, 0 for a member and -inf for
            others; 0 everywhere in an image branch without a member.
        sees: (batch, 2, 1, 1), float32, contiguous, 0 for such a branch, else 1; `None` if there is none.
        last: one integer, the index of the last key that is seen. No later one is read.
        scaling, softcap: of the scores; a softcap of 0 is none.
        parts: into how many the keys are divided, a power of two.
        kernels (*optional*): the kernels as they are launched in a compiled graph.

    Returns:
        (batch, heads, head_dim) in the query's dtype.
    """
    batch, heads, head_dim = query.shape
    kv_heads, group_size = key.shape[1], heads // key.shape[1]
    block_d = block_width(head_dim)
    out = torch.empty_like(query)
    acc = query.new_empty((batch, heads, 2, parts, head_dim), dtype=torch.float32)
    sums = query.new_empty((batch, heads, 2, parts, 2), dtype=torch.float32)
    attend, merge = kernels
    # Of 18 block sizes that were timed on an H200, these are within 4 % of the fastest for 1 and 16 rows.
    attend[(batch * kv_heads, parts)](
        *(query, key, value, bias, last, acc, sums, *key.stride()[:3], *value.stride()[:3], bias.stride(1), kv_heads),
        SM_SCALE=scaling,  # known to the kernel: a compiled graph hands over such numbers as float64
        SOFTCAP=softcap,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        NUM_PARTS=parts,
        BLOCK_G=max(8, 1 << (group_size - 1).bit_length()),  # products have 16 rows at least
        BLOCK_N=64 if block_d <= 128 else 32,
        BLOCK_D=block_d,
        PRECISION="ieee",
        num_warps=4,
        num_stages=2,
    )
    merge[(batch * heads,)](
        *(acc, sums, acc if sees is None else sees, out, heads),
        HEAD_DIM=head_dim,
        NUM_PARTS=parts,
        BLOCK_D=block_d,
        HAS_SEES=sees is not None,
        num_warps=4,
    )
    return out


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def number_of_parts(key: torch.Tensor) -> int:
    """Into how many parts the keys of a cache are divided, so that each multiprocessor has two programs: a power of two."""
    batch, kv_heads, keys, _ = key.shape
    wanted = min(2 * multiprocessors(key.device) // (batch * kv_heads), keys // 64, PARTS)
    return 1 << max(0, wanted.bit_length() - 1)


# Without Triton nothing calls it, and `triton_op` warns.
_operator = torch.library.custom_op if triton is None else torch.library.triton_op


@_operator(f"{operator_namespace(__name__)}::step_attention", mutates_args=())
def step_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    sees: torch.Tensor | None,
    last: torch.Tensor,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """See `launch_step_attention`."""
    kernels = tuple(map(torch.library.wrap_triton, (_step_attention_kernel, _merge_parts_kernel)))
    return launch_step_attention(query, key, value, bias, sees, last, scaling, softcap, number_of_parts(key), kernels)


@step_attention.register_fake
def _(query: torch.Tensor, *others: Any) -> torch.Tensor:
    return torch.empty_like(query)


def has_step_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether the kernels compute an attention, where they may: of one query of each row, in 16 bits.

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, key-value heads, keys, head_dim).
        dropout: of the weights.
    """
    head_dim = query.shape[3]
    return (
        query.shape[2] == 1
        and dropout == 0
        and query.dtype == key.dtype == value.dtype
        and value.shape[3] == head_dim <= MAX_HEAD_DIM
        and key.stride(3) == value.stride(3) == 1
    )


__all__ = ["has_step_attention", "launch_step_attention", "step_attention"]
