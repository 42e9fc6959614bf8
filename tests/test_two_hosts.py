"""Trainings on two hosts, with a shared output directory and with one on each."""

import json
import time

import pytest
from training_runs import (
    BATCH,
    STEPS,
    free_port,
    furthest,
    losses,
    make_checkpoint,
    make_conversations,
    run,
    take_back,
    weights,
)
from two_hosts import DEEPSPEED, TORCHRUN, kill, kill_tree, two_hosts, wait, workers

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

SETUPS = {name: [] if name == "ddp" else ["--deepspeed", name] for name in ("ddp", "zero2", "zero3")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    make_checkpoint(folder)
    make_conversations(folder, layout="ppttpppp" * 3)
    run("--model", folder / "model", "--data", folder / "data.jsonl", "--output", folder / "alone", BATCH, 4, *STEPS)
    return folder


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as hosts:
        yield hosts


OUTPUT = "output"  # relative to the current directory of a host, its disk


def disks(tmp_path, kind):
    """The disk of each host: the same, or one of its own."""
    return [tmp_path / "disk"] * 2 if kind == "shared" else [tmp_path / f"disk-{host}" for host in (0, 1)]


def flags(folder, *more, output=OUTPUT):
    return ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, BATCH, "2", *STEPS, *more]


def succeed(processes):
    ends = wait(processes)
    for status, out in ends:
        assert status == 0, "\n".join(out for _, out in ends)
    return [out for _, out in ends]


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_two_hosts_train_and_resume_like_one_process(folder, tmp_path, hosts, kind, setup):
    places, train = disks(tmp_path, kind), flags(folder, *SETUPS[setup])
    succeed(hosts.torchrun(places, train))
    outputs = [place / OUTPUT for place in places]
    for output in outputs:  # each host ends with the trained model
        assert losses(output) == pytest.approx(losses(folder / "alone"), abs=1e-5)
        assert furthest(weights(output), weights(folder / "alone")) < 1e-5
        assert not list(output.glob(".*"))
    if kind == "separate":  # weights are written once
        assert (outputs[0] / "checkpoint-2" / "model.safetensors").exists()
        assert not (outputs[1] / "checkpoint-2" / "model.safetensors").exists()
        assert (outputs[1] / "checkpoint-2" / "rng_state_1.pth").exists()

    final = weights(outputs[0])
    for output in dict.fromkeys(outputs):
        take_back(output)
    # With separate directories the hosts change their ranks, so that process 0 is where the weights are not.
    ends = succeed(hosts.torchrun(places, train, ranks=(0, 1) if kind == "shared" else (1, 0)))
    assert any(f"Resuming from {OUTPUT}/checkpoint-2." in end for end in ends)
    for output in outputs:
        assert losses(output) == pytest.approx(losses(folder / "alone"), abs=1e-5)
        assert furthest(weights(output), final) < 1e-6


def test_partitions_on_separate_disks_continue_on_one_process(folder, tmp_path, hosts):
    places, train = disks(tmp_path, "separate"), flags(folder, "--deepspeed", "zero2")
    succeed(hosts.torchrun(places, train))
    for place in places:
        take_back(place / OUTPUT)
    succeed(hosts.torchrun(places, train))  # both hosts have the whole checkpoint afterwards
    for place in places:
        take_back(place / OUTPUT)
        resumed = run(*flags(folder, "--deepspeed", "zero2", output=place / OUTPUT))
        assert "which 2 processes wrote, on 1" in resumed.stderr
        assert losses(place / OUTPUT) == pytest.approx(losses(folder / "alone"), abs=1e-5)


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_each_host_has_the_image_features_of_its_samples(folder, tmp_path, hosts, kind):
    places = disks(tmp_path, kind)
    succeed(hosts.torchrun(places, flags(folder, "--cache-image-features", "features")))
    for place in places:
        assert losses(place / OUTPUT) == pytest.approx(losses(folder / "alone"), abs=1e-5)


def test_a_recipe_of_two_stages_on_separate_disks(folder, tmp_path, hosts):
    recipe = tmp_path / "recipe.yaml"
    common = {"data": str(folder / "data.jsonl"), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    recipe.write_text(json.dumps({**common, "stages": [{"name": "align"}, {"name": "tune"}]}))
    places = disks(tmp_path, "separate")
    succeed(hosts.torchrun(places, [recipe, "--model", folder / "model", "--output", OUTPUT]))
    run(recipe, "--model", folder / "model", "--output", tmp_path / "alone", BATCH, 4)
    for place in places:
        assert losses(place / OUTPUT) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
        assert furthest(weights(place / OUTPUT), weights(tmp_path / "alone")) < 1e-5


@pytest.mark.parametrize("setup", ["ddp", "zero3"])
def test_a_lost_host_ends_the_other_within_a_minute(folder, tmp_path, hosts, setup):
    places = disks(tmp_path, "separate")
    train = flags(folder, *SETUPS[setup], "--max-steps", "400", "--save-steps", "3", "--save-total-limit", "2")
    processes = hosts.torchrun(places, train)
    try:
        await_checkpoint(places[0] / OUTPUT, 0)
        lost = workers(processes[1].pid)
        kill(processes[1].pid)  # its launcher cannot say anything
        for worker in lost:
            kill(worker)
        killed = time.monotonic()
        status, out = wait(processes[:1], timeout=60)[0]
    finally:
        stop(processes)
    assert time.monotonic() - killed < 60
    assert status not in (0, -9), out
    assert f"process 1 on {hosts.name(1)} has given no sign of life for 40 seconds" in out
    again = hosts.torchrun(places, train)
    try:
        await_checkpoint(places[0] / OUTPUT, newest(places[0] / OUTPUT))
    finally:
        outs = stop(again)
    assert "Resuming from" in outs[0]


def newest(output):
    """The step of the last checkpoint that is complete on the first host."""
    return max((int(path.parent.name.split("-")[1]) for path in output.glob("checkpoint-*/complete.json")), default=0)


def await_checkpoint(output, step):
    """Wait for a checkpoint after this step."""
    deadline = time.monotonic() + 240
    while newest(output) <= step:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def stop(processes):
    """Kill launchers and their processes; returns the outputs."""
    for process in processes:
        kill_tree(process.pid)
    return [process.communicate()[0] if not process.stdout.closed else "" for process in processes]


def test_torchrun_restarts_both_hosts_when_a_process_is_lost(folder, tmp_path, hosts):
    places, length = disks(tmp_path, "shared"), ["--max-steps", "40", "--save-steps", "4"]
    run(*flags(folder, *length, BATCH, "4", output=tmp_path / "whole"))
    processes = hosts.torchrun(places, flags(folder, *length), "--rdzv-backend", "c10d", "--max-restarts", "3")
    try:
        await_checkpoint(places[0] / OUTPUT, 0)
        for worker in workers(processes[1].pid):
            kill(worker)
        succeed(processes)
    finally:
        stop(processes)
    assert losses(places[0] / OUTPUT) == pytest.approx(losses(tmp_path / "whole"), abs=2e-5)
    assert len(losses(places[0] / OUTPUT)) == 40


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_deepspeed_starts_the_hosts_of_a_hostfile(folder, tmp_path, hosts, kind):
    """Without ssh, one launcher on each host."""
    hostfile, port = tmp_path / "hostfile", free_port()
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    places = disks(tmp_path, kind)
    base = [DEEPSPEED, "--hostfile", hostfile, "--no_ssh", "--master_addr", hosts.addresses[0], "--master_port", port]
    train = ["--module", "dsvl.training", *flags(folder, "--deepspeed", "zero2")]
    succeed([hosts.start(rank, place, *base, "--node_rank", rank, *train) for rank, place in enumerate(places)])
    for place in places:
        assert losses(place / OUTPUT) == pytest.approx(losses(folder / "alone"), abs=1e-5)


def test_directories_of_different_names_are_refused(folder, tmp_path, hosts):
    places, port = disks(tmp_path, "separate"), free_port()
    base = [TORCHRUN, "--nnodes", 2, "--master-addr", hosts.addresses[0], "--master-port", port]
    ends = wait(
        [
            hosts.start(rank, place, *base, "--node-rank", rank, "-m", "dsvl.training", *flags(folder, output=f"out-{rank}"))
            for rank, place in enumerate(places)
        ]
    )
    assert all(status != 0 for status, _ in ends)
    assert "process 1 has the directory out-1, but process 0 out-0; pass the same on all hosts" in ends[0][1]
