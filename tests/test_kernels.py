"""The fused kernels against the definition, on layouts with padding, caches, windows, packed documents and grouped heads."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import few_queries
import pytest
import row_products
import torch
from conftest import FAMILIES, IMAGE_ID, batch, tiny_model
from kernel_layouts import TOLERANCE, relative_errors
from plain_kernels import use_plain_kernels
from torch.utils.checkpoint import checkpoint

from dsvl.acceleration.attention import kernels
from dsvl.acceleration.attention.kernels import DTYPES
from dsvl.acceleration.attention.launch_configs import has_tma, shared_memory
from dsvl.acceleration.attention.token_lists import TokenLists

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_interpreter = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton, whose interpreter runs the kernels on a CPU; a GPU runs them itself",
)


def run_in_interpreter(script: str, *arguments: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, Path(__file__).with_name(script), *arguments], env=environment, check=True)


@needs_gpu
@pytest.mark.parametrize(
    ("dtype", "head_dim", "groups", "softcap", "count"),
    [
        (torch.bfloat16, 128, [1], 0.0, 500),
        (torch.bfloat16, 128, [4], 0.0, 500),
        (torch.bfloat16, 64, [2], 5.0, 500),
        (torch.float16, 80, [1], 0.0, 500),
        (torch.bfloat16, 256, [2], 5.0, 400),
        (torch.float32, 64, [2], 0.0, 400),
        (torch.float32, 128, [1], 5.0, 300),
    ],
)
def test_random_layouts_agree_with_the_definition_in_float64(dtype, head_dim, groups, softcap, count, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialized memory with NaN
    try:
        for seed in range(count):
            errors = relative_errors(seed, dtype, head_dim, 400, "cuda", groups, softcap)
            assert all(error < TOLERANCE[dtype] for error in errors), (seed, errors)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_blocks_of_other_architectures_agree_on_this_gpu(capability, head_dim, monkeypatch):
    """Loads by pointer run on every GPU, and descriptors on Hopper and Blackwell."""
    here = torch.cuda.get_device_capability()
    if has_tma(capability) > has_tma(here) or shared_memory(capability) > shared_memory(here):
        pytest.skip(f"compute capability {here} cannot run it")
    monkeypatch.setattr(kernels, "device_capability", lambda device: capability)
    for seed in range(100):
        errors = relative_errors(seed, torch.bfloat16, head_dim, 400, "cuda", [1, 4], 5.0 * (seed % 2))
        assert all(error < TOLERANCE[torch.bfloat16] for error in errors), (seed, errors)


@needs_interpreter
def test_random_layouts_agree_in_the_interpreter():
    run_in_interpreter("kernel_layouts.py", "30")


@needs_gpu
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", row_products.KINDS)
@pytest.mark.parametrize("shape", [*row_products.SHAPES, (4096, 4096), (11008, 4096), (4096, 11008), (128256, 4096)])
def test_products_of_one_row_agree_with_the_definition(shape, kind, dtype, has_bias):
    assert row_products.relative_error(shape, kind, dtype, has_bias, "cuda") < torch.finfo(dtype).eps


@needs_interpreter
def test_products_of_one_row_agree_in_the_interpreter():
    run_in_interpreter("row_products.py")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize(("most_queries", "has_table"), [(1, False), (12, False), (200, True)])
def test_few_queries_over_a_cache_agree_with_the_definition(most_queries, has_table, head_dim, dtype):
    for seed in range(20):
        error = few_queries.relative_error(seed, dtype, "cuda", head_dim, 3000, most_queries, has_table)
        assert error < few_queries.tolerance(dtype), seed


@needs_interpreter
def test_few_queries_over_a_cache_agree_in_the_interpreter():
    run_in_interpreter("few_queries.py", "12")


def padded():
    return batch("ttItttIIttt", "Itt", "tttttttttt", "tItttt", side="right")


def packed():
    inputs = batch("ttItttIIttt", "IttttttItttt")
    rest = {key: value for key, value in inputs.items() if key != "attention_mask"}
    return rest | {"document_ids": (torch.arange(inputs["input_ids"].shape[1]) // 9).expand_as(inputs["input_ids"])}


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("inputs", [padded, packed])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])  # sdpa does not cap scores
def test_a_model_with_the_fused_mask_gives_the_loss_and_gradients_of_the_gathered_mask(
    family, inputs, positions, monkeypatch
):
    """Token lists and ranges for windows and packed documents, with the kernels in plain PyTorch."""
    model, inputs = tiny_model(family, image_positions=positions).train(), inputs()
    ids = inputs["input_ids"]
    labels = torch.where((ids == IMAGE_ID) | (inputs.get("attention_mask", torch.ones_like(ids)) == 0), -100, ids)
    results = []
    for fused in (False, True):
        if fused:
            use_plain_kernels(monkeypatch)
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9)


def test_the_custom_operator_has_the_gradients_of_the_autograd_function(monkeypatch):
    """Compiled graphs call the operator, also under gradient checkpointing; eager execution calls the function."""
    use_plain_kernels(monkeypatch)
    torch.manual_seed(0)
    types = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0, -1, -1]])
    lists = TokenLists.build(types == 0, types == 0, types == 1, torch.arange(9), rows=12)
    inputs = [torch.randn(2, heads, 9, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]

    def call_operator(*inputs):
        return kernels.mmca(*inputs, lists.tensors, lists.windowed, 0.3, 5.0, True)[0]

    expected = kernels.fused_attention(*inputs, lists, 0.3, 5.0)
    gradient = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, gradient)
    for call in (call_operator, lambda *inputs: checkpoint(call_operator, *inputs, use_reentrant=False)):
        got = call(*inputs)
        assert got.equal(expected)
        for ours, theirs in zip(torch.autograd.grad(got, inputs, gradient), gradients, strict=True):
            assert ours.equal(theirs)


def test_text_queries_alone_are_kept_for_the_backward_pass(monkeypatch):
    use_plain_kernels(monkeypatch)
    is_image = torch.arange(1000).expand(2, -1) % 100 >= 10  # 100 text queries in each of two rows
    lists = TokenLists.build(~is_image, ~is_image, is_image, torch.arange(1000), rows=200)
    assert lists.rows == 512
    query, key = torch.randn(2, 4, 1000, 8, requires_grad=True), torch.randn(2, 2, 1000, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        kernels.fused_attention(query, key, key, lists, 0.3, 0.0)
    queries, keys, values, outputs, sums = kept
    assert (queries, outputs, sums) == ((1, 4, 512, 16), (2, 512, 4, 8), (2, 4, 512))
    assert keys == values == (2, 2, 1024, 16)


@pytest.mark.parametrize(
    ("query", "key", "value", "message"),
    [
        ((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 16), "one head_dim and dtype"),
        ((2, 3, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8), "multiple of the number of key-value heads"),
        ((2, 1, 9, 512), (2, 1, 9, 512), (2, 1, 9, 512), "head_dim of up to 256"),
        ((2, 4, 9, 8), (2, 2, 10, 8), (2, 2, 10, 8), "token lists are for"),
    ],
)
def test_arguments_that_do_not_fit_raise_before_a_launch(query, key, value, message):
    is_text = torch.ones(2, 9, dtype=torch.bool)
    lists = TokenLists.build(is_text, is_text, ~is_text, torch.arange(9))
    with pytest.raises(ValueError, match=message):
        kernels.fused_attention(*(torch.zeros(shape) for shape in (query, key, value)), lists, 0.3)
