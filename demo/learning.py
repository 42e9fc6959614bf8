"""Fine-tuning under the HF `Trainer`: what is shown when, how a batch is made, and the settings."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from .drawing import converse

BATCH_SIZE = 32


class Lessons(Dataset):
    """The training conversations in the order in which they are shown, each drawn when it is asked for.

    The first of them are about one picture, where nothing has to be told apart, so that the tower learns to see. "Which
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
            return converse(seed, pictures=1)
        # All of a batch have the same number of pictures, and so about the same length.
        return converse(seed, pictures=2 + index // BATCH_SIZE % 2, which=0.5 if index < 0.5 * self.size else 0.75)


class Collator:
    """Conversations to a batch of model inputs, by the processor's chat template; labels are the assistant's tokens."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, conversations: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.processor.apply_chat_template(
            [conversation["messages"] for conversation in conversations],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True},
        )
        batch = batch.convert_to_tensors("pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
        return dict(batch)


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
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        train_sampling_strategy="sequential",  # lessons come in an order
        remove_unused_columns=False,
        optim="adamw_torch_fused",
        learning_rate=3e-3,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        max_grad_norm=1.0,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Lessons(seed, steps * BATCH_SIZE), data_collator=Collator(processor)
    )
    metrics = trainer.train().metrics
    model.eval()
    return metrics
