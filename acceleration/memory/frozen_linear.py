"""Frozen linear layers in 8 bits, for training: one 8-bit copy of the weight, an output and an input gradient, and never a
weight gradient.

fp8: weights, inputs and gradients are E4M3 numbers with a scale for each row: the output channels of a weight, the tokens of
inputs and gradients. All scales are powers of two: a scaled number is exact in bfloat16, and E4M3, a floating point format,
loses nothing by it. With the weight `W = s C` (scales `s` of output channels, numbers `C`) and `Q` for rounding rows,

    output          Y = Q(X) C^T s
    input gradient  G = Q(dY s) C

The output channels are the contraction of the input gradient, whose products take no scales there; so the scales are
multiplied into the gradient before it is rounded. Hopper's FP8 products take both operands with their contraction contiguous
in memory. The input gradient therefore needs `C` transposed, which is copied for each layer and dropped.

The products run on FP8 tensor cores where the GPU has them (`why_not_in_fp8`). Everywhere else the same rounded numbers are
multiplied in the dtype of the inputs, so that results agree on all devices, except for the order of sums.

int8: integers with a float32 scale for each output channel. The weight is dequantized for each product; inputs and gradients
are not rounded. (`torch._int_mm` returns int32 numbers, which a second pass over the output must scale.)
"""

import functools
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from ..int8 import dequantize
from ..int8 import quantize as quantize_to_int8
from ..operators import operator_namespace

PRECISIONS = ("fp8", "int8")
NUMBERS = {"fp8": torch.uint8, "int8": torch.int8}  # dtypes of 8-bit numbers, E4M3 as bytes
STORAGE = torch.bfloat16  # of a sharded weight, whose elements are two numbers each

E4M3 = torch.float8_e4m3fn
TENSOR_CORE_MULTIPLE = 16  # both sizes of a weight, for `torch._scaled_mm`


def round_rows(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 numbers and the power of two that each row was divided by.

    Args:
        states: (rows, channels), of floating point.

    Returns:
        The numbers, (rows, channels), and the scales, (rows, 1), float32. A row that is not finite has a NaN among them.
    """
    # Not of `abs()`, which would be a tensor as large as the states where nothing is compiled.
    largest = torch.maximum(states.amax(-1, keepdim=True), -states.amin(-1, keepdim=True)).float()
    # No number here is a global: with `dynamic=True` the compiler would take it for a size that only the first layer has.
    least = (largest / torch.finfo(E4M3).max).clamp(min=2.0**-100)  # of rows of zeros
    # Adding the mask of the mantissa and clearing it rounds up to a power of two.
    scales = ((least.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)
    wide = _wide(states.dtype)
    return (states.to(wide) * scales.reciprocal().to(wide)).to(E4M3), scales


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scales are exact: float16 does not have their range."""
    return torch.float32 if dtype == torch.float16 else dtype


def _scaled(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """E4M3 numbers times their scales, in a dtype."""
    wide = _wide(dtype)
    return (numbers.to(wide) * scales.to(wide)).to(dtype)


def quantize_weight(weight: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8-bit numbers of a weight and the scales of its output channels.

    Args:
        weight: (out_features, in_features).
        precision: "fp8" or "int8".

    Returns:
        The numbers, (out_features, in_features), int8, or the bytes of E4M3 numbers as uint8, which casts of a model to
        another floating point dtype leave alone; and the scales, (out_features,), float32.

    Raises:
        ValueError: for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; choose from {', '.join(PRECISIONS)}.")
    weight = weight.detach()
    if precision == "int8":
        numbers, scales = quantize_to_int8(weight[None])
        return numbers[0], scales[0].float()
    rounded, scales = round_rows(weight)
    return rounded.view(torch.uint8), scales[:, 0]


def _quantize_share(weight: torch.Tensor, precision: str, rank: int, processes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_weight`, but on a CPU the numbers are zeros outside of the rows of one of several processes, in pages that
    take no memory."""
    if processes == 1 or weight.device.type != "cpu":
        return quantize_weight(weight, precision)
    pages = mmap.mmap(-1, weight.numel())
    numbers = torch.frombuffer(pages, dtype=NUMBERS[precision]).view(weight.shape)
    scales = []
    # As FSDP divides rows (torch/distributed/fsdp/_fully_shard/_fsdp_common.py).
    for number, (part, own) in enumerate(zip(weight.chunk(processes), numbers.chunk(processes), strict=True)):
        rounded, part_scales = quantize_weight(part, precision)
        scales.append(part_scales)
        if number == rank:
            own.copy_(rounded)
    return numbers, torch.cat(scales)


def multiply(states: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, in_fp8: bool) -> torch.Tensor:
    """The output of a linear layer without bias.

    Args:
        states: (..., in_features).
        weight, scales: of `quantize_weight`.
        in_fp8: whether bfloat16 inputs are multiplied on FP8 tensor cores.

    Returns:
        (..., out_features), in the dtype of `states`.
    """
    rows = states.flatten(0, -2)
    if in_fp8 and states.dtype == torch.bfloat16 and rows.shape[0] > 0:
        numbers, row_scales = _fused(round_rows, rows)(rows)
        output = _fp8_product(numbers, weight.view(E4M3), row_scales, scales[None])
    else:
        output = (_product_in_graphs if torch.compiler.is_compiling() else _product)(rows, weight, scales)
    return output.view(*states.shape[:-1], output.shape[-1])


def multiply_gradient(gradient: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, in_fp8: bool) -> torch.Tensor:
    """The gradient of the input of `multiply` from that of its output, (..., out_features)."""
    rows = gradient.flatten(0, -2)
    if in_fp8 and gradient.dtype == torch.bfloat16 and rows.shape[0] > 0:
        numbers, row_scales, transposed = _fused(_gradient_operands, rows)(rows, weight, scales)
        output = _fp8_product(numbers, transposed.view(E4M3), row_scales, scales.new_ones(1, transposed.shape[0]))
    else:
        output = (_gradient_in_graphs if torch.compiler.is_compiling() else _gradient)(rows, weight, scales)
    return output.view(*gradient.shape[:-1], output.shape[-1])


def _gradient_operands(
    rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounded rows of a gradient and their scales, and the transposed weight."""
    return (*round_rows(rows * scales.to(rows.dtype)), weight.t().contiguous())


def _fused(function: Callable[..., Any], rows: torch.Tensor) -> Callable[..., Any]:
    """A function as it is within a graph, and compiled outside of one on a GPU: there it would be a dozen kernels."""
    return function if torch.compiler.is_compiling() or not rows.is_cuda else _compiled(function)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled for all shapes."""
    return torch.compile(function, dynamic=True)


def _product(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`multiply` of (rows, in_features) in their dtype, by a dequantized weight."""
    if weight.dtype == torch.int8:
        return nn.functional.linear(rows, dequantize(weight, scales, rows.dtype))
    numbers, row_scales = round_rows(rows)
    columns = _scaled(weight.view(E4M3), scales[:, None], rows.dtype)
    return nn.functional.linear(_scaled(numbers, row_scales, rows.dtype), columns)


def _gradient(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`multiply_gradient` of (rows, out_features) in their dtype."""
    if weight.dtype == torch.int8:
        return rows @ dequantize(weight, scales, rows.dtype)
    wide = _wide(rows.dtype)
    numbers, row_scales = round_rows(rows.to(wide) * scales.to(wide))
    return _scaled(numbers, row_scales, rows.dtype) @ weight.view(E4M3).to(rows.dtype)


# In a compiled graph these products are single operations. The compiler would keep the dequantized weight of each layer from
# forward to backward, as it does not recompute operands of products; and Triton has no E4M3 numbers before compute
# capability 8.9.
_NAMESPACE = operator_namespace(__name__)


@torch.library.custom_op(f"{_NAMESPACE}::frozen_product", mutates_args=())
def _product_in_graphs(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return _product(rows, weight, scales)


@_product_in_graphs.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


@torch.library.custom_op(f"{_NAMESPACE}::frozen_gradient", mutates_args=())
def _gradient_in_graphs(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return _gradient(rows, weight, scales)


@_gradient_in_graphs.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _fp8_product(
    rows: torch.Tensor, columns: torch.Tensor, row_scales: torch.Tensor, column_scales: torch.Tensor
) -> torch.Tensor:
    """`rows @ columns.T`, with scales of both, in bfloat16."""
    return torch._scaled_mm(
        rows, columns.t(), scale_a=row_scales, scale_b=column_scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )


class _Product(torch.autograd.Function):
    """`multiply`, which saves the 8-bit weight alone: not the input, nor a dequantized or transposed weight."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, in_fp8: bool) -> torch.Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.in_fp8 = in_fp8
        return multiply(states, weight, scales, in_fp8)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        weight, scales = ctx.saved_tensors
        return multiply_gradient(gradient, weight, scales, ctx.in_fp8), None, None, None


@functools.cache
def why_not_in_fp8() -> str | None:
    """Why products are not computed on FP8 tensor cores here; None if they are.

    A small product of this release of torch is compared with the same product in float32, once per process.
    """
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; 9.0 (Hopper) or later is needed"
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(rows, 64, generator=generator).bfloat16().cuda() for rows in (32, 48))
    numbers, scales = quantize_weight(weight, "fp8")
    try:
        output = (
            multiply(states, numbers, scales, in_fp8=True),
            multiply_gradient(states @ weight.t(), numbers, scales, True),
        )
    except RuntimeError as error:
        return f"torch._scaled_mm of torch {torch.__version__} fails ({str(error).partition(chr(10))[0]})"
    expected = multiply(states, numbers, scales, False), multiply_gradient(states @ weight.t(), numbers, scales, False)
    for one, other in zip(output, expected, strict=True):
        if not (one - other).float().norm() < 0.01 * other.float().norm():
            return f"torch._scaled_mm of torch {torch.__version__} returns wrong products"
    return None


class FrozenLinear(nn.Linear):
    """A frozen `nn.Linear` with an 8-bit weight.

    `weight` is a buffer of 8-bit numbers, or a parameter of which FSDP gives every process a part. The state dict holds the
    original weight instead, so that what is saved is what was loaded. A state dict is only loaded if its weight is rounded
    to the same numbers: a frozen weight does not change.

    Args:
        linear: the layer; its bias is shared.
        precision: "fp8" or "int8".
        original: returns the original weight for the state dict, *optional*, defaults to None: it is kept in main memory.
        in_fp8: whether products run on FP8 tensor cores, *optional*, defaults to where they can (`why_not_in_fp8`). Layers
            with a size that is no multiple of 16 do not.
        sharded: whether the weight is a parameter, for FSDP, *optional*, defaults to False. Two numbers are then one element
            of bfloat16, as FSDP rounds other dtypes to its own, and takes no integers before torch 2.13. On a CPU only the
            rows that FSDP will leave to this process have numbers, and take memory (see `check_share`).

    Raises:
        ValueError: for another precision, a layer that is trained, or an odd number of inputs of a sharded one.
    """

    weight: Any
    weight_scale: torch.Tensor
    share: tuple[int, int] | None = None  # of which of how many processes the rows are that have numbers

    def __init__(
        self,
        linear: nn.Linear,
        precision: str,
        original: Callable[[], torch.Tensor] | None = None,
        in_fp8: bool | None = None,
        sharded: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # without weights of its own
        if any(parameter.requires_grad for parameter in linear.parameters()):
            raise ValueError("A layer that is trained cannot be kept in 8 bits; freeze it with requires_grad_(False).")
        self.in_features, self.out_features, self.precision = linear.in_features, linear.out_features, precision
        if sharded and linear.in_features % 2:
            raise ValueError(f"A layer of {linear.in_features} inputs cannot be sharded in 8 bits; keep its precision.")
        if sharded:
            self.share = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            numbers, scales = _quantize_share(linear.weight.detach(), precision, *self.share)
            self.weight = nn.Parameter(numbers.view(STORAGE), requires_grad=False)
        else:
            numbers, scales = quantize_weight(linear.weight, precision)
            self.register_buffer("weight", numbers)
        self.register_buffer("weight_scale", scales, persistent=False)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype  # in which weights are rounded to 8 bits
        if original is None:
            kept = linear.weight.detach()
            kept = kept if kept.is_meta else kept.cpu()
            self.original: Callable[[], torch.Tensor] = lambda: kept
        else:
            self.original = original
        fits = not (self.in_features % TENSOR_CORE_MULTIPLE or self.out_features % TENSOR_CORE_MULTIPLE)
        self.in_fp8 = precision == "fp8" and fits and (why_not_in_fp8() is None if in_fp8 is None else in_fp8)
        self.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear.forward`; under autocast in its dtype."""
        kind = input.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        output = _Product.apply(input, self.numbers, self.weight_scale, self.in_fp8)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds a part of the weight, a DTensor; during a forward pass it is whole."""
        return hasattr(self.weight, "to_local")

    def check_share(self) -> None:
        """Check that FSDP has left to this process the rows that have numbers.

        Raises:
            RuntimeError: if not.
        """
        mesh, placements = self.weight.device_mesh, self.weight.placements
        given = mesh.get_local_rank() if mesh.ndim == 1 else None, mesh.size()
        if given != self.share or not (len(placements) == 1 and placements[0].is_shard(0)):
            raise RuntimeError(
                f"Of the rows of an 8-bit weight this process made the share {self.share}, but FSDP has left it {given}, by "
                f"{placements}; shard over all processes."
            )

    @property
    def numbers(self) -> torch.Tensor:
        """The 8-bit numbers, (out_features, in_features), int8 or uint8."""
        numbers = NUMBERS[self.precision]
        return self.weight if self.weight.dtype == numbers else self.weight.view(numbers)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers and of their scales, in all processes together where the numbers are sharded."""
        return self.out_features * self.in_features + self.weight_scale.nbytes

    def extra_repr(self) -> str:
        """The sizes and the precision."""
        return f"{super().extra_repr()}, precision={self.precision}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FrozenLinear":
        """As in `nn.Module`, but the scales stay float32, and the numbers what they are.

        Raises:
            ValueError: for a cast of a weight that FSDP has sharded, which is lost then.
        """
        scales, numbers = self.weight_scale, self.weight.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scales.dtype:
            self.weight_scale = scales.to(self.weight_scale.device)
        if self.is_sharded and self.weight.to_local().dtype != STORAGE:
            raise ValueError("A sharded 8-bit weight cannot be cast to another dtype; cast the model before it is sharded.")
        if self.weight.dtype != numbers.dtype:  # a sharded weight, whose bytes are no floating point numbers
            self.weight.data = numbers.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.original()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        if name in state_dict:
            given = state_dict[name]
            state_dict = {**state_dict, name: self.weight}
            if not self._is_own(given):
                raise ValueError(
                    f"{name} differs from the frozen weight that this model has in {self.precision}; start from the other "
                    "weights (dsvl train --model), and make them 8-bit then."
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _is_own(self, weight: torch.Tensor) -> bool:
        """Whether a weight is rounded to the numbers of this layer; of a sharded one, whether it is the original."""
        if weight.shape != (self.out_features, self.in_features):
            return False
        if self.is_sharded:
            original = self.original()
            return torch.equal(weight.to(original), original)
        numbers, scales = quantize_weight(weight.to(self.weight.device, self.dtype), self.precision)
        return torch.equal(numbers, self.numbers) and torch.equal(scales, self.weight_scale)


__all__ = ["PRECISIONS", "FrozenLinear", "multiply", "multiply_gradient", "quantize_weight", "round_rows", "why_not_in_fp8"]
