"""The fused kernels in plain PyTorch, from the same token lists, for tests without an NVIDIA GPU."""

import ctypes
import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from dsvl.acceleration.attention import few_queries, fused_mask, kernel_choice, kernels
from dsvl.acceleration.decoding import row_product, static_steps
from dsvl.acceleration.reuse import compiled_prefill


def use_plain_kernels(monkeypatch: Any) -> None:
    """Make every decoder choose the fused kernels, and compute them with the functions of this file."""
    monkeypatch.setattr(fused_mask, "can_fuse", lambda *args: True)
    monkeypatch.setattr(kernel_choice, "can_fuse", lambda *args: True)  # where it is called by its module
    monkeypatch.setattr(kernels, "launch_forward", forward)
    monkeypatch.setattr(kernels, "launch_backward", backward)


def use_plain_few_queries(monkeypatch: Any) -> list[int]:
    """Let the kernels for few queries be chosen, and compute them with the function of this file.

    Returns:
        A list that gets the number of queries of each call.
    """
    launched: list[int] = []

    def launch(*args: Any) -> torch.Tensor:
        query = args[0]
        if isinstance(query, FakeTensor):  # while a graph is traced
            return query.new_empty(len(query), query.shape[2], query.shape[1], query.shape[3])
        launched.append(query.shape[2])
        return attend_few_queries(*args)

    monkeypatch.setattr(few_queries, "launch_few_queries", launch)
    monkeypatch.setattr(few_queries, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    monkeypatch.setattr(row_product, "LEAST_FEATURES", 2**30)
    for module in (static_steps, compiled_prefill):
        monkeypatch.setattr(module, "has_step_kernels", lambda device, dtype: True)
    return launched


def attend_few_queries(query, key, value, bias, sees, last, table, scaling, softcap, parts, _):
    queries, read = query.shape[2], int(last.max()) + 1
    cached_key, cached_value, cached_bias = key[:, :, :read], value[:, :, :read], bias[..., :read]
    if table is not None:
        where, strides = table.tolist()[:3], table.tolist()[3:]
        shape = (*key.shape[:2], read, key.shape[3])
        cached_key = _at(where[0], shape, (*strides[:3], 1), key.dtype)
        cached_value = _at(where[1], shape, (*strides[3:6], 1), key.dtype)
        cached_bias = _at(where[2], (len(key), 2, 1, read), (2 * strides[6], strides[6], 0, 1), bias.dtype)
    hidden = torch.arange(read) > last[..., None]  # (batch or 1, queries, keys)
    bias_of = cached_bias.double().masked_fill(hidden[:, None], -torch.inf)
    if table is not None:
        later = torch.ones(queries, queries, dtype=torch.bool).triu(1)
        bias_of = torch.cat([bias_of, bias.double().masked_fill(later, -torch.inf)], -1)
        cached_key, cached_value = torch.cat([cached_key, key], 2), torch.cat([cached_value, value], 2)
    group_size = query.shape[1] // key.shape[1]
    keys, values = (states.repeat_interleave(group_size, 1) for states in (cached_key, cached_value))
    scores = query @ keys.transpose(-1, -2) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = (scores[:, None] + bias_of[:, :, None]).softmax(-1).nan_to_num()
    if sees is not None:
        weights = weights * sees[:, :, None]
    return (weights.sum(1).to(values.dtype) @ values).transpose(1, 2).contiguous()


def _at(address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor at an address in main memory."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_byte * (elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides).clone()


def forward(query, key, value, lists, scaling, softcap, save):
    packed = [_pack(x, index) for x, index in ((query, lists.queries), (key, lists.keys), (value, lists.keys))]
    values = packed[2][:, :, : lists.keys.shape[1]].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores, visible, _ = _scores(*packed[:2], lists, scaling, softcap)
    out, saved_q, branch_out, lse = kernels.empty_outputs(query, lists.rows if save else 0)
    lse = lse.to(torch.promote_types(query.dtype, lse.dtype))  # float64 stays float64
    attended = torch.zeros_like(scores @ values)
    for branch, seen in enumerate(visible):
        branch_lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
        branch_lse = branch_lse.masked_fill(branch_lse == -torch.inf, torch.inf)  # the mark of a query without keys
        of_branch = _probabilities(scores, seen, branch_lse) @ values
        attended = attended + of_branch
        for sample, (queries, _, _, begin) in enumerate(lists.counts.tolist() if save else []):
            saved = slice(begin, begin + queries)
            branch_out[branch, saved] = of_branch[sample, :, :queries, : query.shape[3]].transpose(0, 1)
            lse[branch, :, saved] = branch_lse[sample, :, :queries] / math.log(2)
    own = values.gather(2, _own_keys(lists).expand_as(attended))
    out.copy_(_unpack(torch.where(_is_text(lists), attended, own), lists.queries, out.transpose(1, 2).shape).transpose(1, 2))
    for sample, (queries, _, _, begin) in enumerate(lists.counts.tolist() if save else []):
        saved_q[0, :, begin : begin + queries] = packed[0][sample, :, :queries]
    return out, saved_q, *packed[1:], branch_out, lse


def backward(out_gradient, saved, lists, scaling, softcap):
    saved_q, key, value, branch_out, lse = saved
    query = saved_q.new_zeros(len(key), saved_q.shape[1], lists.queries.shape[1], saved_q.shape[3])
    for sample, (queries, _, _, begin) in enumerate(lists.counts.tolist()):
        query[sample, :, :queries] = saved_q[0, :, begin : begin + queries]
    group_size, seqlen_q, seqlen_k = query.shape[1] // key.shape[1], lists.queries.shape[1], lists.keys.shape[1]
    scores, visible, dcap = _scores(query, key, lists, scaling, softcap)
    do = _pack(out_gradient.transpose(1, 2), lists.queries)[:, :, :seqlen_q]
    keys, values = (x[:, :, :seqlen_k].repeat_interleave(group_size, dim=1) for x in (key, value))
    is_text = _is_text(lists)
    dp = do @ values.transpose(-1, -2)
    ds, total_p = torch.zeros_like(scores), torch.zeros_like(scores)
    for branch, seen in enumerate(visible):
        # As the kernels do: from what was saved, which a caller may have merged with that of other processes.
        outputs, sums = torch.zeros_like(do), torch.full_like(scores[..., 0], torch.inf)
        for sample, (queries, _, _, begin) in enumerate(lists.counts.tolist()):
            its = branch_out[branch, begin : begin + queries].transpose(0, 1)
            outputs[sample, :, :queries, : its.shape[-1]] = its
            sums[sample, :, :queries] = lse[branch, :, begin : begin + queries] * math.log(2)
        p = _probabilities(scores, seen, sums)
        ds, total_p = ds + p * (dp - (do * outputs).sum(-1, keepdim=True)), total_p + p
    ds = ds * is_text * dcap * scaling
    dq = ds @ keys
    dk = ds.transpose(-1, -2) @ query
    dv = (total_p * is_text).transpose(-1, -2) @ do
    # The output of another query is its own value. Own keys are consecutive.
    own_query = lists.keys.long() - lists.own_key[:, :1].long()
    is_own = (own_query >= 0) & (own_query < seqlen_q) & (torch.arange(seqlen_k) >= lists.counts[:, 1:2])
    rows = lists.queries.long().argsort(-1).gather(1, own_query.clamp(0, seqlen_q - 1))[:, None, :, None]
    dv = dv + do.gather(2, rows.expand(-1, do.shape[1], -1, do.shape[3])) * is_own[:, None, :, None]
    gradients = kernels.empty_gradients(out_gradient, key, seqlen_k)
    packed = dq, *(x.unflatten(1, (-1, group_size)).sum(2) for x in (dk, dv))
    for gradient, x, index in zip(gradients, packed, (lists.queries, lists.keys, lists.keys), strict=True):
        gradient.copy_(_unpack(x, index, gradient.shape))
    return gradients


def _pack(x, index):
    """(batch, heads, seqlen, head_dim) in list order, in the shape of the kernels' packed tensors."""
    packed = kernels.empty_packed(x).zero_()
    packed[:, :, : x.shape[2], : x.shape[3]] = x.gather(2, index.long()[:, None, :, None].expand_as(x))
    return packed


def _unpack(x, index, shape):
    x = x[..., : shape[3]]
    return torch.zeros(shape, dtype=x.dtype).scatter(2, index.long()[:, None, :, None].expand(shape), x)


def _is_text(lists):
    return (torch.arange(lists.queries.shape[1]) < lists.counts[:, :1])[:, None, :, None]


def _own_keys(lists):
    """List index of each listed query's own key: (batch, 1, seqlen_q, 1). Text queries may have none."""
    key_index = lists.own_key.long().gather(1, lists.queries.long()).clamp(max=lists.keys.shape[1] - 1)
    list_index = lists.keys.long().argsort(-1)
    return list_index.gather(1, key_index)[:, None, :, None]


def _scores(query, key, lists, scaling, softcap):
    """Scores, (batch, heads, seqlen_q, seqlen_k) in list order; which of them are visible in each branch, (batch, 1,
    seqlen_q, seqlen_k); and the derivative of the cap."""
    seqlen_q, seqlen_k = lists.queries.shape[1], lists.keys.shape[1]
    key = key[:, :, :seqlen_k].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores, dcap = query[:, :, :seqlen_q] @ key.transpose(-1, -2) * scaling, 1.0
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
        dcap = 1 - (scores / softcap) ** 2
    num_text_k = lists.counts[:, 1][:, None, None]
    offs_n, ranges = torch.arange(seqlen_k), lists.key_ranges[..., None]
    branches = (
        (offs_n, offs_n < num_text_k, (ranges[:, 0], ranges[:, 1])),
        (offs_n - num_text_k, offs_n >= num_text_k, (ranges[:, 2], ranges[:, 3])),
    )
    return scores, [((offs >= lo) & (offs < hi) & members)[:, None] for offs, members, (lo, hi) in branches], dcap


def _probabilities(scores, visible, lse):
    """Of one branch; `lse` is inf for a query without keys."""
    return (scores - lse[..., None]).exp().masked_fill(~visible, 0)
