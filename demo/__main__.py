"""End-to-end demo: compose a small model, train it, score it on held-out conversations, and chat with the
saved checkpoint in a process without this package.

python -m dsvl.demo [--output demo_output] [--seed 0] [--chat-format chatml] [--deepspeed]
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.utils import logging

from .. import save_checkpoint
from ..cli import main as dsvl
from ..configuration_dsvl import IMAGE_POSITIONS
from ..publishing.fresh_process import run_without_dsvl
from . import scoring, tiny_models
from .conversations import KINDS, SYSTEM, generate_conversation
from .photographs import show_photographs
from .training import BATCH_SIZE, TrainingConversations, deepspeed_command, train, write_training_data

HELD_OUT = 300  # conversations
MARKER = "written by python -m dsvl.demo"  # --overwrite removes only directories with a file of this name

# Thresholds that a run must meet, with a margin for different seeds. The targets are printed with the table.
FLOORS = {"overall": 0.85, "colour": 0.9, "shape": 0.9, "count": 0.9, "which": 0.65}
CEILINGS = {"colour, swapped": 0.1, "shape, swapped": 0.1}
TARGETS = "90% overall, 95% each of colour, shape and count, 85% which; swapped colours and shapes at most 10%"


def main() -> int:
    """Run the demo; returns the exit status: 1 if a step fails or the model misses a threshold, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m dsvl.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="a new directory (default demo_output)")
    parser.add_argument("--overwrite", action="store_true", help="first remove the output of an earlier run")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the weights and conversations (default 0)")
    parser.add_argument(
        "--chat-format",
        choices=("visualchat", "chatml"),
        default="visualchat",
        help="chatml gives the language model a chat template of its own, which dsvl compose keeps (default visualchat)",
    )
    parser.add_argument(
        "--image-positions",
        choices=IMAGE_POSITIONS,
        default="token",
        help="of dsvl compose: image lets all tokens of an image share one position (default token)",
    )
    parser.add_argument("--steps", type=int, default=1100, help="optimizer steps (default 1100)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument(
        "--deepspeed", action="store_true", help="train with dsvl train under deepspeed: two processes, ZeRO-2"
    )
    arguments = parser.parse_args()
    output: Path = arguments.output
    if arguments.overwrite and (output / MARKER).exists():
        shutil.rmtree(output)
    if output.exists() and any(output.iterdir()):
        print(f"{output} is not empty; pass --overwrite if an earlier run wrote it, or another --output.", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()  # of loading and saving; training has its own
    set_seed(arguments.seed)
    started, started_cpu = time.monotonic(), time.process_time()

    _step("Creating a small CLIP tower and a small LLaMA with a tokenizer")
    tiny_models.save_tower(output / "parts" / "tower")
    tiny_models.save_language_model(output / "parts" / "language_model", chat_format=arguments.chat_format)

    command = ["compose", "--vision", f"{output}/parts/tower", "--language", f"{output}/parts/language_model"]
    command += ["--out", f"{output}/composed", "--number-after", "--image-positions", arguments.image_positions]
    _step(f"dsvl {' '.join(command)}")
    if dsvl(command):
        return 1

    if arguments.deepspeed:
        model, processor = _train_with_deepspeed(output, arguments.seed, arguments.steps)
    else:
        _step("Training with the Trainer")
        model = AutoModelForImageTextToText.from_pretrained(output / "composed")
        processor = AutoProcessor.from_pretrained(output / "composed")
        train(model, processor, output / "training", arguments.seed, arguments.steps)

    _step(f"Accuracy (exact answers) on {HELD_OUT} held-out conversations")
    figures = measure(model, processor, arguments.seed)
    save_checkpoint(model, processor, output / "checkpoint")

    _step("A two-turn conversation about two images, in a new process without this package")
    conversation = write_conversation(output / "conversation", arguments.seed)
    run_without_dsvl(Path(__file__).with_name("chat_without_package.py"), output / "checkpoint", conversation)

    _step("Photographs, with random weights")
    show_photographs(output / "photographs")

    minutes, cpu = (time.monotonic() - started) / 60, (time.process_time() - started_cpu) / 60
    figures |= {"minutes": minutes, "CPU minutes": cpu}
    (output / "figures.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    _step(f"Done in {minutes:.1f} minutes ({cpu:.1f} of CPU time); the trained model is in {output / 'checkpoint'}")
    missed = missed_thresholds(figures)
    for sentence in missed:
        print(sentence, file=sys.stderr)
    return 1 if missed else 0


def _train_with_deepspeed(output: Path, seed: int, steps: int) -> tuple[Any, Any]:
    data = TrainingConversations(seed, steps * BATCH_SIZE)
    _step(f"{len(data):,} conversations, written as JSON lines with image files")
    path = write_training_data(output / "training_data", data)
    command = deepspeed_command(output / "composed", path, output / "training", seed, steps, processes=2)
    _step(" ".join(command))
    subprocess.run(command, check=True, env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    model = AutoModelForImageTextToText.from_pretrained(output / "training").eval()
    model.set_attn_implementation("eager")
    return model, AutoProcessor.from_pretrained(output / "training")


def measure(model: Any, processor: Any, seed: int) -> dict[str, float]:
    """Score a model on held-out conversations and print the table.

    Returns:
        Accuracies: of each kind, "overall" (all kinds), and with changed images: "colour, swapped" and so on.
    """
    conversations = scoring.held_out_conversations(seed, HELD_OUT)
    changes: dict[str, Callable] = {
        "exact": list,
        "swapped": scoring.swapped,
        "replaced": scoring.replaced,
        "blank": scoring.blank,
    }
    scores = {name: scoring.score(model, processor, conversations, change) for name, change in changes.items()}
    print(f"  {'':10}{'answers':>8}" + "".join(f"{name:>9}" for name in scores))
    figures: dict[str, float] = {}
    for label, kinds in [*((kind, [kind]) for kind in KINDS), ("overall", KINDS)]:
        accuracies = {name: score.accuracy(*kinds) for name, score in scores.items()}
        figures |= {label if name == "exact" else f"{label}, {name}": accuracy for name, accuracy in accuracies.items()}
        asked = sum(scores["exact"].asked[kind] for kind in kinds)
        print(f"  {label:10}{asked:8}" + "".join(f"{accuracy:9.1%}" for accuracy in accuracies.values()))
    figures["which, by chance"] = scoring.which_chance_level(conversations)
    print(
        "  swapped, replaced, blank: accuracy with the images swapped, replaced by unrelated ones, or blank; the expected\n"
        "  answers stay the same. After swapping, no direct answer is right any more.\n"
        f"  which: {figures['which']:.1%}, with blank images {figures['which, blank']:.1%}, with replaced ones "
        f"{figures['which, replaced']:.1%}, by chance {figures['which, by chance']:.1%}.\n"
        f"  Targets: {TARGETS}."
    )
    return figures


def missed_thresholds(figures: dict[str, float]) -> list[str]:
    """A message for each figure of `measure` that misses its threshold."""
    low = [(name, "at least", floor) for name, floor in FLOORS.items() if figures[name] < floor]
    high = [(name, "at most", limit) for name, limit in CEILINGS.items() if figures[name] > limit]
    return [
        f"The model misses a threshold: {name} is {figures[name]:.1%}, expected {word} {limit:.0%}."
        for name, word, limit in low + high
    ]


def write_conversation(folder: Path, seed: int) -> Path:
    """Write a held-out conversation for chat_without_package.py: two images, a direct question, a "which" question."""
    folder.mkdir(parents=True)
    for attempt in itertools.count():
        conversation = generate_conversation(f"{seed}/talk/{attempt}", images=2, held_out=True)
        direct = [question for question in conversation["questions"] if question.kind != "which"]
        which = [question for question in conversation["questions"] if question.kind == "which"]
        if direct and which:
            break
    first, second = direct[0], which[0]
    names = ["image 1.png", "image 2.png"]
    for name, image in zip(names, conversation["drawn"], strict=True):
        image.save(folder / name)
    turns = [
        {"images": names, "question": first.text, "expected": first.answer},
        {"images": [], "question": second.text, "expected": second.answer},
    ]
    path = folder / "conversation.json"
    path.write_text(json.dumps({"system": SYSTEM, "turns": turns}, indent=2), encoding="utf-8")
    return path


def _step(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    # With busy-waiting OpenMP threads, this is twenty times slower when another process uses the same cores. OpenMP reads
    # the setting when torch is loaded, which has happened by now, so restart the process with it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
