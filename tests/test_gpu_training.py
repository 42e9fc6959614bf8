"""`dsvl train` on an NVIDIA GPU: bf16, Liger's kernels, DeepSpeed, resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import BATCH, STEPS, losses, make_checkpoint, make_conversations, take_back

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    make_checkpoint(folder)
    make_conversations(folder)
    make_conversations(folder, "held_out.jsonl", layout="ptppt")
    return folder


def train(folder, output, *flags, processes=1, batch=4):
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [
        sys.executable,
        *launcher,
        "-m",
        "dsvl.training",
        "--model",
        folder / "model",
        "--data",
        folder / "data.jsonl",
    ]
    command += ["--output", output, BATCH, batch, *STEPS, *flags]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "DS_ACCELERATOR")}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


SETUPS = {
    "float32": [],
    "bf16": ["--bf16"],
    "flex": ["--bf16", "--attn-implementation", "flex_attention"],
    "liger": ["--bf16", "--use-liger-kernel", "--activation-checkpointing", "true"],
    "compiled": ["--bf16", "--compile-decoder-layers"],
    "compiled and checkpointed": ["--bf16", "--compile-decoder-layers", "--activation-checkpointing", "true"],
    "adapters": ["--bf16", "--lora-rank", "8", "--lora-vision"],
    "zero2": ["--bf16", "--deepspeed", "zero2"],
    "zero3": ["--bf16", "--deepspeed", "zero3", "--activation-checkpointing", "true"],
    "zero3 with adapters": ["--bf16", "--deepspeed", "zero3", "--lora-rank", "8"],
}


@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_learns_and_resumes(folder, tmp_path, setup):
    if setup == "liger":
        pytest.importorskip("liger_kernel")
    if "zero" in setup:
        pytest.importorskip("deepspeed")
    output = tmp_path / "output"
    flags = [*SETUPS[setup], "--eval-data", folder / "held_out.jsonl", "--eval-exact-match", "--eval-max-new-tokens", "3"]
    train(folder, output, *flags)
    whole = losses(output)
    assert whole[-1] < whole[0] - 0.1
    take_back(output)
    assert "Resuming from" in train(folder, output, *flags).stderr
    assert losses(output) == pytest.approx(whole, abs=0.02)  # sums on a GPU come in any order
    assert "eval_exact_match" in json.dumps(json.loads((output / "trainer_state.json").read_text())["log_history"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("setup", ["ddp", "zero2", "zero3", "zero3-offload", "fsdp"])
def test_two_gpus_learn_as_one(folder, tmp_path, setup):
    if "zero" in setup:
        pytest.importorskip("deepspeed")
    train(folder, tmp_path / "one")
    flags = ["--deepspeed", setup] if "zero" in setup else ["--fsdp"] if setup == "fsdp" else []
    train(folder, tmp_path / "two", *flags, processes=2, batch=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_without_a_launcher_one_gpu_trains(folder, tmp_path):
    assert "2 GPUs, but no launcher" in train(folder, tmp_path / "output").stderr


SHARDED = {
    "bf16": ["--bf16"],
    "everything": ["--bf16", "--train", "projector", "embeddings", "vision", "language", "head"],
    "checkpointed": ["--bf16", "--activation-checkpointing", "--gradient-accumulation-steps", "2"],
    "compiled": ["--bf16", "--compile-decoder-layers"],
    "adapters": ["--bf16", "--lora-rank", "8", "--lora-vision"],
    "kept": ["--bf16", "--fsdp-config", '{"reshard_after_forward": false}'],
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("setup", SHARDED)
def test_shards_on_two_gpus_learn_and_resume(folder, tmp_path, setup):
    output = tmp_path / "output"
    flags = ["--fsdp", *SHARDED[setup], "--eval-data", folder / "held_out.jsonl", "--eval-exact-match"]
    flags += ["--eval-max-new-tokens", "3"]
    done = train(folder, output, *flags, processes=2, batch=2)
    assert "(1/2, FSDP2)" in done.stderr
    whole = losses(output)
    assert whole[-1] < whole[0] - 0.1
    take_back(output)
    assert "Resuming from" in train(folder, output, *flags, processes=2, batch=2).stderr
    assert losses(output) == pytest.approx(whole, abs=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_that_split_the_decoder_answer_as_one(folder):
    """On the GPUs; tests/test_tensor_parallel.py tells it without them."""
    script = Path(__file__).with_name("tensor_parallel_answers.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script, folder, "cuda"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        found = json.loads((folder / f"{rank}.json").read_text())
        assert found["own share of the image cache"] == 0.5 and found["logits"] < 1e-3
        assert found["same"] == dict.fromkeys(found["same"], True)
