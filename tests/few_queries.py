"""The kernels for few text queries over a KV cache against MMCA in float64; run as a script, in Triton's interpreter."""

import random
import sys

import torch

from dsvl.acceleration.attention.few_queries import address_table, launch_few_queries

SCALING = 0.3


def relative_error(
    seed: int,
    dtype: torch.dtype,
    device: str,
    head_dim: int,
    longest: int,
    most_queries: int,
    has_table: bool,
) -> float:
    """The largest error of an output on a random layout, over the largest output.

    Args:
        longest: of the cache.
        most_queries: of a row.
        has_table: whether the keys of the queries' own tokens are beside the cache.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, group_size = draw.choice([1, 3]), draw.choice([1, 2]), draw.choice([1, 4, 9])
    queries = draw.randint(1, most_queries)
    capacity, softcap, parts = draw.randint(queries, queries + longest), draw.choice([0.0, 0.0, 5.0]), draw.choice([1, 2, 8])
    # Text, image and hidden tokens; a row may have no image.
    types = torch.randint(-1, 2, (batch, capacity), generator=generator)
    types[0] = types[0].masked_fill(types[0] == 1, draw.choice([1, 0]))
    if has_table:  # some tokens are missing in a row, at its beginning; each has another place in the cache, which is hidden
        last = torch.rand(batch, capacity, generator=generator).argsort(-1)[:, :queries].sort(-1).values
        types = types.scatter(1, last, -1)
        filled = torch.arange(queries) >= torch.tensor([draw.randrange(queries) for _ in range(batch)])[:, None]
    else:  # the last tokens of the cache that are filled
        first = draw.randint(0, capacity - queries)
        last = torch.arange(first, first + queries)[None]
        types[:, last[0]] = 0
        filled = torch.ones(batch, queries, dtype=torch.bool)
    members = torch.stack([types == 0, types == 1], 1)
    sees = members.any(-1, keepdim=True)
    hidden = torch.zeros(members.shape).masked_fill(~members, -torch.inf)
    bias = hidden if has_table else hidden.masked_fill(~sees, 0)
    query = torch.randn(batch, queries, kv_heads * group_size, head_dim, generator=generator).to(dtype).transpose(1, 2)
    # As a cache that holds more heads' channels, and values side by side with keys.
    both = torch.randn(2, batch, kv_heads, capacity, head_dim + 8, generator=generator).to(dtype)
    both[:, :, :, int(last.max()) + 1 :] = torch.nan  # never read
    key, value = both[..., :head_dim]
    new = torch.randn(2, batch, queries, kv_heads, head_dim, generator=generator).to(dtype).transpose(2, 3)
    new_bias = torch.stack([filled, torch.zeros_like(filled)], 1)[:, :, None]
    new_bias = torch.zeros(new_bias.shape).masked_fill(~new_bias, -torch.inf)

    seen = torch.arange(capacity) <= last[..., None]  # (batch or 1, queries, keys)
    visible = torch.zeros(batch, 2, queries, capacity).masked_fill(~seen[:, None], -torch.inf) + hidden[:, :, None]
    keys, values = both[..., :head_dim].nan_to_num().double()
    if has_table:
        causal = torch.ones(queries, queries).tril() == 0
        visible = torch.cat([visible, (new_bias + torch.zeros(1, 2, queries, 1)).masked_fill(causal, -torch.inf)], -1)
        keys, values = torch.cat([keys, new[0].double()], 2), torch.cat([values, new[1].double()], 2)
    keys, values = (states.repeat_interleave(group_size, 1) for states in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * SCALING
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = (scores[:, None] + visible[:, :, None]).softmax(-1).nan_to_num()  # 0 where no key is seen
    expected = (weights.sum(1) @ values).transpose(1, 2)

    query, key, value, bias, last = (one.to(device) for one in (query, key, value, bias[:, :, None], last))
    if has_table:
        table = address_table([key], [value], bias)
        own = (*new.to(device), new_bias.to(device))
        got = launch_few_queries(query, *own, None, last, table[0], SCALING, softcap, parts)
    else:
        in_cache = None if bool(sees.all()) else sees[:, :, None].float().to(device)
        got = launch_few_queries(query, key, value, bias, in_cache, last, None, SCALING, softcap, parts)
    assert got.dtype == dtype and got.shape == expected.shape
    return ((got.cpu().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


def tolerance(dtype: torch.dtype) -> float:
    """The rounding of the output; in float32, of the sums."""
    return 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps


if __name__ == "__main__":
    for seed in range(int(sys.argv[1])):
        for dtype in (torch.float16, torch.float32):  # the interpreter does not multiply bfloat16
            head_dim = random.Random(seed).choice([16, 80, 128])
            for how in ((1, False), (9, False), (70, True)):
                error = relative_error(seed, dtype, "cpu", head_dim, 300, *how)
                assert error < tolerance(dtype), (seed, dtype, how, error)
