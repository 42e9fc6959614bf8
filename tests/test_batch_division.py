"""A run that continues on another number of processes keeps its batch, or is refused with the flags that keep it."""

import json
import logging

import pytest

from dsvl.training.arguments import parse
from dsvl.training.batch_division import BatchDivision, describe_resuming, keep_batch_size, saved_processes, with_division
from dsvl.training.checkpoints import mark_complete
from dsvl.training.fingerprint import RunRecord, read_record
from dsvl.training.repartition import check_states, needs_conversion
from dsvl.training.resumption import decide_start, divide_batch


@pytest.fixture
def asked(tmp_path):
    """Arguments of a training on one process."""
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()

    def get(*flags):
        paths = {"model": tmp_path / "model", "data": tmp_path / "data.jsonl", "output": tmp_path / "output"}
        base = [str(part) for name, path in paths.items() for part in (f"--{name}", path)]
        return parse([*base, "--max-steps", "4", *map(str, flags)])[1:]

    return get


def division_of(processes, per_device, accumulation, workers=0):
    return BatchDivision(processes, per_device, accumulation, workers)


@pytest.mark.parametrize(
    ("before", "processes", "after"),
    [
        ((2, 2, 1), 1, (1, 2, 2)),  # accumulated, as a process has no room for more
        ((2, 2, 2), 4, (4, 2, 1)),
        ((1, 4, 1), 4, (4, 1, 1)),
        ((1, 4, 3), 2, (2, 3, 2)),
        ((2, 2, 1), 2, (2, 2, 1)),
        ((3, 4, 2), 8, (8, 3, 1)),
    ],
)
def test_a_batch_is_divided_anew_without_larger_batches_of_a_process(before, processes, after):
    divided = division_of(*before).among(processes)
    assert divided == division_of(*after)
    assert divided.batch_size == division_of(*before).batch_size


def test_a_batch_that_cannot_be_divided_is_refused_with_the_numbers_that_can():
    with pytest.raises(ValueError, match=r"batch of 6 samples .* among 4 processes; start 1, 2, 3 or 6 of them"):
        division_of(2, 3, 1).among(4)


def test_the_same_flags_on_one_process_accumulate_what_two_processes_trained(asked):
    data, arguments = asked("--per-device-train-batch-size", 2)
    kept = keep_batch_size(division_of(2, 2, 1), data, arguments)
    assert kept == division_of(1, 2, 2)
    divided = with_division(arguments, kept)
    assert BatchDivision.of(divided) == kept
    assert BatchDivision.of(arguments) == division_of(1, 2, 1)
    assert divided.max_steps == 4 and divided.output_dir == arguments.output_dir


def test_other_flags_are_not_changed(asked):
    data, arguments = asked("--per-device-train-batch-size", 3)
    assert keep_batch_size(division_of(2, 2, 1), data, arguments) == division_of(1, 3, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--streaming"], r"--streaming divides .* a run of 2 processes cannot continue on 1 .* --nproc-per-node 2"),
        (["--dataloader-drop-last"], "--dataloader-drop-last ends an epoch after whole batches"),
    ],
)
def test_samples_that_depend_on_the_number_of_processes_are_refused(asked, flags, message):
    data, arguments = asked("--per-device-train-batch-size", 2, *flags)
    with pytest.raises(ValueError, match=message):
        keep_batch_size(division_of(2, 2, 1), data, arguments)
    assert keep_batch_size(division_of(1, 2, 1), data, arguments) == division_of(1, 2, 1)
    keep_batch_size(division_of(2, 2, 1), data, arguments, finished=True)  # reads no samples


def test_a_stream_continues_with_its_number_of_workers(asked):
    data, arguments = asked("--per-device-train-batch-size", 2, "--streaming", "--dataloader-num-workers", 1)
    with pytest.raises(ValueError, match="pass --dataloader-num-workers 3"):
        keep_batch_size(division_of(1, 2, 1, workers=3), data, arguments)


def write_checkpoint(output, processes, step=2, **names):
    checkpoint = output / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in [*states, "optimizer.pt", "trainer_state.json"]:
        (checkpoint / name).write_text("{}")
    mark_complete(checkpoint)
    return checkpoint


def record(batch_size, division):
    return RunRecord({"batch_size": batch_size}, batch=division)


def test_the_record_keeps_the_processes_for_which_the_flags_were_chosen(asked, tmp_path):
    output = tmp_path / "output"
    write_checkpoint(output, 2)
    data, arguments = asked("--per-device-train-batch-size", 2)
    record(4, division_of(2, 2, 1)).write(output)
    requested = record(2, BatchDivision.of(arguments))
    batch = divide_batch(output, read_record(output), requested, data, arguments)
    assert batch == division_of(1, 2, 2)
    assert requested.settings["batch_size"] == 4 and requested.batch == division_of(2, 2, 1)
    assert decide_start(output, requested).checkpoint == str(output / "checkpoint-2")


def test_a_run_before_its_first_checkpoint_starts_with_its_flags(asked, tmp_path):
    data, arguments = asked("--per-device-train-batch-size", 2, "--streaming")
    record(4, division_of(2, 2, 1)).write(tmp_path / "output")
    requested = record(2, BatchDivision.of(arguments))
    assert divide_batch(tmp_path / "output", read_record(tmp_path / "output"), requested, data, arguments).batch_size == 2


def test_another_batch_size_is_refused_with_the_flags_that_keep_it(asked, tmp_path):
    output = tmp_path / "output"
    write_checkpoint(output, 2)
    record(4, division_of(2, 2, 1)).write(output)
    requested = record(8, division_of(1, 8, 1))
    with pytest.raises(
        ValueError, match=r"batch_size \(4 before, 8 now\).* kept with --per-device-train-batch-size 2 --grad"
    ):
        decide_start(output, requested)


def test_another_batch_size_that_is_insisted_on_is_announced(tmp_path, caplog):
    checkpoint = write_checkpoint(tmp_path / "output", 2)
    record(4, division_of(2, 2, 1)).write(tmp_path / "output")
    with caplog.at_level(logging.WARNING):
        decide_start(tmp_path / "other", record(8, division_of(1, 8, 1)), str(checkpoint))
    assert "continues after 2 batches of the new size" in caplog.text


def test_records_of_earlier_releases_have_no_division(tmp_path):
    record(4, None).write(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    del content["batch"]
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert read_record(tmp_path).batch is None


def test_processes_that_share_images_have_one_batch():
    divided = division_of(4, 2, 1).among(4, sharing=2)
    assert (divided.batch_size, divided.per_device, divided.accumulation, divided.sharing) == (8, 2, 2, 2)
    assert divided.among(2) == division_of(2, 2, 2)
    with pytest.raises(ValueError, match="batch of 6 samples .* among 8 processes; start 2, 4, 6 or 12 of them"):
        division_of(2, 3, 1).among(8, sharing=2)


def test_a_checkpoint_tells_how_many_processes_wrote_it(asked, tmp_path):
    _, arguments = asked("--per-device-train-batch-size", 2)
    one, three = write_checkpoint(tmp_path / "one", 1), write_checkpoint(tmp_path / "three", 3)
    assert (saved_processes(one), saved_processes(three)) == (1, 3)
    assert describe_resuming(one, arguments) == f"Resuming from {one}."
    assert "which 3 processes wrote, on 1: batches of 2 x 1 accumulated x 1, 2 samples" in describe_resuming(
        three, arguments
    )


def with_partitions(checkpoint, processes, stage):
    folder = checkpoint / "global_step2"
    folder.mkdir()
    for rank in range(processes):
        (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_text("")
        if stage == 3:
            (folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").write_text("")
    return checkpoint


def test_partitions_of_another_number_of_processes_are_converted(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", 2)
    partitioned = with_partitions(write_checkpoint(tmp_path / "zero", 2), 2, 2)
    assert not needs_conversion(plain, 1)
    assert not needs_conversion(partitioned, 2)
    assert needs_conversion(partitioned, 1) and needs_conversion(partitioned, 4)


def test_optimizer_states_of_another_setup_are_refused(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", 2)
    zero2 = with_partitions(write_checkpoint(tmp_path / "zero2", 2), 2, 2)
    zero3 = with_partitions(write_checkpoint(tmp_path / "zero3", 2), 2, 3)
    sharded = write_checkpoint(tmp_path / "sharded", 2)
    (sharded / "optimizer_0").mkdir()
    for checkpoint, stage in ((plain, None), (zero2, 1), (zero2, 2), (zero3, 3)):
        check_states(checkpoint, stage)
    check_states(sharded, None, fsdp=True)
    for checkpoint, stage, fsdp, flags in (
        (plain, 2, False, "neither"),
        (plain, None, True, "neither"),
        (zero2, None, False, "--deepspeed zero2"),
        (zero2, None, True, "--deepspeed zero2"),
        (zero2, 3, False, "--deepspeed zero2"),
        (zero3, 1, False, "--deepspeed zero3"),
        (sharded, None, False, "--fsdp"),
        (sharded, 2, False, "--fsdp"),
    ):
        with pytest.raises(ValueError, match=f"the optimizer states of a run with .*; pass {flags}"):
            check_states(checkpoint, stage, fsdp)
