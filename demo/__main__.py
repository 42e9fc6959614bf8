"""The whole path in five minutes: parts, `dsvl compose`, Trainer, scores on held-out conversations, a fresh process.

python -m dsvl.demo [--output demo_output] [--seed 0] [--deepspeed]
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
from ..publishing.fresh_process import run_without_dsvl
from . import parts, scoring
from .drawing import KINDS, SYSTEM, converse
from .learning import BATCH_SIZE, Lessons, deepspeed_command, fine_tune, write_lessons
from .photographs import show_photographs

HELD_OUT = 300  # conversations
MARKER = "written by python -m dsvl.demo"  # a file of this name says that --overwrite may remove a directory

# What a run must reach, with room for seeds; what is aimed at is printed with the table.
FLOORS = {"over all": 0.85, "colour": 0.9, "shape": 0.9, "count": 0.9, "which": 0.65}
CEILINGS = {"colour, swapped": 0.1, "shape, swapped": 0.1}
AIMS = "90% over all, 95% each of colour, shape and count, 85% which; swapped colours and shapes at most 10%"


def main() -> int:
    """Run the demo; returns its exit status: 1 if something fails or the model has not learnt, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m dsvl.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="a new directory (default demo_output)")
    parser.add_argument("--overwrite", action="store_true", help="remove the output of an earlier run first")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of every conversation")
    parser.add_argument("--steps", type=int, default=1100, help="of the optimizer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--deepspeed", action="store_true", help="train by dsvl train under deepspeed: two processes, ZeRO-2"
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
    logging.disable_progress_bar()  # of loading and saving; training shows its own
    set_seed(arguments.seed)
    started, started_cpu = time.monotonic(), time.process_time()

    _step("A small CLIP tower, and a small LLaMA with a tokenizer of the demo's words")
    parts.save_tower(output / "parts" / "tower")
    parts.save_language_model(output / "parts" / "language_model")

    command = ["compose", "--vision", f"{output}/parts/tower", "--language", f"{output}/parts/language_model"]
    command += ["--out", f"{output}/composed", "--number-after"]
    _step(f"dsvl {' '.join(command)}")
    if dsvl(command):
        return 1

    if arguments.deepspeed:
        model, processor = _fine_tune_by_deepspeed(output, arguments.seed, arguments.steps)
    else:
        _step("Fine-tuning with the Trainer")
        model = AutoModelForImageTextToText.from_pretrained(output / "composed")
        processor = AutoProcessor.from_pretrained(output / "composed")
        fine_tune(model, processor, output / "training", arguments.seed, arguments.steps)

    _step(f"Exact answers in {HELD_OUT} held-out conversations")
    figures = measure(model, processor, arguments.seed)
    save_checkpoint(model, processor, output / "checkpoint")

    _step("Two rounds about two images, in a fresh process without this package")
    conversation = write_talk(output / "talk", arguments.seed)
    run_without_dsvl(Path(__file__).with_name("talk.py"), output / "checkpoint", conversation)

    _step("Real photographs, random weights")
    show_photographs(output / "photographs")

    minutes, cpu = (time.monotonic() - started) / 60, (time.process_time() - started_cpu) / 60
    figures |= {"minutes": minutes, "CPU minutes": cpu}
    (output / "figures.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    _step(f"Done in {minutes:.1f} minutes ({cpu:.1f} of CPU time); the trained model is in {output / 'checkpoint'}")
    missed = missed_floors(figures)
    for sentence in missed:
        print(sentence, file=sys.stderr)
    return 1 if missed else 0


def _fine_tune_by_deepspeed(output: Path, seed: int, steps: int) -> tuple[Any, Any]:
    lessons = Lessons(seed, steps * BATCH_SIZE)
    _step(f"{len(lessons):,} conversations, as JSON lines beside their images")
    path = write_lessons(output / "lessons", lessons)
    command = deepspeed_command(output / "composed", path, output / "training", seed, steps, processes=2)
    _step(" ".join(command))
    subprocess.run(command, check=True, env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    model = AutoModelForImageTextToText.from_pretrained(output / "training").eval()
    model.set_attn_implementation("eager")
    return model, AutoProcessor.from_pretrained(output / "training")


def measure(model: Any, processor: Any, seed: int) -> dict[str, float]:
    """Score a model on held-out conversations and print the table.

    Returns:
        Shares of exact answers: each kind, "over all" ("which" included), and those with other images in their place,
        "colour, swapped" and so on.
    """
    conversations = scoring.held_out_conversations(seed, HELD_OUT)
    changes: dict[str, Callable] = {
        "exact": list,
        "swapped": scoring.swapped,
        "others": scoring.others,
        "blank": scoring.blank,
    }
    scores = {name: scoring.score(model, processor, conversations, change) for name, change in changes.items()}
    print(f"  {'':10}{'answers':>8}" + "".join(f"{name:>9}" for name in scores))
    figures: dict[str, float] = {}
    for label, kinds in [*((kind, [kind]) for kind in KINDS), ("over all", KINDS)]:
        shares = {name: score.share(*kinds) for name, score in scores.items()}
        figures |= {label if name == "exact" else f"{label}, {name}": share for name, share in shares.items()}
        asked = sum(scores["exact"].asked[kind] for kind in kinds)
        print(f"  {label:10}{asked:8}" + "".join(f"{share:9.1%}" for share in shares.values()))
    figures["which, by chance"] = scoring.chance_of_which(conversations)
    print(
        "  swapped, others, blank: the images change places, are replaced by others, or show nothing, while the answers\n"
        "  that count as exact stay those about the first. Where images change places, all of these become wrong.\n"
        f"  which: {figures['which']:.1%}, with blank images {figures['which, blank']:.1%}, with others "
        f"{figures['which, others']:.1%}, by chance {figures['which, by chance']:.1%}.\n"
        f"  Aims: {AIMS}."
    )
    return figures


def missed_floors(figures: dict[str, float]) -> list[str]:
    """A sentence for each figure of `measure` that is not good enough."""
    low = [(name, "at least", floor) for name, floor in FLOORS.items() if figures[name] < floor]
    high = [(name, "at most", limit) for name, limit in CEILINGS.items() if figures[name] > limit]
    return [
        f"It has not learnt: {name} is {figures[name]:.1%}, expected {word} {limit:.0%}." for name, word, limit in low + high
    ]


def write_talk(folder: Path, seed: int) -> Path:
    """Write a held-out conversation about two images for talk.py: a direct question, then a "which"."""
    folder.mkdir(parents=True)
    for attempt in itertools.count():
        talk = converse(f"{seed}/talk/{attempt}", images=2, held_out=True)
        direct = [question for question in talk["questions"] if question.kind != "which"]
        which = [question for question in talk["questions"] if question.kind == "which"]
        if direct and which:
            break
    first, second = direct[0], which[0]
    names = ["image 1.png", "image 2.png"]
    for name, image in zip(names, talk["drawn"], strict=True):
        image.save(folder / name)
    rounds = [
        {"images": names, "question": first.text, "truth": first.answer},
        {"images": [], "question": second.text, "truth": second.answer},
    ]
    path = folder / "conversation.json"
    path.write_text(json.dumps({"system": SYSTEM, "rounds": rounds}, indent=2), encoding="utf-8")
    return path


def _step(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    # Threads that wait busily make this twenty times slower beside another process on the same cores. The setting is read
    # when torch is loaded, which has happened by now: start again with it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
