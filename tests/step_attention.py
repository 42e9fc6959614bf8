"""The kernels for the attention of decode steps against MMCA in float64; run as a script, in Triton's interpreter."""

import random
import sys

import torch

from dsvl.acceleration.decoding.step_attention import launch_step_attention


def relative_error(seed: int, dtype: torch.dtype, device: str, head_dim: int, longest: int = 300) -> float:
    """The largest error of an output on a random layout, over the largest output."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, group_size = draw.choice([1, 3]), draw.choice([1, 2]), draw.choice([1, 4, 9])
    capacity, softcap, parts = draw.randint(1, longest), draw.choice([0.0, 0.0, 5.0]), draw.choice([1, 2, 8])
    last = draw.randrange(capacity)
    # Text, image and hidden tokens; a row may have no image. Its own token is text.
    types = torch.randint(-1, 2, (batch, capacity), generator=generator)
    types[0] = types[0].masked_fill(types[0] == 1, draw.choice([1, 0]))
    types[:, last] = 0
    members = torch.stack([types == 0, types == 1], 1)
    sees = members[..., : last + 1].any(-1, keepdim=True)
    bias = torch.zeros(members.shape).masked_fill(~members & sees, -torch.inf)
    query = torch.randn(batch, kv_heads * group_size, head_dim, generator=generator).to(dtype)
    # As a cache that holds more heads' channels, and values side by side with keys.
    both = torch.randn(2, batch, kv_heads, capacity, head_dim + 8, generator=generator).to(dtype)
    both[:, :, :, last + 1 :] = torch.nan  # never read
    key, value = both[..., :head_dim]

    grouped = query.double().view(batch, 1, kv_heads, group_size, head_dim)
    exact_key, exact_value = (states[:, None, :, : last + 1].double() for states in (key, value))
    scores = grouped @ exact_key.transpose(-1, -2) * 0.3
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = (scores + bias[:, :, None, None, : last + 1]).softmax(-1) * sees[:, :, None, None]
    expected = (weights @ exact_value).sum(1).flatten(1, 2)

    has_all = bool(sees.all())
    tensors = query, key, value, bias[:, :, None], None if has_all else sees[:, :, None].float(), torch.tensor(last)
    got = launch_step_attention(*(one if one is None else one.to(device) for one in tensors), 0.3, softcap, parts)
    assert got.dtype == dtype and got.shape == expected.shape
    return ((got.cpu().double() - expected).abs().max() / expected.abs().max()).item()


def tolerance(dtype: torch.dtype) -> float:
    """The rounding of the output; in float32, of the sums."""
    return 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps


if __name__ == "__main__":
    for seed in range(int(sys.argv[1])):
        for dtype in (torch.float16, torch.float32):  # the interpreter does not multiply bfloat16
            error = relative_error(seed, dtype, "cpu", random.Random(seed).choice([16, 80, 128]))
            assert error < tolerance(dtype), (seed, dtype, error)
