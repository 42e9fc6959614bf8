"""One process of a training is killed at random moments; the same command goes on, and ends like the uninterrupted run."""

import random
import subprocess
import time

import pytest
from training_runs import BATCH, command, environment, furthest, losses, make_checkpoint, make_conversations, run, weights
from two_hosts import kill, kill_tree, workers

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

SETUPS = {"ddp": [], "zero2": ["--deepspeed", "zero2"], "zero3": ["--deepspeed", "zero3"]}
# Most of the time is spent on saving.
STEPS = ["--max-steps", "40", "--save-steps", "1", "--logging-steps", "1", "--learning-rate", "1e-3"]
KILLS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    make_checkpoint(folder)
    make_conversations(folder, layout="ppttpppp" * 3)
    return folder


def flags(folder, output, setup):
    base = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, BATCH, 2, *STEPS]
    return [str(flag) for flag in [*base, "--save-total-limit", "2", *SETUPS[setup]]]


@pytest.fixture(scope="module")
def whole(folder):
    made = {}

    def get(setup):
        if setup not in made:
            made[setup] = folder / f"whole-{setup}"
            run(*flags(folder, made[setup], setup), processes=2)
        return made[setup]

    return get


def wait_for_a_moment(process, output, rng, log):
    """Wait until the run has passed a few more checkpoints, and then a random time; False if it has ended."""
    before, deadline = newest(output), time.monotonic() + 240
    while newest(output) < before + rng.randint(1, 6):
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5))
    return process.poll() is None


def newest(output):
    return max((int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")), default=0)


@pytest.mark.parametrize("setup", SETUPS)
def test_killed_processes_cost_nothing_but_time(folder, tmp_path, whole, setup):
    """The command is started again by hand. test_two_hosts.py has a restart by torchrun."""
    rng, output, log = random.Random(setup), tmp_path / "output", tmp_path / "log"
    line = command(*flags(folder, output, setup), processes=2)
    kills, process = 0, None
    try:
        while True:
            with log.open("a") as file:
                process = subprocess.Popen(line, env=environment(), stdout=file, stderr=file)
            is_over = kills == KILLS or not wait_for_a_moment(process, output, rng, log)
            if is_over or not (lost := workers(process.pid)):
                assert process.wait(timeout=400) == 0, log.read_text()
                break
            kill(rng.choice(lost))
            kills += 1
            assert process.wait(timeout=60) != 0  # the others end within a minute
            assert "Signal 9 (SIGKILL)" in log.read_text()  # torchrun names the process
    finally:
        if process is not None:
            kill_tree(process.pid)
    assert kills > 0
    assert "Resuming from" in log.read_text()
    assert losses(output) == losses(whole(setup))
    assert furthest(weights(output), weights(whole(setup))) == 0
