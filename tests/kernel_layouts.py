"""Compare the fused kernels with the definition of MMCA in float64, on random layouts.

python kernel_layouts.py COUNT    with TRITON_INTERPRET=1 where there is no GPU: in the configurations of all architectures
"""

import random
import sys

import torch

from dsvl.acceleration.attention import kernel_check, kernels
from dsvl.acceleration.attention.kernel_check import TOLERANCE, definition
from dsvl.acceleration.attention.kernels import fused_attention
from dsvl.acceleration.attention.token_lists import TokenLists

CAPABILITIES = [(8, 0), (9, 0), (8, 9), (10, 0)]


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
    return kernel_check.relative_errors(
        [got, *torch.autograd.grad(got, (query, key, value), gradient)],
        [expected, *torch.autograd.grad(expected, exact, gradient.double())],
        gradient.double().norm() / 10,  # the exact gradient of a query that sees one key is 0
    )


def main(count: int) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialized memory with NaN
    for seed in range(count):
        draw = random.Random(seed)
        head_dim, softcap = draw.choice([(16, 0.0), (20, 0.0), (32, 5.0)])
        dtype, capability = torch.float32, CAPABILITIES[seed % len(CAPABILITIES)]
        if seed % 3 == 2:  # the blocks of half precision, and of larger heads
            dtype, head_dim = torch.float16, draw.choice([64, 128, 256])
        kernels.device_capability = lambda device, capability=capability: capability
        errors = relative_errors(seed, dtype, head_dim, 60 if dtype == torch.float32 else 150, "cpu", [1, 2, 3], softcap)
        assert all(error < TOLERANCE[dtype] for error in errors), (seed, capability, errors)
    print(f"{count} layouts agree")


if __name__ == "__main__":
    main(int(sys.argv[1]))
