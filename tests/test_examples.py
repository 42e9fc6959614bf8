"""The scripts in examples/ run from the command line, and their output is a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import BATCH, environment, losses, make_checkpoint, make_conversations, run, weights
from transformers import AutoModelForImageTextToText, AutoProcessor

import dsvl
from dsvl.training import ConversationCollator, merge_adapters

pytest.importorskip("trl")
from datasets import Image, List, load_dataset  # noqa: E402  (trl brings datasets)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling  # noqa: E402

EXAMPLES = Path(dsvl.__file__).parent / "examples"
FLAGS = ["--max-steps", "12", "--batch-size", "4", "--learning-rate", "1e-2", "--logging-steps", "1"]
PROJECTOR, EMBEDDINGS = "model.multi_modal_projector.", "model.language_model.embed_tokens."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    make_checkpoint(folder)
    data = make_conversations(folder)
    (folder / "images_apart.jsonl").write_text("\n".join(map(images_apart, data.read_text().splitlines())))
    return folder


def images_apart(line):
    """A conversation with its images in a separate list, as TRL expects them."""
    messages = json.loads(line)["messages"]
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return json.dumps({"images": [part.pop("path") for part in parts if part["type"] == "image"], "messages": messages})


def run_example(folder, script, data, output, *flags):
    """Run a script in the data's folder; returns its output directory and logged losses."""
    files = ["--model", "model", "--data", data, "--output", output]
    offline = environment() | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, EXAMPLES / script, *files, *FLAGS, *flags]
    done = subprocess.run(command, cwd=folder, env=offline, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / output, losses(folder / output)


def assert_loss_falls(logged):
    assert len(logged) == 12
    assert sum(logged[-3:]) / 3 < sum(logged[:3]) / 3 - 0.3


def assert_loads_and_only_its_parts_changed(output, folder):
    _, info = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    AutoProcessor.from_pretrained(output, trust_remote_code=True)
    before, after = weights(folder / "model"), weights(output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith((PROJECTOR, EMBEDDINGS))}


@pytest.fixture(scope="module")
def by_trainer(folder):
    return run_example(folder, "fine_tune_with_trainer.py", "data.jsonl", "by_trainer")


def test_the_trainer_script_trains(folder, by_trainer):
    output, logged = by_trainer
    assert_loss_falls(logged)
    assert_loads_and_only_its_parts_changed(output, folder)


def test_dsvl_train_has_the_losses_of_the_trainer_script(folder, by_trainer):
    output = folder / "by_dsvl_train"
    flags = [BATCH if flag == "--batch-size" else flag for flag in FLAGS]
    run("--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, *flags)
    assert losses(output) == pytest.approx(by_trainer[1], abs=1e-5)


def test_the_trl_script_trains(folder, by_trainer):
    output, logged = run_example(folder, "fine_tune_with_trl.py", "images_apart.jsonl", "by_trl")
    assert_loss_falls(logged)
    assert_loads_and_only_its_parts_changed(output, folder)
    # The same conversations and labels, in bf16; with labels for the questions it would be 0.02 less.
    assert logged[0] == pytest.approx(by_trainer[1][0], abs=5e-3)


def test_the_trl_script_makes_adapters_that_load_on_the_base(folder):
    peft = pytest.importorskip("peft")
    output, logged = run_example(folder, "fine_tune_with_trl.py", "images_apart.jsonl", "adapters", "--lora-rank", "4")
    assert_loss_falls(logged)
    assert not (output / "model.safetensors").exists()
    AutoProcessor.from_pretrained(output, trust_remote_code=True)

    base = AutoModelForImageTextToText.from_pretrained(folder / "model", trust_remote_code=True)
    adapted = peft.PeftModel.from_pretrained(base, output).merge_and_unload().state_dict()
    before = weights(folder / "model")
    changed = {name for name in before if not torch.equal(before[name], adapted[name])}
    layers = {name for name in before if name.startswith("model.language_model.layers.") and "_proj." in name}
    assert changed == layers | {name for name in before if name.startswith((PROJECTOR, EMBEDDINGS))}
    merged = merge_adapters(folder / "model", output).state_dict()
    assert all(torch.equal(adapted[name], merged[name]) for name in before)


def test_trls_collator_has_the_same_labels_as_ours(folder, monkeypatch):
    monkeypatch.chdir(folder)
    data = load_dataset("json", data_files="images_apart.jsonl", split="train", cache_dir=str(folder / "cache"))
    data = data.cast_column("images", List(Image()))
    processor = AutoProcessor.from_pretrained("model")
    ours = ConversationCollator(processor)
    theirs = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    for start in range(0, len(data), 6):
        samples = [data[index] for index in range(start, start + 6)]
        one, other = ours(samples), theirs([dict(sample) for sample in samples])
        assert one.keys() == dict(other).keys()
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        for key in ("input_ids", "labels", "mm_token_type_ids"):
            for row in range(6):  # padded on the left, and on the right
                kept, their_kept = one["attention_mask"][row] == 1, other["attention_mask"][row] == 1
                assert torch.equal(one[key][row][kept], other[key][row][their_kept])
