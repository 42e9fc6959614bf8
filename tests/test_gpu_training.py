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
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]  # on a port of its own, so that tests run side by side


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    make_checkpoint(folder)
    make_conversations(folder)
    make_conversations(folder, "held_out.jsonl", layout="ptppt")
    return folder


def train(folder, output, *flags, processes=1, batch=4):
    launcher = [*TORCHRUN, f"--nproc-per-node={processes}"] if processes > 1 else []
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


FROZEN = ["--frozen-precision-keep", "none", "--frozen-precision"]
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
    "zero3, compiled": ["--bf16", "--deepspeed", "zero3", "--compile-decoder-layers"],
    "zero3 with adapters": ["--bf16", "--deepspeed", "zero3", "--lora-rank", "8"],
    "fp8, compiled": ["--bf16", *FROZEN, "fp8", "--compile-decoder-layers", "--activation-checkpointing", "true"],
    "fp8 with adapters and zero2": ["--bf16", *FROZEN, "fp8", "--lora-rank", "8", "--lora-vision", "--deepspeed", "zero2"],
    "int8, compiled": ["--bf16", *FROZEN, "int8", "--compile-decoder-layers"],
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
@pytest.mark.parametrize("setup", ["ddp", "zero2", "zero3", "zero3 compiled", "zero3-offload", "fsdp"])
def test_two_gpus_learn_as_one(folder, tmp_path, setup):
    if "zero" in setup:
        pytest.importorskip("deepspeed")
    train(folder, tmp_path / "one")
    flags = ["--deepspeed", setup.split()[0]] if "zero" in setup else ["--fsdp"] if setup == "fsdp" else []
    flags += ["--compile-decoder-layers"] if "compiled" in setup else []
    train(folder, tmp_path / "two", *flags, processes=2, batch=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_without_a_launcher_one_gpu_trains(folder, tmp_path):
    assert "2 GPUs but no launcher" in train(folder, tmp_path / "output").stderr


SHARDED = {
    "bf16": ["--bf16"],
    "everything": ["--bf16", "--train", "projector", "embeddings", "vision", "language", "head"],
    "checkpointed": ["--bf16", "--activation-checkpointing", "--gradient-accumulation-steps", "2"],
    "compiled": ["--bf16", "--compile-decoder-layers"],
    "adapters": ["--bf16", "--lora-rank", "8", "--lora-vision"],
    "fp8": ["--bf16", *FROZEN, "fp8", "--compile-decoder-layers", "--activation-checkpointing"],
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
    command = [sys.executable, *TORCHRUN, "--nproc-per-node=2", script, folder, "cuda"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        found = json.loads((folder / f"{rank}.json").read_text())
        assert found["own share of the image cache"] == 0.5 and found["logits"] < 1e-3
        assert found["same"] == dict.fromkeys(found["same"], True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("setup", ["ddp", "zero2", "zero3", "liger and checkpointed", "reduced"])
def test_two_gpus_that_share_images_learn_as_one(folder, tmp_path, setup):
    """With the fused kernels, whose partial results are merged through NCCL."""
    if "zero" in setup:
        pytest.importorskip("deepspeed")
    if "liger" in setup:
        pytest.importorskip("liger_kernel")
    flags = {
        "liger and checkpointed": ["--use-liger-kernel", "--activation-checkpointing", "true"],
        "reduced": [
            "--activation-checkpointing",
            "true",
            "--tiled-mlp",
            "64",
            "--skip-image-queries",
            "--offload-activations",
        ],
    }.get(setup, [])
    zero = ["--deepspeed", setup] if "zero" in setup else []
    train(folder, tmp_path / "one", "--bf16", *flags, *zero)
    train(folder, tmp_path / "two", "--bf16", *flags, *zero, "--image-parallel", "2", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=0.02)


SPLIT = """
import sys
import torch
from torch import distributed
sys.path.insert(0, sys.argv[1])
from conftest import batch, tiny_model
from dsvl.acceleration import image_parallel
from dsvl.acceleration.attention import split_attention
from dsvl.acceleration.parallel import split_batch

rank = int(__import__("os").environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
distributed.init_process_group("nccl")
for family in ("llama", "mistral"):
    # Small weights: with those of the tests in float64, gradients in bfloat16 differ by nine tenths from exact ones.
    model = tiny_model(family, dtype=torch.bfloat16, head_dim=32, hidden_size=128, initializer_range=0.05).cuda().train()
    model.set_trainable(vision_tower=True, language_model=True, lm_head=True)
    inputs = {k: v.cuda() for k, v in batch("ttIttttIIttttttttt", "ttItt", "tttt", dtype=torch.bfloat16).items()}
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == 90, -100).masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(ids[:, :-1] == 90, -100)
    fused = []
    forward = split_attention.FusedBranch.forward
    split_attention.FusedBranch.forward = lambda *args: fused.append(1) or forward(*args)

    def gradients():
        made = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return made

    alone = model(**inputs, labels=labels).loss
    alone.backward()
    expected = gradients()
    for is_dealt in (False, True):
        split_batch.deals_text = lambda *counts: is_dealt
        with image_parallel(model):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        mean = gradients()
        distributed.all_reduce(mean)
        mean /= distributed.get_world_size()
        assert abs(loss - alone) < 0.02 * abs(alone), (is_dealt, loss, alone)
        assert (mean - expected).norm() < 0.03 * expected.norm(), (is_dealt, (mean - expected).norm(), expected.norm())
    split_attention.FusedBranch.forward = forward
    assert bool(fused) == (torch.cuda.get_device_capability()[0] == 9), fused
distributed.destroy_process_group()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_fused_kernels_of_two_gpus_give_the_gradients_of_one(tmp_path):
    (tmp_path / "split.py").write_text(SPLIT)
    launcher = [sys.executable, *TORCHRUN, "--nproc-per-node=2"]
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(
        [*launcher, str(tmp_path / "split.py"), str(Path(__file__).parent)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
