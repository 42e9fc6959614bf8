"""MMCA of a few text queries over a KV cache, for compiled decode steps and prompts of text: two Triton kernels.

The first reads each key and value once, up to the last one that a query sees, and not the whole cache; both softmaxes of
MMCA are rows of one block of queries. A program has a block of queries of one key-value head and a part of the keys, as few
queries are too few programs for a GPU (Flash-Decoding; Dao, Haziza, Massa and Sizov, 2023). The second merges the parts.

The keys of the queries' own tokens are in the cache already, as in a decode step, or given beside it. Then a table of
addresses says where the cache is: a CUDA graph reads the same memory in each run, and every cache has its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch

from ..operators import operator_namespace
from .kernels import MAX_HEAD_DIM, block_width, jit, load_rows, tanh_scores, tl, triton

PARTS = 64  # of the keys, at most
ALIGNMENT = 16  # bytes that are loaded at once


@jit
def _few_queries_kernel(
    Q, K, V, Bias, Last, Table, Acc, Sums,
    stride_qb, stride_qh, stride_qt, stride_last, num_heads, num_queries,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_bias,
    SM_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_PARTS: tl.constexpr, HAS_TABLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Unnormalized outputs, row maxima and row sums of both branches over one part of the keys; behind the parts of the
    cache, if Table says where it is, over the queries' own keys.

    Names are those of kernels.py. Rows are queries of a key-value head, those of a query head together: BLOCK_R for the text
    keys, then as many for the image keys. num_heads counts key-value heads.
    """
    off_b, off_h = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    part_id = tl.program_id(1)
    rows = tl.arange(0, 2 * BLOCK_R)
    branch = rows // BLOCK_R
    row = tl.program_id(2) * BLOCK_R + rows % BLOCK_R
    is_row = row < GROUP_SIZE * num_queries
    head, token = off_h * GROUP_SIZE + row // num_queries, row % num_queries
    last = tl.load(Last + off_b * stride_last + token, mask=is_row, other=-1).to(tl.int32)
    Q += off_b.to(tl.int64) * stride_qb
    q = load_rows(Q + (head * stride_qh)[:, None], token, stride_qt, HEAD_DIM, BLOCK_D, is_row)
    num_seen = tl.max(last, 0) + 1
    part = tl.cdiv(tl.cdiv(num_seen, NUM_PARTS), BLOCK_N) * BLOCK_N
    lo = part_id * part
    hi = tl.minimum(lo + part, num_seen)
    if HAS_TABLE:
        is_own = part_id == NUM_PARTS
        K = tl.where(is_own, K, tl.load(Table).to(tl.pointer_type(K.dtype.element_ty)))
        V = tl.where(is_own, V, tl.load(Table + 1).to(tl.pointer_type(V.dtype.element_ty)))
        Bias = tl.where(is_own, Bias, tl.load(Table + 2).to(tl.pointer_type(Bias.dtype.element_ty)))
        stride_kb, stride_vb = (
            tl.where(is_own, stride_kb, tl.load(Table + 3)),
            tl.where(is_own, stride_vb, tl.load(Table + 6)),
        )
        stride_kh, stride_vh = (
            tl.where(is_own, stride_kh, tl.load(Table + 4)),
            tl.where(is_own, stride_vh, tl.load(Table + 7)),
        )
        stride_kn, stride_vn = (
            tl.where(is_own, stride_kn, tl.load(Table + 5)),
            tl.where(is_own, stride_vn, tl.load(Table + 8)),
        )
        stride_bias = tl.where(is_own, stride_bias, tl.load(Table + 9))
        # Else the compiler would load channels one by one.
        K, V = tl.multiple_of(K, 16), tl.multiple_of(V, 16)
        stride_kb, stride_vb = tl.multiple_of(stride_kb, 8), tl.multiple_of(stride_vb, 8)
        stride_kh, stride_vh = tl.multiple_of(stride_kh, 8), tl.multiple_of(stride_vh, 8)
        stride_kn, stride_vn = tl.multiple_of(stride_kn, 8), tl.multiple_of(stride_vn, 8)
        # Each query sees its own key, and those before.
        last = tl.where(is_own, token, last)
        lo, hi = tl.where(is_own, 0, lo), tl.where(is_own, num_queries, hi)
    K += off_b.to(tl.int64) * stride_kb + off_h.to(tl.int64) * stride_kh
    V += off_b.to(tl.int64) * stride_vb + off_h.to(tl.int64) * stride_vh
    Bias += 2 * off_b.to(tl.int64) * stride_bias
    acc = tl.zeros([2 * BLOCK_R, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([2 * BLOCK_R], dtype=tl.float32)
    m_i = tl.full([2 * BLOCK_R], float("-inf"), dtype=tl.float32)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < hi
        k = load_rows(K, offs_n, stride_kn, HEAD_DIM, BLOCK_D, mask_n)
        v = load_rows(V, offs_n, stride_vn, HEAD_DIM, BLOCK_D, mask_n)
        text = tl.load(Bias + offs_n, mask=mask_n, other=float("-inf"))
        image = tl.load(Bias + stride_bias + offs_n, mask=mask_n, other=float("-inf"))
        bias = tl.where((branch == 0)[:, None], text[None, :], image[None, :])
        bias = tl.where(offs_n[None, :] <= last[:, None], bias, float("-inf"))
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP > 0:
            qk = tanh_scores(qk, SM_SCALE, SOFTCAP) * (SOFTCAP * 1.4426950408889634) + bias
        else:
            qk = qk * (SM_SCALE * 1.4426950408889634) + bias
        m_ij = tl.maximum(m_i, tl.max(qk, 1))
        m_finite = tl.where(m_ij == float("-inf"), 0.0, m_ij)  # a query may have seen no key of a branch
        p = tl.exp2(qk - m_finite[:, None])
        alpha = tl.exp2(m_i - m_finite)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_ij
    # (batch, heads, queries, branches, parts) rows of HEAD_DIM numbers, and of two
    saved = (tl.program_id(0).to(tl.int64) * GROUP_SIZE * num_queries + row) * 2 + branch
    saved = saved * (NUM_PARTS + HAS_TABLE) + part_id
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(Acc + saved[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=is_row[:, None] & (offs_d < HEAD_DIM)[None, :])
    tl.store(Sums + 2 * saved, m_i, mask=is_row)
    tl.store(Sums + 2 * saved + 1, l_i, mask=is_row)


@jit
def _merge_parts_kernel(
    Acc, Sums, Sees, Out, num_heads, num_queries, HEAD_DIM: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_SEES: tl.constexpr,
):  # fmt: skip
    """The output of one query of one query head, the sum of both branches; num_heads counts query heads."""
    off_b, off_h = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    token = tl.program_id(1)
    offs_d, parts = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    mask_d, is_part = offs_d < HEAD_DIM, parts < NUM_PARTS
    out = tl.zeros([BLOCK_D], dtype=tl.float32)
    for branch in tl.static_range(2):
        saved = ((tl.program_id(0).to(tl.int64) * num_queries + token) * 2 + branch) * NUM_PARTS + parts
        m_i = tl.load(Sums + 2 * saved, mask=is_part, other=float("-inf"))
        l_i = tl.load(Sums + 2 * saved + 1, mask=is_part, other=0.0)
        acc = tl.load(Acc + saved[:, None] * HEAD_DIM + offs_d[None, :], mask=is_part[:, None] & mask_d[None, :], other=0.0)
        m_max = tl.max(m_i, 0)
        weight = tl.exp2(m_i - tl.where(m_max == float("-inf"), 0.0, m_max))
        total = tl.sum(l_i * weight, 0)
        branch_out = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0, 1.0, total)  # 0 where no key is seen
        if HAS_SEES:
            branch_out *= tl.load(Sees + off_b * 2 + branch).to(tl.float32)
        out += branch_out
    saved_out = (off_b.to(tl.int64) * num_queries + token) * num_heads + off_h
    tl.store(Out + saved_out * HEAD_DIM + offs_d, out.to(Out.dtype.element_ty), mask=mask_d)


def launch_few_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    sees: torch.Tensor | None,
    last: torch.Tensor,
    table: torch.Tensor | None,
    scaling: float,
    softcap: float,
    parts: int,
    kernels: tuple[Any, Any] = (_few_queries_kernel, _merge_parts_kernel),
) -> torch.Tensor:
    """The attention of text queries over a KV cache.

    Args:
        query: (batch, heads, queries, head_dim), bfloat16 or float16. Channels of queries, keys and values are contiguous.
        key, value: (batch, key-value heads, keys, head_dim), in the query's dtype.
        bias: (batch, 2, 1, keys or more), float32, contiguous: of the text and the image branch, 0 for a member and -inf for
            others.
        sees: (batch, 2, 1, 1), float32, contiguous, 0 for a branch whose output is 0, else 1; `None` if there is none.
        last: (batch or 1, queries), integers, the index of the last key in the cache that each query sees. Of those behind
            the largest, none is read.
        table: where the cache is, a row of an `address_table`. Then `key`, `value` and `bias` are those of the queries' own
            tokens, which are not in the cache, and of which each query sees its own and those before. `None` if `key`,
            `value` and `bias` are of the cache.
        scaling, softcap: of the scores; a softcap of 0 is none.
        parts: into how many the keys are divided.
        kernels (*optional*): the kernels as they are launched in a compiled graph.

    Returns:
        (batch, queries, heads, head_dim) in the query's dtype. A branch adds 0 where a query sees none of its keys.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, group_size = key.shape[1], heads // key.shape[1]
    block_d = block_width(head_dim)
    # Products have 16 rows at least; a number of queries that a graph does not know is taken as large.
    block_r = min(32, max(8, 1 << (group_size * queries - 1).bit_length())) if isinstance(queries, int) else 32
    all_parts = parts + (table is not None)
    out = query.new_empty((batch, queries, heads, head_dim))
    acc = query.new_empty((batch, heads, queries, 2, all_parts, head_dim), dtype=torch.float32)
    sums = query.new_empty((batch, heads, queries, 2, all_parts, 2), dtype=torch.float32)
    attend, merge = kernels
    # Of 18 block sizes that were timed on an H200 for one query, these are within 4 % of the fastest for 1 and 16 rows; of
    # 72 for 64 queries over 2,176 keys, too.
    attend[(batch * kv_heads, all_parts, (group_size * queries + block_r - 1) // block_r)](
        *(query, key, value, bias, last, last if table is None else table, acc, sums),
        *(*query.stride()[:3], last.stride(0) if len(last) > 1 else 0, kv_heads, queries),
        *(*key.stride()[:3], *value.stride()[:3], bias.stride(1)),
        SM_SCALE=scaling,  # known to the kernel: a compiled graph hands over such numbers as float64
        SOFTCAP=softcap,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        NUM_PARTS=parts,
        HAS_TABLE=table is not None,
        BLOCK_R=block_r,
        BLOCK_N=64 if block_d <= 128 else 32,
        BLOCK_D=block_d,
        PRECISION="ieee",
        num_warps=4 if block_d <= 128 or block_r <= 16 else 8,
        num_stages=2,
    )
    merge[(batch * heads, queries)](
        *(acc, sums, acc if sees is None else sees, out, heads, queries),
        HEAD_DIM=head_dim,
        NUM_PARTS=all_parts,
        BLOCK_P=1 << (all_parts - 1).bit_length(),
        BLOCK_D=block_d,
        HAS_SEES=sees is not None,
        num_warps=4,
    )
    return out


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def number_of_parts(key: torch.Tensor) -> int:
    """Into how many parts the keys of a cache of known size are divided for one query, so that each multiprocessor has two
    programs: a power of two."""
    batch, kv_heads, keys, _ = key.shape
    wanted = min(2 * multiprocessors(key.device) // (batch * kv_heads), keys // 64, PARTS)
    return 1 << max(0, wanted.bit_length() - 1)


# Without Triton nothing calls it, and `triton_op` warns.
_operator = torch.library.custom_op if triton is None else torch.library.triton_op


@_operator(f"{operator_namespace(__name__)}::few_queries", mutates_args=())
def few_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    sees: torch.Tensor | None,
    last: torch.Tensor,
    table: torch.Tensor | None,
    scaling: float,
    softcap: float,
    parts: int | None,
) -> torch.Tensor:
    """See `launch_few_queries`; without `parts`, those of `number_of_parts`."""
    parts = number_of_parts(key) if parts is None else parts
    kernels = tuple(map(torch.library.wrap_triton, (_few_queries_kernel, _merge_parts_kernel)))
    return launch_few_queries(query, key, value, bias, sees, last, table, scaling, softcap, parts, kernels)


@few_queries.register_fake
def _(query: torch.Tensor, *others: Any) -> torch.Tensor:
    batch, heads, queries, head_dim = query.shape
    return query.new_empty((batch, queries, heads, head_dim))


def takes_few_queries(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether the kernels compute an attention, where they may (see `has_step_kernels`).

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, key-value heads, keys, head_dim).
        dropout: of the weights.
    """
    head_dim = query.shape[3]
    return (
        dropout == 0
        and query.dtype == key.dtype == value.dtype
        and value.shape[3] == head_dim <= MAX_HEAD_DIM
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
    )


def branch_bias(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """The `bias` of `launch_few_queries`, from which keys (batch, keys) are text and which are image tokens."""
    members = torch.stack([text, image], 1)[:, :, None]
    return torch.zeros(members.shape, device=members.device).masked_fill(~members, -torch.inf)


def address_table(
    keys: Sequence[torch.Tensor] | torch.Tensor, values: Sequence[torch.Tensor] | torch.Tensor, bias: torch.Tensor
) -> torch.Tensor | None:
    """Where a KV cache is, for a graph that is recorded once for caches at any place and of any length.

    Args:
        keys, values: of each layer, (batch, key-value heads, keys, head_dim), one by one or in one tensor, which takes less
            time. They must exist until the graph has run.
        bias: of all layers, see `launch_few_queries`; likewise.

    Returns:
        (layers, 10), int64, a row for each layer: the addresses of keys, values and bias; the strides of a sample, a head
        and a token of keys, and of values; and of a branch of the bias. None where the kernels cannot read so.
    """
    (key_places, key_strides), (value_places, value_strides) = map(_places, (keys, values))
    of_bias = bias.data_ptr(), bias.stride(1)
    rows = [
        (key, value, of_bias[0], *strides, *others, of_bias[1])
        for key, value, strides, others in zip(key_places, value_places, key_strides, value_strides, strict=True)
    ]
    first = keys[0]
    bytes_each = first.element_size()
    offsets = {*key_places, *value_places} | {
        stride * bytes_each for strides in {*key_strides, *value_strides} for stride in strides
    }
    is_aligned = not any(offset % ALIGNMENT for offset in offsets)
    if not is_aligned or first.stride(3) != 1 or first.shape != values[0].shape or first.shape[3] > MAX_HEAD_DIM:
        return None
    numbers = array("q", chain.from_iterable(rows))  # of which torch makes a tensor in half the time
    return torch.frombuffer(numbers, dtype=torch.int64).view(len(rows), -1).to(first.device, non_blocking=True)


def _places(states: Sequence[torch.Tensor] | torch.Tensor) -> tuple[list[int], list[tuple[int, ...]]]:
    """The address of each layer's states, and their strides of a sample, a head and a token."""
    if not isinstance(states, torch.Tensor):
        return [one.data_ptr() for one in states], [one.stride()[:3] for one in states]
    layers, first, step = len(states), states.data_ptr(), states.stride(0) * states.element_size()
    return [first + number * step for number in range(layers)], [states.stride()[1:4]] * layers


__all__ = ["address_table", "branch_bias", "few_queries", "launch_few_queries", "takes_few_queries"]
