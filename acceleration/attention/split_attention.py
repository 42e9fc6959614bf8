"""Attention whose image keys are spread over the processes of a group.

Under `"mmca"` a text query has one softmax over text keys and another one over image keys. Every process computes the second
over its own images, with the log-sum-exp `lse_r`. The partial results are merged in float32:

    lse = logsumexp_r lse_r        out = sum_r exp(lse_r - lse) out_r

A process without an image in sight has `lse_r = -inf` and adds 0. In the backward pass `p = exp(s - lse)` and
`delta = rowsum(dO * O)` come from the merged result, as in ring attention. So every process computes the gradients of its
own keys and values, and its part of the gradient of the queries. These parts are summed.

The gradient of the loss with respect to text is the same in all processes of a group, and each computes it in full; an image
is in one of them alone. The gradients of image keys and values are therefore multiplied by the size of the group: then the
mean of the parameters' gradients over the processes (of DDP and ZeRO) is the gradient of a single process.

Long texts are dealt out too (`dealt_text_attention`): of n processes, process r runs text tokens r, r + n, ... of each row,
so that all have as many keys in sight. Each gathers the queries, keys and values of the whole text; its own queries see text
keys, all queries see its images, and of the results over images it gets those of its own queries. Every token is then in one
process alone, and no gradient is multiplied; instead the loss of a process, which is of its own tokens, is.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from ...masks_dsvl import Visibility, attention_scores
from . import kernels
from .image_states import Softmax
from .token_lists import ALIGNMENT, TokenLists

# Scores that exist at a time where the fused kernels do not apply.
SCORES_AT_ONCE = 2**26


def gather_text(own: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    """What belongs to the text tokens of all processes of a group, in the order of the text.

    Args:
        own: of this process's text tokens, along `dim`; all processes have as many slots.
        group: the process group.
        dim: the dimension of tokens.
    """
    size = distributed.get_world_size(group)
    parts = own.new_empty(size * len(own), *own.shape[1:])
    _collective("all_gather_single", "all_gather_into_tensor")(parts, own.contiguous(), group=group)
    return parts.unflatten(0, (size, -1)).movedim(0, dim + 1).flatten(dim, dim + 1)


def sum_of_text(whole: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    """The sum over all processes of what each has for the whole text, at the text tokens of this process: the transpose of
    `gather_text`."""
    size = distributed.get_world_size(group)
    parts = whole.unflatten(dim, (-1, size)).movedim(dim + 1, 0).contiguous()
    own = torch.empty_like(parts[0])
    _collective("reduce_scatter_single", "reduce_scatter_tensor")(own, parts.flatten(0, 1), group=group)
    return own


def _collective(name: str, before: str) -> Callable[..., Any]:
    """A function of `torch.distributed` by its name since torch 2.13, or by the one before."""
    return getattr(distributed, name, None) or getattr(distributed, before)


def merge(
    output: torch.Tensor, lse: torch.Tensor, group: Any, deals_text: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the keys of all processes of a group.

    Args:
        output: (batch, queries, heads, head_dim), of this process's keys; 0 where it has none in sight.
        lse: (batch, queries, heads), the logarithm of the sum of exponentials; -inf there.
        group: the process group.
        deals_text: whether to return the results of this process's text tokens alone, *optional*, defaults to False.

    Returns:
        The merged output and `lse`, in float32 at least.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    m = lse.to(dtype, copy=True).contiguous()
    distributed.all_reduce(m, distributed.ReduceOp.MAX, group=group)
    m = m.masked_fill(m == -torch.inf, 0)
    weight = (lse.to(dtype) - m).exp()[..., None]
    sums = torch.cat([output.to(dtype) * weight, weight], -1)
    if deals_text:
        sums = sum_of_text(sums, group, dim=1)
        m = m[:, distributed.get_rank(group) :: distributed.get_world_size(group)]
    else:
        distributed.all_reduce(sums, group=group)
    total = sums[..., -1]
    return sums[..., :-1] / total.masked_fill(total == 0, 1)[..., None], m + total.log()


class BlockedBranch:
    """One softmax over blocks of keys in plain PyTorch (FlashAttention's): no (queries, keys) tensor as a whole.

    Args:
        visibility: of the whole sequences.
        q_positions: (batch, queries), indices in the whole sequences.
        k_positions: (batch, keys).
        k_filled: (batch, keys), False for keys that no query sees.
    """

    def __init__(
        self, visibility: Visibility, q_positions: torch.Tensor, k_positions: torch.Tensor, k_filled: torch.Tensor
    ) -> None:
        self.visibility, self.q_positions, self.k_positions, self.k_filled = visibility, q_positions, k_positions, k_filled

    def _blocks(self, query: torch.Tensor) -> list[slice]:
        keys = self.k_positions.shape[1]
        size = max(SCORES_AT_ONCE // max(query.shape[:-1].numel(), 1), 1)
        return [slice(start, min(start + size, keys)) for start in range(0, keys, size)]

    def _scores(
        self, query: torch.Tensor, key: torch.Tensor, block: slice, scaling: float, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (batch, key-value heads, query heads of each, queries, keys), and which are hidden, of the same rank."""
        device = query.device
        batch = torch.arange(len(query), device=device)[:, None, None]
        head = torch.zeros((), dtype=torch.long, device=device)
        seen = self.visibility.mask_function(
            batch, head, self.q_positions[:, :, None], self.k_positions[:, None, block]
        ) & self.k_filled[:, None, block]  # fmt: skip
        scores = attention_scores(query, key[:, :, block], scaling, softcap)
        return scores.to(torch.promote_types(scores.dtype, torch.float32)), ~seen[:, None, None]

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """The output (batch, queries, heads, head_dim), `lse` (batch, queries, heads), and what `backward` needs.

        Args:
            query: (batch, heads, queries, head_dim).
            key, value: (batch, key-value heads, keys, head_dim).
        """
        batch, heads, queries, _ = query.shape
        kv_heads = key.shape[1]
        state = Softmax(query.new_empty(batch * kv_heads, heads // kv_heads * queries, value.shape[-1]))
        for block in self._blocks(query):
            scores, hidden = self._scores(query, key, block, scaling, softcap)
            rows = scores.masked_fill_(hidden, -torch.inf).flatten(0, 1).flatten(1, 2)
            state.add(rows, value[:, :, block].flatten(0, 1))
        output, lse = state.result()
        output, lse = output.view(batch, heads, queries, -1), lse.view(batch, heads, queries)
        return output.transpose(1, 2), lse.transpose(1, 2), (query, key, value)

    def backward(
        self,
        gradient: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        saved: tuple[torch.Tensor, ...],
        scaling: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of query, key and value, from the merged output and `lse`.

        Args:
            gradient: (batch, queries, heads, head_dim), of the output.
        """
        query, key, value = saved
        kv_heads = key.shape[1]

        def grouped(states: torch.Tensor) -> torch.Tensor:
            """(batch, queries, heads, ...) as (batch, key-value heads, query heads of each, queries, ...)."""
            return states.transpose(1, 2).unflatten(1, (kv_heads, -1))

        delta = grouped((gradient.to(output.dtype) * output).sum(-1))[..., None]
        lse = grouped(lse)[..., None]
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # such a query sees no key: p = exp(-inf) = 0
        rows = grouped(gradient.to(query.dtype))
        queries = query.unflatten(1, (kv_heads, -1))
        d_query = torch.zeros_like(queries, dtype=output.dtype)
        d_key, d_value = torch.empty_like(key), torch.empty_like(value)
        for block in self._blocks(query):
            scores, hidden = self._scores(query, key, block, scaling, softcap)
            p = (scores - lse).exp().masked_fill_(hidden, 0)
            keys, values = key[:, :, None, block], value[:, :, None, block]
            ds = p * (torch.matmul(rows, values.transpose(-1, -2)) - delta) * scaling
            if softcap is not None:
                ds = ds * (1 - (scores / softcap).square())
            ds, p = ds.to(query.dtype), p.to(query.dtype)
            d_query += torch.matmul(ds, keys)
            # Summed over the queries and the query heads of each key-value head at once.
            d_key[:, :, block] = torch.einsum("bhgqk,bhgqd->bhkd", ds, queries)
            d_value[:, :, block] = torch.einsum("bhgqk,bhgqd->bhkd", p, rows)
        return d_query.flatten(1, 2).to(query.dtype), d_key, d_value


class FusedBranch:
    """One softmax by the fused kernels, whose other branch is empty.

    Args:
        lists: the tokens, see `build`.
    """

    def __init__(self, lists: TokenLists) -> None:
        self.lists = lists

    @classmethod
    def build(
        cls,
        positions: torch.Tensor,
        is_key: torch.Tensor,
        seen: tuple[torch.Tensor, torch.Tensor],
        query_filled: torch.Tensor,
    ) -> "FusedBranch":
        """From the positions that each query sees.

        Args:
            positions: (batch, keys), of the keys in the whole sequences, in order.
            is_key: (batch, keys), False for keys that no query sees.
            seen: the first position that each query sees and the position after the last, (batch, queries) each; neither
                decreases from a query to the next.
            query_filled: (batch, queries), False for empty slots, the last.
        """
        batch, keys = positions.shape
        since, up_to = (
            torch.searchsorted(positions.contiguous(), edge.contiguous()).masked_fill(~query_filled, keys) for edge in seen
        )
        # All queries are the kernels' text queries: an empty slot sees nothing. The key that would be a query's own is
        # beyond the last, so that none gets its gradient.
        lists = TokenLists.build(
            torch.ones_like(query_filled),
            is_key,
            torch.zeros_like(is_key),
            torch.full_like(since, keys),
            since,
            up_to,
            rows=query_filled.numel(),
        )
        return cls(lists)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """As `BlockedBranch.forward`."""
        with torch.cuda.device_of(query):
            _, *packed, branch_out, lse = kernels.launch_forward(
                query, key, value, self.lists, float(scaling), float(softcap or 0.0), save=True
            )
        batch, heads, queries, _ = query.shape
        rows = _aligned(queries)
        output = branch_out[0, : batch * rows].unflatten(0, (batch, rows))[:, :queries]
        lse = lse[0, :, : batch * rows].unflatten(1, (batch, rows))[:, :, :queries] * math.log(2)  # of exp2
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # the kernels' mark of a query without keys
        return output, lse.permute(1, 2, 0), tuple(packed)

    def backward(
        self,
        gradient: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        saved: tuple[torch.Tensor, ...],
        scaling: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `BlockedBranch.backward`."""
        batch, queries, heads, head_dim = output.shape
        rows = _aligned(queries)
        branch_out = saved[0].new_zeros(2, self.lists.rows, heads, head_dim)
        branch_out[0, : batch * rows].unflatten(0, (batch, rows))[:, :queries] = output.to(branch_out.dtype)
        branch_lse = torch.full((2, heads, self.lists.rows), torch.inf, dtype=lse.dtype, device=output.device)
        lse = (lse / math.log(2)).masked_fill(lse == -torch.inf, torch.inf)
        branch_lse[0, :, : batch * rows].unflatten(1, (batch, rows))[:, :, :queries] = lse.permute(2, 0, 1)
        with torch.cuda.device_of(gradient):
            return kernels.launch_backward(
                gradient.to(saved[0].dtype),
                [*saved, branch_out, branch_lse],
                self.lists,
                float(scaling),
                float(softcap or 0.0),
            )


def _aligned(queries: int) -> int:
    """Rows of a sample in what the kernels save: all have as many queries."""
    return -(-queries // ALIGNMENT) * ALIGNMENT


class _BranchAttention(torch.autograd.Function):
    """A branch, merged over a group if there is one; see the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        branch: BlockedBranch | FusedBranch,
        scaling: float,
        softcap: float | None,
        group: Any,
    ) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):
            output, lse, saved = branch.forward(query, key, value, scaling, softcap)
            if group is not None:
                output, lse = merge(output, lse, group)
        ctx.save_for_backward(output, lse, *saved)
        ctx.options = branch, scaling, softcap, group
        return output.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        output, lse, *saved = ctx.saved_tensors
        branch, scaling, softcap, group = ctx.options
        d_query, d_key, d_value = branch.backward(gradient, output, lse, tuple(saved), scaling, softcap)
        if group is not None:
            size = distributed.get_world_size(group)
            summed = d_query.to(torch.promote_types(d_query.dtype, torch.float32)).contiguous()
            distributed.all_reduce(summed, group=group)
            d_query, d_key, d_value = summed.to(d_query.dtype), d_key.mul_(size), d_value.mul_(size)
        return d_query, d_key, d_value, None, None, None, None


def branch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    branch: BlockedBranch | FusedBranch,
    scaling: float,
    softcap: float | None = None,
    group: Any = None,
) -> torch.Tensor:
    """One softmax over keys, of all processes of a group if there is one.

    Args:
        query: (batch, heads, queries, head_dim), the same in all processes of the group.
        key, value: (batch, key-value heads, keys, head_dim), of this process.
        branch: which key a query sees, and how attention is computed.
        scaling, softcap: of the scores.
        group: a process group, *optional*, defaults to None: the keys of this process alone.

    Returns:
        (batch, queries, heads, head_dim).
    """
    return _BranchAttention.apply(query, key, value, branch, scaling, softcap, group)


class _DealtTextAttention(torch.autograd.Function):
    """Both branches of text that is dealt out to the processes of a group; see the top of this file.

    One function, so that the processes communicate in the same order in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        image_key: torch.Tensor,
        image_value: torch.Tensor,
        branches: tuple[BlockedBranch | FusedBranch, BlockedBranch | FusedBranch | None],
        scaling: float,
        softcap: float | None,
        group: Any,
    ) -> torch.Tensor:
        of_text, of_images = branches
        with torch.autocast(query.device.type, enabled=False):
            keys, values = gather_text(key, group, dim=2), gather_text(value, group, dim=2)
            text = of_text.forward(query, keys, values, scaling, softcap)
            output, saved = text[0].to(query.dtype), [*text[:2], *text[2]]
            if of_images is not None:
                queries = gather_text(query, group, dim=2)
                partial, lse, of_backward = of_images.forward(queries, image_key, image_value, scaling, softcap)
                merged, lse = merge(partial, lse, group, deals_text=True)
                output = output + merged.to(query.dtype)
                saved += [merged, lse, *of_backward]
        ctx.save_for_backward(*saved)
        ctx.of_text = 2 + len(text[2])  # how many of them
        ctx.options = branches, scaling, softcap, group, key.dtype
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        (of_text, of_images), scaling, softcap, group, dtype = ctx.options
        tensors = ctx.saved_tensors  # once, as checkpoints demand
        output, lse, *saved = tensors[: ctx.of_text]
        d_query, d_keys, d_values = of_text.backward(gradient, output, lse, tuple(saved), scaling, softcap)
        exact = torch.promote_types(dtype, torch.float32)
        d_image_key = d_image_value = None
        if of_images is not None:
            merged, lse, *saved = tensors[ctx.of_text :]
            whole = (gather_text(part, group, dim=1) for part in (gradient, merged, lse))
            d_queries, d_image_key, d_image_value = of_images.backward(*whole, tuple(saved), scaling, softcap)
            d_query = d_query.to(exact) + sum_of_text(d_queries.to(exact), group, dim=2)
        d_key, d_value = (sum_of_text(part.to(exact), group, dim=2).to(dtype) for part in (d_keys, d_values))
        return d_query.to(dtype), d_key, d_value, d_image_key, d_image_value, None, None, None, None


def dealt_text_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_key: torch.Tensor,
    image_value: torch.Tensor,
    branches: tuple[BlockedBranch | FusedBranch, BlockedBranch | FusedBranch | None],
    scaling: float,
    softcap: float | None,
    group: Any,
) -> torch.Tensor:
    """The text softmax plus the image softmax of this process's text tokens.

    Args:
        query: (batch, heads, queries, head_dim), of this process's text tokens; all processes have as many slots.
        key, value: (batch, key-value heads, queries, head_dim), of the same tokens.
        image_key, image_value: (batch, key-value heads, keys, head_dim), of this process.
        branches: of this process's queries over the whole text, and of the whole text over this process's images; None if
            no process has any.
        scaling, softcap: of the scores.
        group: the process group.

    Returns:
        (batch, queries, heads, head_dim).
    """
    return _DealtTextAttention.apply(query, key, value, image_key, image_value, branches, scaling, softcap, group)


__all__ = ["BlockedBranch", "FusedBranch", "branch_attention", "dealt_text_attention", "merge"]
