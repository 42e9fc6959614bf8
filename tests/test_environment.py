"""`dsvl env`: what a bug report needs, in text and JSON, without and with a checkpoint, and as on a GPU."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, batch, tiny_model
from training_runs import make_checkpoint

from dsvl import cli, masks_dsvl
from dsvl.acceleration.attention import kernel_choice, kernel_timings
from dsvl.environment import report, tuning
from dsvl.environment.attention import attention_of

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def said(capsys: Any, *argv: str) -> tuple[int, str, str]:
    """The status of `dsvl env`, its output and its errors."""
    status = cli.main(["env", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("env"))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As if there were an A100 on which the kernels are right for heads of up to 128 channels."""
    properties = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", major=8, minor=0, total_memory=79 * 2**30)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for name, value in {
        "device_count": lambda: 1,
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda device: properties.name,
        "is_bf16_supported": lambda including_emulation: True,
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(kernel_timings, "driver_version", lambda: "570.1")
    monkeypatch.setattr(report, "driver_version", lambda: "570.1")
    monkeypatch.setattr(kernel_choice, "triton", object())
    monkeypatch.setattr(kernel_choice, "DECISIONS", {})
    monkeypatch.setattr(kernel_choice, "device_capability", lambda device: (8, 0))

    def check(device, dtype, head_dim, *options):
        return head_dim <= 128, "checked on this device" if head_dim <= 128 else "the check failed with OutOfResources: smem"

    monkeypatch.setattr(kernel_choice, "check_kernels", check)
    monkeypatch.setattr(tuning, "check_kernels", check)
    kernel_timings.saved.cache_clear()
    yield
    kernel_timings.saved.cache_clear()


def test_the_text_names_versions_devices_and_attention(capsys):
    status, out, _ = said(capsys)
    assert status == 0
    for expected in (f"torch {torch.__version__}", "Python 3.", "acceleration: active, interface version 1", "  cpu: "):
        assert expected in out
    assert "all: gathered sdpa (not an NVIDIA GPU)" in out
    assert max(map(len, out.splitlines()[-3:])) < 130


def test_json_has_the_same(capsys):
    status, out, _ = said(capsys, "--json")
    found = json.loads(out)
    assert status == 0 and found["packages"]["torch"] == torch.__version__ and found["devices"][-1]["device"] == "cpu"
    assert found["acceleration"] == {"active": True, "interface_version": 1, "fused_kernels": "auto"}
    row = found["attention"]["cpu"]["heads of 128"]["bfloat16"]
    assert row == {"calls": "training and prefill", "attention": "gathered sdpa", "reason": "not an NVIDIA GPU"}


def test_a_checkpoint_is_described(checkpoint, capsys):
    status, out, _ = said(capsys, str(checkpoint))
    assert status == 0
    assert "llama decoder, 4 heads (2 of keys and values) of " in out and "softcap None, window None" in out
    assert "cpu, training and prefill: gathered sdpa (not an NVIDIA GPU)" in out and "cpu, decode step: decode mask" in out


def test_a_checkpoint_with_another_interface_is_told(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path)
    code = checkpoint / "acceleration_dsvl.py"
    code.write_text(code.read_text().replace("INTERFACE_VERSION = 1\n", "INTERFACE_VERSION = 0\n"))
    assert (
        "its code has interface version 0: loaded without this package's classes, it runs without"
        in said(capsys, str(checkpoint))[1]
    )


def test_what_is_no_checkpoint_is_an_error(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    status, _, err = said(capsys, str(tmp_path))
    assert status == 1 and err.startswith("dsvl env: ") and "not a DSVL checkpoint" in err


def test_a_gpu_is_described_with_the_reason_of_each_choice(gpu, checkpoint, capsys):
    status, out, _ = said(capsys)
    assert status == 0
    assert "cuda:0: NVIDIA A100-SXM4-80GB, compute capability 8.0, 79.0 GiB, float32/bfloat16/float16" in out
    assert "not tuned (dsvl env --tune)" in out and "torch build: CUDA 12.8, driver 570.1" in out
    assert "heads of 64, heads of 128 in bfloat16/float16: fused kernels (checked on this device)" in out
    assert (
        "heads of 256, 256, softcap in bfloat16/float16: gathered sdpa (the check failed with OutOfResources: smem)" in out
    )
    assert "all in float32: gathered sdpa (float32 is not bfloat16 or float16)" in out
    status, out, _ = said(capsys, str(checkpoint))
    assert "cuda:0, training and prefill: gathered sdpa (float32 is not bfloat16 or float16)" in out


def test_tuning_is_kept_and_shown(gpu, monkeypatch, capsys, tmp_path):
    def time_heads(device, head_dim, shapes):
        fused = {64: 1.0, 128: 3.0}[head_dim]
        return kernel_timings.Times(head_dim, (kernel_timings.Shape(2048, 512, fused, 2.0),))

    monkeypatch.setattr(kernel_timings, "time_heads", time_heads)
    status, out, err = said(capsys, "--tune")
    assert status == 0 and "cuda:0: heads of 256 are not timed: the check failed with OutOfResources" in err
    assert (
        "cuda:0: heads of up to 64: fused kernels (tuned" in err
        and "cuda:0: heads of up to 128: gathered sdpa (tuned" in err
    )
    assert str(tmp_path / "dsvl") in err
    assert (
        "heads of 128 in bfloat16/float16: gathered sdpa (slower on this device: tuned, fused against gathered sdpa: 3.00"
        in out
    )
    assert "    heads of up to 64: tuned, fused against gathered sdpa: 1.00 against 2.00 ms at 2048 tokens" in out
    assert "tuned, fused against gathered sdpa: 1.00" in said(capsys)[1], "the next call reads the file"


def test_tuning_without_a_gpu_is_an_error(capsys):
    status, out, err = said(capsys, "--tune")
    assert (status, out) == (1, "") and "no GPU was found" in err and "leave --tune out" in err


@pytest.mark.parametrize(
    ("kind", "backend", "accelerated", "attention"),
    [
        ("mmca", "sdpa", True, ["gathered sdpa", "decode mask"]),
        ("mmca", "flex_attention", True, ["gathered flex_attention", "decode mask"]),
        ("mmca", "sdpa", False, ["two calls of sdpa over all tokens", "decode mask"]),
        ("mmca", "eager", True, ["definition, over the matrix of scores", "decode mask"]),
        ("mmca_reference", "sdpa", True, ["definition, over the matrix of scores"]),
        ("causal", "sdpa", True, ["the decoder's own sdpa"]),
    ],
)
def test_the_attention_that_is_named_is_the_one_that_runs(kind, backend, accelerated, attention, monkeypatch, uncompiled):
    """Against the masks that a model builds."""
    config = FAMILIES["llama"]()
    config._attn_implementation = backend
    named = attention_of(config, kind, torch.float32, CPU, accelerated)
    assert [one.attention for one in named] == attention
    if kind == "causal":
        return
    built = []
    if not accelerated:
        monkeypatch.setattr(masks_dsvl, "acceleration", lambda: None)
    build = masks_dsvl.build_masks

    def keep(*args, **kwargs):
        result = build(*args, **kwargs)
        built.append(type(result[1][None]).__name__)
        return result

    monkeypatch.setattr("dsvl.modeling_dsvl.build_masks", keep)
    model = tiny_model(backend=backend, attention=kind, dtype=torch.float32)
    with torch.no_grad():
        model(**batch("ttIttttttttttttttttttttttttttttttttttt", dtype=torch.float32), use_cache=False)
    classes = {"gathered": "GatheredMask", "definition,": "CodedMask", "two": "BranchMasks"}
    assert built == [classes[attention[0].split()[0]]]
