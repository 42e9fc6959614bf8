"""The fused kernels against the definition, on random layouts: padding, caches, windows, packed documents, grouped heads."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from kernel_layouts import TOLERANCE, errors

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
