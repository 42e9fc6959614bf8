"""Does training with frozen weights in 8 bits reach what it reaches without? Held-out accuracy on the demo's trained model.

The projector of a trained model starts anew; projector and embeddings are trained on the demo's conversations, with frozen
tower and decoder in each precision, in the same order and from the same weights. Exact answers to held-out questions are
counted in that precision, and with the original weights, as the saved model has them.

    python -m dsvl.demo                # trains the model
    python benchmarks/frozen_accuracy.py demo_output/checkpoint [--steps 400] [--keep none] [--out frozen_accuracy.json]
"""

import argparse
import tempfile
from typing import Any

import torch
from measure import describe_device, write
from torch.utils.data import Dataset
from transformers import AutoProcessor, Trainer, TrainingArguments, set_seed

from dsvl import DSVLForConditionalGeneration
from dsvl.acceleration.memory.frozen_linear import PRECISIONS
from dsvl.demo.conversations import KINDS
from dsvl.demo.scoring import held_out_conversations, score
from dsvl.demo.training import BATCH_SIZE, TrainingConversations, training_arguments
from dsvl.training import ConversationCollator, freeze_in_8_bits
from dsvl.training.frozen_precision import describe_frozen_weights

SEED = 7  # of the training conversations, which differ from the demo's
# The demo's curriculum ends with all kinds of questions; training begins where it has them.
SIZE, FIRST = 1_000_000, 900_000


class LateConversations(Dataset):
    """Conversations from the end of the demo's curriculum."""

    def __init__(self, size: int) -> None:
        self.all, self.size = TrainingConversations(SEED, SIZE), size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.all[FIRST + index]


def load(name: str) -> DSVLForConditionalGeneration:
    model = DSVLForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
    model.set_attn_implementation({"text_config": "eager"})  # the fastest on a CPU for sequences this short
    return model


def accuracy(model: DSVLForConditionalGeneration, processor: Any, conversations: list[dict[str, Any]]) -> dict[str, float]:
    """The fraction of exact answers, of each kind of question and overall."""
    found = score(model.eval(), processor, conversations)
    return {kind: found.accuracy(kind) for kind in KINDS} | {"overall": found.accuracy(*KINDS)}


def measure(name: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train with frozen weights in a precision, and count exact answers."""
    model, processor = load(name), AutoProcessor.from_pretrained(name)
    set_seed(1)
    for module in model.model.multi_modal_projector.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.set_trainable()
    if precision in PRECISIONS:
        freeze_in_8_bits(model, precision, options.keep, source=name)
    conversations = held_out_conversations(0, options.held_out)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH_SIZE,
            remove_unused_columns=False,
            disable_tqdm=True,
            **training_arguments(0, options.steps) | {"learning_rate": 2e-3},
        )
        data = LateConversations(options.steps * BATCH_SIZE)
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=ConversationCollator(processor))
        trainer.train()
    figures: dict[str, Any] = {
        "layers": describe_frozen_weights(model),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "held_out": accuracy(model, processor, conversations),
    }
    saved = load(name)
    saved.load_state_dict(model.state_dict())
    figures["saved"] = accuracy(saved, processor, conversations)
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the demo's trained model")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=300, help="held-out conversations (default: 300)")
    parser.add_argument("--precisions", nargs="+", choices=("float32", *PRECISIONS), default=("float32", *PRECISIONS))
    parser.add_argument("--keep", nargs="+", help="layers that keep their precision, as for --frozen-precision-keep")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    print(describe_device())
    results = {}
    for precision in options.precisions:
        results[precision] = figures = measure(options.model, precision, options)
        last = figures["losses"][-1] if figures["losses"] else float("nan")
        print(
            f"{precision:10}last loss {last:.4f}  held-out accuracy {figures['held_out']['overall']:.2%}, with the original "
            f"weights {figures['saved']['overall']:.2%}"
        )
    write(options.out, options, results)


if __name__ == "__main__":
    main()
