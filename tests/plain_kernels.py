"""The fused kernels in plain PyTorch, from the same token lists, for tests without an NVIDIA GPU."""

from typing import Any

import torch

from dsvl.acceleration import fused_mask, kernels


def use_plain_kernels(monkeypatch: Any) -> None:
    """Make every decoder choose the fused kernels, and compute them with the functions of this file."""
    monkeypatch.setattr(fused_mask, "can_fuse", lambda *args: True)
    monkeypatch.setattr(kernels, "launch_forward", forward)
    monkeypatch.setattr(kernels, "launch_backward", backward)


def forward(query, key, value, lists, scaling, softcap, save):
    packed = [_pack(x, index) for x, index in ((query, lists.queries), (key, lists.keys), (value, lists.keys))]
    (text_p, image_p), _ = _probabilities(*packed[:2], lists, scaling, softcap)
    values = packed[2][:, :, : lists.keys.shape[1]].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    attended = (text_p + image_p) @ values
    attended = torch.where(_is_text(lists), attended, values.gather(2, _own_keys(lists).expand_as(attended)))
    out, branch_out, lse = kernels.empty_outputs(query, lists.rows if save else 0)
    out.copy_(_unpack(attended, lists.queries, out.transpose(1, 2).shape).transpose(1, 2))
    return out, *packed, branch_out, lse


def backward(out_gradient, saved, lists, scaling, softcap):
    query, key, value, *_ = saved
    group_size, seqlen_q, seqlen_k = query.shape[1] // key.shape[1], lists.queries.shape[1], lists.keys.shape[1]
    probabilities, dcap = _probabilities(query, key, lists, scaling, softcap)
    do = _pack(out_gradient.transpose(1, 2), lists.queries)[:, :, :seqlen_q]
    keys, values = (x[:, :, :seqlen_k].repeat_interleave(group_size, dim=1) for x in (key, value))
    is_text = _is_text(lists)
    dp = do @ values.transpose(-1, -2)
    ds = sum(p * (dp - (p * dp).sum(-1, keepdim=True)) for p in probabilities) * is_text * dcap * scaling
    dq = ds @ keys
    dk = ds.transpose(-1, -2) @ query[:, :, :seqlen_q]
    dv = (sum(probabilities) * is_text).transpose(-1, -2) @ do
    dv = dv.scatter_add(2, _own_keys(lists).expand_as(do), do * ~is_text)
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
    """List index of each listed query's own key: (batch, 1, seqlen_q, 1)."""
    key_index = lists.own_key.long().gather(1, lists.queries.long())
    list_index = lists.keys.long().argsort(-1)
    return list_index.gather(1, key_index)[:, None, :, None]


def _probabilities(query, key, lists, scaling, softcap):
    """Softmax of both branches, (batch, heads, seqlen_q, seqlen_k) in list order; and the derivative of the cap."""
    seqlen_q, seqlen_k = lists.queries.shape[1], lists.keys.shape[1]
    key = key[:, :, :seqlen_k].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores, dcap = query[:, :, :seqlen_q] @ key.transpose(-1, -2) * scaling, 1.0
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
        dcap = 1 - (scores / softcap) ** 2
    num_text_k = lists.counts[:, 1][:, None, None]
    offs_n, ranges = torch.arange(seqlen_k), lists.key_ranges[..., None]
    probabilities = []
    for offs, in_branch, (lo, hi) in (
        (offs_n, offs_n < num_text_k, (ranges[:, 0], ranges[:, 1])),
        (offs_n - num_text_k, offs_n >= num_text_k, (ranges[:, 2], ranges[:, 3])),
    ):
        visible = ((offs >= lo) & (offs < hi) & in_branch)[:, None]
        has_keys = visible.any(-1, keepdim=True)
        probabilities.append(torch.where(has_keys, scores.masked_fill(~visible & has_keys, -torch.inf).softmax(-1), 0))
    return probabilities, dcap
