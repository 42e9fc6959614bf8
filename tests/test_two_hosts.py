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
from two_hosts import DEEPSPEED, kill, two_hosts, wait, workers

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


def outputs(tmp_path, kind):
    """The output directory of each host."""
    return [tmp_path / "output"] * 2 if kind == "shared" else [tmp_path / f"disk-{host}" / "output" for host in (0, 1)]


def flags(folder, output, *more):
    return ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, BATCH, "2", *STEPS, *more]


def succeed(processes):
    ends = wait(processes)
    for status, out in ends:
        assert status == 0, "\n".join(out for _, out in ends)
    return [out for _, out in ends]


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_two_hosts_train_and_resume_like_one_process(folder, tmp_path, hosts, kind, setup):
    places = outputs(tmp_path, kind)
    train = tuple(flags(folder, place, *SETUPS[setup]) for place in places)
    succeed(hosts.torchrun(train))
    for place in places:  # each host ends with the trained model
        assert losses(place) == pytest.approx(losses(folder / "alone"), abs=1e-5)
        assert furthest(weights(place), weights(folder / "alone")) < 1e-5
        assert not list(place.glob(".*"))
    if kind == "separate":  # weights are written once
        assert (places[0] / "checkpoint-2" / "model.safetensors").exists()
        assert not (places[1] / "checkpoint-2" / "model.safetensors").exists()
        assert (places[1] / "checkpoint-2" / "rng_state_1.pth").exists()

    final = weights(places[0])
    for place in dict.fromkeys(places):
        take_back(place)
    # With separate directories the hosts change their ranks, so that process 0 is where the weights are not.
    out = succeed(hosts.torchrun(train, ranks=(0, 1) if kind == "shared" else (1, 0)))
    assert any(f"Resuming from {place / 'checkpoint-2'}." in one for place, one in zip(places, out, strict=True))
    for place in places:
        assert losses(place) == pytest.approx(losses(folder / "alone"), abs=1e-5)
        assert furthest(weights(place), final) < 1e-6


def test_partitions_on_separate_disks_continue_on_one_process(folder, tmp_path, hosts):
    places = outputs(tmp_path, "separate")
    train = tuple(flags(folder, place, "--deepspeed", "zero2") for place in places)
    succeed(hosts.torchrun(train))
    for place in places:
        take_back(place)
    succeed(hosts.torchrun(train))  # both hosts have the whole checkpoint afterwards
    for place in places:
        take_back(place)
        resumed = run(*flags(folder, place, "--deepspeed", "zero2"))
        assert "which 2 processes wrote, on 1" in resumed.stderr
        assert losses(place) == pytest.approx(losses(folder / "alone"), abs=1e-5)


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_each_host_has_the_image_features_of_its_samples(folder, tmp_path, hosts, kind):
    places = outputs(tmp_path, kind)
    train = tuple(flags(folder, place, "--cache-image-features", place.parent / "features") for place in places)
    succeed(hosts.torchrun(train))
    for place in places:
        assert losses(place) == pytest.approx(losses(folder / "alone"), abs=1e-5)


def test_a_recipe_of_two_stages_on_separate_disks(folder, tmp_path, hosts):
    recipe = tmp_path / "recipe.yaml"
    common = {"data": str(folder / "data.jsonl"), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    recipe.write_text(json.dumps({**common, "stages": {"align": {}, "tune": {"train": ["projector", "embeddings"]}}}))
    places = outputs(tmp_path, "separate")
    succeed(hosts.torchrun(tuple([recipe, "--model", folder / "model", "--output", place] for place in places)))
    run(recipe, "--model", folder / "model", "--output", tmp_path / "alone", BATCH, 4)
    for place in places:
        assert losses(place) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
        assert furthest(weights(place), weights(tmp_path / "alone")) < 1e-5


@pytest.mark.parametrize("setup", ["ddp", "zero3"])
def test_a_lost_host_ends_the_other_within_a_minute(folder, tmp_path, hosts, setup):
    places = outputs(tmp_path, "separate")
    more = [*SETUPS[setup], "--max-steps", "400", "--save-steps", "3", "--save-total-limit", "2"]
    train = tuple(flags(folder, place, *more) for place in places)
    processes = hosts.torchrun(train)
    try:
        await_checkpoint(places[0])
        (worker,) = workers(processes[1].pid)
        kill(processes[1].pid)  # its launcher cannot say anything
        kill(worker)
        killed = time.monotonic()
        status, out = wait(processes[:1], timeout=60)[0]
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - killed < 60
    assert status not in (0, -9), out
    assert f"process 1 on {hosts.name(1)} has given no sign of life for 40 seconds" in out
    again = hosts.torchrun(train)
    try:
        deadline = time.monotonic() + 200
        newest = max(int(path.name.split("-")[1]) for path in places[0].glob("checkpoint-*"))
        while not (places[0] / f"checkpoint-{newest + 3}" / "complete.json").exists():
            assert time.monotonic() < deadline and again[0].poll() is None
            time.sleep(0.2)
    finally:
        for process in again:
            for worker in workers(process.pid):
                kill(worker)
            process.kill()
        out = [process.communicate()[0] for process in again]
    assert "Resuming from" in out[0]


def await_checkpoint(output):
    deadline = time.monotonic() + 200
    while not list(output.glob("checkpoint-*/complete.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_torchrun_restarts_both_hosts_when_a_process_is_lost(folder, tmp_path, hosts):
    place = tmp_path / "output"
    train = tuple(flags(folder, place, "--max-steps", "40", "--save-steps", "4") for _ in (0, 1))
    whole = tmp_path / "whole"
    run(*flags(folder, whole, "--max-steps", "40", "--save-steps", "4", BATCH, "4"))
    processes = hosts.torchrun(train, "--rdzv-backend", "c10d", "--max-restarts", "3")
    await_checkpoint(place)
    for worker in workers(processes[1].pid):
        kill(worker)
    succeed(processes)
    assert losses(place) == pytest.approx(losses(whole), abs=2e-5)
    assert len(losses(place)) == 40


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_deepspeed_starts_the_hosts_of_a_hostfile(folder, tmp_path, hosts, kind):
    """Without ssh, one launcher on each host."""
    hostfile, port = tmp_path / "hostfile", free_port()
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    places = outputs(tmp_path, kind)
    base = [DEEPSPEED, "--hostfile", hostfile, "--no_ssh", "--master_addr", hosts.addresses[0], "--master_port", port]
    processes = [
        hosts.start(
            rank, *base, "--node_rank", rank, "--module", "dsvl.training", *flags(folder, place, "--deepspeed", "zero2")
        )
        for rank, place in enumerate(places)
    ]
    succeed(processes)
    for place in places:
        assert losses(place) == pytest.approx(losses(folder / "alone"), abs=1e-5)
