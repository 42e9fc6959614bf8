"""The check of the fused kernels on a device: a small random problem against the definition, with gradients."""

import subprocess

import torch

from .kernels import fused_attention, triton
from .token_lists import TokenLists

# Errors relative to the norm of a tensor.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
TOKENS = 300  # several blocks of each kernel, and a partial one
# What Triton raises where it cannot compile or launch a kernel: its own errors, those of the CUDA driver (RuntimeError), and
# those of the C compiler that builds its launcher.
COMPILATION_ERRORS = (
    RuntimeError,
    subprocess.CalledProcessError,
    *(() if triton is None else (triton.errors.TritonError,)),
)


def definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_types: torch.Tensor,
    key_types: torch.Tensor,
    own_key: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """MMCA from the full matrix of scores.

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, key-value heads, keys, head_dim).
        query_types, key_types: (batch, queries) and (batch, keys), 0 = text, 1 = image, -1 = hidden.
        own_key: (queries,), index of each query's own key.
        first, last: (batch, queries), the interval of keys that a query may see.
        scaling, softcap: of the scores; a softcap of 0 is none.

    Returns:
        (batch, queries, heads, head_dim)
    """
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


def relative_errors(got: list[torch.Tensor], expected: list[torch.Tensor], least: torch.Tensor) -> list[float]:
    """Norm of each error by the norm of the exact tensor, or by `least` if that is larger: the exact gradient of a query
    that sees one key is 0."""
    pairs = zip(got, expected, strict=True)
    return [((ours.double() - exact).norm() / exact.norm().clamp(min=least)).item() for ours, exact in pairs]


def check_errors(device: torch.device, dtype: torch.dtype, head_dim: int, group_size: int, softcap: float) -> list[float]:
    """Errors of output and gradients on a device, with and without a window: two samples with images, one of them padded.

    The kernels are compiled here as the model needs them, and Triton keeps them.

    Args:
        device, dtype, head_dim, softcap: of the attention.
        group_size: query heads for each key-value head.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(2, TOKENS, heads, head_dim, generator=generator).to(device, dtype).transpose(1, 2)

    # The model may be in inference mode or under autocast.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        types = torch.zeros(2, TOKENS, dtype=torch.long)
        types[0, 20:90] = types[0, 150:260] = types[1, 60:61] = types[1, 100:130] = 1
        types[1, :50] = -1
        types = types.to(device)
        own_key = torch.arange(TOKENS, device=device)
        last = (own_key + 1).expand(2, TOKENS)
        query, key, value, gradient = (draw(heads) for heads in (group_size, 1, 1, group_size))
        gradient = gradient.transpose(1, 2)
        states, exact = (query, key, value), (query.double(), key.double(), value.double())
        for x in (*states, *exact):
            x.requires_grad_()
        errors = []
        for window in (None, 100):
            first = torch.zeros_like(last) if window is None else (last - window).clamp(min=0)
            visible_from = None if window is None else first
            lists = TokenLists.build(types == 0, types == 0, types == 1, own_key, visible_from)
            got = fused_attention(query, key, value, lists, head_dim**-0.5, softcap)
            sees = types, types, own_key, first, last
            expected = definition(exact[0], exact[1], exact[2], *sees, head_dim**-0.5, softcap)
            errors += relative_errors(
                [got, *torch.autograd.grad(got, states, gradient)],
                [expected, *torch.autograd.grad(expected, exact, gradient.double())],
                gradient.double().norm() / 10,
            )
        return errors


def check_kernels(
    device: torch.device, dtype: torch.dtype, head_dim: int, group_size: int, softcap: float
) -> tuple[bool, str]:
    """Run the check; for the arguments see `check_errors`.

    Returns:
        Whether the kernels are right on the device, and what was found.
    """
    try:
        errors = check_errors(device, dtype, head_dim, group_size, softcap)
    except COMPILATION_ERRORS as error:
        first_line = next(iter(str(error).splitlines()), "")
        return False, f"the check failed with {type(error).__name__}: {first_line}"
    worst = max(errors, key=lambda error: float("inf") if error != error else error)  # NaN is the largest
    found = f"largest error {worst:.1e}, {TOLERANCE[dtype]:.1e} allowed"
    return worst < TOLERANCE[dtype], f"checked on this device ({found})"


__all__ = ["TOLERANCE", "check_kernels", "definition", "relative_errors"]
