"""TRL's trainers teach the demo's small model: what colour an image has, of 0 to 3 images of a prompt.

Each figure was also measured with shuffled rewards or preferences, which must not reach it.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from colour_questions import accuracy, conversations, preference, write
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import dsvl
from dsvl.data import trl_dataset
from dsvl.demo import tiny_models
from dsvl.evaluation.metrics import exact_match

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.slow
STEPS = {"SFT": 70, "DPO": 60, "GRPO": 60}
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "adam_beta2": 0.98,
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composed model with random weights, conversations to train on, and held-out ones."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "images").mkdir()
    set_seed(0)
    tiny_models.save_tower(folder / "tower")
    tiny_models.save_language_model(folder / "language")
    model, processor = dsvl.compose(folder / "tower", folder / "language", number_after=True)
    dsvl.save_checkpoint(model, processor, folder / "composed")
    for name, number in (("train", 1024), ("reward", 1024), ("held-out", 192)):
        found = conversations(folder, name, number)
        write(folder / f"{name}.jsonl", [{"messages": messages} for messages in found])
        rng = random.Random(name)
        write(folder / f"{name}-preferences.jsonl", [preference(messages, rng) for messages in found])
    return folder


def load(path: Path) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    model.set_trainable(projector=True, embeddings=True, vision_tower=True, language_model=True, lm_head=True)
    model.set_attn_implementation("eager")  # the fastest on a CPU for sequences this short
    return model, AutoProcessor.from_pretrained(path)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def tuned(folder: Path) -> dict[str, Any]:
    """The composed model after a short SFT, which answers about half of the questions."""
    model, processor = load(folder / "composed")
    before = accuracy(model, processor, folder)
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            str(folder / "sft"),
            max_steps=STEPS["SFT"],
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            warmup_steps=10,
            lr_scheduler_type="constant_with_warmup",
            assistant_only_loss=True,
            max_length=None,
            **COMMON,
        ),
        train_dataset=trl_dataset(folder / "train.jsonl"),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    return {"losses": logged(trainer, "loss"), "before": before, "after": accuracy(model, processor, folder)}


def test_sft_learns(tuned: dict[str, Any]) -> None:
    assert mean(tuned["losses"][:5]) > 3 and mean(tuned["losses"][-10:]) < 0.5
    assert tuned["before"] < 0.05 and 0.4 < tuned["after"] < 0.75  # which leaves something to learn


def tune_on_preferences(folder: Path, shuffled: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of held-out preferences before and after DPO."""
    model, processor = load(folder / "sft")
    path = folder / "reward-preferences.jsonl"
    if shuffled:
        rng = random.Random(0)
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            if rng.random() < 0.5:
                record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
        path = write(folder / "shuffled-preferences.jsonl", records)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(
            str(folder / "dpo"),
            max_steps=STEPS["DPO"],
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_length=None,
            **COMMON,
        ),
        train_dataset=trl_dataset(path, "preference"),
        eval_dataset=trl_dataset(folder / "held-out-preferences.jsonl", "preference"),
        processing_class=processor,
    )
    before = trainer.evaluate()
    trainer.train()
    return before, trainer.evaluate()


def gap(metrics: dict[str, float]) -> float:
    """How much more likely the chosen answers are than the rejected ones, in log-probability."""
    return metrics["eval_logps/chosen"] - metrics["eval_logps/rejected"]


def test_dpo_learns_preferences_that_hold_for_other_images(folder: Path, tuned: dict[str, Any]) -> None:
    before, after = tune_on_preferences(folder, shuffled=False)
    assert before["eval_rewards/margins"] == 0 and after["eval_rewards/margins"] > 0.2
    assert after["eval_rewards/accuracies"] > 0.7
    assert gap(after) > gap(before) + 2


def test_dpo_learns_nothing_from_shuffled_preferences(folder: Path, tuned: dict[str, Any]) -> None:
    before, after = tune_on_preferences(folder, shuffled=True)
    assert abs(after["eval_rewards/margins"]) < 0.05 and after["eval_rewards/accuracies"] < 0.6
    assert abs(gap(after) - gap(before)) < 0.5


def reinforce(folder: Path, shuffled: bool) -> tuple[list[float], float]:
    """The mean reward of each step of GRPO, and the accuracy on held-out questions after it."""
    model, processor = load(folder / "sft")
    rng = random.Random(0)

    def correct(completions: list, references: list, **columns: Any) -> list[float]:
        answers = [completion[0]["content"] for completion in completions]
        rewards = [exact_match(answer, accepted) for answer, accepted in zip(answers, references, strict=True)]
        if shuffled:
            rng.shuffle(rewards)
        return rewards

    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=correct,
        args=trl.GRPOConfig(
            str(folder / "grpo"),
            max_steps=STEPS["GRPO"],
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=4,
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            **COMMON,
        ),
        train_dataset=trl_dataset(folder / "reward.jsonl", "prompt"),
        processing_class=processor,
    )
    trainer.train()
    return logged(trainer, "reward"), accuracy(model, processor, folder)


def test_grpo_raises_the_reward(folder: Path, tuned: dict[str, Any]) -> None:
    rewards, after = reinforce(folder, shuffled=False)
    assert mean(rewards[-10:]) > mean(rewards[:5]) + 0.2
    assert after > tuned["after"] + 0.15


def test_grpo_learns_nothing_from_shuffled_rewards(folder: Path, tuned: dict[str, Any]) -> None:
    rewards, after = reinforce(folder, shuffled=True)
    assert mean(rewards[-10:]) < mean(rewards[:5]) + 0.05
    assert after < tuned["after"] + 0.05
