"""The whole way: an instruct language model and a tower, composed, aligned, instructed, tuned on preferences, exported.

Each step is the command or script that a user would run, and each shows that it learned or kept something.
"""

import json
import random
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from colour_questions import accuracy, conversations, preference, write
from snippets import ROOT
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, set_seed

from dsvl.cli import main
from dsvl.data import trl_dataset
from dsvl.demo import tiny_models

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

RECIPE = """
compose:
  vision: {folder}/tower
  language: {folder}/instruct
  projector_type: mlp
  multimodal_attention: causal
  vision_feature_layer: -2
  vision_feature_select_strategy: default
output: {folder}/tuned
use_cpu: true
report_to: none
bf16: false
data: {folder}/train.jsonl
per_device_train_batch_size: 32
adam_beta2: 0.98
logging_steps: 1
save_strategy: "no"
keep_stages: true
stages:
  - name: align
    train: [projector, vision]
    learning_rate: 3e-3
    max_steps: 60
  - name: instruct
    train: [projector, embeddings, language, head, vision]
    learning_rate: 3e-3
    max_steps: 300
"""
# In a process that cannot import dsvl.
STOCK = """
import json, sys
sys.modules["dsvl"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
assert type(model) is LlavaForConditionalGeneration
processor = AutoProcessor.from_pretrained(sys.argv[1])
answers = []
for messages in json.load(open(sys.argv[2])):
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answers.append(ids.tolist())
print(json.dumps(answers))
"""


def teach_language_model(folder: Path) -> None:
    """Give the language model something to lose: it answers questions of text, in its own chat format."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "instruct")
    model = AutoModelForCausalLM.from_pretrained(folder / "instruct")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    for step in range(60):
        batch = [
            [message | {"content": _text(message)} for message in messages]
            for messages in conversations(folder, f"text {step}", 16, counts=[0])
        ]
        inputs = tokenizer.apply_chat_template(batch, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "instruct")


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def losses(directory: Path) -> list[float]:
    history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def chosen_gap(directory: Path, folder: Path) -> float:
    """How much more likely held-out chosen answers are than rejected ones: the mean difference of log-probabilities."""
    model, processor = AutoModelForImageTextToText.from_pretrained(directory), AutoProcessor.from_pretrained(directory)
    gaps = []
    for row in trl_dataset(folder / "held-out-preferences.jsonl", "preference").select(range(64)):
        sums = []
        for answer in (row["chosen"], row["rejected"]):
            messages = _with_images([*row["prompt"], *answer], row["images"])
            batch = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
            )
            mask = batch.pop("assistant_masks")[0, 1:].bool()
            with torch.no_grad():
                scores = model(**batch).logits[0, :-1].log_softmax(-1)
            sums.append(scores[mask].gather(-1, batch["input_ids"][0, 1:][mask][:, None]).sum().item())
        gaps.append(sums[0] - sums[1])
    return sum(gaps) / len(gaps)


def _with_images(messages: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    from trl.data_utils import prepare_multimodal_messages

    return prepare_multimodal_messages(messages, images=images)


def test_from_an_instruct_model_and_a_tower_to_a_model_for_any_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    set_seed(0)
    tiny_models.save_tower(tmp_path / "tower", layers=3)
    tiny_models.save_language_model(tmp_path / "instruct", chat_format="chatml")
    teach_language_model(tmp_path)
    for name, number in (("train", 1024), ("preferred", 512), ("held-out", 192)):
        found = conversations(tmp_path, name, number)
        write(tmp_path / f"{name}.jsonl", [{"messages": messages} for messages in found])
        rng = random.Random(name)
        write(tmp_path / f"{name}-preferences.jsonl", [preference(messages, rng) for messages in found])

    # Composed, aligned, instructed.
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    assert main(["train", str(tmp_path / "recipe.yaml")]) in (0, None)
    composed, aligned, tuned = (tmp_path / "tuned" / name for name in ("stages/0-composed", "stages/1-align", "."))
    question = [message | {"content": _text(message)} for message in conversations(tmp_path, "voice", 1, counts=[0])[0][:-1]]
    voices = []
    for directory in (tmp_path / "instruct", composed, aligned):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model = AutoModelForCausalLM.from_pretrained(directory)
        voices.append((prompt["input_ids"].tolist(), model.generate(**prompt, max_new_tokens=6, do_sample=False).tolist()))
    assert voices[0] == voices[1] == voices[2]  # what the language model said, it still says, while only the rest learns
    assert "(image 1)" in tokenizer.decode(voices[0][1][0])
    align, instruct = losses(aligned), losses(tuned)
    assert sum(align[-10:]) < 0.8 * sum(align[:10]) and sum(instruct[-10:]) < 0.5 * sum(instruct[:10])
    scores = [
        accuracy(AutoModelForImageTextToText.from_pretrained(one), AutoProcessor.from_pretrained(one), tmp_path)
        for one in (composed, tuned)
    ]
    assert scores[1] > scores[0] + 0.3, scores
    card = (tuned / "README.md").read_text()
    assert "align" in card and "instruct" in card and "the language model's own" in card

    # Preferences.
    before = chosen_gap(tuned, tmp_path)
    arguments = ["--model", str(tuned), "--data", str(tmp_path / "preferred-preferences.jsonl")]
    arguments += ["--output", str(tmp_path / "preferred"), "--max-steps", "60", "--batch-size", "16"]
    monkeypatch.setattr(sys, "argv", ["dpo_with_trl.py", *arguments, "--learning-rate", "1e-4"])
    runpy.run_path(str(ROOT / "examples" / "dpo_with_trl.py"), run_name="__main__")
    after = chosen_gap(tmp_path / "preferred", tmp_path)
    assert after > before + 1, (before, after)

    # Exported, and opened without this package.
    assert main(["export", str(tmp_path / "preferred"), "--to", "llava", "--out", str(tmp_path / "llava")]) in (0, None)
    asked = [messages[:-1] for messages in conversations(tmp_path, "asked", 12)]
    for messages in asked:
        for part in messages[1]["content"]:
            if part["type"] == "image":
                part["path"] = str(tmp_path / part["path"])
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, "-c", STOCK, tmp_path / "llava", tmp_path / "asked.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model, processor = (one.from_pretrained(tmp_path / "preferred") for one in (AutoModelForImageTextToText, AutoProcessor))
    expected = []
    for messages in asked:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(ids.tolist())
    assert json.loads(done.stdout.splitlines()[-1]) == expected
