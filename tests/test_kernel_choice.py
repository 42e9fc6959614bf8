"""When the fused kernels are used: what they support, the check at first use, measured times, and one decision for a job."""

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import plain_kernels
import pytest
import torch
from plain_kernels import use_plain_kernels
from training_runs import command, environment
from transformers import LlamaConfig

from dsvl.acceleration.attention import kernel_check, kernel_choice, kernel_timings, kernels
from dsvl.acceleration.attention.kernel_check import check_kernels
from dsvl.acceleration.attention.kernel_choice import Heads, can_fuse, decision
from dsvl.acceleration.attention.kernel_timings import Shape, Times, cache_file, tune, tuned

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SLOW = Times(64, (Shape(2048, 512, 2.0, 1.0),))
FAST = Times(64, (Shape(2048, 512, 1.0, 2.0),))


def decoder(**options):
    return LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, **options)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were an NVIDIA GPU with Triton; its capability, and the result of the check, can be set."""
    state = SimpleNamespace(capability=(8, 0), right=True, capturing=False, checks=[])

    def check(*options):
        state.checks.append(options)
        return state.right, "checked" if state.right else "the check failed with OutOfResources: shared memory"

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(kernel_choice, "triton", object())
    monkeypatch.setattr(kernel_choice, "DECISIONS", {})
    monkeypatch.setattr(kernel_choice, "device_capability", lambda device: state.capability)
    monkeypatch.setattr(kernel_choice, "check_kernels", check)
    monkeypatch.setattr(kernel_choice, "tuned", lambda device, head_dim: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


@pytest.mark.parametrize(
    ("config", "dtype", "training", "capability", "reason"),
    [
        ({}, torch.float32, False, (8, 0), "float32 is not bfloat16 or float16"),
        ({"head_dim": 512}, torch.bfloat16, False, (8, 0), "heads of 512 channels exceed 256"),
        ({"attention_dropout": 0.1}, torch.bfloat16, True, (9, 0), "attention_dropout=0.1 in training"),
        ({}, torch.float16, False, (7, 5), "compute capability 7.5 is below 8.0"),
    ],
)
def test_what_the_kernels_do_not_support_is_refused_without_a_check(config, dtype, training, capability, reason, gpu):
    gpu.capability = capability
    assert not can_fuse(decoder(**config), dtype, GPU, training)
    assert decision(decoder(**config), dtype, GPU, training).reason == reason
    assert gpu.checks == []


def test_devices_without_cuda_are_refused():
    assert decision(decoder(), torch.bfloat16, CPU).reason == "not an NVIDIA GPU"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
@pytest.mark.parametrize("right", [True, False])
def test_other_gpus_are_checked_once_for_the_heads_of_the_model(right, capability, gpu, caplog):
    gpu.right, gpu.capability = right, capability
    with caplog.at_level(logging.INFO, logger=kernel_choice.__name__):
        for _ in range(3):
            assert can_fuse(decoder(), torch.bfloat16, GPU) == right
    assert gpu.checks == [(GPU, torch.bfloat16, 64, 2, 0.0)]
    (record,) = caplog.records
    assert record.levelno == (logging.INFO if right else logging.WARNING)
    assert (
        "are used on cuda:0" if right else "not used on cuda:0 for heads of 64 in bfloat16: the check failed"
    ) in record.message
    config = decoder()
    config.attn_logit_softcapping = 50.0
    can_fuse(config, torch.bfloat16, GPU)
    assert len(gpu.checks) == 2, "a softcap is another kernel"


def test_hopper_was_measured_and_is_not_checked(gpu):
    gpu.capability = (9, 0)
    assert can_fuse(decoder(), torch.bfloat16, GPU) and gpu.checks == []


@pytest.mark.parametrize("graph", ["compiled", "captured"])
def test_nothing_is_checked_while_a_graph_is_made(graph, gpu, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: graph == "compiled")
    gpu.capturing = graph == "captured"
    assert not can_fuse(decoder(), torch.bfloat16, GPU)
    gpu.capability = (9, 0)
    assert can_fuse(decoder(), torch.bfloat16, GPU)
    assert gpu.checks == [] and kernel_choice.DECISIONS == {}


def test_the_choice_can_be_part_of_a_compiled_graph(gpu):
    gpu.capability, config = (9, 0), decoder()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + 1 if can_fuse(config, torch.bfloat16, GPU) else x, backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(2)).tolist() == [1, 1] and kernel_choice.DECISIONS == {}


def test_the_setting_overrides_checks_and_times(gpu, monkeypatch):
    monkeypatch.setattr(kernel_choice, "tuned", lambda device, head_dim: SLOW)
    gpu.right = False
    for setting in ("on", "off"):
        monkeypatch.setattr(kernel_choice, "DECISIONS", {})
        monkeypatch.setattr(kernel_choice, "SETTING", setting)
        found = decision(decoder(), torch.bfloat16, GPU)
        assert found.use == (setting == "on") and found.reason == f"DSVL_FUSED_KERNELS={setting}"
    assert gpu.checks == []
    monkeypatch.setenv("DSVL_FUSED_KERNELS", "yes")
    with pytest.raises(ValueError, match="DSVL_FUSED_KERNELS='yes' is not known; set it to one of auto, on, off"):
        kernel_choice.read_setting()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_what_was_measured_to_be_slower_is_not_used(capability, gpu, monkeypatch):
    gpu.capability = capability
    monkeypatch.setattr(kernel_choice, "tuned", lambda device, head_dim: SLOW)
    found = decision(decoder(), torch.bfloat16, GPU)
    assert (
        not found.use and "slower on this device" in found.reason and "2.00 against 1.00 ms at 2048 tokens" in found.reason
    )
    monkeypatch.setattr(kernel_choice, "DECISIONS", {})
    monkeypatch.setattr(kernel_choice, "tuned", lambda device, head_dim: FAST)
    assert decision(decoder(), torch.bfloat16, GPU).use
    assert len(gpu.checks) == (capability == (8, 0)), "right and fast are two questions"


# -- the check -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "group_size", "softcap"), [(64, 1, 0.0), (128, 4, 0.0), (80, 2, 5.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_kernels_pass_the_check_in_any_mode(dtype, head_dim, group_size, softcap, monkeypatch):
    use_plain_kernels(monkeypatch)
    with torch.inference_mode():
        right, found = check_kernels(CPU, dtype, head_dim, group_size, softcap)
    assert right and found.startswith("checked on this device (largest error "), found


@pytest.mark.parametrize("wrong", ["output", "dq", "dk", "dv", "nan", "windows"])
def test_wrong_kernels_fail_the_check(wrong, monkeypatch):
    use_plain_kernels(monkeypatch)

    def forward(query, key, value, lists, *options, save):
        out, *saved = plain_kernels.forward(query, key, value, lists, *options, save)
        if wrong == "output" or (wrong == "windows" and lists.windowed):
            out[:, -1] *= 1.5
        return out * float("nan") if wrong == "nan" else out, *saved

    def backward(*arguments):
        gradients = dict(zip(("dq", "dk", "dv"), plain_kernels.backward(*arguments), strict=True))
        if wrong in gradients:
            gradients[wrong][:, :, :64] *= 1.1
        return tuple(gradients.values())

    monkeypatch.setattr(kernels, "launch_forward", forward)
    monkeypatch.setattr(kernels, "launch_backward", backward)
    right, found = check_kernels(CPU, torch.float16, 64, 2, 0.0)
    assert not right and "3.0e-03 allowed" in found


def test_kernels_that_do_not_compile_fail_the_check_and_other_errors_are_raised(monkeypatch):
    errors = [
        RuntimeError("Triton Error [CUDA]: out of resources\nmore"),
        subprocess.CalledProcessError(1, "cc"),
        TypeError("a bug"),
    ]

    def forward(*arguments, save):
        raise errors.pop(0)

    monkeypatch.setattr(kernels, "launch_forward", forward)
    assert check_kernels(CPU, torch.float16, 64, 2, 0.0) == (
        False,
        "the check failed with RuntimeError: Triton Error [CUDA]: out of resources",
    )
    assert "CalledProcessError" in check_kernels(CPU, torch.float16, 64, 2, 0.0)[1]
    with pytest.raises(TypeError, match="a bug"):
        check_kernels(CPU, torch.float16, 64, 2, 0.0)


# -- one decision for a job ----------------------------------------------------------------------------------------------

JOB = """
import torch
from torch import distributed
from transformers import LlamaConfig
from dsvl.acceleration.attention import kernel_choice
from dsvl.training.distributed import destroy_process_groups

distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.version.cuda = "12.8"
torch.cuda.is_current_stream_capturing = lambda: False
kernel_choice.triton = object()
kernel_choice.tuned = lambda device, head_dim: None
kernel_choice.device_capability = lambda device: (9, 0) if rank == 0 else (8, 0)
config, device = LlamaConfig(), torch.device("cuda", rank)
for failing in (None, 1):
    kernel_choice.DECISIONS.clear()
    kernel_choice.check_kernels = lambda *options: (rank != failing, f"a check in process {rank}")
    kernel_choice.agree(config, torch.bfloat16, device)
    found = kernel_choice.decision(config, torch.bfloat16, device)
    gathered = [None, None]
    distributed.all_gather_object(gathered, (kernel_choice.can_fuse(config, torch.bfloat16, device), found.reason))
    if rank == 0:
        print(gathered)
distributed.barrier()
destroy_process_groups()
"""


def test_one_process_that_fails_makes_all_fall_back(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    done = subprocess.run(
        command(processes=2, module=str(script)), env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    reason = "a check in process 1"
    assert done.stdout.splitlines() == [
        str([(True, "measured on Hopper GPUs"), (True, reason)]),
        str([(False, f"process 1: {reason}"), (False, reason)]),
    ]


# -- times on disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tuning(monkeypatch, tmp_path):
    use_plain_kernels(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"WIDTH": 128, "SHAPES": ((64, 32),), "IMAGE_TOKENS": 16, "REPEATS": 3}.items():
        monkeypatch.setattr(kernel_timings, name, value)
    kernel_timings.saved.cache_clear()
    yield tmp_path
    kernel_timings.saved.cache_clear()


def test_times_are_measured_and_kept_until_a_version_changes(small_tuning, monkeypatch):
    assert tuned(CPU, 64) is None
    measured = tune(CPU, (64, 128))
    (path,) = small_tuning.rglob("*.json*")
    assert path == cache_file(CPU) and json.loads(path.read_text())["identity"]["torch"] == torch.__version__
    assert [tuned(CPU, head_dim) for head_dim in (64, 80, 256)] == [measured[0], measured[1], None]
    assert all(shape.fused_ms > 0 and shape.gathered_ms > 0 for one in measured for shape in one.shapes)
    for name, value in {"driver": "1.2.3", "card": "another"}.items():
        identity = kernel_timings.identity(CPU) | {name: value}
        with monkeypatch.context() as patch:
            patch.setattr(kernel_timings, "identity", lambda device, identity=identity: identity)
            kernel_timings.saved.cache_clear()
            assert tuned(CPU, 64) is None
            cache_file(CPU).write_text(path.read_text())  # as if two identities had the same name
            kernel_timings.saved.cache_clear()
            assert tuned(CPU, 64) is None
    kernel_timings.saved.cache_clear()
    assert tuned(CPU, 64) == measured[0]


@pytest.mark.parametrize("content", ["", "[]", '{"identity": 1, "times"', "{}"])
def test_a_damaged_file_is_ignored_with_a_message(content, small_tuning, caplog):
    tune(CPU, (64,))
    cache_file(CPU).write_text(content)
    kernel_timings.saved.cache_clear()
    assert tuned(CPU, 64) is None
    assert "is ignored" in caplog.text and "run dsvl env --tune to write it again" in caplog.text


def test_both_attentions_that_are_timed_are_the_same(small_tuning, monkeypatch):
    outputs = []
    interleaved = kernel_timings.interleaved_ms

    def keep(steps, device, *options):
        outputs.extend(step.args[0]() for step in steps)
        return interleaved(steps, device, *options)

    monkeypatch.setattr(kernel_timings, "interleaved_ms", keep)
    kernel_timings.time_heads(CPU, 64, kernel_timings.SHAPES)
    torch.testing.assert_close(*outputs, atol=2e-2, rtol=2e-2)


def test_the_heads_of_a_decoder():
    assert Heads.of(decoder()) == Heads(64, 2, 0.0)
    assert kernel_check.TOLERANCE.keys() >= set(kernels.DTYPES)
    assert sys.modules["dsvl.acceleration.attention.fused_mask"].can_fuse is can_fuse
