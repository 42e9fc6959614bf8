"""A frozen linear layer in 8 bits: what it rounds, its gradients, what it saves, its state dict, and FP8 tensor cores."""

import copy
import functools
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsvl.acceleration.memory import frozen_linear
from dsvl.acceleration.memory.frozen_linear import (
    PRECISIONS,
    FrozenLinear,
    multiply,
    multiply_gradient,
    quantize_weight,
    round_rows,
)

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def linear(rows=96, columns=64, dtype=torch.float32, bias=True):
    return nn.Linear(columns, rows, bias=bias).to(dtype).requires_grad_(False)


def relative(one, other):
    return ((one - other).double().norm() / other.double().norm()).item()


def output_and_gradient(layer, states, gradient):
    states = states.detach().clone().requires_grad_()
    output = layer(states)
    output.backward(gradient)
    return output.detach(), states.grad


# -- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_scales_of_rows_are_the_least_powers_of_two_that_fit(dtype):
    states = torch.randn(200, 48, dtype=torch.float64) * 10.0 ** torch.linspace(-3, 3, 200)[:, None]
    states = states.to(dtype)
    numbers, scales = round_rows(states)
    mantissa, exponent = torch.frexp(scales[:, 0])
    assert torch.equal(mantissa, torch.full_like(mantissa, 0.5)), "not a power of two"
    largest = states.abs().amax(-1).float()
    assert (largest / scales[:, 0] <= 448).all() and (largest / scales[:, 0] > 223.9).all()
    # E4M3 has three bits of mantissa; beside the largest number of a row, small ones are subnormal.
    error = (numbers.double() * scales.double() - states.double()).abs()
    assert (error <= torch.maximum(states.double().abs() / 16, scales.double() * 2**-10)).all()


def test_rows_at_the_edges():
    numbers, scales = round_rows(torch.tensor([[448.0, -448.0], [448.1, 1.0], [0.0, 0.0], [7.0, 3.5]]))
    assert scales[:, 0].tolist()[:2] == [1, 2] and scales[3] == 2**-6
    assert numbers.float().tolist() == [[448, -448], [224, 0.5], [0, 0], [448, 224]]
    assert round_rows(torch.zeros(0, 8))[0].shape == (0, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_stays_so_in_its_row_alone(value):
    layer, states = FrozenLinear(linear(), "fp8"), torch.randn(3, 64)
    expected = layer(states)
    states[1, 5] = value
    output = layer(states)
    assert not output[1].isfinite().any()
    assert torch.equal(output[[0, 2]], expected[[0, 2]])


def test_scaled_numbers_are_exact_in_bfloat16():
    numbers, scales = quantize_weight(torch.randn(32, 64), "fp8")
    exact = numbers.view(E4M3).double() * scales[:, None].double()
    assert torch.equal((numbers.view(E4M3).bfloat16() * scales[:, None].bfloat16()).double(), exact)


def test_int8_numbers_have_the_scale_of_their_channel():
    weight = torch.randn(32, 64)
    numbers, scales = quantize_weight(weight, "int8")
    assert numbers.dtype == torch.int8 and scales.shape == (32,)
    assert torch.allclose(scales, weight.abs().amax(1) / 127)
    assert ((numbers * scales[:, None] - weight).abs() <= scales[:, None] * 0.501).all()


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("precision", "error"), [("fp8", 0.04), ("int8", 0.006)])
def test_output_and_input_gradient_are_close_to_the_original(precision, error, dtype):
    layer = linear(dtype=dtype)
    states, gradient = torch.randn(2, 5, 64, dtype=dtype), torch.randn(2, 5, 96, dtype=dtype)
    frozen = FrozenLinear(layer, precision)
    for one, other in zip(*(output_and_gradient(a, states, gradient) for a in (frozen, layer)), strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert 1e-5 < relative(one, other) < error


def test_the_formulas_of_fp8():
    """Each product is one of rounded numbers, with the scale of an output channel in the gradient before it is rounded."""
    weight, states, gradient = torch.randn(96, 64) / 8, torch.randn(7, 64), torch.randn(7, 96)
    numbers, scales = quantize_weight(weight, "fp8")
    values = numbers.view(E4M3).double()

    def rounded(rows):
        found, by = round_rows(rows)
        return found.double() * by

    output = multiply(states, numbers, scales, in_fp8=False)
    assert relative(output, rounded(states) @ values.T * scales) < 1e-6
    assert relative(multiply_gradient(gradient, numbers, scales, False), rounded(gradient * scales) @ values) < 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_token_does_not_depend_on_others(precision):
    """So that packing, padding, and images on other processes change nothing."""
    layer = FrozenLinear(linear(dtype=torch.float64), precision)
    states, gradient = torch.randn(6, 64, dtype=torch.float64), torch.randn(6, 96, dtype=torch.float64)
    states[3] *= 1000
    together = output_and_gradient(layer, states, gradient)
    for row in range(6):
        alone = output_and_gradient(layer, states[[row]], gradient[[row]])
        for one, other in zip(alone, together, strict=True):
            assert torch.allclose(one[0], other[row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_tokens_and_gradients_of_zero(precision):
    layer = FrozenLinear(linear(), precision)
    output, gradient = output_and_gradient(layer, torch.randn(2, 0, 64), torch.zeros(2, 0, 96))
    assert output.shape == (2, 0, 96) and gradient.shape == (2, 0, 64)
    output, gradient = output_and_gradient(layer, torch.zeros(3, 64), torch.zeros(3, 96))
    assert torch.equal(output, layer.bias.expand(3, -1)) and not gradient.any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_is_saved_but_the_8_bit_weight(precision):
    saved = []
    layer = FrozenLinear(linear(bias=False), precision)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(5, 64, requires_grad=True))
    assert {tensor.data_ptr() for tensor in saved} == {layer.weight.data_ptr(), layer.weight_scale.data_ptr()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", ["compiled", "checkpointed", "reentrant"])
def test_compiled_and_checkpointed_it_computes_the_same(way, precision):
    layers = nn.Sequential(FrozenLinear(linear(), precision), nn.SiLU(), FrozenLinear(linear(64, 96), precision))
    states, gradient = torch.randn(5, 64), torch.randn(5, 64)
    changed = {
        "compiled": torch.compile(layers, backend="aot_eager", fullgraph=True),
        "checkpointed": partial(checkpoint, layers, use_reentrant=False),
        "reentrant": partial(checkpoint, layers, use_reentrant=True),
    }[way]
    for one, other in zip(*(output_and_gradient(a, states, gradient) for a in (changed, layers)), strict=True):
        assert torch.equal(one, other)


# "aot_eager" keeps what is computed in the forward pass; the other partitions graphs as "inductor", without its code.
@pytest.mark.parametrize(
    ("sharded", "backend"),
    [(False, "aot_eager"), (False, "aot_eager_decomp_partition"), (True, "aot_eager_decomp_partition")],
)
@pytest.mark.parametrize(("precision", "in_fp8"), [("fp8", True), ("fp8", False), ("int8", False)])
def test_a_compiled_layer_keeps_no_other_weight_for_its_backward(precision, in_fp8, sharded, backend):
    """The compiler's partitioner would keep a dequantized weight of each layer, if it saw one."""
    layers = [linear(dtype=torch.bfloat16, bias=False), linear(64, 96, dtype=torch.bfloat16, bias=False)]
    layers = nn.Sequential(*(FrozenLinear(layer, precision, in_fp8=in_fp8, sharded=sharded) for layer in layers))
    compiled, saved = torch.compile(layers, backend=backend, fullgraph=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        compiled(torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert saved
    assert {tensor.data_ptr() for tensor in saved} <= {one.data_ptr() for one in (*layers.buffers(), *layers.parameters())}


@pytest.mark.parametrize(("precision", "in_fp8"), [("fp8", True), ("fp8", False), ("int8", False)])
def test_all_other_lengths_share_one_more_graph(precision, in_fp8):
    layer = FrozenLinear(linear(dtype=torch.bfloat16), precision, in_fp8=in_fp8)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for rows in (28, 40, 31, 57):
        states = torch.randn(2, rows, 64).bfloat16()
        assert torch.equal(compiled(states), layer(states))
    assert len(graphs) == 2


@pytest.mark.parametrize(("precision", "in_fp8"), [("fp8", True), ("fp8", False), ("int8", False)])
def test_layers_are_compiled_for_all_lengths_at_once(precision, in_fp8):
    """As decoder layers are by `compile_decoder_layers(dynamic=True)`, where the compiler takes numbers for sizes."""
    layers = [linear(dtype=torch.bfloat16), linear(64, 96, dtype=torch.bfloat16)]
    layers = nn.Sequential(*(FrozenLinear(layer, precision, in_fp8=in_fp8) for layer in layers))
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (28, 40):
        states, gradient = torch.randn(2, rows, 64).bfloat16(), torch.randn(2, rows, 64).bfloat16()
        for one, other in zip(*(output_and_gradient(a, states, gradient) for a in (compiled, layers)), strict=True):
            assert torch.equal(one, other)


def test_under_autocast_it_computes_in_its_dtype():
    layer = linear(dtype=torch.bfloat16)
    states = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        output = FrozenLinear(layer, "fp8")(states)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, FrozenLinear(layer, "fp8")(states.bfloat16()))


# -- FP8 tensor cores --------------------------------------------------------------------------------------------------


def test_products_on_tensor_cores_have_the_layouts_and_scales_that_they_take(monkeypatch):
    """On Hopper it takes rows times columns, both with their contraction contiguous; on a CPU it takes more."""
    multiply_on_cpu = torch._scaled_mm

    def scaled_mm(rows, columns, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert rows.dtype == columns.dtype == E4M3 and out_dtype == torch.bfloat16 and use_fast_accum
        assert rows.is_contiguous() and columns.t().is_contiguous(), "one operand is not K-major"
        assert rows.shape[1] % 16 == 0 and not any(size % 16 for size in columns.shape)
        assert scale_a.shape == (len(rows), 1) and scale_b.shape == (1, columns.shape[1])
        assert scale_a.is_contiguous() and scale_b.is_contiguous() and scale_a.dtype == scale_b.dtype == torch.float32
        return multiply_on_cpu(
            rows, columns, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=use_fast_accum
        )

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    layer = linear(dtype=torch.bfloat16)
    states, gradient = torch.randn(2, 5, 64).bfloat16(), torch.randn(2, 5, 96).bfloat16()
    on, off = (FrozenLinear(layer, "fp8", in_fp8=in_fp8) for in_fp8 in (True, False))
    assert on.in_fp8 and not off.in_fp8
    for one, other in zip(*(output_and_gradient(a, states, gradient) for a in (on, off)), strict=True):
        assert relative(one, other) < 0.005  # roundings of the result to bfloat16


def test_outside_of_a_graph_rounding_is_compiled_on_a_gpu(monkeypatch):
    """For all shapes at once; with the same results. Here a CPU is one."""
    layer = linear(dtype=torch.bfloat16)
    frozen = [FrozenLinear(one, "fp8", in_fp8=True) for one in (layer, linear(64, 96, dtype=torch.bfloat16))]
    batches = [torch.randn(rows, 64).bfloat16() for rows in (5, 9, 30)]
    expected = [output_and_gradient(nn.Sequential(*frozen), states, torch.ones_like(states)) for states in batches]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(frozen_linear, "_compiled", functools.cache(partial(torch.compile, dynamic=True, backend=backend)))
    monkeypatch.setattr(
        frozen_linear,
        "_fused",
        lambda function, rows: function if torch.compiler.is_compiling() else frozen_linear._compiled(function),
    )
    for states, both in zip(batches, expected, strict=True):
        made = output_and_gradient(nn.Sequential(*frozen), states, torch.ones_like(states))
        assert all(torch.equal(one, other) for one, other in zip(made, both, strict=True))
    assert len(graphs) == 2  # of the rows and of the operands of a gradient


def test_where_there_are_no_fp8_tensor_cores_it_says_why(monkeypatch):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    ask = frozen_linear.why_not_in_fp8.__wrapped__
    assert ask() == "there is no NVIDIA GPU"
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(cuda, "get_device_name", lambda: "NVIDIA A100")
    assert "A100 has compute capability 8.0; 9.0 (Hopper) or later is needed" in ask()
    monkeypatch.setattr(cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)

    def fails(*args, **kwargs):
        raise RuntimeError("not compiled\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", fails)
    assert "fails (not compiled)" in ask()
    monkeypatch.setattr(torch, "_scaled_mm", lambda rows, columns, **kwargs: (rows.float() @ columns.float()).bfloat16())
    assert "returns wrong products" in ask()
    monkeypatch.setattr(
        torch,
        "_scaled_mm",
        lambda rows, columns, scale_a, scale_b, **_: (rows.float() @ columns.float() * scale_a * scale_b).bfloat16(),
    )
    assert ask() is None


def test_sizes_that_are_no_multiples_of_16_do_not_run_there():
    assert not FrozenLinear(linear(40, 64), "fp8", in_fp8=True).in_fp8
    assert not FrozenLinear(linear(64, 40), "fp8", in_fp8=True).in_fp8
    assert not FrozenLinear(linear(), "int8", in_fp8=True).in_fp8


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cast_leaves_numbers_and_scales_alone(precision):
    layer = FrozenLinear(linear(dtype=torch.bfloat16), precision)
    numbers, scales = layer.weight.clone(), layer.weight_scale.clone()
    for cast in (lambda: layer.half(), lambda: layer.to(torch.float64), lambda: layer.bfloat16()):
        cast()
        assert torch.equal(layer.weight, numbers) and torch.equal(layer.weight_scale, scales)
        assert layer.weight_scale.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    assert layer.to("meta").weight_scale.is_meta


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_state_dict_has_the_original_weight(precision):
    layer = linear()
    frozen = FrozenLinear(layer, precision)
    for one in (frozen, copy.deepcopy(frozen), copy.deepcopy(frozen).bfloat16().float()):
        state = one.state_dict()
        assert state.keys() == {"weight", "bias"} and torch.equal(state["weight"], layer.weight)
    other = torch.randn(96, 64)
    assert FrozenLinear(layer, precision, original=lambda: other).state_dict()["weight"] is other


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_its_own_weight_is_loaded(precision):
    layer = linear()
    frozen = FrozenLinear(layer, precision)
    numbers = frozen.weight.clone()
    bias = torch.randn(96)
    assert not any(frozen.load_state_dict(layer.state_dict() | {"bias": bias}))
    assert torch.equal(frozen.bias, bias) and torch.equal(frozen.weight, numbers)
    for wrong in (torch.randn(96, 64), torch.randn(96, 65)):
        with pytest.raises(ValueError, match=f"weight differs from the frozen weight that this model has in {precision}"):
            frozen.load_state_dict({"weight": wrong, "bias": bias})
    assert frozen.load_state_dict({"bias": bias}, strict=False).missing_keys == ["weight"]


def test_refusals():
    with pytest.raises(ValueError, match="precision='fp4' is unknown; choose from fp8, int8"):
        FrozenLinear(linear(), "fp4")
    with pytest.raises(ValueError, match="trained cannot be kept in 8 bits"):
        FrozenLinear(nn.Linear(16, 16), "fp8")
