"""Hosts with directories of their own get the files that they lack; one shared directory is recognized."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import environment, free_port

from dsvl.training.checkpoints import mark_complete, send_checkpoint, why_incomplete
from dsvl.training.hosts import Hosts

SCRIPT = str(Path(__file__).with_name("hosts_process.py"))


def run_two(folders):
    """What two processes print that have these current directories."""
    port, started = free_port(), []
    for rank, folder in enumerate(folders):
        group = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipe = subprocess.PIPE
        line = [sys.executable, SCRIPT, "output"]
        started.append(subprocess.Popen(line, cwd=folder, env=environment() | group, stdout=pipe, stderr=pipe, text=True))
    results = []
    for process in started:
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    return results


def write(folder, **files):
    """Write files, name -> content."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.slow
def test_a_shared_directory_has_one_leader(tmp_path):
    first, last = run_two([tmp_path, tmp_path])
    for one in (first, last):
        assert one["members"] == [0, 1] and one["leaders"] == [0] and not one["separate"]
        assert one["error"] == "no room"
    assert (first["leads"], last["leads"]) == (True, False)
    assert (first["each"], last["each"]) == ("process 0", None)
    assert first["files"] == {}  # no traces


def test_separate_directories_get_what_they_lack(tmp_path):
    """Process 0's host has the weights, and was not there when checkpoint 8 was written; checkpoint 6 has no end."""
    large, disks = "weights 4 " * 500, [tmp_path / "a", tmp_path / "b"]
    state = json.dumps({"best_model_checkpoint": "output/checkpoint-2"})
    a, b = (
        {f"output/checkpoint-4/{name}": text for name, text in files.items()}
        for files in (
            {"rng_state_0.pth": "0"},
            {"model.safetensors": large, "rng_state_1.pth": "1", "trainer_state.json": state},
        )
    )
    write(disks[0], **a, **{"output/checkpoint-6/model.safetensors": "half", "output/model/model.safetensors": "newer"})
    write(disks[1], **b, **{"output/checkpoint-2/model.safetensors": "best", "output/run.json": "{}"})
    write(disks[1], **{"output/model/model.safetensors": "older", "output/checkpoint-8/complete.json": '{"gone": 3}'})
    sizes = {name.rsplit("/", 1)[1]: len(text) for name, text in (a | b).items()}
    mark_complete(disks[1] / "output" / "checkpoint-4", sizes)

    first, last = run_two(disks)
    assert [one["members"] for one in (first, last)] == [[0], [1]]
    assert all(one["separate"] and one["leads"] and one["leaders"] == [0, 1] for one in (first, last))
    assert [one["each"] for one in (first, last)] == ["process 0", "process 1"]
    for disk, one in zip(disks, (first, last), strict=True):
        assert why_incomplete(disk / "output" / "checkpoint-4") is None
        assert (disk / "output" / "checkpoint-4" / "model.safetensors").read_text() == large
        assert one["files"]["checkpoint-2/model.safetensors"] == "best"  # it may be loaded at the end
        assert one["files"]["model/model.safetensors"] == "newer"
        assert one["files"]["run.json"] == "{}"
    assert "checkpoint-6/model.safetensors" not in last["files"]
    assert not list(tmp_path.rglob("*.partial"))


def test_one_process_has_one_directory(tmp_path):
    hosts = Hosts(tmp_path / "output")
    assert not hosts.separate and hosts.leads and not hosts.directory.exists()
    assert hosts.each(lambda: 3) == 3
    with pytest.raises(ValueError, match="no"):
        hosts.each(lambda: int("no"))
    hosts.share(lambda: pytest.fail("nothing is sent"))
    send_checkpoint(hosts)
