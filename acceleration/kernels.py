"""MMCA in fused kernels, for NVIDIA GPUs: no score is ever stored.

The definition is in attention_dsvl.py. What makes it fast: text keys and image keys are two lists of places, and what a
text query sees is an interval of each list (all of it up to some place, under plain causality). So a block of queries
walks two short lists whose inner blocks need no mask, and keys that no query of the block sees are never read. Keys and
values are packed in the order of their lists first, so that a block is read as one; queries and gradients by the kernels
that are the first to read them. A query that is not text is copied from its own value. Softmaxes are computed online, and
the backward pass recomputes them from their saved normalisers (FlashAttention-2, arXiv 2307.08691), once for each of the two
branches.

Written in Triton, which comes with PyTorch for CUDA; without it `can_fuse` is False.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from .token_lists import TokenLists

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = None

MAX_HEAD_DIM = 256
# In single precision the kernels are right, but their products leave no registers for anything else: others are faster.
DTYPES = (torch.bfloat16, torch.float16)


def can_fuse(text_config: Any, dtype: torch.dtype, device: torch.device, training: bool = False) -> bool:
    """Whether the kernels are to compute a decoder's attention: on an NVIDIA GPU of the Hopper generation (H100,
    H200), with Triton, for scores in half precision, heads of up to 256, and no dropout.

    Earlier GPUs have no memory accelerator that reads a block without registers, and the kernels spill there; later ones
    compile them, but nobody has measured them yet.
    """
    if triton is None or device.type != "cuda" or torch.version.cuda is None or dtype not in DTYPES:
        return False
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    dropped = training and (getattr(text_config, "attention_dropout", None) or 0) > 0
    return head_dim <= MAX_HEAD_DIM and not dropped and _capability(device)[0] == 9


# ----------------------------------------------------------------------------------------------------------------------
# Kernels. Scores are kept in units of log2, for exp2 is what the hardware has.

# Lengths differ from batch to batch: a kernel must not be compiled again for one that is a multiple of 16.
_LENGTHS = ["queries", "keys", "rows", "places", "slots", "query_slots", "key_slots"]


def jit(function: Callable) -> Any:
    return function if triton is None else triton.jit(function)


def kernel(function: Callable) -> Any:
    return (
        function
        if triton is None
        else triton.jit(function, do_not_specialize=[n for n in _LENGTHS if n in function.__code__.co_varnames])
    )


@jit
def _load_rows(pointer, places, stride, head_dim: tl.constexpr, block_d: tl.constexpr, valid):
    """Rows of (places, head_dim) at `places`; zero where not `valid`."""
    columns = tl.arange(0, block_d)
    at = pointer + places[:, None].to(tl.int64) * stride + columns[None, :]
    if block_d != head_dim:
        return tl.load(at, mask=valid[:, None] & (columns < head_dim)[None, :], other=0.0)
    return tl.load(at, mask=valid[:, None], other=0.0)


@jit
def _store_rows(pointer, places, stride, rows, head_dim: tl.constexpr, block_d: tl.constexpr, valid):
    columns = tl.arange(0, block_d)
    at = pointer + places[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(at, rows.to(pointer.dtype.element_ty), mask=valid[:, None] & (columns < head_dim)[None, :])


@jit
def _cap(scores, scale, softcap):
    """tanh(scores * scale / softcap), by which Gemma 2 caps its scores."""
    return 2.0 / (1.0 + tl.exp2(scores * (scale * (-2.0 * 1.4426950408889634) / softcap))) - 1.0


@jit
def _seen(ranks, first, last, windowed: tl.constexpr):
    """Which ranks lie in which intervals; `ranks` broadcasts against `first` and `last`."""
    seen = ranks < last
    if windowed:
        seen &= ranks >= first
    return seen


@jit
def _intervals(First, Last, row, valid, others, size: tl.constexpr, windowed: tl.constexpr):
    """Consecutive intervals, whose ends never decrease: which blocks lie in any of them, and which in all.

    Args:
        First, Last: pointers to where the first of them begins and ends.
        row, valid: which of them a program has, and whether they exist.
        others: how many follow the first.
        windowed: whether they may begin elsewhere than at 0.

    Returns:
        Where each begins and ends; and start, inner start, inner end, end of all, multiples of `size` but the last.
    """
    first, last = tl.load(First + row, mask=valid, other=0), tl.load(Last + row, mask=valid, other=0)
    end, inner_end = tl.load(Last + others), tl.load(Last) // size * size
    start, inner_start = 0, 0
    if windowed:
        start = tl.minimum(tl.load(First), end) // size * size
        inner_start = (tl.load(First + others) + size - 1) // size * size
    return first, last, start, inner_start, inner_end, end


@kernel
def _pack_kernel(
    States, Packed, Places, Counts, s_batch, s_head, s_token, heads, places, slots,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_m: tl.constexpr,
):  # fmt: skip
    """Rows of (batch, key-value heads, tokens, head_dim) in the order of the keys: (batch, heads, slots, block_d).

    A block is read whole, and what is hidden in it is weighed by 0, which nothing but numbers survives: slots behind the
    image keys are set to 0 as far as any block of them reaches.
    """
    block, batch, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    count = tl.load(Counts + batch * 4 + 1) + tl.load(Counts + batch * 4 + 2)
    if block * block_m >= count + block_m:
        return
    ranks = block * block_m + tl.arange(0, block_m)
    valid = ranks < count
    at = tl.load(Places + batch * places + ranks, mask=valid, other=0)
    base = States + batch.to(tl.int64) * s_batch + head.to(tl.int64) * s_head
    rows = _load_rows(base, at, s_token, head_dim, block_d, valid)
    out = Packed + (batch * heads + head).to(tl.int64) * slots * block_d
    _store_rows(out, ranks, block_d, rows, block_d, block_d, ranks < slots)


@jit
def _attend(
    query, Key, Value, row, first, last, start, inner_start, inner_end, end, scale, softcap, block_d: tl.constexpr,
    capped: tl.constexpr, windowed: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The blocks of keys from rank `start` to `end`, by online softmax; every query sees those from `inner_start` to
    `inner_end`."""
    accumulator = tl.zeros([block_m, block_d], dtype=tl.float32)
    normaliser = tl.zeros([block_m], dtype=tl.float32)
    peak = tl.full([block_m], float("-inf"), dtype=tl.float32)
    for rank in range(start, end, block_n):
        key = Key.load([row + rank, 0])
        scores = tl.dot(query, tl.trans(key), input_precision=precision)
        # One multiplication and addition for each score: the peak is kept in scaled units, the scores are not.
        if capped:
            scores, unit = _cap(scores, scale, softcap), softcap * 1.4426950408889634
        else:
            unit = scale * 1.4426950408889634
        if (rank < inner_start) | (rank >= inner_end):
            ranks = rank + tl.arange(0, block_n)
            scores = tl.where(_seen(ranks[None, :], first[:, None], last[:, None], windowed), scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * unit)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * unit - shift[:, None])
        decay = tl.exp2(peak - shift)
        normaliser = normaliser * decay + tl.sum(weights, 1)
        accumulator = accumulator * decay[:, None]
        value = Value.load([row + rank, 0])
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision=precision)
        peak = new_peak
    return accumulator, normaliser, peak


@kernel
def _forward_kernel(
    Query, Key, Value, OwnValue, Out, PackedQuery, Branches, Normalisers, Queries, Counts, KeyRanges, OwnKey,
    q_batch, q_head, q_token, v_batch, v_head, v_token, scale, softcap,
    heads, queries, rows, query_slots, key_slots, group: tl.constexpr,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    capped: tl.constexpr, windowed: tl.constexpr, save: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: text queries attend, others are given their own value."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the long ones first
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv_head = head // group
    text_queries = tl.load(Counts + batch * 4)
    value_base = OwnValue + batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    ranks = block * block_m + tl.arange(0, block_m)
    within, valid = ranks < queries, ranks < text_queries
    places = tl.load(Queries + batch * queries + ranks, mask=within, other=0)
    out_base = Out + (batch.to(tl.int64) * queries * heads + head) * head_dim
    if block * block_m >= text_queries:
        own = tl.load(OwnKey + batch * queries + places, mask=within, other=0)
        own_value = _load_rows(value_base, own, v_token, head_dim, block_d, within)
        _store_rows(out_base, places, heads * head_dim, own_value, head_dim, block_d, within)
        return
    query_base = Query + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    query = _load_rows(query_base, places, q_token, head_dim, block_d, valid)
    if save:
        packed_base = PackedQuery + (batch * heads + head).to(tl.int64) * query_slots * block_d
        _store_rows(packed_base, ranks, block_d, query, block_d, block_d, ranks < query_slots)
    key_row = (batch * (heads // group) + kv_head) * key_slots
    total = tl.zeros([block_m, block_d], dtype=Out.dtype.element_ty)
    row, others = tl.arange(0, block_m), tl.minimum(block_m, text_queries - block * block_m) - 1
    saved = tl.load(Counts + batch * 4 + 3) + ranks
    for branch in tl.static_range(2):
        begin = KeyRanges + (batch * 4 + 2 * branch) * queries + block * block_m
        first, last, start, inner_start, inner_end, end = _intervals(
            begin, begin + queries, row, within, others, block_n, windowed
        )
        if branch == 1:
            key_row += tl.load(Counts + batch * 4 + 1)
        accumulator, normaliser, peak = _attend(
            query, Key, Value, key_row, first, last, start, inner_start, inner_end, end, scale, softcap, block_d,
            capped, windowed, block_m, block_n, precision,
        )  # fmt: skip
        some = normaliser > 0
        accumulator = accumulator / tl.where(some, normaliser, 1.0)[:, None]
        # Kept in the output's precision between the branches: half the registers, which are what there is too little of.
        total = (total.to(tl.float32) + accumulator).to(total.dtype)
        if save:
            # An empty softmax is infinitely normalised, so that its weights come back as 0.
            log = tl.where(some, peak + tl.log2(normaliser), float("inf"))
            at = (branch * heads + head).to(tl.int64) * rows + saved
            tl.store(Normalisers + at, log, mask=valid)
            branch_base = Branches + (head.to(tl.int64) + branch * rows * heads) * head_dim
            _store_rows(branch_base, saved, heads * head_dim, accumulator, head_dim, block_d, valid)
    if block * block_m + block_m > text_queries:
        own = tl.load(OwnKey + batch * queries + places, mask=within, other=0)
        own_value = _load_rows(value_base, own, v_token, head_dim, block_d, within & ~valid)
        total = tl.where(valid[:, None], total, own_value)
    _store_rows(out_base, places, heads * head_dim, total, head_dim, block_d, within)


@jit
def _delta(gradient, Branch, places, stride, head_dim: tl.constexpr, block_d: tl.constexpr, valid):
    """What a branch's softmax takes off the gradients of its scores: the output's gradient times the branch's output."""
    output = _load_rows(Branch, places, stride, head_dim, block_d, valid)
    return tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)


@jit
def _weights(scores, normaliser, scale, softcap, capped: tl.constexpr):
    """Weights from raw products, and how fast the scores grow with these; `normaliser` broadcasts against `scores`."""
    if capped:
        cap = _cap(scores, scale, softcap)
        weights, slope = tl.exp2(cap * (softcap * 1.4426950408889634) - normaliser), 1.0 - cap * cap
    else:
        weights, slope = tl.exp2(scores * (scale * 1.4426950408889634) - normaliser), 1.0
    return weights, slope


@jit
def _query_blocks(
    gradient_sum, query, gradient, normaliser, delta, Key, Value, row, first, last, start, inner_start, inner_end, end,
    scale, softcap, capped: tl.constexpr, windowed: tl.constexpr, block_n: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    for rank in range(start, end, block_n):
        key = Key.load([row + rank, 0])
        value = Value.load([row + rank, 0])
        scores = tl.dot(query, tl.trans(key), input_precision=precision)
        weights, slope = _weights(scores, normaliser[:, None], scale, softcap, capped)
        if (rank < inner_start) | (rank >= inner_end):
            ranks = rank + tl.arange(0, block_n)
            weights = tl.where(_seen(ranks[None, :], first[:, None], last[:, None], windowed), weights, 0.0)
        weight_gradients = tl.dot(gradient, tl.trans(value), input_precision=precision)
        gradients = weights * (weight_gradients - delta[:, None]) * slope
        gradient_sum = tl.dot(gradients.to(key.dtype), key, gradient_sum, input_precision=precision)
    return gradient_sum


@kernel
def _query_gradient_kernel(
    Query, Key, Value, Gradient, PackedGradient, QueryGradient, Branches, Normalisers, Deltas, Queries, Counts, KeyRanges,
    g_batch, g_head, g_token, d_batch, d_head, d_token, scale, softcap,
    heads, queries, rows, query_slots, key_slots, group: tl.constexpr,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    capped: tl.constexpr, windowed: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries of one head; 0 for queries that are not text."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv_head = head // group
    text_queries = tl.load(Counts + batch * 4)
    ranks = block * block_m + tl.arange(0, block_m)
    within, valid = ranks < queries, ranks < text_queries
    places = tl.load(Queries + batch * queries + ranks, mask=within, other=0)
    out_base = QueryGradient + batch.to(tl.int64) * d_batch + head.to(tl.int64) * d_head
    total = tl.zeros([block_m, block_d], dtype=tl.float32)
    if block * block_m < text_queries:
        query_row = (batch * heads + head) * query_slots
        query = Query.load([query_row + block * block_m, 0])
        gradient_base = Gradient + batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
        gradient = _load_rows(gradient_base, places, g_token, head_dim, block_d, valid)
        packed_base = PackedGradient + query_row.to(tl.int64) * block_d
        _store_rows(packed_base, ranks, block_d, gradient, block_d, block_d, ranks < query_slots)
        key_row = (batch * (heads // group) + kv_head) * key_slots
        saved = tl.load(Counts + batch * 4 + 3) + ranks
        text, image = Branches + head.to(tl.int64) * head_dim, Branches + (head.to(tl.int64) + rows * heads) * head_dim
        deltas = (
            _delta(gradient, text, saved, heads * head_dim, head_dim, block_d, valid),
            _delta(gradient, image, saved, heads * head_dim, head_dim, block_d, valid),
        )
        row, others = tl.arange(0, block_m), tl.minimum(block_m, text_queries - block * block_m) - 1
        for branch in tl.static_range(2):
            begin = KeyRanges + (batch * 4 + 2 * branch) * queries + block * block_m
            first, last, start, inner_start, inner_end, end = _intervals(
                begin, begin + queries, row, within, others, block_n, windowed
            )
            if branch == 1:
                key_row += tl.load(Counts + batch * 4 + 1)
            at = (branch * heads + head).to(tl.int64) * rows + saved
            normaliser = tl.load(Normalisers + at, mask=valid, other=float("inf"))
            delta = deltas[branch]
            tl.store(Deltas + at, delta, mask=valid)
            total = _query_blocks(
                total, query, gradient, normaliser, delta, Key, Value, key_row, first, last,
                start, inner_start, inner_end, end, scale, softcap, capped, windowed, block_n, precision,
            )  # fmt: skip
    total = tl.where(valid[:, None], total * scale, 0.0)
    _store_rows(out_base, places, d_token, total, head_dim, block_d, within)


@jit
def _key_blocks(
    key_sum, value_sum, key, value, Query, Gradient, Normalisers, Deltas, row, line, saved, first, last, start,
    inner_start, inner_end, end, scale, softcap, capped: tl.constexpr, block_m: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    for rank in range(start, end, block_m):
        query = Query.load([row + rank, 0])
        gradient = Gradient.load([row + rank, 0])
        normaliser = Normalisers.load([line, saved + rank]).reshape([block_m])
        delta = Deltas.load([line, saved + rank]).reshape([block_m])
        scores = tl.dot(key, tl.trans(query), input_precision=precision)
        weights, slope = _weights(scores, normaliser[None, :], scale, softcap, capped)
        if (rank < inner_start) | (rank >= inner_end):
            ranks = rank + tl.arange(0, block_m)
            weights = tl.where(_seen(ranks[None, :], first[:, None], last[:, None], True), weights, 0.0)
            delta = tl.where(ranks < end, delta, 0.0)  # behind the last query nothing was written
        value_sum = tl.dot(weights.to(gradient.dtype), gradient, value_sum, input_precision=precision)
        weight_gradients = tl.dot(value, tl.trans(gradient), input_precision=precision)
        gradients = weights * (weight_gradients - delta[None, :]) * slope
        key_sum = tl.dot(gradients.to(query.dtype), query, key_sum, input_precision=precision)
    return key_sum, value_sum


@kernel
def _key_gradient_kernel(
    Query, Key, Value, Gradient, OwnGradient, KeyGradient, ValueGradient, Normalisers, Deltas,
    Keys, Counts, QueryRanges, OwnKey, g_batch, g_head, g_token,
    dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token, scale, softcap,
    heads, queries, keys, query_slots, key_slots, group: tl.constexpr,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    capped: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values of one key-value head: text keys, or image and hidden keys."""
    kv_heads = heads // group
    batch, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    text_keys = tl.load(Counts + batch * 4 + 1)
    block, text_blocks = tl.program_id(0), (text_keys + block_n - 1) // block_n
    branch = (block >= text_blocks).to(tl.int32)
    begin = tl.where(branch == 1, text_keys, 0)
    count = tl.where(branch == 1, keys - text_keys, text_keys)
    first_rank = (block - branch * text_blocks) * block_n  # within the text or the other keys
    if first_rank >= count:
        return
    row = tl.arange(0, block_n)
    valid = first_rank + row < count
    places = tl.load(Keys + batch * keys + begin + first_rank + row, mask=valid, other=0)
    seen_by = QueryRanges + batch * 2 * keys + begin + first_rank
    # Hidden keys come last, and no query sees them.
    shown = tl.minimum(tl.where(branch == 1, tl.load(Counts + batch * 4 + 2), text_keys) - first_rank, block_n)
    first, last, start, inner_start, inner_end, end = _intervals(
        seen_by, seen_by + keys, row, valid, tl.maximum(shown - 1, 0), block_m, True
    )
    end = tl.where(shown > 0, end, 0)
    key_row = (batch * kv_heads + kv_head) * key_slots + begin + first_rank
    key, value = Key.load([key_row, 0]), Value.load([key_row, 0])
    saved = tl.load(Counts + batch * 4 + 3)
    key_sum = tl.zeros([block_n, block_d], dtype=tl.float32)
    value_sum = tl.zeros([block_n, block_d], dtype=tl.float32)
    # The query whose own key this is, if it is one of this call's and not text, was given the value itself.
    own_query = places - tl.load(OwnKey + batch * queries)
    is_own = valid & (own_query >= 0) & (own_query < queries) & (branch == 1)
    for member in range(0, group):
        head = kv_head * group + member
        key_sum, value_sum = _key_blocks(
            key_sum, value_sum, key, value, Query, Gradient, Normalisers, Deltas, (batch * heads + head) * query_slots,
            branch * heads + head, saved, first, last, start, inner_start, inner_end, end, scale, softcap, capped, block_m,
            precision,
        )  # fmt: skip
    key_sum = tl.where((row < shown)[:, None], key_sum, 0.0)
    value_sum = tl.where((row < shown)[:, None], value_sum, 0.0)
    if branch == 1:
        for member in range(0, group):
            head = kv_head * group + member
            own_base = OwnGradient + batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
            value_sum += _load_rows(own_base, own_query, g_token, head_dim, block_d, is_own).to(tl.float32)
    key_out = KeyGradient + batch.to(tl.int64) * dk_batch + kv_head.to(tl.int64) * dk_head
    value_out = ValueGradient + batch.to(tl.int64) * dv_batch + kv_head.to(tl.int64) * dv_head
    _store_rows(key_out, places, dk_token, key_sum * scale, head_dim, block_d, valid)
    _store_rows(value_out, places, dv_token, value_sum, head_dim, block_d, valid)


# ----------------------------------------------------------------------------------------------------------------------
# Launching


@dataclass(frozen=True)
class Blocks:
    """How a kernel cuts its work: queries and keys of a block, warps, and how many loads are in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# What measured best in half precision on Hopper, with heads of up to 64, 128 and 256; what its shared memory and registers
# hold in single precision. The forward and the query kernel write what the key kernel reads: its blocks of queries are no
# longer than theirs.
_SMALL = {"forward": Blocks(64, 64, 4, 3), "queries": Blocks(64, 64, 4, 3), "keys": Blocks(32, 64, 4, 3)}
_NARROW = {"forward": Blocks(64, 64, 4, 3), "queries": Blocks(128, 64, 8, 3), "keys": Blocks(64, 64, 4, 2)}
_WIDE = {"forward": Blocks(64, 64, 8, 2), "queries": Blocks(64, 64, 8, 2), "keys": Blocks(64, 64, 8, 2)}
_SINGLE = {"forward": Blocks(64, 32, 4, 1), "queries": Blocks(64, 32, 4, 1), "keys": Blocks(32, 32, 4, 1)}


def _blocks(kernel: str, packed: torch.Tensor) -> Blocks:
    block_d = packed.shape[3]
    if packed.element_size() == 4:
        return replace(_SINGLE[kernel], queries=32) if block_d > 128 else _SINGLE[kernel]
    return (_SMALL if block_d <= 64 else _NARROW if block_d <= 128 else _WIDE)[kernel]


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _strides(states: torch.Tensor) -> tuple[int, int, int]:
    """Of (batch, heads, tokens, head_dim), whose last dimension lies dense."""
    return states.stride(0), states.stride(1), states.stride(2)


def _dense(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(3) == 1 else states.contiguous()


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"


# Packed states are written by so many rows at a time, of which no block that is read has more.
_ROOM = 128


def _pack(states: torch.Tensor, lists: TokenLists) -> torch.Tensor:
    """Keys or values (batch, heads, tokens, head_dim) in the order of their list: (batch, heads, slots, a power of two)."""
    states = _dense(states)
    batch, heads, tokens, head_dim = states.shape
    packed = _empty_packed(states)
    slots, block_d = packed.shape[2:]
    _pack_kernel[(slots // _ROOM, batch * heads)](
        states, packed, lists.keys, lists.counts, *_strides(states), heads, tokens, slots,
        head_dim=head_dim, block_d=block_d, block_m=_ROOM, num_warps=8,
    )  # fmt: skip
    return packed


def _empty_packed(states: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    batch, heads, tokens, head_dim = states.shape
    slots = -(-tokens // _ROOM) * _ROOM if wanted else 0
    return states.new_empty(batch, heads, slots, max(1 << (head_dim - 1).bit_length(), 16))


def _empty_outputs(query: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the forward pass: the output, and of each branch its output and its normalisers, for so many text queries."""
    batch, heads, tokens, head_dim = query.shape
    return (
        query.new_empty(batch, tokens, heads, head_dim),
        query.new_empty(2, rows, heads, head_dim),
        query.new_empty(2, heads, rows, dtype=torch.float32),
    )


def _empty_gradients(
    gradient: torch.Tensor, key: torch.Tensor, keys: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of query, key and value, as a decoder's projections lie in memory; `gradient` is (batch, queries, heads, head_dim)."""
    batch, tokens, heads, head_dim = gradient.shape
    query_like = gradient.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    key_like, value_like = (gradient.new_empty(batch, keys, key.shape[1], head_dim).transpose(1, 2) for _ in range(2))
    return query_like, key_like, value_like


def _blocks_of(packed: torch.Tensor, rows: int) -> Any:
    """Packed states as a kernel reads them, `rows` at a time."""
    block_d = packed.shape[3]
    return TensorDescriptor(packed, [packed.numel() // block_d, block_d], [block_d, 1], [rows, block_d])


def _lines_of(figures: torch.Tensor, columns: int) -> Any:
    """Figures of softmaxes (2, heads, rows) as a kernel reads them, those of so many queries of one head at a time."""
    rows = figures.shape[2]
    return TensorDescriptor(figures, [figures.numel() // rows, rows], [rows, 1], [1, columns])


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: TokenLists,
    scaling: float,
    softcap: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    query, value = _dense(query), _dense(value)
    batch, heads, tokens, head_dim = query.shape
    packed_query, packed_key, packed_value = _empty_packed(query, save), _pack(key, lists), _pack(value, lists)
    cut = _blocks("forward", packed_key)
    rows = lists.rows if save else 0
    out, branches, normalisers = _empty_outputs(query, rows)
    _forward_kernel[(triton.cdiv(tokens, cut.queries), batch * heads)](
        query, _blocks_of(packed_key, cut.keys), _blocks_of(packed_value, cut.keys), value, out, packed_query, branches,
        normalisers, lists.queries, lists.counts, lists.key_ranges, lists.own_key, *_strides(query), *_strides(value),
        scaling, softcap, heads, tokens, rows, packed_query.shape[2], packed_key.shape[2], group=heads // key.shape[1],
        head_dim=head_dim, block_d=packed_key.shape[3], block_m=cut.queries, block_n=cut.keys,
        capped=softcap > 0, windowed=lists.windowed, save=save, precision=_precision(query.dtype),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out, packed_query, packed_key, packed_value, branches, normalisers


def _backward(
    out_gradient: torch.Tensor, saved: Sequence[torch.Tensor], lists: TokenLists, scaling: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value, branches, normalisers = saved
    gradient = _dense(out_gradient.transpose(1, 2))
    batch, heads, tokens, head_dim = gradient.shape
    kv_heads, kv_tokens = key.shape[1], lists.keys.shape[1]
    rows, slots = lists.rows, (query.shape[2], key.shape[2])
    deltas, packed_gradient = torch.empty_like(normalisers), torch.empty_like(query)
    query_gradient, key_gradient, value_gradient = _empty_gradients(out_gradient, key, kv_tokens)
    exact = dict(
        group=heads // kv_heads, head_dim=head_dim, block_d=query.shape[3], capped=softcap > 0,
        precision=_precision(query.dtype),
    )  # fmt: skip
    cut = _blocks("queries", query)
    _query_gradient_kernel[(triton.cdiv(tokens, cut.queries), batch * heads)](
        _blocks_of(query, cut.queries), _blocks_of(key, cut.keys), _blocks_of(value, cut.keys),
        gradient, packed_gradient, query_gradient, branches, normalisers, deltas,
        lists.queries, lists.counts, lists.key_ranges, *_strides(gradient), *_strides(query_gradient), scaling, softcap,
        heads, tokens, rows, *slots, windowed=lists.windowed,
        block_m=cut.queries, block_n=cut.keys, num_warps=cut.warps, num_stages=cut.stages, **exact,
    )  # fmt: skip
    cut = _blocks("keys", query)
    # One block more than there are keys for, as the last block of text keys may be partly filled.
    _key_gradient_kernel[(triton.cdiv(kv_tokens, cut.keys) + 1, batch * kv_heads)](
        _blocks_of(query, cut.queries), _blocks_of(key, cut.keys), _blocks_of(value, cut.keys),
        _blocks_of(packed_gradient, cut.queries), gradient, key_gradient, value_gradient,
        _lines_of(normalisers, cut.queries), _lines_of(deltas, cut.queries),
        lists.keys, lists.counts, lists.query_ranges, lists.own_key, *_strides(gradient),
        *_strides(key_gradient), *_strides(value_gradient), scaling, softcap, heads, tokens, kv_tokens, *slots,
        block_m=cut.queries, block_n=cut.keys, num_warps=cut.warps, num_stages=cut.stages, **exact,
    )  # fmt: skip
    return query_gradient, key_gradient, value_gradient


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, lists: TokenLists, scaling: float, softcap: float
    ) -> torch.Tensor:
        with torch.cuda.device_of(query):
            out, *saved = _forward(query, key, value, lists, scaling, softcap, save=True)
        ctx.save_for_backward(*saved)
        ctx.options = lists, scaling, softcap
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        with torch.cuda.device_of(gradient):
            return *_backward(gradient, ctx.saved_tensors, *ctx.options), None, None, None


# The same as operators, for a compiled graph, which does not look into them. Two versions of this file may be loaded in one
# process, as the remote code of two checkpoints: each has operators of its own. The module's name holds that of the
# checkpoint's directory, in any script, but the name of an operator must be ASCII.
_NAMESPACE = f"dsvl_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}"


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
    return _forward(query, key, value, TokenLists.of(lists, windowed), scaling, softcap, save)


@mmca.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lists: Any, *options: Any) -> Any:
    save = options[-1]
    out, branches, normalisers = _empty_outputs(query, lists[-1].shape[0] if save else 0)
    return out, _empty_packed(query, save), _empty_packed(key), _empty_packed(value), branches, normalisers


@torch.library.custom_op(f"{_NAMESPACE}::mmca_backward", mutates_args=())
def mmca_backward(
    gradient: torch.Tensor,
    saved: list[torch.Tensor],
    lists: list[torch.Tensor],
    windowed: bool,
    scaling: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(gradient, saved, TokenLists.of(lists, windowed), scaling, softcap)


@mmca_backward.register_fake
def _(gradient: torch.Tensor, saved: Any, lists: Any, *options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_gradients(gradient, saved[1], lists[1].shape[1])


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, lists, *options, save = inputs
    ctx.save_for_backward(*lists, *output[1:])
    ctx.options = options


def _compiled_backward(ctx: Any, gradient: torch.Tensor, *unused: Any) -> tuple:
    tensors = ctx.saved_tensors  # asked for once: under checkpointing a second time is an error
    lists, saved = list(tensors[:-5]), list(tensors[-5:])
    gradients = mmca_backward(gradient, saved, lists, *ctx.options)
    return *gradients, [None] * len(lists), None, None, None, None  # a list of them for a list


mmca.register_autograd(_compiled_backward, setup_context=_save_for_backward)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: TokenLists,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """MMCA of one layer.

    Args:
        query: (batch, heads, queries, head_dim), bf16, fp16 or fp32, on an NVIDIA GPU.
        key, value: (batch, key-value heads, keys, head_dim), of the same dtype.
        lists: tokens by modality, and what each sees; layers of one type share them.
        scaling: by what the products of queries and keys are multiplied.
        softcap: to what the scores are capped, by softcap * tanh(scores / softcap).

    Returns:
        (batch, queries, heads, head_dim)

    Raises:
        ValueError: if values are not as wide as keys, or tensors have different dtypes.
    """
    if key.shape != value.shape or query.shape[3] != key.shape[3] or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "The fused kernels want queries, keys and values of one width and dtype; got a query "
            f"{tuple(query.shape)} {query.dtype}, a key {tuple(key.shape)} {key.dtype} and a value {tuple(value.shape)} "
            f"{value.dtype}. Choose attn_implementation='eager' or 'flex_attention'."
        )
    save = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    options = float(scaling), float(softcap or 0.0)
    if torch.compiler.is_compiling():
        return mmca(query, key, value, lists.tensors, lists.windowed, *options, save)[0]
    if save:
        return _FusedAttention.apply(query, key, value, lists, *options)
    with torch.cuda.device_of(query):
        return _forward(query, key, value, lists, *options, save)[0]
