"""A killed training, resumed by the same command, ends bit-identical to an uninterrupted run."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from training_runs import BATCH, command, environment, furthest, make_checkpoint, make_conversations, run, weights

KILLED = str(Path(__file__).with_name("killed_training.py"))
# Adapters with dropout, to use random numbers; the second epoch begins at step 6.
SETTINGS = ["--max-steps", "8", "--save-steps", "2", "--logging-steps", "3", "--learning-rate", "1e-2", BATCH, "4"]
SETTINGS += ["--lora-rank", "4", "--lora-dropout", "0.2", "--save-total-limit", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    make_checkpoint(folder)
    make_conversations(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder):
    output = folder / "uninterrupted"
    run(*flags(folder, output))
    return output


def flags(folder, output, settings=SETTINGS):
    return ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, *settings]


def history(output):
    """The logged values of every step, without timings."""
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "train_runtime" not in entry]


def assert_equal_to_the_bit(output, uninterrupted):
    assert history(output) == history(uninterrupted)
    assert furthest(weights(output), weights(uninterrupted)) == 0


MOMENTS = {  # moment and step of the kill -> step of the checkpoint that the run resumes from
    ("in a step", 7): 6,
    ("in the weights", 4): 2,
    ("in the optimizer", 6): 4,
    ("before the mark", 8): 6,
    ("in the trained model", 1): 8,
}


@pytest.mark.parametrize(("moment", "step"), MOMENTS, ids=lambda value: str(value))
def test_a_killed_training_continues_to_the_bit(folder, uninterrupted, tmp_path, moment, step):
    # With adapters, the trained model consists of PEFT's files and the merged weights.
    output = tmp_path / "output"
    killed = run(moment, step, *flags(folder, output), module=KILLED, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (output / "config.json").exists()

    again = run(*flags(folder, output))
    left = MOMENTS[moment, step]
    assert f"Resuming from {output / f'checkpoint-{left}'}." in again.stderr
    skipped = f"{output / f'checkpoint-{step}'} is skipped" in again.stderr
    assert skipped == (moment not in ("in a step", "in the trained model"))
    assert_equal_to_the_bit(output, uninterrupted)


def test_a_finished_training_started_again_changes_nothing(folder, uninterrupted, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(uninterrupted, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = run(*flags(folder, output))
    assert f"{output} is finished" in again.stderr and "Resuming from" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert_equal_to_the_bit(output, uninterrupted)


def test_two_processes_are_killed_and_continue_to_the_bit(folder, tmp_path):
    pytest.importorskip("deepspeed")
    settings = ["--max-steps", "4", "--save-steps", "2", "--logging-steps", "1", "--learning-rate", "1e-2", BATCH, "2"]
    settings += ["--deepspeed", "zero2", "--dataloader-num-workers", "1"]
    whole, output = tmp_path / "whole", tmp_path / "output"
    run(*flags(folder, whole, settings), processes=2)
    killed = run("in a step", "3", *flags(folder, output, settings), module=KILLED, processes=2, check=False)
    assert killed.returncode != 0 and not (output / "config.json").exists()
    again = run(*flags(folder, output, settings), processes=2)
    assert f"Resuming from {output / 'checkpoint-2'}." in again.stderr
    assert_equal_to_the_bit(output, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_at_random_moments(folder, tmp_path, seed):
    settings = [*SETTINGS, "--max-steps", "120", "--save-steps", "3"]
    whole, output = tmp_path / "whole", tmp_path / "output"
    started = time.monotonic()
    run(*flags(folder, whole, settings))
    duration = time.monotonic() - started
    rng, kills = random.Random(seed), 0
    while True:
        process = subprocess.Popen(
            command(*map(str, flags(folder, output, settings))),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=duration * rng.uniform(0.5, 0.95) if kills < 6 else 400)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert process.returncode == 0
    assert kills > 0
    assert_equal_to_the_bit(output, whole)


def test_a_run_on_another_seed_is_another_run(folder, uninterrupted, tmp_path):
    """The comparison above fails for different runs."""
    run(*flags(folder, tmp_path / "output"), "--seed", "7")
    assert not torch.equal(
        *(weights(output)["model.multi_modal_projector.linear.weight"] for output in (tmp_path / "output", uninterrupted))
    )
