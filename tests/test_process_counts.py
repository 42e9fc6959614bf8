"""A run that was started on some number of processes continues on another, with the losses of the uninterrupted run."""

import json
import shutil

import pytest
from training_runs import BATCH, furthest, losses, make_checkpoint, make_conversations, run, take_back, weights

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

SETUPS = {name: [] if name == "ddp" else ["--deepspeed", name] for name in ("ddp", "zero1", "zero2", "zero3")}
SETUPS["fsdp"] = ["--fsdp"]
# Shuffled; 11 samples in batches of 4: an epoch ends within a batch, in step 3, where processes get samples to fill theirs.
STEPS = ["--max-steps", "5", "--save-steps", "2", "--logging-steps", "1", "--learning-rate", "1e-2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    make_checkpoint(folder)
    make_conversations(folder, layout="ppttpppptpt")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """Uninterrupted runs, by setup and number of processes; each is run once."""
    made = {}

    def get(setup, processes):
        if (setup, processes) not in made:
            output = folder / f"{setup}-{processes}"
            train(folder, output, setup, processes, 4 // processes)
            made[setup, processes] = output
        return made[setup, processes]

    return get


def train(folder, output, setup, processes, batch, *flags):
    base = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, BATCH, batch, *STEPS]
    return run(*base, *SETUPS[setup], *flags, processes=processes, always_launched=setup == "fsdp")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_continues_on_another_number_of_processes(folder, tmp_path, whole, setup, before, after):
    uninterrupted, output = whole(setup, before), tmp_path / "output"
    shutil.copytree(uninterrupted, output)
    take_back(output, "checkpoint-5")
    take_back_too = output / "checkpoint-4"
    shutil.rmtree(take_back_too)

    resumed = train(folder, output, setup, after, 4 // before)  # the same flags
    assert f"Resuming from {output / 'checkpoint-2'}, which {before} process" in resumed.stderr
    assert ("Converting the optimizer states" in resumed.stderr) == ("zero" in setup)
    assert losses(output) == pytest.approx(losses(uninterrupted), abs=1e-5)
    assert len(losses(output)) == 5
    assert furthest(weights(output), weights(uninterrupted)) < 1e-5
    assert not list(output.glob("checkpoint-*/*universal*"))  # what was converted is removed
    assert json.loads((output / "run.json").read_text())["batch"]["processes"] == before

    take_back(output, "checkpoint-5")  # back to where it came from, from a checkpoint of the other number
    again = train(folder, output, setup, before, 4 // before)
    assert f"which {after} process" in again.stderr
    assert losses(output) == pytest.approx(losses(uninterrupted), abs=1e-5)


@pytest.mark.parametrize("setup", ["ddp", "zero3"])
def test_adapters_and_their_learning_rates_continue(folder, tmp_path, setup):
    flags = ["--lora-rank", "4", "--learning-rates", "adapters=5e-3,projector=2e-2", "--lr-scheduler-type", "cosine"]
    whole, output = tmp_path / "whole", tmp_path / "output"
    train(folder, whole, setup, 2, 2, *flags)
    shutil.copytree(whole, output)
    take_back(output, "checkpoint-5")
    train(folder, output, setup, 1, 2, *flags)
    assert losses(output) == pytest.approx(losses(whole), abs=1e-5)
    assert furthest(weights(output), weights(whole)) < 1e-5


@pytest.mark.parametrize("setup", ["zero2", "zero3"])
def test_the_best_checkpoint_of_another_number_of_processes_is_loaded(folder, tmp_path, setup):
    make_conversations(folder, "held_out.jsonl", layout="pt")
    # The best is the one of the highest loss, as the loss falls.
    flags = ["--eval-data", folder / "held_out.jsonl", "--max-steps", "4", "--greater-is-better", "True"]
    output = tmp_path / "output"
    train(folder, output, setup, 2, 2, *flags)
    best = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert best.endswith("checkpoint-2")
    final = weights(output)
    take_back(output)
    train(folder, output, setup, 1, 2, *flags)
    assert furthest(weights(output), final) < 1e-6
    assert not list(output.glob("checkpoint-*/*universal*"))
