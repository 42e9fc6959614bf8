"""Training of the demo's model with the Trainer of transformers, or with `dsvl train` under DeepSpeed."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from ..training import ConversationCollator
from .conversations import generate_conversation

BATCH_SIZE = 32


class TrainingConversations(Dataset):
    """The training data, in training order; each conversation is generated when it is indexed.

    The first 8% have a single image, so that the vision tower is trained on recognition alone. "Which image ..." questions
    are learned last, because they compare all images; the second half asks them more often.

    Args:
        seed: of all conversations.
        size: the number of conversations.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = f"{self.seed}/train/{index}"
        if index < 0.08 * self.size:
            return generate_conversation(seed, images=1)
        # A batch has a uniform number of images, and therefore little padding.
        images = 2 + index // BATCH_SIZE % 2
        return generate_conversation(seed, images, which=0.5 if index < 0.5 * self.size else 0.75)


def training_arguments(seed: int, steps: int) -> dict[str, Any]:
    """Fields of `TrainingArguments`, except for directories and the number of processes."""
    return {
        "seed": seed,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",  # the order is a curriculum
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


def train(model: Any, processor: Any, directory: Path, seed: int = 0, steps: int = 1100) -> dict[str, float]:
    """Train all parts of a newly composed model.

    Args:
        model: a `DSVLForConditionalGeneration`; trained in place.
        processor: its `DSVLProcessor`.
        directory: the Trainer's output directory.
        seed (*optional*, defaults to 0): of the training conversations.
        steps (*optional*, defaults to 1100): optimizer steps.

    Returns:
        The Trainer's metrics.
    """
    # All weights are random, so all parts are trained.
    model.set_trainable(projector=True, embeddings=True, vision_tower=True, language_model=True, lm_head=True)
    model.set_attn_implementation("eager")  # the fastest on a CPU for sequences this short
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=BATCH_SIZE,
        remove_unused_columns=False,
        **training_arguments(seed, steps),
    )
    data = TrainingConversations(seed, steps * BATCH_SIZE)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=ConversationCollator(processor))
    metrics = trainer.train().metrics
    model.eval()
    return metrics


def write_training_data(folder: Path, data: TrainingConversations) -> Path:
    """Write the conversations as JSON lines, with their images in a subfolder; returns the JSON file."""
    (folder / "images").mkdir(parents=True)
    path = folder / "conversations.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(len(data)):
            messages, number = data[index]["messages"], 0
            for message in messages:
                for part in message["content"] if isinstance(message["content"], list) else []:
                    if part["type"] == "image":
                        name = f"images/{index}-{number}.png"
                        part.pop("image").save(folder / name)
                        part["path"], number = name, number + 1
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def deepspeed_command(checkpoint: Path, data: Path, output: Path, seed: int, steps: int, processes: int) -> list[str]:
    """The command line of `dsvl train` with the same settings, under the `deepspeed` launcher with ZeRO-2.

    Args:
        checkpoint: the composed model.
        data: the file that `write_training_data` wrote.
        output: the output directory.
        seed, steps: as for `train`.
        processes: the number of processes on this machine, which share a batch.
    """
    values = {
        "model": str(checkpoint),
        "data": str(data),
        "output": str(output),
        "train": ["projector", "embeddings", "vision", "language", "head"],
        "attn_implementation": "eager",
        "per_device_train_batch_size": BATCH_SIZE // processes,
        "dataloader_num_workers": 1,
        "deepspeed": "zero2",
        **training_arguments(seed, steps),
    }
    run = data.with_name("run.yaml")
    run.write_text(yaml.safe_dump(values), encoding="utf-8")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(processes)]
    return [*launcher, "--module", "dsvl.training", str(run)]
