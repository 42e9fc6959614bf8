"""When a process of a training is lost, the others end with a message that names it."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import environment, free_port

from dsvl.training.argument_checks import check_options

SCRIPT = str(Path(__file__).with_name("watched_process.py"))
TIMEOUT = 3.0


def start(what, rank, port, timeout=TIMEOUT):
    """A process without a launcher, as a launcher would end the others itself."""
    group = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, SCRIPT, what, str(timeout)]
    return subprocess.Popen(command, env=environment() | group, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"it did not end:\n{out}{err}")
    return process.returncode, out, err


@pytest.fixture
def two():
    started = []

    def run(what, timeout=TIMEOUT):
        port = free_port()
        started.extend(start(what, rank, port, timeout) for rank in range(2))
        return started

    yield run
    for process in started:
        process.kill()  # a stopped one too
        process.wait()


@pytest.mark.parametrize("what", ["killed", pytest.param("stuck", marks=pytest.mark.slow)])
def test_the_lost_process_is_named(two, what):
    first, last = two(what)
    status, out, err = end(first)
    assert status == 1 and "done" not in out
    assert f"process 1 on {socket.gethostname()} has given no sign of life for {TIMEOUT:g} seconds" in err
    assert "start the same command again to resume" in err


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others_with_its_message(two):
    first, last = two("error", 40)
    started = time.monotonic()
    status, out, err = end(first)
    assert status != 0 and "done" not in out
    assert f"process 1 on {socket.gethostname()} ended with an error: ValueError: no such file" in err
    assert time.monotonic() - started < 40  # it does not wait for the timeout
    assert "ValueError: no such file" in end(last)[2]


@pytest.mark.slow
def test_a_process_that_waits_for_another_is_not_lost(two):
    for process in two("late", 1.0):
        status, out, err = end(process)
        assert status == 0 and "done" in out, err


def test_a_timeout_that_a_busy_process_would_exceed_is_refused():
    with pytest.raises(ValueError, match=r"--lost-process-timeout 3: .* pass 10 or more seconds, or 0"):
        check_options(OPTIONS | {"lost_process_timeout": 3.0})


OPTIONS = {"train": ["projector"], "lora_rank": 0, "qlora": False, "lora_vision": False, "lora_language": True}
OPTIONS |= {"eval_exact_match": False, "max_steps": 4, "data": "data.jsonl"}
