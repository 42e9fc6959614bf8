"""Compare the fused kernels with the definition of MMCA in float64, on random layouts.

python kernel_layouts.py COUNT    with TRITON_INTERPRET=1 where there is no GPU
"""

import random
import sys

import torch

from dsvl.acceleration.kernels import fused_attention
from dsvl.acceleration.token_lists import TokenLists

TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}  # relative to the norm of a tensor


def definition(query, key, value, query_types, key_types, own_key, first, last, scaling, softcap):
    """MMCA from the full matrix of scores: (batch, seqlen_q, heads, head_dim)."""
    group_size = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group_size, 1), value.repeat_interleave(group_size, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    key_index = torch.arange(key.shape[2], device=key.device)
    visible = (key_index >= first[..., None]) & (key_index < last[..., None])
    output = torch.zeros_like(query)
    for modality in (0, 1):
        branch = (visible & (key_types == modality)[:, None])[:, None]
        has_keys = branch.any(-1, keepdim=True)
        weights = scores.masked_fill(~branch & has_keys, -torch.inf).softmax(-1)
        output = output + torch.where(has_keys, weights, 0) @ value
    return torch.where((query_types == 0)[:, None, :, None], output, value[:, :, own_key]).transpose(1, 2)


def relative_errors(
    seed: int, dtype: torch.dtype, head_dim: int, longest: int, device: str, groups: list[int], softcap: float = 0.0
) -> list[float]:
    """Errors of the kernels on one random layout.

    Args:
        seed: seed of the layout and of all values.
        dtype, head_dim, device, softcap: of the attention.
        longest: the largest number of queries, of cached keys and of a window.
        groups: numbers of query heads for each key-value head, of which one is drawn.

    Returns:
        The errors of the output and the gradients of query, key and value, relative to the norms of the exact tensors.
    """
    draw, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
    batch, queries = draw.choice([1, 2, 3]), draw.randint(1, longest)
    cached, unwritten = draw.choice([0, 0, draw.randint(1, longest)]), draw.choice([0, 0, draw.randint(1, 20)])
    num_kv_heads, group_size = draw.choice([1, 2]), draw.choice(groups)
    keys = cached + queries + unwritten
    types = torch.zeros(batch, keys, dtype=torch.long)
    for row in types:
        start, longest_run = 0, draw.choice([3, 20, 150])
        while start < keys:
            run = draw.randint(1, longest_run)
            row[start : start + run] = draw.choice([0, 1])
            start += run
        if draw.random() < 0.4:
            row[: draw.randint(0, keys // 2)] = -1  # left padding
        elif draw.random() < 0.4:
            row[keys - unwritten - draw.randint(0, queries // 2) :] = -1  # right padding
    types[:, cached + queries :] = -1
    types = types.to(device)
    query_types = types[:, cached : cached + queries]
    own_key = torch.arange(queries, device=device) + cached
    first, last = torch.zeros(batch, queries, dtype=torch.long, device=device), (own_key + 1).expand(batch, queries)
    kind = draw.choice(["causal", "window", "documents"])
    if kind == "window":
        first = (last - draw.randint(1, longest)).clamp(min=0)
    elif kind == "documents":
        starts = torch.zeros(keys, dtype=torch.long, device=device)
        for start in draw.sample(range(keys), min(3, keys)):
            starts[start] = start
        first = starts.cummax(0).values[own_key].expand(batch, queries)

    def random_tensor(heads: int, tokens: int) -> torch.Tensor:
        x = torch.randn(batch, tokens, heads, head_dim, generator=generator, device=device).to(dtype)
        return x.transpose(1, 2).requires_grad_()

    query = random_tensor(num_kv_heads * group_size, queries)
    key, value = random_tensor(num_kv_heads, keys), random_tensor(num_kv_heads, keys)
    rows = int((query_types == 0).sum()) + draw.choice([0, 7])
    visible_from = None if kind == "causal" else first
    lists = TokenLists.build(query_types == 0, types == 0, types == 1, own_key, visible_from, None, rows=rows)
    got = fused_attention(query, key, value, lists, head_dim**-0.5, softcap)
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = definition(*exact, query_types, types, own_key, first, last, head_dim**-0.5, softcap)
    gradient = torch.randn(got.shape, generator=generator, device=device).to(dtype)
    pairs = [(got, expected)]
    pairs += zip(
        torch.autograd.grad(got, (query, key, value), gradient),
        torch.autograd.grad(expected, exact, gradient.double()),
        strict=True,
    )
    least = gradient.double().norm() / 10  # the exact gradient of a query that sees one key is 0
    return [((ours.double() - theirs).norm() / theirs.norm().clamp(min=least)).item() for ours, theirs in pairs]


def main(count: int) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialized memory with NaN
    for seed in range(count):
        head_dim, softcap = random.Random(seed).choice([(16, 0.0), (20, 0.0), (32, 5.0)])
        errors = relative_errors(seed, torch.float32, head_dim, 60, "cpu", [1, 2, 3], softcap)
        assert all(error < TOLERANCE[torch.float32] for error in errors), (seed, errors)
    print(f"{count} layouts agree")


if __name__ == "__main__":
    main(int(sys.argv[1]))
