"""Full training steps of DSVL and transformers' Llava at CLIP ViT-L/14 + LLaMA-7B size in bf16, with and without DeepSpeed.

    python benchmarks/fine_tuning.py [--rows llava zero2/dsvl+liger] [--attention-backend sdpa] [--out fine_tuning.json]
    DS_ACCELERATOR=cpu python benchmarks/fine_tuning.py --tiny    # only checks that every row runs

A step is forward, backward and AdamW's step. Projector and embeddings are trained, tower and decoder are frozen; with LoRA
adapters are trained as well. The name of a row is
`[lora/][zero2/|zero3/][checkpointing/]MODEL[+liger][+compiled][+everyN][+cached]`:

    lora           adapters at all linear layers of the decoder
    zero2, zero3   DeepSpeed with one process and the sizes that `dsvl train`, for Llava transformers, sets for "auto"
    checkpointing  gradient checkpointing of all layers
    MODEL          llava (with sdpa) or dsvl (MMCA, with --attention-backend)
    +liger         Liger's kernels in the decoder, and for Llava its fused loss
    +compiled      compiled decoder layers (`dsvl train --compile-decoder-layers`)
    +everyN        gradient checkpointing of every Nth layer
    +cached        image features from a cache (`dsvl train --cache-image-features`)

Each row runs in its own process, as an engine does not free all its memory. The table has the median, minimum and maximum
time of a step; tokens per second; MFU by flops.py; peak allocated memory, in total and without the model's bf16 weights;
speed and peak memory relative to plain Llava in the same setup (speed above 1 is faster, memory below 1 is less); and the
peak that `dsvl plan` estimates. The first row is repeated at the end, to show the drift of the machine.
"""

import argparse
import gc
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flops import peak_tflops, step_flops, supervised_tokens
from models import LORA_RANK, Shape, dsvl, inputs, llava, with_adapters

# The most important rows come first, in case the budget is exceeded. A baseline comes before the rows that use it.
ROWS = (
    "llava",
    "dsvl",
    "dsvl+compiled",
    "dsvl+liger",
    "dsvl+liger+cached",
    "dsvl+liger+every4",
    "llava+liger",
    "zero2/llava",
    "zero2/dsvl",
    "zero2/dsvl+compiled",
    "zero2/dsvl+liger+every4",
    "zero3/llava",
    "zero3/dsvl",
    "zero3/dsvl+compiled",
    "zero3/dsvl+liger+every4",
    "lora/zero2/llava",
    "lora/zero2/dsvl",
    "lora/zero2/dsvl+liger+every4",
    "checkpointing/llava",
    "checkpointing/dsvl",
    "checkpointing/dsvl+liger",
    "lora/llava",
    "lora/dsvl+liger",
)
TINY = Shape(
    tokens=128,
    images=2,
    layers=4,
    hidden=64,
    intermediate=96,
    heads=4,
    vocabulary=320,
    vision_layers=4,
    vision_hidden=32,
    vision_intermediate=48,
    vision_heads=2,
    image_size=56,
)
LEARNING_RATE = 1e-3  # large enough to change bf16 weights, so that the loss shows that the optimizer steps
WARM_UP = 3  # steps, for compilation, optimizer states, and ZeRO-3's trace of its parameters
ROW_TIMEOUT = 180  # seconds, for rows that hang
REPEATED = " (again)"


@dataclass(frozen=True)
class Row:
    model: str
    lora: bool
    zero_stage: int
    checkpoint_every: int  # layers; 0 keeps all activations
    liger: bool
    compiled: bool
    cached: bool
    baseline: str  # the name of Llava's row in the same setup

    @classmethod
    def parse(cls, name: str) -> "Row":
        match = re.fullmatch(
            r"((lora/)?(?:zero([23])/)?(checkpointing/)?)(llava|dsvl)(\+liger)?(\+compiled)?(?:\+every([1-9]\d*))?(\+cached)?",
            name,
        )
        if match is None or ((match[7] or match[9]) and match[5] == "llava"):
            raise ValueError(
                f"{name!r} is not a row; expected [lora/][zero2/|zero3/][checkpointing/]llava|dsvl[+liger][+compiled]"
                f"[+everyN][+cached] (compiled and cached only for dsvl), such as {', '.join(ROWS)}."
            )
        setup, lora, stage, checkpointing, model, liger, compiled, every, cached = match.groups()
        if checkpointing and every:
            raise ValueError(f"{name!r} has both checkpointing and +every{every}; pass one of them.")
        return cls(
            model=model,
            lora=lora is not None,
            zero_stage=int(stage or 0),
            checkpoint_every=1 if checkpointing else int(every or 0),
            liger=liger is not None,
            compiled=compiled is not None,
            cached=cached is not None,
            baseline=f"{setup}llava",
        )


# ----------------------------------------------------------------------------------------------------------------------
# One row, in its own process


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def build(row: Row, shape: Shape, backend: str) -> torch.nn.Module:
    """The model of a row on the device, with its kernels, gradient checkpointing and adapters."""
    device = device_type()
    model: Any = dsvl(shape, "mmca", backend, device) if row.model == "dsvl" else llava(shape, device)
    if row.liger and row.model == "dsvl":
        from dsvl.training.liger import use_liger

        use_liger(model)
    elif row.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if row.checkpoint_every:
        # On the whole model, as Trainer does. Llava's frozen tower then has an autograd graph and is recomputed too; DSVL's
        # never has one.
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=row.checkpoint_every)
    if row.model == "dsvl" and row.zero_stage == 3:
        from dsvl.training.zero3 import gather_layer_by_layer

        gather_layer_by_layer(model)
    if row.compiled:
        model.compile_decoder_layers()
    if row.lora:
        model = with_adapters(model)
    return model


def zero_config(stage: int, shape: Shape, prefetch: int) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": shape.hidden**2,
    }
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = prefetch
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": shape.batch,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW; DeepSpeed's would be compiled first
    }


def init_process_group() -> None:
    """Initialize a process group of one process, as a launcher does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in group.items()})
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if device_type() == "cuda" else "gloo")


def training_step(row: Row, model: torch.nn.Module, shape: Shape, batch: dict) -> Callable[[], torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=device_type() == "cuda")
    if not row.zero_stage:

        def plain() -> torch.Tensor:
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return plain
    init_process_group()
    import deepspeed

    from dsvl.training.zero3 import weights_to_prefetch

    # As `dsvl train` has it, and for Llava transformers.
    prefetch = weights_to_prefetch(model) if row.model == "dsvl" else int(0.9 * shape.hidden**2)
    config = zero_config(row.zero_stage, shape, prefetch)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def by_engine() -> torch.Tensor:
        loss = engine(**batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return by_engine


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def planned_gib(row: Row, shape: Shape, supervised: int) -> float | None:
    """The estimate of `dsvl plan`; None for rows that it does not support."""
    if row.model != "dsvl" or row.liger or row.checkpoint_every > 1:
        return None
    from dsvl import DSVLConfig
    from dsvl.training.memory_plan import plan

    vision, text = shape.configs()
    text_tokens = shape.batch * (shape.tokens - shape.images * shape.per_image)
    planned = plan(
        DSVLConfig(vision, text, image_token_id=shape.image_token_id),
        micro_batch=shape.batch,
        deepspeed=f"zero{row.zero_stage}" if row.zero_stage else None,
        sequence_length=shape.tokens,
        images=shape.images,
        lora_rank=LORA_RANK if row.lora else 0,
        activation_checkpointing=row.checkpoint_every == 1,
        compile_decoder_layers=row.compiled,
        supervised_share=supervised / text_tokens,
        dtype="bfloat16",
    )
    return planned.total / 2**30


def measure(name: str, shape: Shape, backend: str, rounds: int) -> dict[str, Any]:
    """Build, warm up and time one row."""
    row = Row.parse(name)
    batch = inputs(shape, device_type())
    model = build(row, shape, backend)
    if row.cached:
        with torch.no_grad():
            batch["image_features"] = model.get_image_features(batch.pop("pixel_values")).last_hidden_state
    # Before an engine partitions them. A tied weight counts once.
    weights = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers())) / 2**30
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run = training_step(row, model, shape, batch)
    losses = [run() for _ in range(WARM_UP)]
    gc.collect()
    synchronize()
    starting_peak = peak_gib()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        losses.append(run())
        synchronize()
        times.append(1000 * (time.perf_counter() - start))
    first, last = float(losses[0]), float(losses[-1])
    if not (math.isfinite(first) and math.isfinite(last)) or first == last:
        raise RuntimeError(f"{name}: the loss went from {first} to {last}; expected finite losses that change.")
    supervised = supervised_tokens(batch["labels"])
    flops = step_flops(shape, supervised, LORA_RANK if row.lora else 0)
    ms, peak = statistics.median(times), peak_gib()
    return {
        "ms": ms,
        "ms_low": min(times),
        "ms_high": max(times),
        "tokens_per_second": 1000 * shape.batch * shape.tokens / ms,
        "tflop_per_second": flops / ms / 1e9,
        "peak_gib": peak,
        "planned_gib": planned_gib(row, shape, supervised),
        "peak_gib_above_weights": None if peak is None else peak - weights,
        "peak_gib_at_start": starting_peak,  # while building, initializing the engine, and in the warm-up
        "weights_gib": weights,
        "trained_parameters": trained,
        "losses": [first, last],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
    }


def measure_row(name: str, options: argparse.Namespace, shape: Shape) -> None:
    """Measure a row in this process, and write its results."""
    result = measure(name, shape, options.attention_backend, options.rounds)
    Path(options.out).write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# All rows


def in_own_process(name: str, timeout: float) -> dict[str, Any]:
    """Run a row in its own process; returns its results, or `skipped` or `error` with the reason."""
    # In bf16, Triton's interpreter on a CPU gives NaN.
    if Row.parse(name).liger and not torch.cuda.is_available():
        return {"skipped": "Liger's kernels need a GPU"}
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "row.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--row", name, "--out", str(out)]
        try:
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {timeout:.0f} s"}
        if out.exists():  # even if the process failed at exit
            return json.loads(out.read_text())
    output = [line for line in done.stdout.splitlines() if line.strip()]
    return {"error": output[-1] if output else f"exit status {done.returncode}", "log": output[-60:]}


def describe(name: str, result: dict[str, Any], baseline: dict[str, Any] | None, peak: float | None) -> str:
    """One line of the table."""
    for reason in ("skipped", "error"):
        if reason in result:
            return f"{name:30}{reason}: {result[reason]}"

    def number(value: float | None, width: int, form: str) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}{form}}"

    speed = memory = None
    if baseline is not None and "ms" in baseline:
        speed = baseline["ms"] / result["ms"]
        if result["peak_gib"] is not None:
            memory = result["peak_gib"] / baseline["peak_gib"]
    mfu = None if peak is None else result["tflop_per_second"] / peak
    return (
        f"{name:30}{result['ms']:9.1f}{result['ms_low']:9.1f}{result['ms_high']:9.1f}{result['tokens_per_second']:10.0f}"
        f"{number(mfu, 8, '.1%')}{number(result['peak_gib'], 10, '.2f')}{number(result['peak_gib_above_weights'], 9, '.2f')}"
        f"{number(speed, 8, '.3f')}{number(memory, 8, '.3f')}{number(result['planned_gib'], 9, '.2f')}"
    )


HEADER = (
    f"{'':30}{'ms':>9}{'low':>9}{'high':>9}{'tokens/s':>10}{'MFU':>8}"
    f"{'peak GiB':>10}{'-weights':>9}{'speed':>8}{'memory':>8}{'planned':>9}"
)


def write_all(options: argparse.Namespace, shape: Shape, peak: float | None, results: dict[str, dict[str, Any]]) -> None:
    """Write all results as JSON. Unlike measure.write, this does not initialize CUDA in this process."""
    ran = next((result for result in results.values() if "ms" in result), {})
    record = {
        "device": ran.get("device"),
        "torch": torch.__version__,
        "options": {name: value for name, value in vars(options).items() if name not in ("out", "row")},
        "shape": asdict(shape),
        "peak_tflops": peak,
        "results": results,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


def measure_all(names: list[str], options: argparse.Namespace, shape: Shape) -> bool:
    """Measure and print rows until the budget is spent; returns whether no row failed."""
    began, longest = time.monotonic(), 0.0
    queue = [*names, names[0] + REPEATED] if len(names) > 1 else list(names)
    results: dict[str, dict[str, Any]] = {}
    print(
        f"{shape.batch} x {shape.tokens} tokens, {shape.images} images of {shape.per_image} tokens per sample\n\n{HEADER}",
        flush=True,
    )
    for label in queue:
        name = label.removesuffix(REPEATED)
        left = options.budget - (time.monotonic() - began)
        # Time is reserved for the repeated row.
        if left < longest * (1 if label == queue[-1] else 2):
            results[label] = {"skipped": f"the budget of {options.budget:.0f} s is nearly spent; --rows {name}"}
        else:
            start = time.monotonic()
            results[label] = in_own_process(name, timeout=min(max(left, 60), ROW_TIMEOUT))
            results[label]["process_seconds"] = time.monotonic() - start
            longest = max(longest, time.monotonic() - start)
        peak = options.peak_tflops or peak_tflops(results[label].get("device", ""))
        print(describe(label, results[label], results.get(Row.parse(name).baseline), peak), flush=True)
        if options.out:
            write_all(options, shape, peak, results)
    ran = [result for result in results.values() if "ms" in result]
    if ran:
        print(f"\n{ran[0]['device']}, torch {ran[0]['torch']}, {time.monotonic() - began:.0f} s in total")
    return not any("error" in result for result in results.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="names of rows, in this order")
    parser.add_argument("--tiny", action="store_true", help="use a tiny shape, to check that every row runs")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--images", type=int, help="images per sample")
    parser.add_argument("--layers", type=int, help="layers of the decoder; fewer for a smaller GPU")
    parser.add_argument("--attention-backend", choices=["sdpa", "flex_attention"], default="sdpa", help="of DSVL")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps per row")
    parser.add_argument("--budget", type=float, default=520, help="seconds after which no row is started")
    parser.add_argument("--peak-tflops", type=float, help="peak TFLOP/s of a device that flops.py does not know")
    parser.add_argument("--out", help="JSON file for the results")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = {key: getattr(options, key) for key in ("batch", "tokens", "images", "layers")}
    shape = replace(TINY if options.tiny else Shape(), **{key: value for key, value in given.items() if value is not None})
    if options.row is not None:
        measure_row(options.row, options, shape)
        return
    for name in options.rows:
        Row.parse(name)
    sys.exit(0 if measure_all(options.rows, options, shape) else 1)


if __name__ == "__main__":
    main()
