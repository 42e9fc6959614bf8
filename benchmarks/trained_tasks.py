"""Small models that are trained from scratch, and how their runs are scheduled: for small_print.py, distractors.py and
red_ball.py, which measure what a model learns."""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import device_type
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from dsvl import compose
from dsvl.demo.tiny_models import train_tokenizer
from dsvl.projectors_dsvl import sincos_position_table

TOWER_HEAD_DIM = 32  # as in the demo
WARM_UP = 0.05  # fraction of a training
REPORTS = 20  # lines that a training prints
CHECKS = 4  # of them have figures beside the loss


# ----------------------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class Parts:
    """Sizes of a CLIP tower and a LLaMA; the defaults are those of `python -m dsvl.demo`.

    Attributes:
        image_size, patch_size: in pixels.
        tower_width, tower_layers: of the tower.
        width, layers, head_dim: of the language model.
        rope_theta: a small base rotates fast, which tells neighbours apart. Tokens that are found by what they are, at any
            distance, need channels that hardly rotate over it, so a large base and wider heads.
        max_positions: of the language model.
    """

    image_size: int = 32
    patch_size: int = 16
    tower_width: int = 64
    tower_layers: int = 2
    width: int = 128
    layers: int = 3
    head_dim: int = 32
    rope_theta: float = 500.0
    max_positions: int = 1024


def compose_parts(parts: Parts, texts: Sequence[str], vocab_size: int = 512, **options: Any) -> tuple[Any, Any]:
    """A model of random weights, all of them trainable, and its processor.

    Args:
        parts: the sizes.
        texts: what the tokenizer is trained on. Each word of the demo's pattern becomes a token, if `vocab_size` allows.
        vocab_size: of the tokenizer, at most.
        options: of `dsvl.compose`.
    """
    tokenizer = train_tokenizer(list(texts), vocab_size)
    side = {"height": parts.image_size, "width": parts.image_size}
    # The white background becomes 0, so that empty patches differ in their position only.
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": parts.image_size}, crop_size=side, image_mean=[1.0] * 3, image_std=[0.5] * 3
    )
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=parts.width,
        intermediate_size=2 * parts.width,
        num_hidden_layers=parts.layers,
        num_attention_heads=parts.width // parts.head_dim,
        max_position_embeddings=parts.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": parts.rope_theta},
        attention_bias=True,  # a distance can be attended to, whatever the tokens are
        tie_word_embeddings=True,  # a token is copied before its row of a head could be trained
        initializer_range=0.08,  # with the usual 0.02, attention would be almost uniform at this width
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, processor = compose(
        random_tower(parts),
        LlamaForCausalLM(text_config),
        tokenizer=tokenizer,
        image_processor=image_processor,
        number_after=True,
        **options,
    )
    model.set_trainable(projector=True, embeddings=True, vision_tower=True, language_model=True, lm_head=True)
    model.set_attn_implementation("sdpa")
    return model.to(device_type()), processor


def random_tower(parts: Parts) -> CLIPVisionModel:
    """A CLIP tower. Its learned positions start as sines and cosines of row and column, without which a tower of many
    patches would first have to learn which of them are neighbours."""
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=parts.tower_width,
            intermediate_size=2 * parts.tower_width,
            num_hidden_layers=parts.tower_layers,
            num_attention_heads=parts.tower_width // TOWER_HEAD_DIM,
            image_size=parts.image_size,
            patch_size=parts.patch_size,
        )
    )
    positions = tower.get_parameter(
        next(name for name, _ in tower.named_parameters() if name.endswith("position_embedding.weight"))
    )
    with torch.no_grad():
        positions[1:] = sincos_position_table(parts.image_size // parts.patch_size, parts.tower_width)
    return tower


def as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """What the image processor of `compose_parts` normalized, before that: uint8, for less memory."""
    return (255 * (0.5 * pixels + 1)).round().clamp(0, 255).to(torch.uint8)


def as_pixels(values: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_bytes`."""
    return values.float().div_(127.5).sub_(2)


def precision() -> AbstractContextManager:
    """bfloat16 where that is fast, with weights in float32."""
    return torch.autocast("cuda", torch.bfloat16) if device_type() == "cuda" else nullcontext()


# ----------------------------------------------------------------------------------------------------------------------
# Training


def fit(
    model: Any,
    make_batch: Callable[[float], dict[str, torch.Tensor]],
    steps: int,
    minutes: float | None = None,
    learning_rate: float = 3e-3,
    label: str = "",
    check: Callable[[], str] | None = None,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
) -> dict[str, float]:
    """Train a model with a cosine schedule.

    Args:
        model: all its trainable parameters are trained.
        make_batch: makes a batch from the fraction of the training that is done, a number from 0 to 1.
        steps: of the optimizer.
        minutes: the schedule ends earlier, if the steps take longer than this.
        learning_rate: the highest.
        label: in front of what is printed.
        check: what to print beside the loss, in evaluation mode.
        optimizers: of all that is trained; AdamW by default.

    Returns:
        The `steps` that were done, their `seconds`, and the `loss` of the last twentieth.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizers is None:
        optimizers = [torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)]
    model.train()
    started = reported = time.monotonic()
    losses: list[torch.Tensor] = []
    step, done, loss = 0, 0.0, math.nan
    while done < 1:
        before = done
        rate = min(done / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * done))
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            group["lr"] = learning_rate * max(rate, 0.01)
        batch = make_batch(done)
        with precision():
            outputs = model(**batch, use_cache=False)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(outputs.loss.detach())
        step += 1
        done = max(step / steps, (time.monotonic() - started) / 60 / minutes if minutes else 0)
        if int(done * REPORTS) > int(before * REPORTS):
            loss = float(torch.stack(losses).mean())
            rate = len(losses) / (time.monotonic() - reported)
            text = f"{label} {min(done, 1):4.0%} step {step}, loss {loss:.3f}, {rate:.1f} steps/s"
            if check is not None and int(done * CHECKS) > int(before * CHECKS):
                model.eval()
                text += ", " + check()
                model.train()
            print(text, flush=True)
            losses, reported = [], time.monotonic()
    model.eval()
    return {"steps": step, "seconds": time.monotonic() - started, "loss": loss}


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def side_by_side(script: str, runs: dict[str, list[str]], minutes: float | None = None, at_once: int = 8) -> dict[str, Any]:
    """Run a benchmark once for each configuration, in processes side by side. One that fails costs its own row alone.

    Args:
        script: the benchmark's file, which takes `--out`.
        runs: name -> flags.
        minutes: after which a run is stopped.
        at_once: how many run at the same time.

    Returns:
        name -> what the run wrote as its results, or {"failed": reason}.
    """
    results: dict[str, Any] = {}
    slots = threading.Semaphore(at_once)

    def run(name: str, flags: list[str], folder: Path) -> None:
        out, errors = folder / "results.json", folder / "errors.txt"
        with slots, errors.open("w") as stream:
            command = [sys.executable, script, *flags, "--out", str(out)]
            try:
                subprocess.run(command, check=True, stderr=stream, timeout=60 * minutes if minutes else None)
                results[name] = json.loads(out.read_text())["results"]
            except subprocess.TimeoutExpired:
                results[name] = {"failed": f"not done after {minutes:g} minutes"}
            except subprocess.CalledProcessError as error:
                said = errors.read_text().strip()
                print(f"{name}: {said}", file=sys.stderr, flush=True)
                results[name] = {"failed": said.rpartition("\n")[2] or f"exit status {error.returncode}"}

    with tempfile.TemporaryDirectory() as directory:
        threads = []
        for number, (name, flags) in enumerate(runs.items()):
            folder = Path(directory) / str(number)
            folder.mkdir()
            threads.append(threading.Thread(target=run, args=(name, flags, folder)))
            threads[-1].start()
        for thread in threads:
            thread.join()
    return {name: results[name] for name in runs}


def as_flags(options: argparse.Namespace, **changes: Any) -> list[str]:
    """The flags that give these options, with some of them changed; `out` is left to `side_by_side`."""
    flags: list[str] = []
    for name, value in (vars(options) | changes).items():
        if name != "out" and value is not False and value is not None:
            flags.append(f"--{name.replace('_', '-')}")
            flags += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return flags


def add_training_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """The flags that all trainings have in common."""
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps of a training (default {steps})")
    parser.add_argument("--minutes", type=float, help="of a training at most; its schedule ends then (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    parser.add_argument("--out", help="JSON file for the results")


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; fractions are written as percentages."""

    def text(cell: object) -> str:
        return f"{cell:.1%}" if isinstance(cell, float) else str(cell)

    lines = [list(map(text, row)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(head), ["---"] * len(head), *lines])
