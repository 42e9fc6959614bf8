"""The scripts in examples/ run from the command line, and their output is a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import BATCH, command, environment, losses, make_checkpoint, make_conversations, run, weights
from transformers import AutoModelForImageTextToText, AutoProcessor

import dsvl
from dsvl.training import merge_adapters

pytest.importorskip("trl")

EXAMPLES = Path(dsvl.__file__).parent / "examples"
FLAGS = ["--max-steps", "12", "--batch-size", "4", "--learning-rate", "1e-2", "--logging-steps", "1"]
PROJECTOR, EMBEDDINGS = "model.multi_modal_projector.", "model.language_model.embed_tokens."
DECODER = ("model.language_model.layers.", "model.language_model.norm.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    make_checkpoint(folder)
    path = make_conversations(folder)
    lines = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    worse = [{"role": "assistant", "content": "dog " + line[-1]["content"]} for line in lines]
    pairs = zip(lines, worse, strict=True)
    write(folder / "preferences.jsonl", [{"prompt": a[:-1], "chosen": a[-1:], "rejected": [b]} for a, b in pairs])
    # With the usual 0.02 all tokens are about equally likely, and no answer is ever right. So many words are accepted.
    make_checkpoint(folder, "decided", initializer_range=0.3)
    tokenizer = AutoProcessor.from_pretrained(folder / "decided").tokenizer
    words = [word for word in map(tokenizer.decode, range(len(tokenizer))) if word.strip().isalpha()]
    accepted = [word for word in words if len(word.strip()) > 1][::2]
    for line in lines:
        line[-1]["references"] = accepted
    write(folder / "accepted.jsonl", [{"messages": line} for line in lines])
    return folder


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))


def run_example(folder, script, data, output, *flags, model="model"):
    """Run a script in another directory than the data's; returns its output directory and the log."""
    files = ["--model", folder / model, "--data", folder / data, "--output", folder / output]
    offline = environment() | {"HF_HUB_OFFLINE": "1"}
    start = [sys.executable, EXAMPLES / script, *files, *FLAGS, *flags]
    done = subprocess.run(start, cwd=folder.parent, env=offline, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / output, json.loads((folder / output / "trainer_state.json").read_text())["log_history"]


def logged(history, name):
    """The values of a metric, one per step."""
    return [entry[name] for entry in history if name in entry]


def assert_loss_falls(losses):
    assert len(losses) == 12
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.3


def assert_loads_and_only_its_parts_changed(output, folder, parts=(PROJECTOR, EMBEDDINGS), model="model"):
    _, info = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    AutoProcessor.from_pretrained(output, trust_remote_code=True)
    before, after = weights(folder / model), weights(output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(parts)}


@pytest.fixture(scope="module")
def by_trainer(folder):
    output, history = run_example(folder, "fine_tune_with_trainer.py", "data.jsonl", "by_trainer")
    return output, logged(history, "loss")


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
    output, history = run_example(folder, "fine_tune_with_trl.py", "data.jsonl", "by_trl")
    own = logged(history, "loss")
    assert_loss_falls(own)
    assert_loads_and_only_its_parts_changed(output, folder)
    assert "Fine-tuned with TRL's `SFTTrainer`." in (output / "README.md").read_text()
    # The same conversations and labels, in bf16; with labels for the questions it would be 0.02 less.
    assert own[0] == pytest.approx(by_trainer[1][0], abs=5e-3)


def test_the_trl_script_makes_adapters_that_load_on_the_base(folder):
    peft = pytest.importorskip("peft")
    output, history = run_example(folder, "fine_tune_with_trl.py", "data.jsonl", "adapters", "--lora-rank", "4")
    assert_loss_falls(logged(history, "loss"))
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


def test_the_dpo_script_prefers_the_chosen_answers(folder):
    output, history = run_example(folder, "dpo_with_trl.py", "preferences.jsonl", "by_dpo", "--beta", "0.5")
    margins = logged(history, "rewards/margins")
    assert margins[0] == 0 and sum(margins[-3:]) / 3 > 1
    assert_loads_and_only_its_parts_changed(output, folder, (PROJECTOR, *DECODER))
    assert "Trained on preferences with TRL's `DPOTrainer`." in (output / "README.md").read_text()


def test_the_grpo_script_raises_the_reward(folder):
    flags = ["--batch-size", "32", "--max-completion-length", "1"]
    output, history = run_example(folder, "grpo_with_trl.py", "accepted.jsonl", "by_grpo", *flags, model="decided")
    rewards = logged(history, "reward")
    assert rewards[0] < 0.3 and sum(rewards[-3:]) / 3 > 0.7
    assert_loads_and_only_its_parts_changed(output, folder, (PROJECTOR, *DECODER), model="decided")
    assert "with TRL's `GRPOTrainer`." in (output / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dpo_with_trl.py", "grpo_with_trl.py"])
def test_two_processes_train_on_prompts_with_and_without_images(folder, script):
    """A process may have no image in its batch, when another has."""
    data, model, batch = ("preferences", "model", "2") if "dpo" in script else ("accepted", "decided", "8")
    output = folder / f"by_two_{data}"
    flags = ["--model", folder / model, "--data", folder / f"{data}.jsonl", "--output", output, "--batch-size", batch]
    flags += ["--max-steps", "6", *(["--max-completion-length", "1"] if data == "accepted" else [])]
    start = command(*map(str, flags), processes=2, module=str(EXAMPLES / script))
    done = subprocess.run(start, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_loads_and_only_its_parts_changed(output, folder, (PROJECTOR, *DECODER), model=model)
