"""Hundreds of images: CLIP ViT-L/14 + LLaMA-7B shapes in bf16, batch 1. Training with activation checkpointing, and answers.

    python benchmarks/many_images.py [--rows llava dsvl+tiles+queries] [--images 64 500] [--out many_images.json]
    python benchmarks/many_images.py --what answer [--rows 16bit 8bit+shared] [--out many_images_answer.json]
    python benchmarks/many_images.py --tiny    # only checks that every row runs, on a CPU too

A training step is forward and backward, of a sample with --text tokens of text beside its images. Projector and embeddings
are trained, tower and decoder are frozen. The name of a row is `MODEL[+LEVER...]`:

    llava      transformers' Llava with sdpa, as it comes
    dsvl       DSVL with "mmca"
    +tiles     MLPs in tiles of --tile tokens (`dsvl train --tiled-mlp`)
    +queries   no queries of image tokens (`--skip-image-queries`)
    +offload   checkpoints in main memory (`--offload-activations`)
    +compiled  compiled decoder layers (`--compile-decoder-layers`)
    +liger     Liger's kernels in the decoder (`--use-liger-kernel`)

Each row runs in its own process, from few images to many: where memory ends, the row ends. A compiled row warms up for each
number of images, others for the first; steps of more than 12 s are timed once, others twice. The table has the time of a
step, TFLOP/s by flops.py with the attention of the model, peak allocated and reserved memory with weights, and time relative
to the first row with as many images. --gpu-memory caps the memory of the process, as a smaller GPU would.

With `--what answer`, images are encoded once and a prompt over them is answered greedily, with a dynamic KV cache. The name
of a row is `BITS[+OPTION...]`:

    16bit, 8bit  images in the model's dtype, or `quantize=True`
    +shared      the KV cache uses the images where they are (`SharedImagesCache`), as it always does in 8 bits
    +offloaded   images in main memory (`offload=True`)
    +kv8         a model with 8 key-value heads

The table has the time to the first token and of each further one in a second answer, the time to encode all images, their
memory, and the peak of the answer with weights and images.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import answer_many_images as answers
import torch
from fine_tuning import TINY, device_type, synchronize
from flops import attention_pairs, step_flops, supervised_tokens
from models import Shape, dsvl, llava

LEVERS = ("tiles", "queries", "offload", "compiled", "liger")
# Row -> numbers of images. With a compiler, Llava is measured at the ends only, as each number waits for the compiler.
ROWS = {
    "llava": (64, 128, 250, 500),
    "dsvl+tiles+queries+offload+compiled": (64, 128, 250, 500, 1000),
    "llava+compiled": (64, 500),
}
TINY_IMAGES = (3, 6)
ONCE_ABOVE = 12.0  # seconds of a step that is timed only once


@dataclass(frozen=True)
class Row:
    model: str
    levers: frozenset[str]

    @classmethod
    def parse(cls, name: str) -> "Row":
        model, *levers = name.split("+")
        allowed = LEVERS if model == "dsvl" else ("compiled",)
        if model not in ("llava", "dsvl") or not set(levers) <= set(allowed) or len(levers) > len(set(levers)):
            raise ValueError(
                f"{name!r} is not a row; expected llava[+compiled], or dsvl with any of +{', +'.join(LEVERS)}, such as "
                f"{list(ROWS)[1]}."
            )
        return cls(model, frozenset(levers))


# ----------------------------------------------------------------------------------------------------------------------
# One row, in its own process


def sample(shape: Shape, text: int, device: str) -> dict[str, torch.Tensor]:
    """A sample: half of the text is spread between the images, the rest follows; its last quarter is supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, shape.image_token_id, (1, shape.tokens), generator=generator)
    between = text // 2
    for number in range(shape.images):
        start = between * (number + 1) // max(shape.images, 1) + number * shape.per_image
        ids[:, start : start + shape.per_image] = shape.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -max(text // 4, 1) :] = ids[:, -max(text // 4, 1) :]
    size = (shape.images, 3, shape.image_size, shape.image_size)
    pixels = torch.randn(size, generator=generator).to(torch.bfloat16)
    return {"input_ids": ids.to(device), "labels": labels.to(device), "pixel_values": pixels.to(device)}


def build(row: Row, shape: Shape, tile: int) -> Any:
    """The model of a row on the device, with checkpointing and its levers."""
    device = device_type()
    model: Any = dsvl(shape, "mmca", "sdpa", device) if row.model == "dsvl" else llava(shape, device)
    if "liger" in row.levers:
        from dsvl.training.liger import use_liger

        use_liger(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    if row.model == "dsvl":
        model.reduce_memory(
            mlp_tile=tile if "tiles" in row.levers else None,
            offload="offload" in row.levers,
            skip_image_queries="queries" in row.levers,
        )
        if "compiled" in row.levers:
            model.compile_decoder_layers()
    elif "compiled" in row.levers:
        for layer in model.model.language_model.layers:
            layer.compile()
    return model


def step(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Forward and backward; returns the loss when the device is done."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    synchronize()
    return float(loss)


def gib(which: str) -> float | None:
    return getattr(torch.cuda, which)() / 2**30 if torch.cuda.is_available() else None


def measure(row: Row, model: Any, shape: Shape, text: int, warm_up: bool) -> dict[str, Any]:
    """Time steps of one number of images."""
    batch = sample(shape, text, device_type())
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    losses = [step(model, batch)] if warm_up else []
    warm_up_seconds = time.perf_counter() - began if warm_up else None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < (1 if times and times[0] > ONCE_ABOVE else 2):
        synchronize()
        began = time.perf_counter()
        losses.append(step(model, batch))
        times.append(time.perf_counter() - began)
    if not all(math.isfinite(loss) and loss > 0 for loss in losses):
        raise RuntimeError(f"The losses of {row} at {shape.images} images are {losses}; expected positive ones.")
    seconds = min(times)
    types = (batch["input_ids"] == shape.image_token_id).long()
    # With hundreds of images causal attention would be most of the work, and MMCA has almost none of it.
    pairs = attention_pairs(types, "mmca" if row.model == "dsvl" else "causal")
    return {
        "ms": 1000 * seconds,
        "all_ms": [1000 * one for one in times],
        "warm_up_seconds": warm_up_seconds,
        "loss": losses[-1],
        "tokens": shape.tokens,
        "tflop_per_s": step_flops(shape, supervised_tokens(batch["labels"]), pairs=pairs) / seconds / 1e12,
        "peak_gib": gib("max_memory_allocated"),
        "reserved_gib": gib("max_memory_reserved"),
        "host_gib": host_gib(model),
    }


def host_gib(model: Any) -> float:
    """Main memory that the offloaded activations reserve."""
    from dsvl.acceleration.memory.activation_offloading import ActivationOffloading

    hooks = [getattr(hook, "__self__", None) for hook in model.model.language_model._forward_pre_hooks.values()]
    return sum(hook.nbytes for hook in hooks if isinstance(hook, ActivationOffloading)) / 2**30


def measure_row(name: str, numbers: list[int], shape: Shape, options: argparse.Namespace) -> None:
    """Measure a row in this process, and write its results after each number of images."""
    is_answer, results = options.what == "answer", {}
    row = None if is_answer else Row.parse(name)
    if torch.cuda.is_available() and options.gpu_memory is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(options.gpu_memory * 2**30 / total, 1.0))
    shapes = {images: replace(shape, images=images, tokens=options.text + images * shape.per_image) for images in numbers}
    largest = shapes[max(numbers)]
    model = answers.build(name, answers.row_shape(name, largest)) if row is None else build(row, largest, options.tile)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for images in sorted(numbers):
        try:
            if row is None:
                results[images] = answers.measure(name, model, sample(shapes[images], options.text, device_type()))
            else:
                warm_up = "compiled" in row.levers or "offload" in row.levers or not results
                results[images] = measure(row, model, shapes[images], options.text, warm_up)
        except torch.OutOfMemoryError as error:
            results[images] = {"error": f"out of memory: {str(error).splitlines()[0]}"}
        Path(options.out).write_text(json.dumps({"device": device, "results": results}))
        if "error" in results[images]:
            return


# ----------------------------------------------------------------------------------------------------------------------
# All rows


def in_own_process(name: str, numbers: list[int], timeout: float) -> dict[str, Any]:
    """Run a row in its own process; returns its results, with `error` if it ended early."""
    environment = os.environ | ({} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"})
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "row.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--row", name, "--row-images", *map(str, numbers)]
        error = None
        try:
            done = subprocess.run(
                [*command, "--out", str(out)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
            said = [line for line in done.stdout.splitlines() if line.strip()]
            if done.returncode:
                error = {"error": said[-1] if said else f"exit status {done.returncode}", "log": said[-40:]}
        except subprocess.TimeoutExpired:
            error = {"error": f"took more than {timeout:.0f} s"}
        result = json.loads(out.read_text()) if out.exists() else {"device": None, "results": {}}
    if error is not None:
        missing = [str(number) for number in sorted(numbers) if str(number) not in result["results"]]
        result["results"] |= {number: error for number in missing[:1]}
    return result


HEADER = (
    f"{'':38}{'images':>7}{'ms':>10}{'TFLOP/s':>9}{'peak GiB':>10}{'reserved':>10}{'host GiB':>10}{'loss':>9}{'speed':>7}"
)


def describe(name: str, images: str, figures: dict[str, Any], base: dict[str, Any] | None) -> str:
    """One line of the table."""
    if "error" in figures:
        return f"{name:38}{images:>7}  {figures['error']}"

    def number(value: float | None, width: int, form: str) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}{form}}"

    speed = None if base is None or "ms" not in base else base["ms"] / figures["ms"]
    return (
        f"{name:38}{images:>7}{figures['ms']:10.1f}{figures['tflop_per_s']:9.3g}{number(figures['peak_gib'], 10, '.2f')}"
        f"{number(figures['reserved_gib'], 10, '.2f')}{figures['host_gib']:10.2f}{figures['loss']:9.4f}"
        f"{number(speed, 7, '.2f')}"
    )


def measure_all(options: argparse.Namespace, shape: Shape) -> bool:
    """Measure and print all rows until the budget is spent; returns whether no row failed, except for memory."""
    began = time.monotonic()
    results: dict[str, dict[str, dict[str, Any]]] = {}
    device = None
    is_answer = options.what == "answer"
    header = answers.HEADER if is_answer else HEADER
    print(f"{options.text} tokens of text, {shape.per_image} tokens per image\n\n{header}", flush=True)
    for name in options.rows:
        known = answers.ANSWER_ROWS if is_answer else ROWS
        numbers = options.images or (TINY_IMAGES if options.tiny else known.get(name, (64, 500)))
        left = options.budget - (time.monotonic() - began)
        if left < 20:
            results[name] = {str(min(numbers)): {"error": f"the budget of {options.budget:.0f} s is spent; --rows {name}"}}
        else:
            made = in_own_process(name, list(numbers), left)
            results[name], device = made["results"], made["device"] or device
        for images, figures in results[name].items():
            if is_answer:
                print(answers.describe(name, images, figures), flush=True)
            else:
                print(describe(name, images, figures, results[options.rows[0]].get(images)), flush=True)
        if options.out:
            record = {
                "device": device,
                "torch": torch.__version__,
                "options": {key: value for key, value in vars(options).items() if key not in ("out", "row", "row_images")},
                "shape": asdict(shape),
                "results": results,
            }
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{device}, torch {torch.__version__}, {time.monotonic() - began:.0f} s in total")
    failures = [figures["error"] for row in results.values() for figures in row.values() if "error" in figures]
    return all(failure.startswith("out of memory") for failure in failures)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("train", "answer"), default="train")
    parser.add_argument("--rows", nargs="+", help="names of rows, in this order")
    parser.add_argument("--images", type=int, nargs="+", help="numbers of images of every row")
    parser.add_argument("--tiny", action="store_true", help="use a tiny shape, to check that every row runs")
    parser.add_argument("--text", type=int, help="tokens of text (default: 2048)")
    parser.add_argument("--tile", type=int, help="tokens of a tile of the MLPs (default: 8192)")
    parser.add_argument("--layers", type=int, help="layers of the decoder; fewer for a smaller GPU")
    parser.add_argument("--gpu-memory", type=float, help="memory in GiB that the process may use")
    parser.add_argument("--budget", type=float, default=530, help="seconds after which no row is started")
    parser.add_argument("--out", help="JSON file for the results")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--row-images", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.text = options.text or (32 if options.tiny else 2048)
    options.tile = options.tile or (16 if options.tiny else 8192)
    shape = replace(TINY if options.tiny else Shape(), batch=1)
    shape = replace(shape, layers=options.layers or shape.layers)
    options.rows = options.rows or list(answers.ANSWER_ROWS if options.what == "answer" else ROWS)
    if options.row is not None:
        measure_row(options.row, options.row_images, shape, options)
        return
    for name in options.rows:
        answers.parse(name) if options.what == "answer" else Row.parse(name)
    sys.exit(0 if measure_all(options, shape) else 1)


if __name__ == "__main__":
    main()
