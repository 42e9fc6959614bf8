"""Runs: each trains one arm from the shared parts, measures it on held-out items, and writes a file of its own."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import device_name, device_type
from trained_tasks import as_pixels, fit
from transformers import set_seed

from attention_quality.arms import ARMS, Form, Title, heading_ids, name_numbers
from attention_quality.language import Encoder, answers_right, padded, text_perplexity
from attention_quality.parts import SharedParts, load_parts, read_record
from attention_quality.plan import (
    STAGES,
    Record,
    Run,
    as_json,
    chosen_rates,
    code_hash,
    item_sets,
    mean_accuracy,
    path_of,
    read_records,
    read_step_times,
    runs_of,
)
from attention_quality.scenes import (
    Conversation,
    Sprites,
    generator_hash,
    held_out_conversation,
    training_conversation,
)
from attention_quality.sizes import SIZES_OF_EXPERIMENT, Size
from attention_quality.versions import comparable
from dsvl import compose
from dsvl.training.adapters import lora_config

LORA_RANK = 16
EVALUATED_TOKENS = 65536  # of a batch of items


# ----------------------------------------------------------------------------------------------------------------------
# Models and batches


def compose_arm(parts: SharedParts, arm: str, seed: int, mode: str = "frozen") -> tuple[Any, Any]:
    """The model of an arm, with its trainable parts set, and its processor.

    Args:
        parts: which become part of the model.
        arm: of `ARMS`.
        seed: of the projector and the adapters.
        mode: of `plan.MODES`.
    """
    set_seed(seed)
    core = ARMS[arm].core
    model, processor = compose(
        parts.tower,
        parts.language,
        tokenizer=parts.tokenizer,
        image_processor=parts.image_processor,
        projector_type="mlp",
        multimodal_attention=core or "causal",
        image_positions="image",  # so that 64 images take no more positions than their texts do
        vision_feature_select_strategy="default",
        numbered_images=len(heading_ids(parts.tokenizer)) if ARMS[arm].is_numbered else 0,
        number_after=True,  # for all arms, as image tokens do not see the number before them in some
    )
    if ARMS[arm].is_numbered:
        name_numbers(model, processor.tokenizer)
    model.set_attn_implementation("sdpa")
    model.to(device_type())
    if core is None:
        Form(arm, model)
    if device_type() == "cuda":
        model.compile_decoder_layers(dynamic=True)
    is_full = mode == "full"
    model.set_trainable(projector=True, embeddings=True, language_model=is_full, lm_head=is_full)
    if mode == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(model, LORA_RANK))
    if ARMS[arm].has_title:
        Title(model.get_base_model() if mode == "lora" else model)
    return model, processor


class Batches:
    """Batches of conversations on the device.

    Args:
        size: of the experiment.
        tokenizer: with the image token.
        sprites: the drawings, on the device.
    """

    def __init__(self, size: Size, tokenizer: Any, sprites: Sprites) -> None:
        self.size, self.sprites = size, sprites
        self.encoder = Encoder(tokenizer, size.tokens_per_image)

    def make(self, conversations: Sequence[Conversation]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """`input_ids` and `pixel_values`, and which tokens are an answer's, (rows, tokens), on the host."""
        encoded = [self.encoder.conversation(conversation) for conversation in conversations]
        ids = torch.from_numpy(padded([ids for ids, _ in encoded], self.encoder.ids["<pad>"]))
        answers = torch.from_numpy(padded([answers for _, answers in encoded], 0)).bool()
        cells = torch.cat([torch.from_numpy(conversation.cells) for conversation in conversations])
        inputs = {
            "input_ids": ids.to(device_type(), non_blocking=True),
            "pixel_values": as_pixels(self.sprites.images(cells)),
        }
        return inputs, answers

    def training(self, seed: int, indexes: Sequence[int]) -> dict[str, torch.Tensor]:
        """Conversations of the training data, with labels. Those of a batch have equally many images."""
        size = self.size
        images = images_of_batch(size, seed, indexes[0] // size.batch)
        made = [training_conversation(size.world, seed, index, images, size.questions) for index in indexes]
        inputs, answers = self.make(made)
        labels = inputs["input_ids"].masked_fill(~answers.to(device_type(), non_blocking=True), -100)
        return inputs | {"labels": labels}

    @torch.inference_mode()
    def right(self, model: Any, conversations: Sequence[Conversation]) -> str:
        """Which conversations of one question get their answer, "1" or "0" for each."""
        bits: list[bool] = []
        tokens = len(conversations[0].scenes) * (self.size.tokens_per_image + 2) + 40
        rows = max(1, EVALUATED_TOKENS // tokens)
        for start in range(0, len(conversations), rows):
            inputs, answers = self.make(conversations[start : start + rows])
            bits += answers_right(
                lambda inputs=inputs, **kept: model(**inputs, use_cache=False, **kept).logits, inputs["input_ids"], answers
            )
        return "".join("01"[bit] for bit in bits)


def images_of_batch(size: Size, seed: int, batch: int) -> int:
    """The number of images in each conversation of a batch of the training data."""
    return random.Random(f"images/{seed}/{batch}").choice(size.images)


def order_of_batches(size: Size, run: Run) -> list[list[int]]:
    """The conversations of each step: all of them once, and again in another order until there are
    `least_steps`; or the first `share` of these."""
    batches = [list(range(start, start + size.batch)) for start in range(0, run.conversations, size.batch)]
    steps = round(run.share * max(size.least_steps, len(batches)))
    order: list[list[int]] = []
    rng = random.Random(f"order/{run.seed}/{run.conversations}")
    while len(order) < steps:
        order += rng.sample(batches, len(batches))
    return order[:steps]


@cache
def held_out_items(size_name: str, task: str, images: int, count: int) -> tuple[Conversation, ...]:
    """Items of a task, the same for all runs."""
    world = SIZES_OF_EXPERIMENT[size_name].world
    return tuple(held_out_conversation(world, task, images, index) for index in range(count))


def measure_items(model: Any, batches: Batches, size_name: str, on_curve: bool = False) -> dict[str, str]:
    """Every item's result, by task: "1" where the answer was right, else "0".

    Args:
        model: in evaluation mode.
        batches: of the experiment.
        size_name: of `SIZES_OF_EXPERIMENT`.
        on_curve: the first items alone, for a learning curve.
    """
    size = SIZES_OF_EXPERIMENT[size_name]
    count, count_distractors = (
        (size.curve_items, max(4, size.distractor_items // 8)) if on_curve else (size.items, size.distractor_items)
    )
    return {
        key: batches.right(model, held_out_items(size_name, task, images, number))
        for key, task, images, number in item_sets(size, count, count_distractors)
    }


# ----------------------------------------------------------------------------------------------------------------------
# One run


def do_run(run: Run, parts_folder: Path) -> Record:
    """Train and measure; returns what its file holds."""
    torch.compiler.reset()  # graphs of earlier runs would count as graphs of this one's layers, whose number is limited
    parts = load_parts(parts_folder)
    size, size_name, tokenizer = parts.size, parts.record["size"], parts.tokenizer
    model, _ = compose_arm(parts, run.arm, run.seed, run.mode)
    batches = Batches(size, tokenizer, Sprites(size.world).to(device_type()))
    order = order_of_batches(size, run)
    times = [round(len(order) * (point + 1) / size.curve) for point in range(size.curve)]
    curve: list[Record] = []
    losses: list[torch.Tensor] = []
    step, measuring = 0, 0.0

    def measure_curve() -> None:
        nonlocal measuring
        started = time.monotonic()
        model.eval()
        curve.append({"step": step, "items": measure_items(model, batches, size_name, on_curve=True)})
        model.train()
        measuring += time.monotonic() - started

    def make_batch(done: float) -> dict[str, torch.Tensor]:
        nonlocal step
        if step in times:
            measure_curve()
        batch = batches.training(run.seed, order[step])
        step += 1
        return batch

    def keep_loss(module: Any, args: Any, outputs: Any) -> None:
        if outputs.loss is not None:
            losses.append(outputs.loss.detach())

    hook = model.register_forward_hook(keep_loss)
    training = fit(model, make_batch, len(order), None, run.learning_rate, run.name)
    hook.remove()
    measure_curve()
    model.eval()
    per_point = [float(torch.stack(list(part)).mean()) for part in torch.stack(losses).tensor_split(size.curve)]
    record = {
        "run": as_json(run),
        "size": size_name,
        "items": measure_items(model, batches, size_name),
        "curve": curve,
        "loss": per_point,
        "perplexity": text_perplexity(model, tokenizer, size),
        "steps": training["steps"],
        "seconds": training["seconds"] - measuring,  # side by side with other runs
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "device": device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return record | fingerprints(parts.record)


def fingerprints(parts_record: Record) -> Record:
    """What has to be the same in two runs to be compared: data, code and parts."""
    size = SIZES_OF_EXPERIMENT[parts_record["size"]]
    return {"generator": generator_hash(size.world), "code": code_hash(), "parts": parts_record["weights"]}


# ----------------------------------------------------------------------------------------------------------------------
# Many runs


def missing_runs(stage_name: str, results: Path, conversations: int | None = None) -> list[Run]:
    """The runs of a stage whose files do not exist.

    Args:
        stage_name: of `STAGES`.
        results: folder of the results.
        conversations: instead of the stage's, for a tiny version; learning rates are chosen from runs with as many.
    """
    stage, records = STAGES[stage_name], read_records(results)
    if conversations is None:
        rates = chosen_rates(records)
    else:
        stage, rates = replace(stage, conversations=(conversations,)), chosen_rates(records, conversations)
    runs = runs_of(stage, rates, read_step_times(results))
    return [run for run in runs if not path_of(run, results).exists()]


def do_runs(runs: Sequence[Run], parts: Path, results: Path, deadline: float = float("inf")) -> int:
    """Do runs one after the other; returns how many failed. None is started that would probably end after the deadline.

    Args:
        runs: those whose file exists meanwhile are skipped.
        parts: folder of the parts.
        results: folder of the results, which must be of the same data and code.
        deadline: of `time.monotonic`.
    """
    mark, failed = fingerprints(read_record(parts)), 0
    for record in read_records(results):
        if different := [key for key, value in comparable(record).items() if value != mark[key]]:
            raise ValueError(
                f"{results} holds runs of another {' and '.join(different)}, such as {Run(**record['run']).name}; results "
                "of several versions do not compare, so pass another --results."
            )
    longest: dict[int, float] = {}
    (results / "runs").mkdir(parents=True, exist_ok=True)
    for run in runs:
        path = path_of(run, results)
        left = deadline - time.monotonic()
        if path.exists():
            continue
        if left < longest.get(run.conversations, 0):
            print(f"{run.name}: not started, {left:.0f} s are left", flush=True)
            continue
        started = time.monotonic()
        try:
            record = do_run(run, parts)
        except (RuntimeError, ValueError) as error:  # out of memory, say: the other runs go on, and the report names it
            message = f"{type(error).__name__}: {error}"
            print(f"{run.name}: failed: {message}", file=sys.stderr, flush=True)
            failure_of(path).write_text(message + "\n")
            failed += 1
            continue
        failure_of(path).unlink(missing_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text(json.dumps(record) + "\n")
        unfinished.rename(path)
        longest[run.conversations] = max(longest.get(run.conversations, 0), time.monotonic() - started)
        took = time.monotonic() - started
        print(f"{run.name}: {mean_accuracy(record['items']):.1%}, {took:.0f} s", flush=True)
    return failed


def failure_of(path: Path) -> Path:
    """Where the reason is written, if a run of this file failed."""
    return path.with_suffix(".failed")


def visible_gpus() -> list[str]:
    """What names each GPU of this process in `CUDA_VISIBLE_DEVICES`; empty without GPUs."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def do_side_by_side(runs: Sequence[Run], arguments: Sequence[str], at_once: int, deadline: float) -> int:
    """Start `at_once` processes of this command, each with its part of the runs; they take turns on the GPUs. Those that
    still run at the deadline are stopped, and their unfinished runs leave no file. Returns how many processes failed.

    Args:
        runs: to be done.
        arguments: of the command, but for the names of the runs.
        at_once: number of processes.
        deadline: of `time.monotonic`.
    """
    command = [sys.executable, "-m", "attention_quality", "runs", *arguments, "--only"]
    parts = [[run.name for run in runs[index::at_once]] for index in range(min(at_once, len(runs)))]
    gpus = visible_gpus()
    workers = []
    for index, names in enumerate(parts):
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {})
        workers.append(subprocess.Popen([*command, *names], env=environment))
    failed = 0
    for worker in workers:
        try:
            failed += worker.wait(None if deadline == float("inf") else max(0.0, deadline - time.monotonic())) != 0
        except subprocess.TimeoutExpired:
            worker.terminate()
            worker.wait()
            print("A process was stopped at the end of the budget; its unfinished run is missing.", flush=True)
    return failed
