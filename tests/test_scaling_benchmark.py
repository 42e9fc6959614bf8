"""`benchmarks/scaling.py`: its rows, what it says of a profile, and a run of two processes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import environment

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling")


def test_rows_are_read_by_their_names(scaling):
    assert [scaling.Row.parse(name).method for name in scaling.ROWS][-1] == "fsdp"
    row = scaling.Row.parse("lora/zero3+auto+compiled")
    assert (row.lora, row.method, row.variants) == (True, "zero3", ("auto", "compiled"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero4", "'zero4' is not a row; expected"),
        ("ddp+fast", r"'ddp\+fast' is not a row; expected"),
        ("zero2+single", r"\+single is a variant of zero3; drop it"),
        ("zero3+kept", r"\+kept is a variant of fsdp; drop it"),
        ("fsdp+fp8+int8", "layers are in one of fp8 and int8; drop the other"),
        ("zero3+fp8", r"does not partition 8-bit weights; take fsdp\+fp8"),
        ("zero3+single+compiled", r"gathered inside of compiled layers; drop \+single"),
    ],
)
def test_other_names_are_refused(scaling, name, message):
    with pytest.raises(ValueError, match=message):
        scaling.Row.parse(name)


def test_every_variant_of_zero3_changes_its_settings_as_deepspeed_knows_them(scaling, monkeypatch):
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    monkeypatch.setattr(scaling.dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    import torch

    def settings(*variants):
        made = scaling.zero_config(scaling.Row.parse("+".join(["zero3", *variants])), scaling.SHAPES["7b"], torch.bfloat16)
        assert "auto" not in made["zero_optimization"].values()
        return config.DeepSpeedZeroConfig(**made["zero_optimization"]).model_dump()

    plain = settings()
    for variant in set(scaling.ZERO3_VARIANTS) - {"single", "layers"}:
        changed = {name for name, value in settings(variant).items() if value != plain[name]}
        assert len(changed) == 1, (variant, changed)
    assert plain["prefetch_bucket_size"] == 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)  # two layers of LLaMA-7B


def test_shapes_have_the_parameters_that_they_are_named_after(scaling):
    import torch

    from dsvl import DSVLForConditionalGeneration
    from dsvl.transformers_dsvl import no_init_weights

    def count(name, layers):
        shape = scaling.replace(scaling.SHAPES[name], layers=layers)
        with torch.device("meta"), no_init_weights():
            model = DSVLForConditionalGeneration(scaling.configuration(name, shape))
        return sum(parameter.numel() for parameter in model.parameters())

    def whole(name):  # layers are alike
        one, two = count(name, 1), count(name, 2)
        return one + (scaling.SHAPES[name].layers - 1) * (two - one)

    assert whole("7b") == pytest.approx(7.05e9, rel=0.01)
    assert whole("30b") == pytest.approx(32.8e9, rel=0.01)
    assert whole("70b") == pytest.approx(70.9e9, rel=0.01)


def test_times_split_into_computing_communicating_both_and_neither(scaling):
    shares = scaling.bounds([(0, 4), (3, 5), (8, 9)], [(4, 7), (9, 20)], whole=(0, 10))
    assert shares == pytest.approx({"compute": 0.5, "both": 0.1, "exposed_communication": 0.3, "idle": 0.1})
    assert scaling.bounds([], [], whole=(0, 1))["idle"] == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "allgather"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "reducescatter"),
        ("gloo:all_reduce", "allreduce"),
        ("nccl:_all_gather_base", "allgather"),
        ("ncclDevKernel_SendRecv", "other"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16>", None),
        ("aten::mm", None),
    ],
)
def test_collectives_are_told_from_kernels_that_compute(scaling, name, kind):
    assert scaling.collective(name) == kind


@pytest.mark.parametrize("row", ["fsdp", "fsdp+fp8", "fsdp+int8"])
def test_a_model_built_without_values_gets_random_ones_of_about_the_same_size(scaling, single_group, monkeypatch, row):
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setattr(scaling, "BIG", ("tiny",))
    row, cpu = scaling.Row.parse(row), torch.device("cpu")
    model = scaling.build("tiny", row, scaling.SHAPES["tiny"], False, cpu, torch.float32)
    assert model.model.language_model.layers[1].mlp.up_proj.weight.is_meta
    fully_shard(model)
    scaling.fill(model, cpu)
    layer = model.model.language_model.layers[1].mlp.up_proj
    model.unshard()
    assert 0.01 < layer(torch.eye(layer.in_features)).std() < 0.04
    model.reshard()
    loss = model(**scaling.inputs(scaling.SHAPES["tiny"], "cpu", torch.float32), use_cache=False).loss
    loss.backward()
    assert loss.isfinite() and model.get_input_embeddings().weight.grad is not None


BIG_BUT_TINY = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import scaling
scaling.BIG = ("tiny",)
scaling.main()
"""


def test_two_processes_shard_a_model_built_without_values(tmp_path):
    (tmp_path / "big.py").write_text(BIG_BUT_TINY)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(tmp_path / "big.py"), str(BENCHMARKS), "--out", str(tmp_path / "row.json")]
    command += ["--shape", "tiny", "--row", "fsdp+fp8", "--rounds", "1"]
    own = environment() | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "row.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_it_runs_with_one_and_two_processes(tmp_path):
    pytest.importorskip("deepspeed")
    rows = ["ddp", "zero2", "zero3", "fsdp", "zero3+single", "zero3+auto+compiled", "lora/fsdp", "lora/zero3"]
    rows += ["ddp+fp8", "fsdp+fp8"]
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--shape", "tiny", "--processes", "1", "2", "--rounds", "2"]
    command += ["--budget", "1800", "--profile", str(tmp_path / "traces"), "--out", str(tmp_path / "scaling.json")]
    done = subprocess.run([*command, "--rows", *rows], env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {(one["row"], one["processes"]): one for one in json.loads((tmp_path / "scaling.json").read_text())["results"]}
    assert len(results) == 20
    # Every method trains the same model on the same batch: without adapters, the losses are those of DDP.
    for (row, processes), one in results.items():
        if not row.startswith("lora/"):
            same = "ddp+fp8" if row.endswith("+fp8") else "ddp"
            assert one["losses"] == pytest.approx(results[same, processes]["losses"], abs=1e-4), row
            assert one["parameters"] == results["ddp", processes]["parameters"]
        assert one["profile"]["idle"] < 1 and (tmp_path / "traces").is_dir()
    for row in ("zero3", "fsdp"):
        assert results[row, 2]["profile"]["calls_of_collectives"]["allgather"] > 0
    assert "100.0%" in done.stdout


@pytest.mark.slow
def test_a_checkpoint_from_disk_through_an_interrupted_training_and_back(tmp_path):
    pytest.importorskip("deepspeed")
    commands = {"make": [], "start": [], "end": ["--delete-source"], "check": []}
    for command, flags in commands.items():
        script = [sys.executable, str(BENCHMARKS / "large_checkpoint.py"), command, str(tmp_path / "large"), *flags]
        done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "large" / "large_checkpoint.json").read_text())
    assert not list((tmp_path / "large" / "model").glob("*.safetensors"))
    assert (found["start"]["resumed"], found["end"]["resumed"]) == (False, True)
    assert 0 < found["start"]["host_gib_until_loaded"] <= found["start"]["host_gib"] and found["start"]["load_seconds"] >= 0
    assert len(found["start"]["step_seconds"]) == len(found["end"]["step_seconds"]) == 2
    assert 0 < found["start"]["optimizer_states_gib"] < found["start"]["checkpoint_gib"] / 2
    assert found["check"]["same_names"]
    assert all("multi_modal_projector" in name or "embed_tokens" in name for name in found["check"]["changed"])
    assert 0 < len(found["check"]["changed"]) < found["check"]["weights"]
