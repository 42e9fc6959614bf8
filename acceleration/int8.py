"""Keys and values in 8 bits: integers, with a scale for each token and head.

An integer is exact in bfloat16, so that a product with a key is the product with its integers, times its scale. With float8
(`torch.float8_e4m3fn`) the error of a normally distributed key is four times as large.
"""

import torch

MAXIMUM = 127


def quantize(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 numbers and their scales.

    Args:
        states: (layers, ..., head_dim), of floating point. Layers are computed one by one, as it takes several times their
            memory.

    Returns:
        The numbers, of the same shape, and the scales without its last axis, float32 at least. Where a state is not finite
        its scale is not.
    """
    numbers = torch.empty_like(states, dtype=torch.int8)
    scales = states.new_empty(states.shape[:-1], dtype=torch.promote_types(states.dtype, torch.float32))
    for part, part_numbers, part_scales in zip(states, numbers, scales, strict=True):
        # By the reciprocal, as a GPU divides by a number: so all devices make the same scales of a weight.
        part_scales.copy_(part.abs().amax(-1)).mul_(1 / MAXIMUM)
        # Zeros have the scale 0, and divided by anything they stay zeros.
        divisors = part_scales.masked_fill(part_scales == 0, 1)[..., None]
        part_numbers.copy_((part / divisors).round_())
    return numbers, scales


def dequantize(numbers: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The states of these numbers, in a dtype; without scales, the numbers are the states."""
    if scales is None:
        return numbers.to(dtype)
    states = torch.empty_like(numbers, dtype=dtype)
    return torch.mul(numbers, scales[..., None], out=states)  # computed in the scales' dtype


__all__ = ["dequantize", "quantize"]
