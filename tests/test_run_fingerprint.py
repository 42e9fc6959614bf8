"""Output directories of other runs, finished runs, runs without optimizer states, and runs without tokens to train."""

import json
import shutil
import signal
import subprocess
import time
from dataclasses import fields

import pytest
from training_runs import command, environment, losses, make_checkpoint, make_conversations, take_back, weights

from dsvl import DSVLForConditionalGeneration
from dsvl.cli import main
from dsvl.training import distributed, fingerprint, run
from dsvl.training.arguments import DataArguments, DSVLTrainingArguments, ModelArguments, parse
from dsvl.training.fingerprint import RECORD, differences, file_digest, read_record, take_fingerprint

pytestmark = pytest.mark.usefixtures("fresh_log")

F = ["--max-steps", "4", "--save-steps", "2", "--logging-steps", "1", "--per-device-train-batch-size", "2", "--use-cpu"]
F += ["--report-to", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fingerprint")
    make_checkpoint(folder)
    make_checkpoint(folder, "other-model", initializer_range=0.1)
    make_conversations(folder)
    make_conversations(folder, "b.jsonl", layout="tpt")
    make_conversations(folder, "texts.jsonl", layout="ttt")
    return folder


@pytest.fixture
def train(folder, tmp_path, capsys):
    """`dsvl train` in this process: its exit status and output."""

    def call(*flags, model="model", data="data.jsonl", output=tmp_path / "out"):
        argv = ["--model", folder / model, "--data", folder / data, "--output", output, *F, *flags]
        status = main(["train", *map(str, argv)])
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A finished run, to be copied."""
    output = tmp_path_factory.mktemp("finished") / "out"
    argv = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, *F]
    assert main(["train", *map(str, argv)]) == 0
    return output


@pytest.fixture
def out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def times(output):
    return {str(path): path.stat().st_mtime_ns for path in output.rglob("*")}


# -- another run's directory -------------------------------------------------------------------------------------------

REMEDY = "--overwrite-output to delete it and start over, or --resume-from CHECKPOINT to continue"
CHANGES = {
    "data": dict(data="b.jsonl"),
    "model": dict(model="other-model"),
    "train": dict(flags=["--train", "projector"]),
    "learning_rate": dict(flags=["--learning-rate", "1e-2"]),
    "learning_rates": dict(flags=["--learning-rates", "projector=1e-2"]),
    "lora_rank": dict(flags=["--lora-rank", "4"]),
    "max_steps": dict(flags=["--max-steps", "8"]),
    "lr_scheduler_type": dict(flags=["--lr-scheduler-type", "linear"]),
    "batch_size": dict(flags=["--gradient-accumulation-steps", "2"]),
    "max_length": dict(flags=["--max-length", "400"]),
    "seed": dict(flags=["--seed", "7"]),
}


@pytest.mark.parametrize("state", ["finished", "interrupted"])
@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_and_the_field_named(train, out, monkeypatch, name, state):
    def no_weights(*args, **kwargs):
        raise AssertionError("weights were loaded")

    if state == "interrupted":
        take_back(out)
    before = times(out)
    monkeypatch.setattr(DSVLForConditionalGeneration, "from_pretrained", no_weights)
    change = dict(CHANGES[name])
    status, said = train(*change.pop("flags", []), **change)
    assert status == 1 and times(out) == before
    assert f"dsvl train: {out} belongs to another run: {name} (" in said and REMEDY in said
    assert said.count(" before, ") == 1


def test_several_differences_are_named_together(train, out):
    status, said = train("--learning-rate", "1e-2", data="b.jsonl")
    assert status == 1 and "belongs to another run: data (data.jsonl, " in said
    assert "learning_rate (5e-05 before, 0.01 now). Pass another --output, " in said


def test_a_finished_run_says_so_and_changes_nothing(train, out):
    before = times(out)
    status, said = train()
    assert status == 0 and f"{out} is finished: the trained model exists, and is not changed." in said
    assert times(out) == before


def test_settings_that_only_change_the_speed_do_not_matter(train, out):
    take_back(out)
    flags = [
        "--per-device-train-batch-size",
        "1",
        "--gradient-accumulation-steps",
        "2",
        "--activation-checkpointing",
        "true",
    ]
    flags += ["--dataloader-num-workers", "1", "--save-steps", "1", "--attn-implementation", "eager"]
    status, said = train(*flags)
    assert status == 0 and f"Resuming from {out / 'checkpoint-2'}." in said


def test_a_run_may_move_with_its_data_and_model(train, folder, out, tmp_path):
    take_back(out)
    shutil.copytree(folder, tmp_path / "elsewhere")
    moved = out.rename(tmp_path / "moved")
    status, said = train(model=tmp_path / "elsewhere/model", data=tmp_path / "elsewhere/data.jsonl", output=moved)
    assert status == 0 and f"Resuming from {moved / 'checkpoint-2'}." in said
    assert str(tmp_path) not in (moved / RECORD).read_text()


def test_a_changed_data_file_of_the_same_name_is_another(train, folder, out, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    path = tmp_path / "elsewhere/data.jsonl"
    path.write_text(path.read_text().replace("circle", "square", 1))
    status, said = train(data=path)
    assert status == 1 and "belongs to another run: data (data.jsonl, " in said


def test_overwriting_starts_over(train, out, finished):
    (out / "notes.txt").write_text("mine")
    status, said = train("--overwrite-output", "--learning-rate", "1e-2", "--max-steps", "2")
    assert status == 0 and " of an earlier run in " in said and "Resuming" not in said
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2"]
    assert (out / "notes.txt").read_text() == "mine" and len(losses(out)) == 2
    assert train("--learning-rate", "1e-2", "--max-steps", "2")[1].count("is finished") == 1


def test_resuming_from_a_checkpoint_with_new_settings(train, out):
    flags = ["--learning-rate", "1e-2", "--max-steps", "6", "--lr-scheduler-type", "constant"]
    status, said = train("--resume-from", out / "checkpoint-2", *flags, data="b.jsonl")
    assert status == 0 and f"{out / 'checkpoint-2'} was written by a run with other settings: data (" in said
    assert f"{out / 'checkpoint-4'} is newer than {out / 'checkpoint-2'} and was renamed to superseded-4." in said
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert len(rates) == 6 and max(rates[:2]) <= 5e-5 and rates[2:] == [1e-2] * 4  # not the checkpoint's
    assert "is finished" in train(*flags, data="b.jsonl")[1]


@pytest.mark.parametrize("word", ["no", "false"])
def test_resume_from_no_never_resumes(train, out, tmp_path, word):
    before = times(out)
    status, said = train("--resume-from-checkpoint", word)
    assert status == 1 and "but --resume-from is no" in said and times(out) == before
    take_back(out)
    assert train("--resume-from", word)[0] == 1
    status, said = train("--resume-from", word, output=tmp_path / "new")
    assert status == 0 and "Resuming" not in said and (tmp_path / "new/config.json").exists()


def test_resume_from_last_needs_a_checkpoint(train, out, tmp_path):
    assert "contains no complete checkpoint" in train("--resume-from", "last", output=tmp_path / "new")[1]
    take_back(out)
    assert f"Resuming from {out / 'checkpoint-2'}." in train("--resume-from", "true")[1]


def test_other_directories_cannot_be_resumed_from(train, tmp_path):
    status, said = train("--resume-from", tmp_path)
    assert status == 1 and f"--resume-from {tmp_path} is not a checkpoint (it has no trainer_state.json)" in said
    status, said = train("--resume-from", tmp_path, "--overwrite-output")
    assert status == 1 and "pass one of them" in said


def test_runs_without_a_record_resume_with_one_warning(train, out):
    take_back(out)
    (out / RECORD).unlink()
    status, said = train()
    assert status == 0 and said.count(f"{out} has no run.json") == 1
    assert f"Resuming from {out / 'checkpoint-2'}." in said
    assert "is finished" in train()[1]


def test_a_model_without_a_record_is_not_replaced(train, folder, tmp_path):
    shutil.copytree(folder / "other-model", tmp_path / "out")
    before = weights(tmp_path / "out")
    status, said = train()
    assert status == 1 and "contains a model without the record of a run" in said
    assert all(before[name].equal(value) for name, value in weights(tmp_path / "out").items())
    status, said = train(model=tmp_path / "out")
    assert status == 1 and "is the directory of --model, which would be replaced" in said


def test_a_broken_record_is_refused(train, out):
    (out / RECORD).write_text("{")
    assert "is not the record of a run" in train()[1]
    assert train("--overwrite-output")[0] == 0


# -- weights alone -----------------------------------------------------------------------------------------------------


def test_weights_alone_are_not_resumed(train, out):
    assert train("--save-only-model", "true", "--overwrite-output")[0] == 0
    take_back(out)
    status, said = train("--save-only-model", "true")
    assert status == 1 and "checkpoint-2 has no optimizer states (--save-only-model)" in said
    assert f"--model {out / 'checkpoint-2'} and another --output" in said
    assert "has no optimizer states" in train("--resume-from", out / "checkpoint-2")[1]
    status, said = train("--save-only-model", "true", "--overwrite-output")
    assert status == 0 and "Resuming" not in said


def test_a_new_run_can_start_from_weights_alone(train, out, tmp_path):
    assert train("--save-only-model", "true", "--overwrite-output")[0] == 0
    assert train(model=out / "checkpoint-2", output=tmp_path / "next")[0] == 0


# -- nothing to train --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--streaming"], ["--streaming", "--packing"], ["--packing"]], ids=str)
def test_an_epoch_without_a_trained_token_is_refused_before_the_first_step(train, tmp_path, monkeypatch, flags):
    def no_step(*args, **kwargs):
        raise AssertionError("a step was made")

    monkeypatch.setattr(run.DSVLTrainer, "training_step", no_step)
    status, said = train("--max-length", 20, "--on-bad-sample", "skip", "--max-bad-samples", 1, *flags)
    assert status == 1 and not (tmp_path / "out/config.json").exists()
    reason = "the shortest first turn takes " if not flags else "holds no conversation"
    assert reason in said


def test_a_template_without_marks_is_refused(train, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    template = tmp_path / "model/chat_template.jinja"
    marks = template.read_text()
    template.write_text(marks.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""))
    assert template.read_text() != marks
    status, said = train(model=tmp_path / "model")
    assert status == 1 and "has no token to train in 18 conversations: the chat template marks no answers." in said


def test_the_data_line_counts(train):
    status, said = train("--max-steps", 1)
    (line,) = [line for line in said.splitlines() if line.startswith("Data: ")]
    assert line == "Data: 18 conversations, 40 turns, 22 images, 3,235 tokens, 307 trained."
    assert "contains no image" not in said


def test_the_data_line_counts_the_contents_of_batches(folder):
    from transformers import AutoProcessor

    from dsvl.data import load_conversations
    from dsvl.training import ConversationCollator
    from dsvl.training.data_summary import describe_data

    data = load_conversations(folder / "data.jsonl")
    collator = ConversationCollator(AutoProcessor.from_pretrained(folder / "model"), 200, "skip")
    rows = [collator([data[index]]) for index in range(len(data))]
    trained = sum(int((row["labels"] != -100).sum()) for row in rows)
    tokens = sum(int(row["attention_mask"].sum()) for row in rows)
    images = sum(len(row.get("pixel_values", [])) for row in rows)
    line = describe_data(data, collator)
    assert f"{images} images, {tokens:,} tokens, {trained} trained" in line and "about" not in line


def test_large_data_is_estimated(folder, monkeypatch):
    from transformers import AutoProcessor

    from dsvl.data import load_conversations
    from dsvl.training import ConversationCollator, data_summary

    data = load_conversations(folder / "data.jsonl")
    collator = ConversationCollator(AutoProcessor.from_pretrained(folder / "model"))
    seen = []
    monkeypatch.setattr(data_summary, "MEASURED", 3)
    monkeypatch.setattr(collator, "measure", lambda sample, own=collator.measure: seen.append(1) or own(sample))
    assert data_summary.describe_data(data, collator).startswith("about 18 conversations, ")
    assert len(seen) == 3


def test_data_without_images_warns(train):
    status, said = train("--max-steps", 1, data="texts.jsonl")
    assert status == 0 and "texts.jsonl contains no image" in said and ", 0 images, " in said


# -- interrupted -------------------------------------------------------------------------------------------------------


def test_ctrl_c_names_the_kept_checkpoint_in_one_line(folder, tmp_path):
    output = tmp_path / "out"
    flags = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, *F]
    flags += ["--max-steps", "100000", "--save-steps", "20"]
    process = subprocess.Popen(
        command(*map(str, flags)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-20/complete.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    last = said.rstrip().splitlines()[-1]
    assert last.startswith(f"dsvl train: Interrupted. {output / 'checkpoint-'}")
    assert last.endswith("is kept; run the same command again to resume from it.")


def test_ctrl_c_before_a_checkpoint(train, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load_model", stop)
    status, said = train()
    assert status == 130 and "dsvl train: Interrupted before the first checkpoint; nothing is kept" in said


# -- the fingerprint itself --------------------------------------------------------------------------------------------


def test_every_argument_is_part_of_the_fingerprint_or_known_not_to_be():
    """For every new argument, decide whether it changes the result."""
    elsewhere = {"attn_implementation", "compile_decoder_layers", "cache_image_features", "model", "data", "eval_data"}
    elsewhere |= {"tiled_mlp", "offload_activations", "skip_image_queries", "frozen_precision_report"}  # exact
    elsewhere |= {"allow_urls", "max_bad_samples"}  # whether a run fails, not its result
    known = {*fingerprint.MODEL_FIELDS, *fingerprint.ADAPTER_FIELDS, *fingerprint.DATA_FIELDS} | elsewhere
    assert {field.name for kind in (ModelArguments, DataArguments) for field in fields(kind)} - known == set()
    assert set(fingerprint.TRAINING_FIELDS) <= {field.name for field in fields(DSVLTrainingArguments)}


def test_files_are_read_once(folder, monkeypatch, tmp_path):
    parsed = parse(["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--output", str(tmp_path), *F])
    first = take_fingerprint(*parsed)

    def read(path):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(fingerprint, "file_digest", read)
    assert take_fingerprint(*parsed, known=first.files).settings == first.settings


def test_large_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "LARGE", 1000)
    monkeypatch.setattr(fingerprint, "BLOCKS", 10)
    monkeypatch.setattr(fingerprint, "BLOCK", 200)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(250)) * 6)
    before = file_digest(path)
    for index in (0, 700, 1499):
        content = bytearray(path.read_bytes())
        content[index] ^= 1
        path.write_bytes(content)
        assert file_digest(path) != before
        content[index] ^= 1
        path.write_bytes(content)
        assert file_digest(path) == before


def test_records_with_a_former_field_name_are_read(out, train):
    """Runs of dsvl 0.1 recorded `max_pictures_per_pack`."""
    take_back(out)
    content = json.loads((out / RECORD).read_text())
    content["settings"]["max_pictures_per_pack"] = content["settings"].pop("max_images_per_pack")
    (out / RECORD).write_text(json.dumps(content))
    assert "max_images_per_pack" in read_record(out).settings
    status, said = train("--packing", "--max-length", 400, "--max-images-per-pack", 3)
    assert status == 1 and "max_images_per_pack (null before, 3 now)" in said
    assert f"Resuming from {out / 'checkpoint-2'}." in train()[1]


def test_records_with_the_former_rate_of_the_embeddings_are_read(out, train):
    """Runs of dsvl 0.2 recorded `embeddings_learning_rate`."""
    take_back(out)
    content = json.loads((out / RECORD).read_text())
    del content["settings"]["learning_rates"]
    content["settings"]["embeddings_learning_rate"] = 1e-3
    (out / RECORD).write_text(json.dumps(content))
    status, said = train()
    assert status == 1 and 'learning_rates ({"embeddings": 0.001} before, null now)' in said
    assert f"Resuming from {out / 'checkpoint-2'}." in train("--learning-rates", "embeddings=1e-3")[1]


def test_fields_that_only_one_version_knows_are_no_difference():
    assert differences({"seed": 1, "old": 2}, {"seed": 1, "new": 3}) == []
    assert differences({"seed": 1}, {"seed": 2}) == ["seed (1 before, 2 now)"]


def test_a_mixture_is_its_parts_wherever_they_are(folder, tmp_path):
    def digest(root, weight):
        path = root / "mixture.yaml"
        entries = [{"path": str(root / "data.jsonl"), "weight": weight}, {"path": "b.jsonl"}]
        path.write_text(json.dumps({"datasets": entries}))
        parsed = parse(["--model", str(folder / "model"), "--data", str(path), "--output", str(tmp_path / "out"), *F])
        return take_fingerprint(*parsed).settings["data"]

    shutil.copytree(folder, tmp_path / "elsewhere")
    assert digest(folder, 1) == digest(tmp_path / "elsewhere", 1) != digest(folder, 2)


def test_an_error_of_the_first_process_is_raised():
    def fail():
        raise ValueError("no")

    assert distributed.on_first_process(lambda: 3) == 3
    with pytest.raises(ValueError, match="no"):
        distributed.on_first_process(fail)
