"""Trainings of several stages: bit-equal after any interruption, equal to separate trainings, and with one model card."""

import gc
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import command, environment, furthest, losses, make_checkpoint, make_conversations, run, weights
from transformers import AutoModelForImageTextToText

from dsvl import DSVLForConditionalGeneration
from dsvl.cli import main
from dsvl.training import stages
from dsvl.training.ready_recipes import ready_recipes

pytestmark = pytest.mark.usefixtures("fresh_log")

KILLED = str(Path(__file__).with_name("killed_training.py"))
SHARED = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True}
SHARED |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2}
STAGES = [
    {"name": "align", "train": ["projector"], "data": "data.jsonl"},
    {"name": "adapt", "train": ["projector"], "data": "b.jsonl", "lora_rank": 4, "learning_rates": {"adapters": 1e-3}},
    {"name": "full", "train": ["projector", "language", "vision"], "data": "b.jsonl", "max_length": 300, "seed": 7},
]
COMPOSE = {"vision": "tower", "language": "llama"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    make_checkpoint(folder)
    make_conversations(folder)
    make_conversations(folder, "b.jsonl", layout="ptp" * 4)
    return folder


@pytest.fixture(autouse=True)
def in_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.set_num_threads(1)  # as in the processes that are started: sums have the same order


def write(path, stages=STAGES, **shared):
    """A recipe that composes its model."""
    path.write_text(yaml.safe_dump({"compose": COMPOSE} | SHARED | shared | {"stages": stages}))
    return path


@pytest.fixture(scope="module")
def recipe(folder):
    return write(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def whole(folder, recipe):
    """The output of an uninterrupted run in one process; interrupted ones are compared with it in other processes."""
    output = folder / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)  # as in the processes that are started: sums have the same order
        assert main(["train", str(recipe), "--output", str(output), "--keep-stages"]) == 0
    return output


@pytest.fixture
def train(recipe, capfd):
    """`dsvl train` of a recipe in this process: its exit status and output."""

    def call(output, *flags, recipe=recipe):
        status = main(["train", *map(str, [recipe, "--output", output, *flags])])
        said = capfd.readouterr()
        return status, said.out + said.err

    return call


def files(output):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in output.rglob("*") if path.is_file()}


def assert_equal_to_the_bit(output, whole):
    assert losses(output) == losses(whole) and len(losses(output)) == 4
    assert furthest(weights(output), weights(whole)) == 0


# -- one command -------------------------------------------------------------------------------------------------------


def test_the_next_stage_starts_from_the_last_ones_result(whole, folder):
    """A stage in the same process equals a separate training from the result of the stage before it, bit for bit."""
    starts = [whole / "stages/0-composed", whole / "stages/1-align", whole / "stages/2-adapt"]
    outputs = [whole / "stages/1-align", whole / "stages/2-adapt", whole]
    for start, stage, output in zip(starts, STAGES, outputs, strict=True):
        alone = folder / f"alone-{stage['name']}"
        (folder / "alone.yaml").write_text(yaml.safe_dump(SHARED | {k: v for k, v in stage.items() if k != "name"}))
        assert main(["train", str(folder / "alone.yaml"), "--model", str(start), "--output", str(alone)]) == 0
        assert losses(output) == losses(alone) and furthest(weights(output), weights(alone)) == 0, stage
        assert furthest(weights(output), weights(start)) > 0


def test_the_composed_model_is_that_of_compose(whole, folder, tmp_path):
    torch.manual_seed(42)  # the seed of the first stage
    assert main(["compose", "--vision", "tower", "--language", "llama", "--out", str(tmp_path / "composed")]) == 0
    composed, own = weights(tmp_path / "composed"), weights(whole / "stages/0-composed")
    assert furthest(composed, own) == 0


def test_the_card_has_every_stage(whole):
    card = (whole / "README.md").read_text()
    assert "In 3 stages: align, adapt, full. Each starts from the result of the one before." in card
    parts = card.split("### Stage ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["1: align", "2: adapt", "3: full"]
    assert "| data.jsonl | 18 |" in parts[0] and "| b.jsonl | 12 |" in parts[1]
    assert "| trained parts | projector |" in parts[0] and "| trained parts | projector, language, vision |" in parts[2]
    assert "| adapters | LoRA" in parts[1] and "rank 4, alpha 8" in parts[1] and "adapters" not in parts[2]
    assert "| learning rate of the adapters | 0.001 |" in parts[1]
    assert all("| steps | 4 |" in part and "last logged training loss" in part for part in parts)
    assert [f"| seed | {seed} |" in part for seed, part in zip((42, 42, 7), parts, strict=True)] == [True] * 3
    for number, name in ((1, "-1-align"), (2, "-2-adapt"), (3, "")):
        assert f"](training{name}.svg)" in parts[number - 1] and (whole / f"training{name}.svg").is_file()
    assert str(whole) not in card


def test_the_output_says_which_stage_it_is_and_one_model_is_in_memory(train, tmp_path, monkeypatch):
    def models():
        return sum(isinstance(one, DSVLForConditionalGeneration) for one in gc.get_objects())

    def count():
        release()
        alive.append(models())

    release, alive, before = stages.release_memory, [], models()
    monkeypatch.setattr(stages, "release_memory", count)
    status, said = train(tmp_path / "out", "--disable-tqdm", "true")
    assert status == 0 and alive == [before] * 3
    for number, name in enumerate(("align", "adapt", "full"), 1):
        assert f"Stage {number} of 3, {name}: from " in said
        assert said.count(f"stage {number}/3, {name} | step ") == 5
    assert "Deleted the models of earlier stages" in said
    left = {str(path.relative_to(tmp_path / "out/stages")) for path in (tmp_path / "out/stages").rglob("*")}
    names = ("run.json", "stage.json", "trainer_state.json")
    assert left == {"1-align", "2-adapt", *(f"{stage}/{name}" for stage in ("1-align", "2-adapt") for name in names)}
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)


# -- again -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_a_finished_run_changes_nothing(train, whole, tmp_path, keep):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    if not keep:
        assert train(output)[0] == 0  # the stages are not needed any more
        assert not (output / "stages/0-composed").exists()
    before = files(output)
    status, said = train(output, *(["--keep-stages"] if keep else []))
    assert status == 0 and f"{output} is finished" in said
    assert files(output) == before


CHANGES = {
    "align": (["--stage", "align.learning_rate=0.5"], "learning_rate (0.01 before, 0.5 now)"),
    "adapt": (["--stage", "adapt.lora_rank=8"], "lora_rank (4 before, 8 now)"),
    "full": (["--stage", "full.data=data.jsonl"], "data (b.jsonl, "),
}


@pytest.mark.parametrize("cleaned", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_stage_is_refused_with_its_name_and_fields(train, whole, tmp_path, monkeypatch, name, cleaned):
    def no_weights(*args, **kwargs):
        raise AssertionError("weights were loaded")

    output = tmp_path / "out"
    shutil.copytree(whole, output)
    if cleaned:
        assert train(output)[0] == 0
    monkeypatch.setattr(DSVLForConditionalGeneration, "from_pretrained", no_weights)
    before = files(output)
    flags, field = CHANGES[name]
    status, said = train(output, *flags)
    assert status == 1 and files(output) == before
    assert f"dsvl train: stage '{name}': {output}" in said and field in said and said.count(" before, ") == 1
    assert "--overwrite-output to delete all stages" in said


def test_what_the_model_is_composed_from_belongs_to_the_first_stage(train, whole, folder, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    other = write(tmp_path / "other.yaml", compose=COMPOSE | {"multimodal_attention": "causal"})
    status, said = train(output, recipe=other)
    assert status == 1 and "stage 'align': " in said
    assert 'compose.multimodal_attention ("mmca" before, "causal" now)' in said


def test_renamed_stages_are_refused(train, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    other = write(tmp_path / "other.yaml", stages=[STAGES[0] | {"name": "first"}, *STAGES[1:]])
    status, said = train(output, recipe=other)
    assert status == 1 and f"{output / 'stages/1-align'} is no stage of {other}; pass another --output, or" in said


def test_a_stage_that_has_not_begun_may_change_and_finished_ones_are_not_run_again(train, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole / "stages/1-align", output / "stages/1-align")
    before = files(output / "stages/1-align")
    status, said = train(output, "--stage", "adapt.lora_rank=2", "--keep-stages")
    assert status == 0 and "Stage 1 of 3, align, is finished." in said and "Stage 1 of 3, align: from" not in said
    assert files(output / "stages/1-align") == before
    assert "rank 2, alpha 4" in (output / "README.md").read_text()


def test_overwriting_starts_over(train, whole, tmp_path, monkeypatch):
    def reached(model_arguments, data_arguments, arguments, data, record, start, hosts, stage):
        assert start.checkpoint is None and stage.number == 1
        raise ValueError("reached")

    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "stages/notes.txt").write_text("mine")
    monkeypatch.setattr(stages, "train_model", reached)
    status, said = train(output, "--overwrite-output", "--stage", "align.seed=3")
    assert status == 1 and "dsvl train: stage 'align': reached" in said and "of an earlier run" in said
    assert sorted(path.name for path in (output / "stages").iterdir()) == ["0-composed", "notes.txt"]
    assert not list(output.glob("*.safetensors")) and not list(output.glob("checkpoint-*"))


@pytest.mark.parametrize("word", ["no", "last"])
def test_resuming_can_be_forbidden_or_required(train, whole, tmp_path, word):
    output = tmp_path / "out"
    shutil.copytree(whole / "stages", output / "stages")
    status, said = train(output, "--resume-from", word)
    if word == "no":
        assert status == 1 and f"{output} contains this run, but --resume-from is no." in said
    else:
        assert status == 0 and "Stage 3 of 3, full: from" in said
        assert_equal_to_the_bit(output, whole)


def test_a_directory_of_a_recipe_is_not_one_of_a_single_training(train, whole, capfd):
    flags = ["--model", "model", "--data", "b.jsonl", "--output", str(whole), "--use-cpu", "--report-to", "none"]
    assert main(["train", *flags]) == 1
    assert f"{whole} belongs to another run: " in capfd.readouterr().err


def test_the_finished_model_is_published_without_its_stages(whole):
    from dsvl.publishing.directory_checks import read_contents

    contents = read_contents(whole)
    assert contents.faults == [] and not any(name.startswith("stages/") for name in contents.files)
    assert {"training-1-align.svg", "training.svg"} <= set(contents.files)


# -- interrupted -------------------------------------------------------------------------------------------------------


def killed_and_continued(recipe, output, *moment, **start):
    """Kill a run at a moment and run it again; the output of the second run."""
    flags = [recipe, "--output", output]
    done = run(*moment, *flags, module=KILLED, check=False, **start)
    assert done.returncode != 0 and not (output / "config.json").exists()
    return run(*flags, **start).stderr


def test_a_run_killed_while_a_stages_result_is_written_continues_to_the_bit(recipe, whole, tmp_path):
    output = tmp_path / "out"
    said = killed_and_continued(recipe, output, "in the trained model", 2)
    assert "Stage 1 of 3, align, is finished." in said
    assert f"Resuming from {output / 'stages/2-adapt/checkpoint-4'}." in said
    assert_equal_to_the_bit(output, whole)


MOMENTS = [
    ("in the composed model", 1),
    ("after the composed model", 1),
    ("in a step", 3),  # of the first stage
    ("in a later step", 3),  # of the second stage
    ("in the weights", 4),
    ("before the mark", 2),
    ("in the trained model", 1),
    ("in the trained model", 3),
    ("after the trained model", 1),
    ("after the trained model", 3),
    ("between two stages", 1),
    ("between two stages", 2),
    ("while stages are deleted", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[0]} {moment[1]}")
def test_a_run_killed_at_any_moment_continues_to_the_bit(recipe, whole, tmp_path, moment):
    output = tmp_path / "out"
    flags = [recipe, "--output", output]
    done = run(*moment, *flags, module=KILLED, check=False)
    assert done.returncode == -signal.SIGKILL
    run(*flags)
    assert_equal_to_the_bit(output, whole)
    before = files(output)
    assert f"{output} is finished" in run(*flags).stderr and files(output) == before
    assert not list(output.rglob(".*partial*")) and not list((output / "stages").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again_at_random_moments(recipe, whole, tmp_path, seed):
    output, rng = tmp_path / "out", random.Random(seed)
    started = time.monotonic()
    run(recipe, "--output", tmp_path / "timed")
    duration = time.monotonic() - started
    for attempt in range(20):
        process = subprocess.Popen(
            command(str(recipe), "--output", str(output)),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=duration * rng.uniform(0.4, 0.9) if attempt < 5 else 400)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert process.returncode == 0
    assert_equal_to_the_bit(output, whole)


def test_ctrl_c_names_the_stage(train, tmp_path, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsvl.training.trainer.DSVLTrainer.training_step", interrupt)
    status, said = train(tmp_path / "out")
    assert (
        status == 130 and "Interrupted in stage 1 of 3, align, before its first checkpoint; the same command starts" in said
    )


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_two_processes_are_killed_and_continue_to_the_bit(recipe, folder, tmp_path, deepspeed):
    """And each stage equals a separate training of two processes; under ZeRO the stages have different configurations."""
    if deepspeed:
        pytest.importorskip("deepspeed")
    zero = [] if deepspeed is None else ["--stage", "align.deepspeed=zero2", "--stage", f"adapt.deepspeed={deepspeed}"]
    zero += [] if deepspeed is None else ["--stage", f"full.deepspeed={deepspeed}"]
    flags = [recipe, "--per-device-train-batch-size", "1", *zero]
    whole, output = tmp_path / "whole", tmp_path / "out"
    run(*flags, "--output", whole, "--keep-stages", processes=2)
    killed = run("in a later step", "3", *flags, "--output", output, module=KILLED, processes=2, check=False)
    assert killed.returncode != 0 and not (output / "config.json").exists()
    again = run(*flags, "--output", output, processes=2)
    assert f"Resuming from {output / 'stages/2-adapt/checkpoint-2'}." in again.stderr
    assert_equal_to_the_bit(output, whole)

    alone = tmp_path / "alone"
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(SHARED | {k: v for k, v in STAGES[2].items() if k != "name"}))
    own = ["--deepspeed", deepspeed] if deepspeed else []
    start = ["--model", whole / "stages/2-adapt", "--output", alone, "--per-device-train-batch-size", "1", *own]
    run(tmp_path / "alone.yaml", *start, processes=2)
    assert furthest(weights(whole), weights(alone)) == 0


# -- the recipes of the package ----------------------------------------------------------------------------------------


def tiny(name, folder, output):
    """Flags that replace the model, the data and the number of steps of a ready recipe; everything else is the recipe's."""
    content = yaml.safe_load(ready_recipes()[name].read_text())
    flags = ["--model", folder / "model", "--output", output, "--max-steps", 2, "--use-cpu", "--report-to", "none"]
    for stage in content["stages"]:
        if names := stage.get("dataset_names"):
            (folder / "sets").mkdir(exist_ok=True)
            for one in names:
                shutil.copy(folder / "data.jsonl", folder / "sets" / f"{one}.jsonl")
            if not (folder / "sets/images").exists():
                (folder / "sets/images").symlink_to(folder / "images")
        flags += ["--stage", f"{stage['name']}.data={folder / ('sets' if names else 'data.jsonl')}"]
    return [*map(str, flags)], [stage["name"] for stage in content["stages"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ready_recipes())
def test_every_ready_recipe_runs(name, folder, tmp_path):
    output = tmp_path / "out"
    flags, names = tiny(name, folder, output)
    done = run(name, *flags)
    for number, stage in enumerate(names, 1):
        assert f"Stage {number} of {len(names)}, {stage}: from" in done.stderr
    card = (output / "README.md").read_text()
    assert all(f"### Stage {number}: {stage}" in card for number, stage in enumerate(names, 1)) or len(names) == 1
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 2
