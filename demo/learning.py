"""Fine-tuning under the HF `Trainer`: what is shown when, how a batch is made, and the settings."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from ..training import ConversationCollator
from .drawing import converse

BATCH_SIZE = 32


class Lessons(Dataset):
    """The training conversations in the order in which they are shown, each drawn when it is asked for.

    The first of them are about one image, where nothing has to be told apart, so that the tower learns to see. "Which
    image ..." is learnt last, since it compares what all of them show, and so it is asked more often in the second half.

    Args:
        seed: decides every conversation.
        size: how many conversations.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = f"{self.seed}/train/{index}"
        if index < 0.08 * self.size:
            return converse(seed, images=1)
        # All of a batch have the same number of images, and so about the same length.
        return converse(seed, images=2 + index // BATCH_SIZE % 2, which=0.5 if index < 0.5 * self.size else 0.75)


def settings(seed: int, steps: int) -> dict[str, Any]:
    """The fields of `TrainingArguments`, but for those that say where and in how many processes."""
    return {
        "seed": seed,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",  # lessons come in an order
        "optim": "adamw_torch_fused",
        "learning_rate": 3e-3,
        "adam_beta2": 0.98,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50,
        "max_grad_norm": 1.0,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }


def fine_tune(model: Any, processor: Any, directory: Path, seed: int = 0, steps: int = 1100) -> dict[str, float]:
    """Train every part of a freshly composed model.

    Args:
        model: a `DSVLForConditionalGeneration`; trained in place.
        processor: its `DSVLProcessor`.
        directory: for what the Trainer writes.
        seed: of the conversations.
        steps: of the optimizer.

    Returns:
        The Trainer's metrics.
    """
    # Nothing here was trained before, so every part learns, the tower too.
    model.set_trainable(projector=True, embeddings=True, vision_tower=True, language_model=True, lm_head=True)
    model.set_attn_implementation("eager")  # for sequences this short, the fastest on a CPU
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=BATCH_SIZE,
        remove_unused_columns=False,
        **settings(seed, steps),
    )
    lessons = Lessons(seed, steps * BATCH_SIZE)
    trainer = Trainer(model=model, args=arguments, train_dataset=lessons, data_collator=ConversationCollator(processor))
    metrics = trainer.train().metrics
    model.eval()
    return metrics


def write_lessons(folder: Path, lessons: Lessons) -> Path:
    """Write the lessons as JSON lines beside a folder of images, as anybody's conversations are."""
    (folder / "images").mkdir(parents=True)
    path = folder / "lessons.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(len(lessons)):
            messages, number = lessons[index]["messages"], 0
            for message in messages:
                for part in message["content"] if isinstance(message["content"], list) else []:
                    if part["type"] == "image":
                        name = f"images/{index}-{number}.png"
                        part.pop("image").save(folder / name)
                        part["path"], number = name, number + 1
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def deepspeed_command(checkpoint: Path, lessons: Path, output: Path, seed: int, steps: int, processes: int) -> list[str]:
    """`dsvl train` with the same settings under the `deepspeed` launcher: ZeRO-2, the batch shared by the processes.

    Args:
        checkpoint: the composed model.
        lessons: as `write_lessons` wrote them.
        output: for the trained model.
        seed, steps: as in `fine_tune`.
        processes: how many, on this machine.
    """
    values = {
        "model": str(checkpoint),
        "data": str(lessons),
        "output": str(output),
        "train": ["projector", "embeddings", "vision", "language", "head"],
        "attn_implementation": "eager",
        "per_device_train_batch_size": BATCH_SIZE // processes,
        "dataloader_num_workers": 1,
        "deepspeed": "zero2",
        **settings(seed, steps),
    }
    run = lessons.with_name("run.yaml")
    run.write_text(yaml.safe_dump(values), encoding="utf-8")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(processes)]
    return [*launcher, "--module", "dsvl.training", str(run)]
