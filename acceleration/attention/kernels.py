"""Fused MMCA kernels in Triton, for NVIDIA GPUs from compute capability 8.0 (Ampere) on. Only Hopper GPUs were measured.

Algorithm: FlashAttention-2 (Dao, 2023, arXiv 2307.08691), with two softmaxes. attention_dsvl.py defines MMCA: the output of
a text query is the sum of two attentions, one over the text keys and one over the image keys that it sees; the output of any
other query is its own value.

- `TokenLists` lists the text queries, text keys and image keys of a sample. What a query sees is one interval of indices in
  each list of keys, and what sees a key is one interval of the list of text queries. A program loops over the blocks of an
  interval only. Full blocks need no mask; the first and last blocks are masked.
- Keys and values are first packed in list order (`_pack_kernel`), so that a block is one load: through a tensor descriptor
  where there is a tensor memory accelerator (`TMA`, Hopper and Blackwell), else by pointers, with asynchronous copies. The
  forward kernel packs the queries and the dQ kernel packs the output gradients, for the dK/dV kernel.
- Forward, for each of the two branches: an online softmax over blocks of keys, with the row maximum `m_i`, the row sum `l_i`
  and the accumulator `acc`. The log-sum-exp `lse` and the output of each branch are saved for the backward pass.
- Backward: `p` is recomputed from `lse`. With `delta = rowsum(dO * O)` of the branch, `dS = p * (dO V^T - delta)`. One
  kernel computes dQ, and another one dK and dV.

No score is written to global memory. Triton comes with the CUDA builds of PyTorch; without it `kernel_choice.py` chooses
other attention. launch_configs.py has the block sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..operators import operator_namespace
from .launch_configs import block_config, device_capability, has_tma
from .token_lists import TokenLists

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = None

MAX_HEAD_DIM = 256
# float32 gives correct results, but is slower than the other implementations: it needs too many registers.
DTYPES = (torch.bfloat16, torch.float16)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels
#
# Names, beside those of FlashAttention:
#   offs_m, offs_n        indices in the lists of queries and keys; idx_m, idx_n are the indices of those tokens
#   Counts                (batch, 4): text queries, text keys, image keys, first row of the sample in the saved tensors
#   branch                0: text keys, 1: image keys
#   total_q               rows of the saved tensors, which hold the text queries of all samples one after the other
#   seqlen_k_rounded      rows of packed keys and values for each head, a multiple of PACK_BLOCK
#   BLOCK_D               HEAD_DIM rounded up to a power of two
#   WINDOWED              whether intervals of keys may start after the first key of a list
#
# Scores, m_i and lse are in units of log2, for exp2. The factor 1.4426950408889634 is log2(e).

# Lengths change with every batch. Triton would compile a kernel again for a length that is 1 or a multiple of 16.
_LENGTHS = ["seqlen_q", "seqlen_k", "total_q", "seqlen_k_rounded"]


def jit(function: Callable, **options: Any) -> Any:
    """`triton.jit`, or the plain function if Triton is not installed."""
    return function if triton is None else triton.jit(function, **options)


def kernel(function: Callable) -> Any:
    """`jit` for a function that is launched, without specialization for lengths."""
    return jit(function, do_not_specialize=[name for name in _LENGTHS if name in function.__code__.co_varnames])


@jit
def load_rows(ptr, index, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, mask):
    """Rows `index` of a matrix of HEAD_DIM columns, as (len(index), BLOCK_D); zero where not `mask`."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + index[:, None].to(tl.int64) * stride + offs_d[None, :]
    if BLOCK_D != HEAD_DIM:
        return tl.load(ptrs, mask=mask[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(ptrs, mask=mask[:, None], other=0.0)


@jit
def _store_rows(ptr, index, stride, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, mask):
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + index[:, None].to(tl.int64) * stride + offs_d[None, :]
    tl.store(ptrs, rows.to(ptr.dtype.element_ty), mask=mask[:, None] & (offs_d < HEAD_DIM)[None, :])


@jit
def _load_block(x, row, start, num_rows, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """Rows row + start to row + start + BLOCK of a packed tensor; by a pointer, rows from `num_rows` on are 0."""
    if TMA:
        return x.load([row + start, 0])
    else:  # noqa: RET505 (Triton compiles what follows a return)
        rows = tl.arange(0, BLOCK)
        ptrs = x + row.to(tl.int64) * BLOCK_D + (start + rows[:, None]) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        return tl.load(ptrs, mask=(rows < num_rows)[:, None], other=0.0)


@jit
def _store_block(x, row, start, rows, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write whole rows row + start to row + start + BLOCK of a packed tensor, as they are read."""
    offs_m = start + tl.arange(0, BLOCK)
    ptrs = x + row.to(tl.int64) * BLOCK_D + offs_m[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptrs, rows.to(x.dtype.element_ty))


@jit
def _load_saved(x, row, start, num_rows, total_q, BLOCK_M: tl.constexpr, TMA: tl.constexpr):
    """lse or delta (2, heads, total_q) of BLOCK_M queries of one branch and head, `row`; as `_load_block`."""
    if TMA:
        return x.load([row, start]).reshape([BLOCK_M])
    else:  # noqa: RET505
        rows = tl.arange(0, BLOCK_M)
        return tl.load(x + row.to(tl.int64) * total_q + start + rows, mask=rows < num_rows, other=0.0)


@jit
def tanh_scores(qk, sm_scale, softcap):
    """tanh(qk * sm_scale / softcap), the capped scores of Gemma 2 before their multiplication by `softcap`."""
    return 2.0 / (1.0 + tl.exp2(qk * (sm_scale * (-2.0 * 1.4426950408889634) / softcap))) - 1.0


@jit
def _in_range(offs, range_lo, range_hi, WINDOWED: tl.constexpr):
    """Whether range_lo <= offs < range_hi, with broadcasting; range_lo is taken as 0 if not WINDOWED."""
    inside = offs < range_hi
    if WINDOWED:
        inside &= offs >= range_lo
    return inside


@jit
def _load_ranges(Lo, Hi, offs, mask, num_others, BLOCK: tl.constexpr, WINDOWED: tl.constexpr):
    """Load the intervals of a block of rows, and find the blocks to loop over.

    Args:
        Lo, Hi: pointers to start and end of the first row's interval. Neither decreases from a row to the next.
        offs, mask: offsets of the rows of the block, and which of them exist.
        num_others: the number of rows that follow the first one.
        BLOCK: size of the blocks to loop over.
        WINDOWED: whether intervals may start after 0.

    Returns:
        range_lo, range_hi: interval of each row.
        lo, full_lo, full_hi, hi: blocks from lo to hi overlap an interval; blocks from full_lo to full_hi lie in all
            intervals and need no mask. All but hi are multiples of BLOCK.
    """
    range_lo, range_hi = tl.load(Lo + offs, mask=mask, other=0), tl.load(Hi + offs, mask=mask, other=0)
    hi, full_hi = tl.load(Hi + num_others), tl.load(Hi) // BLOCK * BLOCK
    lo, full_lo = 0, 0
    if WINDOWED:
        lo = tl.minimum(tl.load(Lo), hi) // BLOCK * BLOCK
        full_lo = (tl.load(Lo + num_others) + BLOCK - 1) // BLOCK * BLOCK
    return range_lo, range_hi, lo, full_lo, full_hi, hi


@kernel
def _pack_kernel(
    X, Packed, Index, Counts, stride_xb, stride_xh, stride_xn, num_heads, seqlen_k, seqlen_k_rounded,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gather keys or values (batch, kv heads, seqlen_k, HEAD_DIM) in list order.

    Packed is (batch, kv heads, seqlen_k_rounded, BLOCK_D). Its rows after the image keys are 0 as far as a block may reach:
    masked rows are multiplied by p = 0, and uninitialized rows may hold NaN.
    """
    start_n, off_b, off_h = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    num_k = tl.load(Counts + off_b * 4 + 1) + tl.load(Counts + off_b * 4 + 2)
    if start_n * BLOCK_N >= num_k + BLOCK_N:
        return
    offs_n = start_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_k
    idx_n = tl.load(Index + off_b * seqlen_k + offs_n, mask=mask_n, other=0)
    X += off_b.to(tl.int64) * stride_xb + off_h.to(tl.int64) * stride_xh
    x = load_rows(X, idx_n, stride_xn, HEAD_DIM, BLOCK_D, mask_n)
    Packed += (off_b * num_heads + off_h).to(tl.int64) * seqlen_k_rounded * BLOCK_D
    _store_rows(Packed, offs_n, BLOCK_D, x, BLOCK_D, BLOCK_D, offs_n < seqlen_k_rounded)


@jit
def _fwd_inner(
    q, packed_k, packed_v, row_k, range_lo, range_hi, lo, full_lo, full_hi, hi, sm_scale, softcap, BLOCK_D: tl.constexpr,
    USE_SOFTCAP: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of queries over the keys of one branch.

    Args:
        row_k: row of the branch's first key in the packed keys and values.
        range_lo, range_hi, lo, full_lo, full_hi, hi: see `_load_ranges`.

    Returns:
        acc, l_i, m_i: unnormalized output, row sum and row maximum.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    for start_n in range(lo, hi, BLOCK_N):
        k = _load_block(packed_k, row_k, start_n, hi - start_n, BLOCK_N, BLOCK_D, TMA)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        # m_i is scaled and qk is not: p then takes one fused multiply-add for each score.
        if USE_SOFTCAP:
            qk, qk_scale = tanh_scores(qk, sm_scale, softcap), softcap * 1.4426950408889634
        else:
            qk_scale = sm_scale * 1.4426950408889634
        if (start_n < full_lo) | (start_n >= full_hi):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            qk = tl.where(_in_range(offs_n[None, :], range_lo[:, None], range_hi[:, None], WINDOWED), qk, float("-inf"))
        m_ij = tl.maximum(m_i, tl.max(qk, 1) * qk_scale)
        m_finite = tl.where(m_ij == float("-inf"), 0.0, m_ij)  # a row may see no key of this branch
        p = tl.exp2(qk * qk_scale - m_finite[:, None])
        alpha = tl.exp2(m_i - m_finite)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = _load_block(packed_v, row_k, start_n, hi - start_n, BLOCK_N, BLOCK_D, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m_i = m_ij
    return acc, l_i, m_i


@kernel
def _fwd_kernel(
    Q, packed_k, packed_v, V, Out, PackedQ, BranchOut, Lse, QIndex, Counts, KRanges, OwnKey,
    stride_qb, stride_qh, stride_qm, stride_vb, stride_vh, stride_vn, sm_scale, softcap,
    num_heads, seqlen_q, total_q, seqlen_k_rounded, GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    USE_SOFTCAP: tl.constexpr, WINDOWED: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Output of one block of queries of one head: attention for text queries, their own value for the others."""
    start_m = tl.num_programs(0) - 1 - tl.program_id(0)  # the blocks with the longest intervals first
    off_b, off_h = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    off_hk = off_h // GROUP_SIZE
    num_text_q = tl.load(Counts + off_b * 4)
    V += off_b.to(tl.int64) * stride_vb + off_hk.to(tl.int64) * stride_vh
    offs_m = start_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, is_text = offs_m < seqlen_q, offs_m < num_text_q
    idx_m = tl.load(QIndex + off_b * seqlen_q + offs_m, mask=mask_m, other=0)
    Out += (off_b.to(tl.int64) * seqlen_q * num_heads + off_h) * HEAD_DIM
    if start_m * BLOCK_M >= num_text_q:
        own_idx = tl.load(OwnKey + off_b * seqlen_q + idx_m, mask=mask_m, other=0)
        own_v = load_rows(V, own_idx, stride_vn, HEAD_DIM, BLOCK_D, mask_m)
        _store_rows(Out, idx_m, num_heads * HEAD_DIM, own_v, HEAD_DIM, BLOCK_D, mask_m)
        return
    Q += off_b.to(tl.int64) * stride_qb + off_h.to(tl.int64) * stride_qh
    q = load_rows(Q, idx_m, stride_qm, HEAD_DIM, BLOCK_D, is_text)
    start_saved = tl.load(Counts + off_b * 4 + 3)
    offs_saved = start_saved + offs_m
    if SAVE:
        _store_block(PackedQ, off_h * total_q + start_saved, start_m * BLOCK_M, q, BLOCK_M, BLOCK_D)
    row_k = (off_b * (num_heads // GROUP_SIZE) + off_hk) * seqlen_k_rounded
    out = tl.zeros([BLOCK_M, BLOCK_D], dtype=Out.dtype.element_ty)
    rows, num_others = tl.arange(0, BLOCK_M), tl.minimum(BLOCK_M, num_text_q - start_m * BLOCK_M) - 1
    for branch in tl.static_range(2):
        Lo = KRanges + (off_b * 4 + 2 * branch) * seqlen_q + start_m * BLOCK_M
        range_lo, range_hi, lo, full_lo, full_hi, hi = _load_ranges(
            Lo, Lo + seqlen_q, rows, mask_m, num_others, BLOCK_N, WINDOWED
        )
        if branch == 1:
            row_k += tl.load(Counts + off_b * 4 + 1)
        acc, l_i, m_i = _fwd_inner(
            q, packed_k, packed_v, row_k, range_lo, range_hi, lo, full_lo, full_hi, hi, sm_scale, softcap, BLOCK_D,
            USE_SOFTCAP, WINDOWED, BLOCK_M, BLOCK_N, PRECISION, TMA,
        )  # fmt: skip
        has_keys = l_i > 0
        acc = acc / tl.where(has_keys, l_i, 1.0)[:, None]
        # The sum of the branches is kept in the output's dtype: it takes half the registers.
        out = (out.to(tl.float32) + acc).to(out.dtype)
        if SAVE:
            # lse = inf makes p = 0 in the backward pass where a row sees no key of this branch.
            lse = tl.where(has_keys, m_i + tl.log2(l_i), float("inf"))
            offs_lse = (branch * num_heads + off_h).to(tl.int64) * total_q + offs_saved
            tl.store(Lse + offs_lse, lse, mask=is_text)
            branch_out = BranchOut + (off_h.to(tl.int64) + branch * total_q * num_heads) * HEAD_DIM
            _store_rows(branch_out, offs_saved, num_heads * HEAD_DIM, acc, HEAD_DIM, BLOCK_D, is_text)
    if start_m * BLOCK_M + BLOCK_M > num_text_q:
        own_idx = tl.load(OwnKey + off_b * seqlen_q + idx_m, mask=mask_m, other=0)
        own_v = load_rows(V, own_idx, stride_vn, HEAD_DIM, BLOCK_D, mask_m & ~is_text)
        out = tl.where(is_text[:, None], out, own_v)
    _store_rows(Out, idx_m, num_heads * HEAD_DIM, out, HEAD_DIM, BLOCK_D, mask_m)


@jit
def _load_delta(do, BranchOut, index, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, mask):
    """delta = rowsum(dO * O) of one branch."""
    o = load_rows(BranchOut, index, stride, HEAD_DIM, BLOCK_D, mask)
    return tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)


@jit
def _recompute_p(qk, lse, sm_scale, softcap, USE_SOFTCAP: tl.constexpr):
    """p from unscaled scores and `lse`, which broadcasts against them; and the derivative of the cap."""
    if USE_SOFTCAP:
        tanh = tanh_scores(qk, sm_scale, softcap)
        p, dcap = tl.exp2(tanh * (softcap * 1.4426950408889634) - lse), 1.0 - tanh * tanh
    else:
        p, dcap = tl.exp2(qk * (sm_scale * 1.4426950408889634) - lse), 1.0
    return p, dcap


@jit
def _bwd_dq_inner(
    dq, q, do, lse, delta, packed_k, packed_v, row_k, range_lo, range_hi, lo, full_lo, full_hi, hi,
    sm_scale, softcap, BLOCK_D: tl.constexpr, USE_SOFTCAP: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    for start_n in range(lo, hi, BLOCK_N):
        k = _load_block(packed_k, row_k, start_n, hi - start_n, BLOCK_N, BLOCK_D, TMA)
        v = _load_block(packed_v, row_k, start_n, hi - start_n, BLOCK_N, BLOCK_D, TMA)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p, dcap = _recompute_p(qk, lse[:, None], sm_scale, softcap, USE_SOFTCAP)
        if (start_n < full_lo) | (start_n >= full_hi):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            p = tl.where(_in_range(offs_n[None, :], range_lo[:, None], range_hi[:, None], WINDOWED), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None]) * dcap
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@kernel
def _bwd_dq_kernel(
    packed_q, packed_k, packed_v, DO, PackedDO, DQ, BranchOut, Lse, Delta, QIndex, Counts, KRanges,
    stride_dob, stride_doh, stride_dom, stride_dqb, stride_dqh, stride_dqm, sm_scale, softcap,
    num_heads, seqlen_q, total_q, seqlen_k_rounded, GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    USE_SOFTCAP: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries of one head: 0 for queries that are not text. Saves delta and packs dO."""
    start_m = tl.num_programs(0) - 1 - tl.program_id(0)
    off_b, off_h = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    off_hk = off_h // GROUP_SIZE
    num_text_q = tl.load(Counts + off_b * 4)
    offs_m = start_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, is_text = offs_m < seqlen_q, offs_m < num_text_q
    idx_m = tl.load(QIndex + off_b * seqlen_q + offs_m, mask=mask_m, other=0)
    DQ += off_b.to(tl.int64) * stride_dqb + off_h.to(tl.int64) * stride_dqh
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if start_m * BLOCK_M < num_text_q:
        start_saved = tl.load(Counts + off_b * 4 + 3)
        row_q = off_h * total_q + start_saved
        q = _load_block(packed_q, row_q, start_m * BLOCK_M, num_text_q - start_m * BLOCK_M, BLOCK_M, BLOCK_D, TMA)
        do_base = DO + off_b.to(tl.int64) * stride_dob + off_h.to(tl.int64) * stride_doh
        do = load_rows(do_base, idx_m, stride_dom, HEAD_DIM, BLOCK_D, is_text)
        _store_block(PackedDO, row_q, start_m * BLOCK_M, do, BLOCK_M, BLOCK_D)
        row_k = (off_b * (num_heads // GROUP_SIZE) + off_hk) * seqlen_k_rounded
        offs_saved = start_saved + offs_m
        text_out = BranchOut + off_h.to(tl.int64) * HEAD_DIM
        image_out = BranchOut + (off_h.to(tl.int64) + total_q * num_heads) * HEAD_DIM
        deltas = (
            _load_delta(do, text_out, offs_saved, num_heads * HEAD_DIM, HEAD_DIM, BLOCK_D, is_text),
            _load_delta(do, image_out, offs_saved, num_heads * HEAD_DIM, HEAD_DIM, BLOCK_D, is_text),
        )
        rows, num_others = tl.arange(0, BLOCK_M), tl.minimum(BLOCK_M, num_text_q - start_m * BLOCK_M) - 1
        for branch in tl.static_range(2):
            Lo = KRanges + (off_b * 4 + 2 * branch) * seqlen_q + start_m * BLOCK_M
            range_lo, range_hi, lo, full_lo, full_hi, hi = _load_ranges(
                Lo, Lo + seqlen_q, rows, mask_m, num_others, BLOCK_N, WINDOWED
            )
            if branch == 1:
                row_k += tl.load(Counts + off_b * 4 + 1)
            offs_lse = (branch * num_heads + off_h).to(tl.int64) * total_q + offs_saved
            lse = tl.load(Lse + offs_lse, mask=is_text, other=float("inf"))
            delta = deltas[branch]
            tl.store(Delta + offs_lse, delta, mask=is_text)
            dq = _bwd_dq_inner(
                dq, q, do, lse, delta, packed_k, packed_v, row_k, range_lo, range_hi, lo, full_lo, full_hi, hi,
                sm_scale, softcap, BLOCK_D, USE_SOFTCAP, WINDOWED, BLOCK_N, PRECISION, TMA,
            )  # fmt: skip
    dq = tl.where(is_text[:, None], dq * sm_scale, 0.0)
    _store_rows(DQ, idx_m, stride_dqm, dq, HEAD_DIM, BLOCK_D, mask_m)


@jit
def _bwd_dkdv_inner(
    dk, dv, k, v, packed_q, packed_do, Lse, Delta, row_q, row_lse, start_saved, range_lo, range_hi,
    lo, full_lo, full_hi, hi, sm_scale, softcap, total_q, BLOCK_D: tl.constexpr, USE_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Transposed: scores and p are (BLOCK_N, BLOCK_M)."""
    for start_m in range(lo, hi, BLOCK_M):
        q = _load_block(packed_q, row_q, start_m, hi - start_m, BLOCK_M, BLOCK_D, TMA)
        do = _load_block(packed_do, row_q, start_m, hi - start_m, BLOCK_M, BLOCK_D, TMA)
        lse = _load_saved(Lse, row_lse, start_saved + start_m, hi - start_m, total_q, BLOCK_M, TMA)
        delta = _load_saved(Delta, row_lse, start_saved + start_m, hi - start_m, total_q, BLOCK_M, TMA)
        kq = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p, dcap = _recompute_p(kq, lse[None, :], sm_scale, softcap, USE_SOFTCAP)
        if (start_m < full_lo) | (start_m >= full_hi):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            p = tl.where(_in_range(offs_m[None, :], range_lo[:, None], range_hi[:, None], True), p, 0.0)
            delta = tl.where(offs_m < hi, delta, 0.0)  # uninitialized after the last text query
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :]) * dcap
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@kernel
def _bwd_dkdv_kernel(
    packed_q, packed_k, packed_v, packed_do, DO, DK, DV, Lse, Delta,
    KIndex, Counts, QRanges, OwnKey, stride_dob, stride_doh, stride_dom,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, sm_scale, softcap,
    num_heads, seqlen_q, seqlen_k, seqlen_k_rounded, total_q, GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    USE_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys of one kv head. A block holds text keys, or image and hidden keys."""
    num_kv_heads = num_heads // GROUP_SIZE
    off_b, off_hk = tl.program_id(1) // num_kv_heads, tl.program_id(1) % num_kv_heads
    num_text_k = tl.load(Counts + off_b * 4 + 1)
    block_n, num_text_blocks = tl.program_id(0), (num_text_k + BLOCK_N - 1) // BLOCK_N
    branch = (block_n >= num_text_blocks).to(tl.int32)
    branch_start = tl.where(branch == 1, num_text_k, 0)
    branch_len = tl.where(branch == 1, seqlen_k - num_text_k, num_text_k)
    start_n = (block_n - branch * num_text_blocks) * BLOCK_N  # from branch_start on
    if start_n >= branch_len:
        return
    rows = tl.arange(0, BLOCK_N)
    mask_n = start_n + rows < branch_len
    idx_n = tl.load(KIndex + off_b * seqlen_k + branch_start + start_n + rows, mask=mask_n, other=0)
    Lo = QRanges + off_b * 2 * seqlen_k + branch_start + start_n
    # Hidden keys are last in the list, and no query sees them.
    num_visible = tl.minimum(tl.where(branch == 1, tl.load(Counts + off_b * 4 + 2), num_text_k) - start_n, BLOCK_N)
    range_lo, range_hi, lo, full_lo, full_hi, hi = _load_ranges(
        Lo, Lo + seqlen_k, rows, mask_n, tl.maximum(num_visible - 1, 0), BLOCK_M, True
    )
    hi = tl.where(num_visible > 0, hi, 0)
    row_k = (off_b * num_kv_heads + off_hk) * seqlen_k_rounded + branch_start
    k = _load_block(packed_k, row_k, start_n, num_visible, BLOCK_N, BLOCK_D, TMA)
    v = _load_block(packed_v, row_k, start_n, num_visible, BLOCK_N, BLOCK_D, TMA)
    start_saved = tl.load(Counts + off_b * 4 + 3)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    # The output of a query that is not text is its own value, whose gradient is the query's dO.
    own_query = idx_n - tl.load(OwnKey + off_b * seqlen_q)
    is_own = mask_n & (own_query >= 0) & (own_query < seqlen_q) & (branch == 1)
    for off_g in range(0, GROUP_SIZE):
        off_h = off_hk * GROUP_SIZE + off_g
        dk, dv = _bwd_dkdv_inner(
            dk, dv, k, v, packed_q, packed_do, Lse, Delta, off_h * total_q + start_saved,
            branch * num_heads + off_h, start_saved, range_lo, range_hi, lo, full_lo, full_hi, hi, sm_scale, softcap,
            total_q, BLOCK_D, USE_SOFTCAP, BLOCK_M, PRECISION, TMA,
        )  # fmt: skip
    dk = tl.where((rows < num_visible)[:, None], dk, 0.0)
    dv = tl.where((rows < num_visible)[:, None], dv, 0.0)
    if branch == 1:
        for off_g in range(0, GROUP_SIZE):
            off_h = off_hk * GROUP_SIZE + off_g
            do = DO + off_b.to(tl.int64) * stride_dob + off_h.to(tl.int64) * stride_doh
            dv += load_rows(do, own_query, stride_dom, HEAD_DIM, BLOCK_D, is_own).to(tl.float32)
    DK += off_b.to(tl.int64) * stride_dkb + off_hk.to(tl.int64) * stride_dkh
    DV += off_b.to(tl.int64) * stride_dvb + off_hk.to(tl.int64) * stride_dvh
    _store_rows(DK, idx_n, stride_dkn, dk * sm_scale, HEAD_DIM, BLOCK_D, mask_n)
    _store_rows(DV, idx_n, stride_dvn, dv, HEAD_DIM, BLOCK_D, mask_n)


# ----------------------------------------------------------------------------------------------------------------------
# Launching


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of (batch, heads, seqlen, head_dim), whose last stride is 1."""
    return x.stride(0), x.stride(1), x.stride(2)


def _contiguous_last_dim(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"


# Rows that a program of _pack_kernel writes. The length of packed keys and values is a multiple of it; no block is larger.
PACK_BLOCK = 128


def _pack(x: torch.Tensor, lists: TokenLists) -> torch.Tensor:
    """Gather keys or values (batch, kv heads, seqlen_k, head_dim) in list order; see `_pack_kernel`."""
    x = _contiguous_last_dim(x)
    batch, num_kv_heads, seqlen_k, head_dim = x.shape
    packed = empty_packed(x)
    seqlen_k_rounded, block_d = packed.shape[2:]
    _pack_kernel[(seqlen_k_rounded // PACK_BLOCK, batch * num_kv_heads)](
        x, packed, lists.keys, lists.counts, *_strides(x), num_kv_heads, seqlen_k, seqlen_k_rounded,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_N=PACK_BLOCK, num_warps=8,
    )  # fmt: skip
    return packed


def block_width(head_dim: int) -> int:
    """BLOCK_D."""
    return max(1 << (head_dim - 1).bit_length(), 16)


def empty_packed(x: torch.Tensor) -> torch.Tensor:
    """Allocate the packed form of keys or values (batch, kv heads, seqlen_k, head_dim)."""
    batch, heads, seqlen, head_dim = x.shape
    return x.new_empty(batch, heads, -(-seqlen // PACK_BLOCK) * PACK_BLOCK, block_width(head_dim))


def empty_outputs(query: torch.Tensor, total_q: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate what the forward pass returns, with `total_q` rows of what it saves.

    Returns:
        out: (batch, seqlen_q, heads, head_dim)
        packed_q: (1, heads, total_q, BLOCK_D), the text queries.
        branch_out: (2, total_q, heads, head_dim), output of each branch for the text queries.
        lse: (2, heads, total_q) float32, log-sum-exp of each branch for the text queries.
    """
    batch, num_heads, seqlen_q, head_dim = query.shape
    return (
        query.new_empty(batch, seqlen_q, num_heads, head_dim),
        query.new_empty(1, num_heads, total_q, block_width(head_dim)),
        query.new_empty(2, total_q, num_heads, head_dim),
        query.new_empty(2, num_heads, total_q, dtype=torch.float32),
    )


def empty_gradients(
    gradient: torch.Tensor, key: torch.Tensor, seqlen_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate the gradients of query, key and value, in the memory layout of a decoder's projections.

    Args:
        gradient: (batch, seqlen_q, heads, head_dim), gradient of the output.
        key: the packed keys.
        seqlen_k: the number of keys.
    """
    batch, seqlen_q, num_heads, head_dim = gradient.shape
    dq = gradient.new_empty(batch, seqlen_q, num_heads, head_dim).transpose(1, 2)
    dk, dv = (gradient.new_empty(batch, seqlen_k, key.shape[1], head_dim).transpose(1, 2) for _ in range(2))
    return dq, dk, dv


def _row_blocks(packed: torch.Tensor, block_rows: int, tma: bool) -> Any:
    """A packed tensor; with the tensor memory accelerator, its descriptor that loads `block_rows` rows."""
    if not tma:
        return packed
    block_d = packed.shape[3]
    return TensorDescriptor(packed, [packed.numel() // block_d, block_d], [block_d, 1], [block_rows, block_d])


def _lse_blocks(x: torch.Tensor, block_m: int, tma: bool) -> Any:
    """lse or delta (2, heads, total_q), or its descriptor that loads `block_m` queries of one branch and head."""
    if not tma:
        return x
    total_q = x.shape[2]
    return TensorDescriptor(x, [x.numel() // total_q, total_q], [total_q, 1], [1, block_m])


def _check_arguments(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lists: TokenLists) -> None:
    if key.shape != value.shape or query.shape[3] != key.shape[3] or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "The fused kernels need queries, keys and values of one head_dim and dtype, and as many values as keys; got a "
            f"query {tuple(query.shape)} {query.dtype}, a key {tuple(key.shape)} {key.dtype} and a value "
            f"{tuple(value.shape)} {value.dtype}. Use attn_implementation='eager' or 'flex_attention'."
        )
    if query.shape[3] > MAX_HEAD_DIM or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"The fused kernels need a head_dim of up to {MAX_HEAD_DIM} and a number of heads that is a multiple of the "
            f"number of key-value heads; got a query {tuple(query.shape)} and a key {tuple(key.shape)}. "
            "Use attn_implementation='eager' or 'flex_attention'."
        )
    listed = tuple(lists.queries.shape), tuple(lists.keys.shape)
    if listed != ((query.shape[0], query.shape[2]), (key.shape[0], key.shape[2])):
        raise ValueError(
            f"The token lists are for queries {listed[0]} and keys {listed[1]} of shape (batch, seqlen); got a query "
            f"{tuple(query.shape)} and a key {tuple(key.shape)}. Build the lists from the inputs of this forward call."
        )


def launch_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: TokenLists,
    scaling: float,
    softcap: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels of the forward pass; for the arguments see `fused_attention`.

    Returns:
        The output; and packed queries, keys and values, branch outputs and lse, which `launch_backward` takes. What only the
        backward pass needs has no rows if not `save`.
    """
    _check_arguments(query, key, value, lists)
    query, value = _contiguous_last_dim(query), _contiguous_last_dim(value)
    batch, num_heads, seqlen_q, head_dim = query.shape
    packed_k, packed_v = _pack(key, lists), _pack(value, lists)
    capability = device_capability(query.device)
    config, tma = block_config("fwd", packed_k, capability), has_tma(capability)
    total_q = lists.rows if save else 0
    out, packed_q, branch_out, lse = empty_outputs(query, total_q)
    _fwd_kernel[(triton.cdiv(seqlen_q, config.block_m), batch * num_heads)](
        query, _row_blocks(packed_k, config.block_n, tma), _row_blocks(packed_v, config.block_n, tma), value, out, packed_q,
        branch_out, lse, lists.queries, lists.counts, lists.key_ranges, lists.own_key, *_strides(query), *_strides(value),
        scaling, softcap, num_heads, seqlen_q, total_q, packed_k.shape[2],
        GROUP_SIZE=num_heads // key.shape[1], HEAD_DIM=head_dim, BLOCK_D=packed_k.shape[3], USE_SOFTCAP=softcap > 0,
        WINDOWED=lists.windowed, SAVE=save, PRECISION=_precision(query.dtype), TMA=tma, **config.options,
    )  # fmt: skip
    return out, packed_q, packed_k, packed_v, branch_out, lse


def launch_backward(
    out_gradient: torch.Tensor, saved: Sequence[torch.Tensor], lists: TokenLists, scaling: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels of the backward pass.

    Args:
        out_gradient: (batch, seqlen_q, heads, head_dim)
        saved: what `launch_forward` returned after the output.
        lists, scaling, softcap: the same as in the forward pass.

    Returns:
        The gradients of query, key and value.
    """
    packed_q, packed_k, packed_v, branch_out, lse = saved
    do = _contiguous_last_dim(out_gradient.transpose(1, 2))
    batch, num_heads, seqlen_q, head_dim = do.shape
    num_kv_heads, seqlen_k = packed_k.shape[1], lists.keys.shape[1]
    total_q, seqlen_k_rounded = lists.rows, packed_k.shape[2]
    delta, packed_do = torch.empty_like(lse), torch.empty_like(packed_q)
    dq, dk, dv = empty_gradients(out_gradient, packed_k, seqlen_k)
    capability = device_capability(do.device)
    tma = has_tma(capability)
    constants = dict(
        GROUP_SIZE=num_heads // num_kv_heads, HEAD_DIM=head_dim, BLOCK_D=packed_q.shape[3], USE_SOFTCAP=softcap > 0,
        PRECISION=_precision(packed_q.dtype), TMA=tma,
    )  # fmt: skip
    config = block_config("bwd_dq", packed_q, capability)
    _bwd_dq_kernel[(triton.cdiv(seqlen_q, config.block_m), batch * num_heads)](
        _row_blocks(packed_q, config.block_m, tma), _row_blocks(packed_k, config.block_n, tma),
        _row_blocks(packed_v, config.block_n, tma), do, packed_do, dq, branch_out, lse, delta, lists.queries,
        lists.counts, lists.key_ranges, *_strides(do), *_strides(dq), scaling, softcap, num_heads, seqlen_q, total_q,
        seqlen_k_rounded, WINDOWED=lists.windowed, **constants, **config.options,
    )  # fmt: skip
    config = block_config("bwd_dkdv", packed_q, capability)
    # One program more than there are blocks of keys: the last block of text keys may be partial.
    _bwd_dkdv_kernel[(triton.cdiv(seqlen_k, config.block_n) + 1, batch * num_kv_heads)](
        _row_blocks(packed_q, config.block_m, tma), _row_blocks(packed_k, config.block_n, tma),
        _row_blocks(packed_v, config.block_n, tma), _row_blocks(packed_do, config.block_m, tma), do, dk, dv,
        _lse_blocks(lse, config.block_m, tma), _lse_blocks(delta, config.block_m, tma), lists.keys, lists.counts,
        lists.query_ranges, lists.own_key, *_strides(do), *_strides(dk), *_strides(dv), scaling, softcap, num_heads,
        seqlen_q, seqlen_k, seqlen_k_rounded, total_q, **constants, **config.options,
    )  # fmt: skip
    return dq, dk, dv


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, lists: TokenLists, scaling: float, softcap: float
    ) -> torch.Tensor:
        with torch.cuda.device_of(query):
            out, *saved = launch_forward(query, key, value, lists, scaling, softcap, save=True)
        ctx.save_for_backward(*saved)
        ctx.options = lists, scaling, softcap
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        with torch.cuda.device_of(gradient):
            return *launch_backward(gradient, ctx.saved_tensors, *ctx.options), None, None, None


# The same as custom operators, which torch.compile does not trace.
_NAMESPACE = operator_namespace(__name__)


@torch.library.custom_op(f"{_NAMESPACE}::mmca", mutates_args=())
def mmca(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: list[torch.Tensor],
    windowed: bool,
    scaling: float,
    softcap: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch_forward(query, key, value, TokenLists.of(lists, windowed), scaling, softcap, save)


@mmca.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lists: Any, *options: Any) -> Any:
    save = options[-1]
    out, packed_q, branch_out, lse = empty_outputs(query, lists[-1].shape[0] if save else 0)
    return out, packed_q, empty_packed(key), empty_packed(value), branch_out, lse


@torch.library.custom_op(f"{_NAMESPACE}::mmca_backward", mutates_args=())
def mmca_backward(
    gradient: torch.Tensor,
    saved: list[torch.Tensor],
    lists: list[torch.Tensor],
    windowed: bool,
    scaling: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch_backward(gradient, saved, TokenLists.of(lists, windowed), scaling, softcap)


@mmca_backward.register_fake
def _(gradient: torch.Tensor, saved: Any, lists: Any, *options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_gradients(gradient, saved[1], lists[1].shape[1])


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, lists, *options, save = inputs
    ctx.save_for_backward(*lists, *output[1:])
    ctx.options = options


def _compiled_backward(ctx: Any, gradient: torch.Tensor, *unused: Any) -> tuple:
    tensors = ctx.saved_tensors  # gradient checkpointing allows only one access
    lists, saved = list(tensors[:-5]), list(tensors[-5:])
    gradients = mmca_backward(gradient, saved, lists, *ctx.options)
    return *gradients, [None] * len(lists), None, None, None, None  # a list for the list argument


mmca.register_autograd(_compiled_backward, setup_context=_save_for_backward)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: TokenLists,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """MMCA of one decoder layer.

    Args:
        query (`torch.Tensor` of shape (batch, heads, seqlen_q, head_dim)): bfloat16, float16 or float32, on an NVIDIA GPU.
        key, value (`torch.Tensor` of shape (batch, key-value heads, seqlen_k, head_dim)): of the same dtype.
        lists (`TokenLists`): tokens by modality, and what each sees. Layers of one type share them.
        scaling (`float`): factor of the products of queries and keys.
        softcap (`float`, *optional*, defaults to `None`): cap of the scores, by softcap * tanh(scores / softcap).

    Returns:
        `torch.Tensor` of shape (batch, seqlen_q, heads, head_dim).

    Raises:
        ValueError: if shapes or dtypes do not fit each other or the lists, or head_dim exceeds `MAX_HEAD_DIM`. In a compiled
            graph, at run time.
    """
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    options = float(scaling), float(softcap or 0.0)
    if torch.compiler.is_compiling():
        return mmca(query, key, value, lists.tensors, lists.windowed, *options, save)[0]
    if save:
        return _FusedAttention.apply(query, key, value, lists, *options)
    with torch.cuda.device_of(query):
        return launch_forward(query, key, value, lists, *options, save)[0]
