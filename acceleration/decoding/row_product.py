"""Linear layers of one row, for compiled decode steps: a Triton kernel that reads 8-bit weights as they are stored.

A step of one row is bound by the rate at which weights are read. The compiler writes such products itself, as reductions. It
reads weights in 8 bits at two fifths of the card's rate, and long rows in 16 bits, as of an MLP's second layer, at three
fifths. This kernel has the loads of whole rows under way before it multiplies. Other layers in 16 bits are the compiler's,
which merges those with one input: queries, keys and values; gate and up projection.

`out[n] = scales[n] * sum_k weight[n, k] * row[k] + bias[n]`, accumulated in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..attention.kernels import jit, tl, triton
from ..decoder_run import stored
from ..memory.frozen_linear import E4M3
from ..operators import operator_namespace

# Smaller layers, as of adapters, are left to the compiler, which merges them with what is around them.
LEAST_FEATURES = 1024
LONG_ROW = 8192  # inputs, above which the kernel also computes layers in 16 bits


@jit
def _row_product_kernel(
    row_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    out_features,
    IN_FEATURES: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_ASSEMBLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < out_features
    weight_ptrs = weight_ptr + tl.minimum(offs_n, out_features - 1).to(tl.int64)[:, None] * IN_FEATURES
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start_k in tl.static_range(0, IN_FEATURES, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        if start_k + BLOCK_K <= IN_FEATURES:
            weight = tl.load(weight_ptrs + offs_k[None, :], eviction_policy="evict_first")
            row = tl.load(row_ptr + offs_k)
        else:
            mask_k = offs_k < IN_FEATURES
            weight = tl.load(weight_ptrs + offs_k[None, :], mask=mask_k[None, :], other=0.0, eviction_policy="evict_first")
            row = tl.load(row_ptr + offs_k, mask=mask_k, other=0.0)
        if weight.dtype == tl.float8e4nv:
            weight = weight.to(tl.float16)  # exact, and one instruction for two numbers
        elif IN_ASSEMBLY and weight.dtype == tl.int8:
            # Conversions of integers are an eighth as fast as logic. Two bytes, of weight + 128, become the lowest bits of
            # two float16 numbers 1024 by one instruction that moves bytes; one more subtracts 1152 from both. All is exact.
            weight = tl.inline_asm_elementwise(
                """{
                .reg .b32 bytes, low, high, least;
                .reg .b16 a, b, c, d;
                xor.b32 bytes, $4, 0x80808080;
                prmt.b32 low, bytes, 0x64646464, 0x4140;
                prmt.b32 high, bytes, 0x64646464, 0x4342;
                mov.b32 least, 0x64806480;
                sub.f16x2 low, low, least;
                sub.f16x2 high, high, least;
                mov.b32 {a, b}, low;
                mov.b32 {c, d}, high;
                cvt.f32.f16 $0, a;
                cvt.f32.f16 $1, b;
                cvt.f32.f16 $2, c;
                cvt.f32.f16 $3, d;
                }""",
                "=r,=r,=r,=r,r",
                [weight],
                dtype=tl.float32,
                is_pure=True,
                pack=4,
            )
        acc += weight.to(tl.float32) * row.to(tl.float32)[None, :]
    out = tl.sum(acc, axis=1)
    if HAS_SCALES:
        out *= tl.load(scales_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


def block_config(element_size: int) -> dict[str, int]:
    """Block sizes and warps, by the bytes of a number: of 15 that were timed on an H200, the fastest for rows of 11008 in 16
    bits, and within a tenth of the fastest for nearly all layers of 4096 to 11008 inputs in 8 bits."""
    return dict(BLOCK_N=2, BLOCK_K=4096, num_warps=4) if element_size == 1 else dict(BLOCK_N=4, BLOCK_K=2048, num_warps=4)


def launch_row_product(
    row: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    kernel: Any = _row_product_kernel,
) -> torch.Tensor:
    """A linear layer of one row.

    Args:
        row: (..., in_features), a single row, contiguous.
        weight: (out_features, in_features), contiguous, of the row's dtype, int8 or `torch.float8_e4m3fn`.
        scales: a scale for each output channel, out_features numbers, contiguous; or `None`.
        bias: (out_features), contiguous; or `None`.
        kernel (*optional*): the kernel as it is launched in a compiled graph.

    Returns:
        (..., out_features) in the row's dtype.
    """
    out_features, in_features = weight.shape
    out = row.new_empty(*row.shape[:-1], out_features)
    config = block_config(weight.element_size())
    kernel[(-(-out_features // config["BLOCK_N"]),)](
        row,
        weight,
        row if scales is None else scales,
        row if bias is None else bias,
        out,
        out_features,
        IN_FEATURES=in_features,
        HAS_SCALES=scales is not None,
        HAS_BIAS=bias is not None,
        # Which Triton's interpreter and AMD's GPUs do not know.
        IN_ASSEMBLY=os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None,
        **config,
    )
    return out


# Without Triton nothing calls it, and `triton_op` warns.
_operator = torch.library.custom_op if triton is None else torch.library.triton_op


@_operator(f"{operator_namespace(__name__)}::row_product", mutates_args=())
def row_product(
    row: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    return launch_row_product(row, weight, scales, bias, torch.library.wrap_triton(_row_product_kernel))


@row_product.register_fake
def _(row: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
    return row.new_empty(*row.shape[:-1], len(weight))


class OneRow(TorchFunctionMode):
    """Linear layers of decode steps of one row: by the kernel, or with their input in memory, see `stored`.

    Args:
        in_kernel: whether the kernel computes the layers that it can; for a device see `has_step_kernels`.
    """

    def __init__(self, in_kernel: bool) -> None:
        super().__init__()
        self.in_kernel = in_kernel

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is nn.functional.linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        row = stored(input)
        parts = numbers_and_scales(weight, row.dtype) if self.in_kernel else None
        return nn.functional.linear(row, weight, bias) if parts is None else row_product(row, *parts, bias)


def numbers_and_scales(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """What the kernel reads of a weight: its numbers, and a scale for each output channel if it is in 8 bits.

    Args:
        weight: of a linear layer, plain with long rows, or quantized by torchao.
        dtype: of the row.

    Returns:
        None if the kernel does not know the weight, or is not for it.
    """
    if type(weight) in (torch.Tensor, nn.Parameter):
        numbers, scales, is_known = weight, None, weight.dtype == dtype and weight.shape[-1] > LONG_ROW
    else:
        numbers, scales = getattr(weight, "qdata", weight), getattr(weight, "scale", None)
        others = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale")
        is_known = (
            numbers.dtype in (torch.int8, E4M3)
            and scales is not None
            and scales.numel() == len(numbers)
            and scales.is_contiguous()
            and all(getattr(weight, name, None) is None for name in others)
        )
    is_large = numbers.ndim == 2 and min(numbers.shape) >= LEAST_FEATURES
    return (numbers, scales) if is_known and is_large and numbers.is_contiguous() else None


__all__ = ["OneRow", "launch_row_product", "numbers_and_scales", "row_product"]
