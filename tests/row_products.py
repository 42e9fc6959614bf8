"""The kernel for linear layers of one row against their definition in float64; run as a script, in Triton's interpreter."""

import itertools

import torch

from dsvl.acceleration.decoding.row_product import E4M3, launch_row_product

# Sizes that end with a block, within one, and before the first.
SHAPES = [(8, 4096), (6, 11008), (5, 3000), (3, 1000)]
KINDS = (torch.bfloat16, torch.int8, E4M3)


def relative_error(
    shape: tuple[int, int], kind: torch.dtype, dtype: torch.dtype, has_bias: bool, device: str, seed: int = 0
) -> float:
    """The largest error of an output, over the largest output."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    row = torch.randn(1, 1, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) * 30 if has_bias else None
    scales = None
    if kind in (torch.int8, E4M3):
        scales = weight.abs().amax(1, keepdim=True) / (127 if kind == torch.int8 else 448)
        weight = weight / scales
    numbers = (weight.round() if kind == torch.int8 else weight).to(dtype if scales is None else kind)
    expected = row.double() @ numbers.to(torch.float32).double().t()
    if scales is not None:
        expected = expected * scales.double().flatten()
    if bias is not None:
        expected = expected + bias.double()
    parts = (None if part is None else part.to(device) for part in (row, numbers, scales, bias))
    got = launch_row_product(*parts)  # type: ignore[arg-type]
    assert got.dtype == dtype and got.shape == expected.shape
    return ((got.cpu().double() - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    for shape, kind, has_bias in itertools.product(SHAPES, KINDS, (False, True)):
        for dtype in (torch.bfloat16, torch.float16):
            error = relative_error(shape, kind, dtype, has_bias, "cpu")
            assert error < torch.finfo(dtype).eps, (shape, kind, dtype, has_bias, error)
