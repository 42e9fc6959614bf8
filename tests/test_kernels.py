"""The fused kernels against the definition, on random layouts: padding, caches, windows, packed documents, grouped heads."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, IMAGE_ID, batch, tiny_model
from kernel_layouts import TOLERANCE, errors
from plain_kernels import use_plain_kernels
from torch.utils.checkpoint import checkpoint

from dsvl.acceleration import kernels
from dsvl.acceleration.token_lists import TokenLists

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


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
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that is not written reads as NaN
    try:
        for seed in range(count):
            found = errors(seed, dtype, head_dim, 400, "cuda", groups, softcap)
            assert all(error < TOLERANCE[dtype] for error in found), (seed, found)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, whose interpreter runs the kernels on a CPU")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself is asked")
def test_random_layouts_agree_in_the_interpreter():
    script = Path(__file__).with_name("kernel_layouts.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, script, "30"], env=environment, check=True)


def padded():
    return batch("ttItttIIttt", "Itt", "tttttttttt", "tItttt", side="right")


def packed():
    inputs = batch("ttItttIIttt", "IttttttItttt")
    rest = {key: value for key, value in inputs.items() if key != "attention_mask"}
    return rest | {"position_ids": torch.arange(inputs["input_ids"].shape[1]).remainder(9).expand_as(inputs["input_ids"])}


@pytest.mark.parametrize("inputs", [padded, packed])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])  # which sdpa would not cap
def test_their_way_through_a_model_gives_what_the_gathered_one_gives(family, inputs, monkeypatch):
    """The lists, the ranges and the intervals of windows and packed conversations, with plain PyTorch for the kernels."""
    model, inputs = tiny_model(family).train(), inputs()
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


def test_their_operator_has_the_gradients_of_their_function(monkeypatch):
    """The one is in compiled graphs, the other is called without; and both may be checkpointed."""
    use_plain_kernels(monkeypatch)
    torch.manual_seed(0)
    types = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0, -1, -1]])
    lists = TokenLists.build(types == 0, types == 0, types == 1, torch.arange(9), rows=12)
    states = [torch.randn(2, heads, 9, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]

    def by_operator(*states):
        return kernels.mmca(*states, lists.tensors, lists.windowed, 0.3, 5.0, True)[0]

    expected = kernels.fused_attention(*states, lists, 0.3, 5.0)
    gradient = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, states, gradient)
    for call in (by_operator, lambda *states: checkpoint(by_operator, *states, use_reentrant=False)):
        got = call(*states)
        assert got.equal(expected)
        for ours, theirs in zip(torch.autograd.grad(got, states, gradient), gradients, strict=True):
            assert ours.equal(theirs)
