"""Frozen weights in 8 bits in two processes: they train, save and resume as one; DeepSpeed's files have the originals."""

import pytest
import torch
from safetensors.torch import load_file
from test_frozen_precision import assert_frozen_bytes_are_those_of, is_trained
from training_runs import (
    BATCH,
    IN_ORDER,
    STEPS,
    furthest,
    losses,
    make_checkpoint,
    make_conversations,
    run,
    runs_once,
    take_back,
    weights,
)

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

SETUPS = {
    "ddp": [],
    "zero1": ["--deepspeed", "zero1"],
    "zero2": ["--deepspeed", "zero2", "--activation-checkpointing", "true"],
    "zero2 with compiled layers": ["--deepspeed", "zero2", "--compile-decoder-layers"],
    "adapters": ["--lora-rank", "4", "--lora-vision"],
    "zero2 with adapters": ["--deepspeed", "zero2", "--lora-rank", "4"],
    "image-parallel": ["--image-parallel", "2"],
    "image-parallel zero2": ["--image-parallel", "2", "--deepspeed", "zero2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    make_checkpoint(folder, num_hidden_layers=4)
    make_conversations(folder, layout="ppttpppp" * 2)
    make_conversations(folder, "held_out.jsonl", layout="ptp")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """Runs of one process, by their flags; each is run once."""
    return runs_once(folder, lambda output, *flags: train(folder, output, *flags, batch=4))


def train(folder, output, *flags, batch, **start):
    base = [
        "--model",
        folder / "model",
        "--data",
        folder / "data.jsonl",
        "--output",
        output,
        BATCH,
        batch,
        *STEPS,
        *IN_ORDER,
    ]
    return run(*base, *flags, **start)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("setup", SETUPS)
def test_two_processes_train_save_and_resume_as_one(folder, tmp_path, alone, setup, precision):
    if precision == "fp8" and setup not in ("ddp", "zero2 with adapters", "image-parallel"):
        pytest.skip("the products are other ones, the processes are not")
    output, frozen = tmp_path / "output", ["--frozen-precision", precision]
    flags = [*frozen, *SETUPS[setup], "--eval-data", folder / "held_out.jsonl"]
    batch = 4 if "image-parallel" in setup else 2
    said = train(folder, output, *flags, batch=batch, processes=2)
    assert f"Frozen weights: {precision} in 14 of 28" in said.stderr
    if "adapters" not in setup:
        # A number between two of E4M3 may be rounded to either, as sums in another order differ in the last bit.
        assert losses(output) == pytest.approx(losses(alone(*frozen)), abs=1e-5 if precision == "int8" else 1e-3)
        for path in (output, output / "checkpoint-2"):
            assert_frozen_bytes_are_those_of(path, folder / "model", is_trained)
        for states in output.glob("checkpoint-*/global_step*/*model_states.pt"):
            assert all(map(is_trained, torch.load(states, weights_only=False)["module"]))
    else:
        source, saved = (load_file(path / "model.safetensors") for path in (folder / "model", output))
        same = {name for name, weight in source.items() if torch.equal(weight, saved[name])}
        assert {name for name in source if "_proj" not in name and "fc" not in name and not is_trained(name)} <= same
    final, kept = weights(output), losses(output)
    take_back(output)
    assert "Resuming from" in train(folder, output, *flags, batch=batch, processes=2).stderr
    assert losses(output) == kept
    assert furthest(weights(output), final) == 0
