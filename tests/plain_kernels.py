"""What the fused kernels compute, in plain PyTorch by the lists of their mask: the way to them, without an NVIDIA GPU."""

from typing import Any

import torch

from dsvl.acceleration import fused_mask, kernels


def use_plain_kernels(monkeypatch: Any) -> None:
    """Let every decoder take the fused way, and this compute it."""
    monkeypatch.setattr(fused_mask, "can_fuse", lambda *args: True)
    monkeypatch.setattr(kernels, "_forward", forward)
    monkeypatch.setattr(kernels, "_backward", backward)


def forward(query, key, value, mask, scaling, softcap, save):
    packed = [_packed(states, places) for states, places in ((query, mask.queries), (key, mask.keys), (value, mask.keys))]
    weights, _ = _weights(*packed[:2], mask, scaling, softcap)
    values = packed[2][:, :, : mask.keys.shape[1]].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    attended = sum(weights) @ values
    attended = torch.where(_is_text(mask), attended, values.gather(2, _own_keys(mask).expand_as(attended)))
    out, branches, normalisers = kernels._empty_outputs(query, mask.rows if save else 0)
    out.copy_(_unpacked(attended, mask.queries, out.transpose(1, 2).shape).transpose(1, 2))
    return out, *packed, branches, normalisers


def backward(out_gradient, saved, mask, scaling, softcap):
    query, key, value, *_ = saved
    group, keys = query.shape[1] // key.shape[1], mask.keys.shape[1]
    (text, image), capped = _weights(query, key, mask, scaling, softcap)
    gradient = _packed(out_gradient.transpose(1, 2), mask.queries)[:, :, : mask.queries.shape[1]]
    values = value[:, :, :keys].repeat_interleave(group, dim=1)
    attended, is_text = text + image, _is_text(mask)
    towards = gradient @ values.transpose(-1, -2)
    scores = sum(branch * (towards - (branch * towards).sum(-1, keepdim=True)) for branch in (text, image))
    scores = scores * is_text * capped * scaling
    repeated = key[:, :, :keys].repeat_interleave(group, dim=1)
    query_gradient = scores @ repeated
    key_gradient = scores.transpose(-1, -2) @ query[:, :, : mask.queries.shape[1]]
    own = _own_keys(mask).expand_as(gradient)
    value_gradient = (attended * is_text).transpose(-1, -2) @ gradient
    value_gradient = value_gradient.scatter_add(2, own, gradient * ~is_text)
    made = kernels._empty_gradients(out_gradient, key, keys)
    found = query_gradient, *(g.unflatten(1, (-1, group)).sum(2) for g in (key_gradient, value_gradient))
    for empty, states, places in zip(made, found, (mask.queries, mask.keys, mask.keys), strict=True):
        empty.copy_(_unpacked(states, places, empty.shape))
    return made


def _packed(states, places):
    """(batch, heads, tokens, head_dim) in the order of a list, in the room that the kernels take."""
    packed = kernels._empty_packed(states).zero_()
    index = places.long()[:, None, :, None].expand_as(states)
    packed[:, :, : states.shape[2], : states.shape[3]] = states.gather(2, index)
    return packed


def _unpacked(states, places, shape):
    states = states[..., : shape[3]]
    return torch.zeros(shape, dtype=states.dtype).scatter(2, places.long()[:, None, :, None].expand(shape), states)


def _is_text(mask):
    return (torch.arange(mask.queries.shape[1]) < mask.counts[:, :1])[:, None, :, None]


def _own_keys(mask):
    """The rank of each query's own key, by the query's rank: (batch, 1, queries, 1)."""
    place = mask.own_key.long().gather(1, mask.queries.long())
    rank = mask.keys.long().argsort(-1)
    return rank.gather(1, place)[:, None, :, None]


def _weights(query, key, mask, scaling, softcap):
    """Of both branches, (batch, heads, queries, keys) by rank; and what a capped score's gradient is multiplied with."""
    queries, keys = mask.queries.shape[1], mask.keys.shape[1]
    key = key[:, :, :keys].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores, capped = query[:, :, :queries] @ key.transpose(-1, -2) * scaling, 1.0
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
        capped = 1 - (scores / softcap) ** 2
    texts = mask.counts[:, 1][:, None, None]
    ranks, edges = torch.arange(keys), mask.key_ranges[..., None]
    weights = []
    for rank, member, (first, last) in (
        (ranks, ranks < texts, (edges[:, 0], edges[:, 1])),
        (ranks - texts, ranks >= texts, (edges[:, 2], edges[:, 3])),
    ):
        seen = ((rank >= first) & (rank < last) & member)[:, None]
        some = seen.any(-1, keepdim=True)
        weights.append(torch.where(some, scores.masked_fill(~seen & some, -torch.inf).softmax(-1), 0))
    return weights, capped
