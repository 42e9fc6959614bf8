"""The whole path in five minutes: parts, `dsvl compose`, Trainer, scores on held-out conversations, a fresh process.

python -m dsvl.demo [--output demo_output] [--seed 0]
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from .. import save_checkpoint
from ..cli import main as dsvl
from . import parts, scoring
from .drawing import SYSTEM, converse
from .fresh_process import run_without_dsvl
from .learning import fine_tune
from .photographs import show_photographs

HELD_OUT = 300  # conversations

# What a run must reach, with room for seeds; what is aimed at stands beside it in the table.
FLOORS = {"over all": 0.85, "colour": 0.9, "shape": 0.9, "count": 0.9}
CEILINGS = {"colour, swapped": 0.1, "shape, swapped": 0.1}


def main() -> int:
    """Run the demo; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dsvl.demo", description=__doc__, formatter_class=_Verbatim)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="a new directory (default demo_output)")
    parser.add_argument("--overwrite", action="store_true", help="remove the output directory of an earlier run first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1300, help="of the optimizer")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    output: Path = arguments.output
    if arguments.overwrite and (output / "figures.json").exists():
        shutil.rmtree(output)
    if output.exists() and any(output.iterdir()):
        print(f"{output} is not empty; choose another --output, or pass --overwrite after a complete run.", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()  # of loading and saving; training shows its own
    started, started_cpu = time.monotonic(), time.process_time()

    _step("A small CLIP tower, and a small LLaMA with a tokenizer of the demo's words")
    parts.seeded(arguments.seed)
    parts.save_tower(output / "parts" / "tower")
    parts.save_language_model(output / "parts" / "language_model")

    _step("dsvl compose")
    places = ["--vision", output / "parts" / "tower", "--language", output / "parts" / "language_model"]
    if dsvl(["compose", *map(str, places), "--out", str(output / "composed"), "--number-after"]):
        return 1

    _step("Fine-tuning with the Trainer")
    model = AutoModelForImageTextToText.from_pretrained(output / "composed")
    processor = AutoProcessor.from_pretrained(output / "composed")
    fine_tune(model, processor, output / "training", arguments.seed, arguments.steps)

    _step(f"Exact answers in {HELD_OUT} held-out conversations")
    figures = measure(model, processor, arguments.seed)
    save_checkpoint(model, processor, output / "checkpoint")

    _step("A fresh process, without this package")
    run_without_dsvl(Path(__file__).with_name("talk.py"), output / "checkpoint", write_talk(output / "talk", arguments.seed))

    _step("Real photographs, random weights")
    show_photographs(output / "photographs")

    minutes, cpu = (time.monotonic() - started) / 60, (time.process_time() - started_cpu) / 60
    (output / "figures.json").write_text(json.dumps(figures | {"minutes": minutes, "CPU minutes": cpu}, indent=2))
    _step(f"Done in {minutes:.1f} minutes ({cpu:.1f} of CPU time); the trained model is in {output / 'checkpoint'}")
    missed = missed_floors(figures)
    for sentence in missed:
        print(sentence, file=sys.stderr)
    return 1 if missed else 0


def measure(model: Any, processor: Any, seed: int) -> dict[str, float]:
    """Score a model on held-out conversations and print the table.

    Returns:
        Shares of exact answers: each kind, "over all" ("which" included), and with pictures swapped or blank.
    """
    conversations = scoring.held_out_conversations(seed, HELD_OUT)
    true, swapped, blank = (
        scoring.score(model, processor, conversations, change) for change in (list, scoring.swapped, scoring.blank)
    )
    figures = {"over all": true.share()}
    print(f"  {'':10}{'answers':>8}{'exact':>8}{'swapped':>9}{'blank':>8}")
    for kind in true.asked:
        figures |= {kind: true.share(kind), f"{kind}, swapped": swapped.share(kind), f"{kind}, blank": blank.share(kind)}
        row = f"{true.share(kind):8.1%}{swapped.share(kind):9.1%}{blank.share(kind):8.1%}"
        print(f"  {kind:10}{true.asked[kind]:8}{row}")
    total = f"{true.share():8.1%}{swapped.share():9.1%}{blank.share():8.1%}"
    print(f"  {'over all':10}{sum(true.asked.values()):8}{total}")
    print("  swapped: every picture stands in another's place, and the answers to the first order no longer hold.")
    print("  aims: 90% over all, 95% colour, shape and count, 85% which; swapped colours and shapes at most 10%.")
    return figures


def missed_floors(figures: dict[str, float]) -> list[str]:
    """A sentence for each figure of `measure` that is not good enough."""
    low = [(name, figures[name], "at least", floor) for name, floor in FLOORS.items() if figures[name] < floor]
    high = [(name, figures[name], "at most", limit) for name, limit in CEILINGS.items() if figures[name] > limit]
    return [
        f"It has not learnt: {name} is {value:.1%}, expected {word} {limit:.0%}." for name, value, word, limit in low + high
    ]


def write_talk(folder: Path, seed: int) -> Path:
    """Write a held-out conversation of two rounds about two pictures, for talk.py."""
    folder.mkdir(parents=True)
    attempt = 0
    while True:  # a direct question first, then a "which"
        talk = converse(f"{seed}/talk/{attempt}", pictures=2, held_out=True)
        direct = [question for question in talk["questions"] if question.kind != "which"]
        which = [question for question in talk["questions"] if question.kind == "which"]
        if direct and which:
            break
        attempt += 1
    names = [f"picture_{number + 1}.png" for number in range(2)]
    for name, image in zip(names, talk["images"], strict=True):
        image.save(folder / name)
    rounds = [
        {"pictures": names if first else [], "question": question.text, "truth": question.answer, "system": SYSTEM}
        for first, question in ((True, direct[0]), (False, which[0]))
    ]
    path = folder / "conversation.json"
    path.write_text(json.dumps(rounds, indent=2), encoding="utf-8")
    return path


class _Verbatim(argparse.RawDescriptionHelpFormatter):
    pass


def _step(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
