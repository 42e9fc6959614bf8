"""MMCA fused into one kernel each way, for NVIDIA GPUs: no score is ever stored, no token is gathered.

The definition is in attention_dsvl.py. What makes it fast: text keys and image keys are two lists of places, and what a
text query sees is an interval of each list (all of it up to some place, under plain causality). So a block of queries
walks two short lists whose inner blocks need no mask, and keys that no query of the block sees are never read. A query
that is not text is copied from its own value. Softmaxes are computed online, and the backward pass recomputes them from
their saved normalisers (FlashAttention-2, arXiv 2307.08691), once for each of the two branches.

Written in Triton, which comes with PyTorch for CUDA; without it `is_available()` is False.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

LOG2_E = math.log2(math.e)
MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_available(device: torch.device) -> bool:
    """Whether the kernels run on this device: an NVIDIA GPU of compute capability 8.0 or later, and Triton."""
    if triton is None or device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass
class FusedMask:
    """Who sees whom in one forward call: lists of places, and an interval of them for every query and key.

    A *rank* is a place in a list. Nothing here needs to be asked of the device, so no shape depends on the data.

    Attributes:
        queries: (batch, queries) int32, the places of the queries: text first, in order, then the others.
        keys: (batch, keys) int32, the places of the keys: text, then image, then those that are hidden.
        counts: (batch, 4) int32: text queries, text keys, image keys, and the text queries of all earlier rows.
        key_ranges: (batch, 4, queries) int32: from and up to which rank of the text keys, and of the image keys, a query of
            a rank sees.
        query_ranges: (batch, 2, keys) int32: from and up to which rank the text queries see a key of a rank.
        own_key: (batch, queries) int32, the place of each query's own key; for a backward pass these must be consecutive.
        rows: at least as many as there are text queries in the batch; what is saved for the backward pass is as large.
        windowed: whether a query may not see the first keys of a list.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    counts: torch.Tensor
    key_ranges: torch.Tensor
    query_ranges: torch.Tensor
    own_key: torch.Tensor
    rows: int
    windowed: bool

    def to(self, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> FusedMask:
        """Move every tensor: a model spread over devices by accelerate calls this."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return FusedMask(
            **{
                name: value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value
                for name, value in values.items()
            }
        )


def fused_mask(
    is_text_query: torch.Tensor,
    is_text_key: torch.Tensor,
    is_image_key: torch.Tensor,
    own_key: torch.Tensor,
    visible_from: torch.Tensor | None = None,
    visible_up_to: torch.Tensor | None = None,
    rows: int | None = None,
) -> FusedMask:
    """List the modalities of one forward call.

    Args:
        is_text_query: (batch, queries) bool.
        is_text_key, is_image_key: (batch, keys) bool; a key that is neither is hidden from every query but its own.
        own_key: (queries,) or (batch, queries), the place of each query's own key.
        visible_from, visible_up_to: (batch or 1, queries), the places of keys between which a query may see; both must never
            decrease from a query to the next. By default, from the first key up to its own.
        rows: an upper bound of the number of text queries in the batch, if one is known; it saves memory.
    """
    batch, queries = is_text_query.shape
    keys = is_text_key.shape[1]
    up_to = (own_key + 1 if visible_up_to is None else visible_up_to).expand(batch, queries)
    # Places in order: a stable sort of a few classes.
    query_order = (~is_text_query).to(torch.uint8).argsort(dim=-1, stable=True)
    key_class = torch.where(is_text_key, 0, torch.where(is_image_key, 1, 2)).to(torch.uint8)
    key_order = key_class.argsort(dim=-1, stable=True)
    text_count, image_count = is_text_key.sum(-1, keepdim=True), is_image_key.sum(-1, keepdim=True)
    query_count = is_text_query.sum(-1, keepdim=True)
    earlier = query_count.cumsum(0) - query_count

    rank = torch.arange(queries, device=is_text_query.device)
    is_query = rank < query_count
    up_to = up_to.gather(1, query_order)
    since = None if visible_from is None else visible_from.expand(batch, queries).gather(1, query_order)
    key_rank = torch.arange(keys, device=is_text_query.device).expand(batch, keys)
    ranges, seen_by = [], []
    for members in (is_text_key, is_image_key):
        before = torch.nn.functional.pad(members.cumsum(-1), (1, 0))  # how many members lie before a place
        last = before.gather(1, up_to)
        first = torch.zeros_like(last) if since is None else before.gather(1, since)
        beyond = keys + 1  # slots past the text queries see nothing, and keep the lists sorted
        first_sorted, last_sorted = first.masked_fill(~is_query, beyond), last.masked_fill(~is_query, beyond)
        ranges += [first.masked_fill(~is_query, 0), last.masked_fill(~is_query, 0)]
        within = (key_rank if members is is_text_key else key_rank - text_count).contiguous()
        seen_by.append([torch.searchsorted(edge, within, right=True) for edge in (last_sorted, first_sorted)])
    is_text, is_hidden = key_rank < text_count, key_rank >= text_count + image_count
    query_ranges = [
        torch.where(is_text, text, image).masked_fill(is_hidden, 0) for text, image in zip(*seen_by, strict=True)
    ]
    return FusedMask(
        queries=query_order.to(torch.int32),
        keys=key_order.to(torch.int32),
        counts=torch.cat([query_count, text_count, image_count, earlier], dim=1).to(torch.int32),
        key_ranges=torch.stack(ranges, dim=1).to(torch.int32),
        query_ranges=torch.stack(query_ranges, dim=1).to(torch.int32),
        own_key=own_key.expand(batch, queries).to(torch.int32).contiguous(),
        rows=batch * queries if rows is None else rows,
        windowed=visible_from is not None,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Kernels. Scores are kept in units of log2, for exp2 is what the hardware has.

# Lengths differ from batch to batch: a kernel must not be compiled again for one that is a multiple of 16.

def jit(function: Callable) -> Any:
    return function if triton is None else triton.jit(function)


def kernel(function: Callable) -> Any:
    return function if triton is None else triton.jit(function, do_not_specialize=["queries", "keys", "rows"])


@jit
def _load_rows(pointer, places, stride, head_dim: tl.constexpr, block_d: tl.constexpr, valid, masked: tl.constexpr):
    """Rows of (places, head_dim) at `places`; zero where not `valid`."""
    columns = tl.arange(0, block_d)
    at = pointer + places[:, None] * stride + columns[None, :]
    if block_d != head_dim:
        if masked:
            return tl.load(at, mask=valid[:, None] & (columns < head_dim)[None, :], other=0.0)
        return tl.load(at, mask=(columns < head_dim)[None, :], other=0.0)
    if masked:
        return tl.load(at, mask=valid[:, None], other=0.0)
    return tl.load(at)


@jit
def _store_rows(pointer, places, stride, rows, head_dim: tl.constexpr, block_d: tl.constexpr, valid):
    columns = tl.arange(0, block_d)
    at = pointer + places[:, None] * stride + columns[None, :]
    tl.store(at, rows.to(pointer.dtype.element_ty), mask=valid[:, None] & (columns < head_dim)[None, :])


@jit
def _cap(scores, scale, softcap):
    """tanh(scores * scale / softcap), by which Gemma 2 caps its scores."""
    return 2.0 / (1.0 + tl.exp2(scores * (scale * (-2.0 * 1.4426950408889634) / softcap))) - 1.0


@jit
def _inner_blocks(first, last, valid, size: tl.constexpr):
    """Of the intervals [first, last) of many queries: which blocks need a look, and which lie inside of all of them.

    Returns:
        start, inner start, inner end, end; all multiples of `size` but the last.
    """
    far = 2147483647
    start = tl.min(tl.where(valid & (last > first), first, far), 0)
    end = tl.max(tl.where(valid, last, 0), 0)
    start = tl.minimum(start, end) // size * size
    inner_start = tl.max(tl.where(valid, first, 0), 0)
    inner_start = tl.maximum((inner_start + size - 1) // size * size, start)
    inner_end = tl.min(tl.where(valid, last, far), 0)
    inner_end = tl.maximum(inner_end // size * size, inner_start)
    return start, inner_start, inner_end, end


@jit
def _attend(
    accumulator, normaliser, peak, query, key_base, value_base, key_list, first, last, start, end,
    key_stride, value_stride, scale, softcap,
    capped: tl.constexpr, masked: tl.constexpr, head_dim: tl.constexpr, block_d: tl.constexpr,
    block_n: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The blocks of keys from rank `start` to `end`, by online softmax."""
    for rank in range(start, end, block_n):
        ranks = rank + tl.arange(0, block_n)
        if masked:
            places = tl.load(key_list + ranks, mask=ranks < end, other=0)
        else:
            places = tl.load(key_list + ranks)
        key = _load_rows(key_base, places, key_stride, head_dim, block_d, ranks < end, masked)
        scores = tl.dot(query, tl.trans(key), input_precision=precision)
        if capped:
            scores = _cap(scores, scale, softcap) * (softcap * 1.4426950408889634)
        else:
            scores = scores * (scale * 1.4426950408889634)
        if masked:
            seen = (ranks[None, :] >= first[:, None]) & (ranks[None, :] < last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        if masked:
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        else:
            shift = new_peak
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(peak - shift)
        normaliser = normaliser * decay + tl.sum(weights, 1)
        accumulator = accumulator * decay[:, None]
        value = _load_rows(value_base, places, value_stride, head_dim, block_d, ranks < end, masked)
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision=precision)
        peak = new_peak
    return accumulator, normaliser, peak


@kernel
def _forward_kernel(
    Query, Key, Value, Out, Branches, Normalisers, Queries, Keys, Counts, KeyRanges, OwnKey,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, scale, softcap,
    heads, queries, keys, rows, group: tl.constexpr,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    capped: tl.constexpr, windowed: tl.constexpr, save: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: text queries attend, others are given their own value."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the long ones first
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv_head = head // group
    text_queries = tl.load(Counts + batch * 4)
    key_base = Key + batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    value_base = Value + batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    ranks = block * block_m + tl.arange(0, block_m)
    within, valid = ranks < queries, ranks < text_queries
    places = tl.load(Queries + batch * queries + ranks, mask=within, other=0)
    out_base = Out + (batch.to(tl.int64) * queries * heads + head) * head_dim
    if block * block_m >= text_queries:
        own = tl.load(OwnKey + batch * queries + places, mask=within, other=0)
        rows_ = _load_rows(value_base, own, v_token, head_dim, block_d, within, True)
        _store_rows(out_base, places, heads * head_dim, rows_, head_dim, block_d, within)
        return
    query_base = Query + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    query = _load_rows(query_base, places, q_token, head_dim, block_d, valid, True)
    total = tl.zeros([block_m, block_d], dtype=tl.float32)
    saved = tl.load(Counts + batch * 4 + 3) + ranks
    for branch in tl.static_range(2):
        edges = KeyRanges + (batch * 4 + 2 * branch) * queries + ranks
        first = tl.load(edges, mask=within, other=0)
        last = tl.load(edges + queries, mask=within, other=0)
        key_list = Keys + batch * keys
        if branch == 1:
            key_list += tl.load(Counts + batch * 4 + 1)
        accumulator = tl.zeros([block_m, block_d], dtype=tl.float32)
        normaliser = tl.zeros([block_m], dtype=tl.float32)
        peak = tl.full([block_m], float("-inf"), dtype=tl.float32)
        start, inner_start, inner_end, end = _inner_blocks(first, last, valid, block_n)
        if windowed:
            accumulator, normaliser, peak = _attend(
                accumulator, normaliser, peak, query, key_base, value_base, key_list, first, last,
                start, tl.minimum(inner_start, end), k_token, v_token, scale, softcap,
                capped, True, head_dim, block_d, block_n, precision,
            )  # fmt: skip
        accumulator, normaliser, peak = _attend(
            accumulator, normaliser, peak, query, key_base, value_base, key_list, first, last,
            inner_start, inner_end, k_token, v_token, scale, softcap,
            capped, False, head_dim, block_d, block_n, precision,
        )  # fmt: skip
        accumulator, normaliser, peak = _attend(
            accumulator, normaliser, peak, query, key_base, value_base, key_list, first, last,
            inner_end, end, k_token, v_token, scale, softcap,
            capped, True, head_dim, block_d, block_n, precision,
        )  # fmt: skip
        some = normaliser > 0
        accumulator = accumulator / tl.where(some, normaliser, 1.0)[:, None]
        total += accumulator
        if save:
            # An empty softmax is infinitely normalised, so that its weights come back as 0.
            log = tl.where(some, peak + tl.log2(normaliser), float("inf"))
            at = (branch * heads + head).to(tl.int64) * rows + saved
            tl.store(Normalisers + at, log, mask=valid)
            branch_base = Branches + (head.to(tl.int64) + branch * rows * heads) * head_dim
            _store_rows(branch_base, saved.to(tl.int64), heads * head_dim, accumulator, head_dim, block_d, valid)
    if block * block_m + block_m > text_queries:
        own = tl.load(OwnKey + batch * queries + places, mask=within, other=0)
        own_value = _load_rows(value_base, own, v_token, head_dim, block_d, within & ~valid, True)
        total = tl.where(valid[:, None], total, own_value.to(tl.float32))
    _store_rows(out_base, places, heads * head_dim, total, head_dim, block_d, within)


@kernel
def _delta_kernel(
    Gradient, Branches, Deltas, Queries, Counts, g_batch, g_head, g_token, heads, queries, rows,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_m: tl.constexpr,
):  # fmt: skip
    """Each text query's gradient times each branch's output: what its softmax takes off its scores' gradients."""
    block = tl.program_id(0)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    text_queries = tl.load(Counts + batch * 4)
    if block * block_m >= text_queries:
        return
    ranks = block * block_m + tl.arange(0, block_m)
    valid = ranks < text_queries
    places = tl.load(Queries + batch * queries + ranks, mask=valid, other=0)
    base = Gradient + batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
    gradient = _load_rows(base, places, g_token, head_dim, block_d, valid, True).to(tl.float32)
    saved = tl.load(Counts + batch * 4 + 3) + ranks
    for branch in tl.static_range(2):
        branch_base = Branches + (head.to(tl.int64) + branch * rows * heads) * head_dim
        output = _load_rows(branch_base, saved.to(tl.int64), heads * head_dim, head_dim, block_d, valid, True)
        at = (branch * heads + head).to(tl.int64) * rows + saved
        tl.store(Deltas + at, tl.sum(gradient * output.to(tl.float32), 1), mask=valid)


@jit
def _score_gradients(
    scores, normaliser, weight_gradients, delta, seen, scale, softcap, capped: tl.constexpr, masked: tl.constexpr
):
    """Weights and the scores' gradients, both before scaling, from raw products; operands broadcast against `scores`."""
    if capped:
        cap = _cap(scores, scale, softcap)
        weights = tl.exp2(cap * (softcap * 1.4426950408889634) - normaliser)
    else:
        weights = tl.exp2(scores * (scale * 1.4426950408889634) - normaliser)
    if masked:
        weights = tl.where(seen, weights, 0.0)
    gradients = weights * (weight_gradients - delta)
    if capped:
        gradients = gradients * (1.0 - cap * cap)
    return weights, gradients


@jit
def _query_blocks(
    gradient_sum, query, gradient, normaliser, delta, key_base, value_base, key_list, first, last, start, end,
    key_stride, value_stride, scale, softcap,
    capped: tl.constexpr, masked: tl.constexpr, head_dim: tl.constexpr, block_d: tl.constexpr,
    block_n: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    for rank in range(start, end, block_n):
        ranks = rank + tl.arange(0, block_n)
        if masked:
            places = tl.load(key_list + ranks, mask=ranks < end, other=0)
        else:
            places = tl.load(key_list + ranks)
        key = _load_rows(key_base, places, key_stride, head_dim, block_d, ranks < end, masked)
        value = _load_rows(value_base, places, value_stride, head_dim, block_d, ranks < end, masked)
        scores = tl.dot(query, tl.trans(key), input_precision=precision)
        weight_gradients = tl.dot(gradient, tl.trans(value), input_precision=precision)
        seen = (ranks[None, :] >= first[:, None]) & (ranks[None, :] < last[:, None])
        _, gradients = _score_gradients(
            scores, normaliser[:, None], weight_gradients, delta[:, None], seen, scale, softcap, capped, masked
        )
        gradient_sum = tl.dot(gradients.to(key.dtype), key, gradient_sum, input_precision=precision)
    return gradient_sum


@kernel
def _query_gradient_kernel(
    Query, Key, Value, Gradient, QueryGradient, Normalisers, Deltas, Queries, Keys, Counts, KeyRanges,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, g_batch, g_head, g_token,
    d_batch, d_head, d_token, scale, softcap, heads, queries, keys, rows, group: tl.constexpr,
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
        key_base = Key + batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
        value_base = Value + batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
        query_base = Query + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
        query = _load_rows(query_base, places, q_token, head_dim, block_d, valid, True)
        gradient_base = Gradient + batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
        gradient = _load_rows(gradient_base, places, g_token, head_dim, block_d, valid, True)
        saved = tl.load(Counts + batch * 4 + 3) + ranks
        for branch in tl.static_range(2):
            edges = KeyRanges + (batch * 4 + 2 * branch) * queries + ranks
            first = tl.load(edges, mask=within, other=0)
            last = tl.load(edges + queries, mask=within, other=0)
            key_list = Keys + batch * keys
            if branch == 1:
                key_list += tl.load(Counts + batch * 4 + 1)
            at = (branch * heads + head).to(tl.int64) * rows + saved
            normaliser = tl.load(Normalisers + at, mask=valid, other=float("inf"))
            delta = tl.load(Deltas + at, mask=valid, other=0.0)
            start, inner_start, inner_end, end = _inner_blocks(first, last, valid, block_n)
            if windowed:
                total = _query_blocks(
                    total, query, gradient, normaliser, delta, key_base, value_base, key_list, first, last,
                    start, tl.minimum(inner_start, end), k_token, v_token, scale, softcap,
                    capped, True, head_dim, block_d, block_n, precision,
                )  # fmt: skip
            total = _query_blocks(
                total, query, gradient, normaliser, delta, key_base, value_base, key_list, first, last,
                inner_start, inner_end, k_token, v_token, scale, softcap,
                capped, False, head_dim, block_d, block_n, precision,
            )  # fmt: skip
            total = _query_blocks(
                total, query, gradient, normaliser, delta, key_base, value_base, key_list, first, last,
                inner_end, end, k_token, v_token, scale, softcap,
                capped, True, head_dim, block_d, block_n, precision,
            )  # fmt: skip
    _store_rows(out_base, places, d_token, total * scale, head_dim, block_d, within)


@jit
def _key_blocks(
    key_sum, value_sum, key, value, query_base, gradient_base, normalisers, deltas, query_list, edges, key_ranks,
    start, end, q_token, g_token, queries, scale, softcap,
    capped: tl.constexpr, masked: tl.constexpr, head_dim: tl.constexpr, block_d: tl.constexpr,
    block_m: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    for rank in range(start, end, block_m):
        ranks = rank + tl.arange(0, block_m)
        valid = ranks < end
        if masked:
            places = tl.load(query_list + ranks, mask=valid, other=0)
            normaliser = tl.load(normalisers + ranks, mask=valid, other=float("inf"))
            delta = tl.load(deltas + ranks, mask=valid, other=0.0)
            first = tl.load(edges + ranks, mask=valid, other=0)
            last = tl.load(edges + queries + ranks, mask=valid, other=0)
            seen = (key_ranks[:, None] >= first[None, :]) & (key_ranks[:, None] < last[None, :])
        else:
            places = tl.load(query_list + ranks)
            normaliser = tl.load(normalisers + ranks)
            delta = tl.load(deltas + ranks)
            seen = valid
        query = _load_rows(query_base, places, q_token, head_dim, block_d, valid, masked)
        gradient = _load_rows(gradient_base, places, g_token, head_dim, block_d, valid, masked)
        scores = tl.dot(key, tl.trans(query), input_precision=precision)
        weight_gradients = tl.dot(value, tl.trans(gradient), input_precision=precision)
        weights, gradients = _score_gradients(
            scores, normaliser[None, :], weight_gradients, delta[None, :], seen, scale, softcap, capped, masked
        )
        value_sum = tl.dot(weights.to(gradient.dtype), gradient, value_sum, input_precision=precision)
        key_sum = tl.dot(gradients.to(query.dtype), query, key_sum, input_precision=precision)
    return key_sum, value_sum


@kernel
def _key_gradient_kernel(
    Query, Key, Value, Gradient, KeyGradient, ValueGradient, Normalisers, Deltas,
    Queries, Keys, Counts, KeyRanges, QueryRanges, OwnKey,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, g_batch, g_head, g_token,
    dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token, scale, softcap, heads, queries, keys, rows, group: tl.constexpr,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    capped: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values of one key-value head: text keys, or image and hidden keys."""
    kv_heads = heads // group
    batch, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    text_queries, text_keys = tl.load(Counts + batch * 4), tl.load(Counts + batch * 4 + 1)
    block, text_blocks = tl.program_id(0), (text_keys + block_n - 1) // block_n
    branch = (block >= text_blocks).to(tl.int32)
    begin = tl.where(branch == 1, text_keys, 0)
    key_ranks = (block - branch * text_blocks) * block_n + tl.arange(0, block_n)  # within the text or the other keys
    valid = key_ranks < tl.where(branch == 1, keys - text_keys, text_keys)
    if (block - branch * text_blocks) * block_n >= tl.where(branch == 1, keys - text_keys, text_keys):
        return
    places = tl.load(Keys + batch * keys + begin + key_ranks, mask=valid, other=0)
    key_base = Key + batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    value_base = Value + batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    key = _load_rows(key_base, places, k_token, head_dim, block_d, valid, True)
    value = _load_rows(value_base, places, v_token, head_dim, block_d, valid, True)
    seen_by = QueryRanges + batch * 2 * keys + begin + key_ranks
    first = tl.load(seen_by, mask=valid, other=0)
    last = tl.load(seen_by + keys, mask=valid, other=0)
    start, inner_start, inner_end, end = _inner_blocks(first, last, valid, block_m)
    query_list = Queries + batch * queries
    edges = KeyRanges + (batch * 4 + 2 * branch) * queries
    saved = tl.load(Counts + batch * 4 + 3)
    key_sum = tl.zeros([block_n, block_d], dtype=tl.float32)
    value_sum = tl.zeros([block_n, block_d], dtype=tl.float32)
    # The query whose own key this is, if it is one of this call's and not text, was given the value itself.
    own_query = places - tl.load(OwnKey + batch * queries)
    is_own = valid & (own_query >= 0) & (own_query < queries) & (branch == 1)
    for member in range(0, group):
        head = kv_head * group + member
        query_base = Query + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
        gradient_base = Gradient + batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
        at = (branch * heads + head).to(tl.int64) * rows + saved
        key_sum, value_sum = _key_blocks(
            key_sum, value_sum, key, value, query_base, gradient_base, Normalisers + at, Deltas + at, query_list, edges,
            key_ranks, start, tl.minimum(inner_start, end), q_token, g_token, queries, scale, softcap,
            capped, True, head_dim, block_d, block_m, precision,
        )  # fmt: skip
        key_sum, value_sum = _key_blocks(
            key_sum, value_sum, key, value, query_base, gradient_base, Normalisers + at, Deltas + at, query_list, edges,
            key_ranks, inner_start, inner_end, q_token, g_token, queries, scale, softcap,
            capped, False, head_dim, block_d, block_m, precision,
        )  # fmt: skip
        key_sum, value_sum = _key_blocks(
            key_sum, value_sum, key, value, query_base, gradient_base, Normalisers + at, Deltas + at, query_list, edges,
            key_ranks, inner_end, end, q_token, g_token, queries, scale, softcap,
            capped, True, head_dim, block_d, block_m, precision,
        )  # fmt: skip
        if branch == 1:
            value_sum += _load_rows(gradient_base, own_query, g_token, head_dim, block_d, is_own, True).to(tl.float32)
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


def _blocks(kernel: str, block_d: int, itemsize: int) -> Blocks:
    """What measured best on an H100 (benchmarks/attention.py), or what its shared memory can hold."""
    if itemsize == 4:
        return Blocks(32, 32, 4, 1) if block_d > 128 else Blocks(64, 32, 4, 1)
    if block_d > 128:
        return Blocks(64, 32, 4, 1) if kernel == "keys" else Blocks(64, 64, 4 if kernel == "queries" else 8, 2)
    return BLOCKS[kernel]


BLOCKS = {
    "forward": Blocks(128, 64, 8, 3),
    "queries": Blocks(128, 64, 8, 2),
    "keys": Blocks(64, 128, 8, 2),
}


def _strides(states: torch.Tensor) -> tuple[int, int, int]:
    """Of (batch, heads, tokens, head_dim), whose last dimension lies dense."""
    return states.stride(0), states.stride(1), states.stride(2)


def _dense(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(3) == 1 else states.contiguous()


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"


# Two versions of this file may be loaded in one process, as the remote code of two checkpoints: each has operators of its own.
_NAMESPACE = "dsvl_" + "".join(c if c.isalnum() else "_" for c in __name__)


@torch.library.custom_op(f"{_NAMESPACE}::attend", mutates_args=())
def _attend_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    counts: torch.Tensor,
    key_ranges: torch.Tensor,
    query_ranges: torch.Tensor,
    own_key: torch.Tensor,
    rows: int,
    windowed: bool,
    scaling: float,
    softcap: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = _dense(query), _dense(key), _dense(value)
    batch, heads, tokens, head_dim = query.shape
    block_d = max(triton.next_power_of_2(head_dim), 16)
    cut = _blocks("forward", block_d, query.element_size())
    out, branches, normalisers = _empty_outputs(query, rows if save else 0)
    grid = (triton.cdiv(tokens, cut.queries), batch * heads)
    with torch.cuda.device(query.device):
        _forward_kernel[grid](
            query, key, value, out, branches, normalisers, queries, keys, counts, key_ranges, own_key,
            *_strides(query), *_strides(key), *_strides(value), scaling, softcap,
            heads, tokens, key.shape[2], rows, group=heads // key.shape[1],
            head_dim=head_dim, block_d=block_d, block_m=cut.queries, block_n=cut.keys,
            capped=softcap > 0, windowed=windowed, save=save, precision=_precision(query.dtype),
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    return out, branches, normalisers


def _empty_outputs(query: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, tokens, head_dim = query.shape
    return (
        query.new_empty(batch, tokens, heads, head_dim),
        query.new_empty(2, rows, heads, head_dim),
        query.new_empty(2, heads, rows, dtype=torch.float32),
    )


@_attend_op.register_fake
def _(query: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, save = args[8], args[12]
    return _empty_outputs(query, rows if save else 0)


@torch.library.custom_op(f"{_NAMESPACE}::attend_backward", mutates_args=())
def _attend_backward_op(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    branches: torch.Tensor,
    normalisers: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    counts: torch.Tensor,
    key_ranges: torch.Tensor,
    query_ranges: torch.Tensor,
    own_key: torch.Tensor,
    rows: int,
    windowed: bool,
    scaling: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradient, query, key, value = (_dense(states) for states in (gradient.transpose(1, 2), query, key, value))
    batch, heads, tokens, head_dim = query.shape
    kv_heads, kv_tokens = key.shape[1], key.shape[2]
    block_d = max(triton.next_power_of_2(head_dim), 16)
    deltas = torch.empty_like(normalisers)
    query_gradient, key_gradient, value_gradient = (_like_projected(states) for states in (query, key, value))
    common = dict(head_dim=head_dim, block_d=block_d)
    exact = dict(capped=softcap > 0, precision=_precision(query.dtype))
    inputs = (*_strides(query), *_strides(key), *_strides(value), *_strides(gradient))
    with torch.cuda.device(query.device):
        _delta_kernel[(triton.cdiv(tokens, 64), batch * heads)](
            gradient, branches, deltas, queries, counts, *_strides(gradient), heads, tokens, rows, block_m=64, **common
        )
        cut = _blocks("keys", block_d, query.element_size())
        # One block more than there are keys for, as the last block of text keys may be partly filled.
        _key_gradient_kernel[(triton.cdiv(kv_tokens, cut.keys) + 1, batch * kv_heads)](
            query, key, value, gradient, key_gradient, value_gradient, normalisers, deltas,
            queries, keys, counts, key_ranges, query_ranges, own_key,
            *inputs, *_strides(key_gradient), *_strides(value_gradient), scaling, softcap,
            heads, tokens, kv_tokens, rows, group=heads // kv_heads,
            block_m=cut.queries, block_n=cut.keys, num_warps=cut.warps, num_stages=cut.stages, **common, **exact,
        )  # fmt: skip
        cut = _blocks("queries", block_d, query.element_size())
        _query_gradient_kernel[(triton.cdiv(tokens, cut.queries), batch * heads)](
            query, key, value, gradient, query_gradient, normalisers, deltas, queries, keys, counts, key_ranges,
            *inputs, *_strides(query_gradient), scaling, softcap,
            heads, tokens, kv_tokens, rows, group=heads // kv_heads, windowed=windowed,
            block_m=cut.queries, block_n=cut.keys, num_warps=cut.warps, num_stages=cut.stages, **common, **exact,
        )  # fmt: skip
    return query_gradient, key_gradient, value_gradient


def _like_projected(states: torch.Tensor) -> torch.Tensor:
    """Room for (batch, heads, tokens, head_dim) in the memory order in which a decoder's projections leave it."""
    batch, heads, tokens, head_dim = states.shape
    return states.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


@_attend_backward_op.register_fake
def _(gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any) -> Any:
    return _like_projected(query), _like_projected(key), _like_projected(value)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, rows, windowed, scaling, softcap, save = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.options, ctx.saved = (rows, windowed, scaling, softcap), save


def _backward(ctx: Any, gradient: torch.Tensor, *unused: Any) -> tuple:
    query, key, value, *mask, branches, normalisers = ctx.saved_tensors
    gradients = _attend_backward_op(gradient, query, key, value, branches, normalisers, *mask, *ctx.options)
    return *gradients, *[None] * 11


_attend_op.register_autograd(_backward, setup_context=_setup_context)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: FusedMask,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """MMCA of one layer.

    Args:
        query: (batch, heads, queries, head_dim), bf16, fp16 or fp32, on an NVIDIA GPU.
        key, value: (batch, key-value heads, keys, head_dim), of the same dtype.
        mask: who sees whom; may be shared by all layers that see alike.
        scaling: by what the products of queries and keys are multiplied.
        softcap: to what the scores are capped, by softcap * tanh(scores / softcap).

    Returns:
        (batch, queries, heads, head_dim)

    Raises:
        ValueError: if values are not as wide as keys, or tensors have different dtypes.
    """
    if key.shape != value.shape or query.shape[3] != key.shape[3] or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"The fused kernels want keys and values of one shape and dtype; got a query {tuple(query.shape)} {query.dtype}, "
            f"a key {tuple(key.shape)} {key.dtype} and a value {tuple(value.shape)} {value.dtype}. Choose "
            "attn_implementation='eager' or 'flex_attention'."
        )
    save = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    lists = (mask.queries, mask.keys, mask.counts, mask.key_ranges, mask.query_ranges, mask.own_key)
    return _attend_op(query, key, value, *lists, mask.rows, mask.windowed, float(scaling), float(softcap or 0.0), save)[0]
