"""Does training with frozen weights in 8 bits reach what it reaches without? Held-out accuracy of two trained models.

The projector of a trained model starts anew; projector and embeddings are trained on the demo's conversations, with frozen
tower and decoder in each precision, in the same order and from the same weights. Exact answers to held-out questions are
counted in that precision, and with the original weights, as the saved model has them.

    python -m dsvl.demo                # trains the model
    python benchmarks/frozen_accuracy.py demo_output/checkpoint [--steps 400] [--keep none] [--out frozen_accuracy.json]

Or runs of attention_quality, with a frozen language model of 60 million parameters, in each precision. Parts, data, steps
and items are those of the arm's reported runs.

    (cd benchmarks; python -m attention_quality parts --parts parts)
    python benchmarks/frozen_accuracy.py --parts benchmarks/parts [--arm mmca_numbered] [--seeds 0 1] [--keep none]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from attention_quality.parts import load_parts
from attention_quality.plan import CONVERSATIONS, Run, accuracies, mean_accuracy
from attention_quality.runs import Batches, compose_arm, measure_items, order_of_batches
from attention_quality.scenes import Sprites
from measure import describe_device, device_type, write
from torch.utils.data import Dataset
from trained_tasks import fit
from transformers import AutoProcessor, Trainer, TrainingArguments, set_seed

from dsvl import DSVLForConditionalGeneration
from dsvl.acceleration.decoder_layers import compile_8_bit_tower
from dsvl.acceleration.memory.frozen_linear import PRECISIONS
from dsvl.demo.conversations import KINDS
from dsvl.demo.scoring import held_out_conversations, score
from dsvl.demo.training import BATCH_SIZE, TrainingConversations, training_arguments
from dsvl.training import ConversationCollator, freeze_in_8_bits
from dsvl.training.frozen_precision import describe_frozen_weights

LEARNING_RATES = {"causal": 0.004, "mmca": 0.008, "mmca_numbered": 0.004}  # of their reported runs in attention_quality
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


def measure_arm(precision: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train an arm of attention_quality with frozen weights in a precision, and count exact answers."""
    torch.compiler.reset()
    parts = load_parts(Path(options.parts))
    model, _ = compose_arm(parts, options.arm, seed)
    if precision in PRECISIONS:
        freeze_in_8_bits(model, precision, options.keep)
        if model.model._compiled_layers is not None:
            compile_8_bit_tower(model)
    batches = Batches(parts.size, parts.tokenizer, Sprites(parts.size.world).to(device_type()))
    run = Run(options.arm, "frozen", options.conversations, seed, LEARNING_RATES[options.arm])
    order = order_of_batches(parts.size, run)[: options.steps]
    steps = iter(order)
    training = fit(
        model,
        lambda done: batches.training(seed, next(steps)),
        len(order),
        None,
        run.learning_rate,
        f"{precision} {run.name}",
    )
    saved, _ = compose_arm(load_parts(Path(options.parts)), options.arm, seed)
    saved.load_state_dict(model.state_dict())
    figures: dict[str, Any] = {"layers": describe_frozen_weights(model), "losses": [training["loss"]]}
    for name, one in (("held_out", model), ("saved", saved)):
        items = measure_items(one.eval(), batches, parts.record["size"])
        figures[name] = accuracies(items) | {"overall": mean_accuracy(items)}
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="the demo's trained model")
    parser.add_argument("--parts", help="instead: the parts of attention_quality")
    parser.add_argument(
        "--arm", choices=LEARNING_RATES, default="mmca_numbered", help="of attention_quality (default: mmca_numbered)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of its runs (default: 0 1)")
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS, help="of its training data")
    parser.add_argument("--steps", type=int, help="(default: 400; of attention_quality all)")
    parser.add_argument("--held-out", type=int, default=300, help="held-out conversations (default: 300)")
    parser.add_argument("--precisions", nargs="+", choices=("float32", *PRECISIONS), default=("float32", *PRECISIONS))
    parser.add_argument("--keep", nargs="+", help="layers that keep their precision, as for --frozen-precision-keep")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    if (options.model is None) == (options.parts is None):
        parser.error("pass either the demo's trained model, or --parts.")
    if options.model is not None:
        options.steps, options.seeds = options.steps or 400, [None]
    print(describe_device())
    results = {}
    for seed in options.seeds:
        for precision in options.precisions:
            if seed is None:
                name, figures = precision, measure(options.model, precision, options)
            else:
                name, figures = f"{precision}, seed {seed}", measure_arm(precision, seed, options)
            results[name] = figures
            last = figures["losses"][-1] if figures["losses"] else float("nan")
            print(
                f"{name:18}last loss {last:.4f}  held-out accuracy {figures['held_out']['overall']:.2%}, with the original "
                f"weights {figures['saved']['overall']:.2%}"
            )
            write(options.out, options, results)


if __name__ == "__main__":
    main()
