"""Training steps over several GPUs: DDP, ZeRO-1, 2 and 3, and FSDP2, with compiled layers, Liger's kernels and LoRA.

    python benchmarks/scaling.py --processes 1 2 4 [--shape 7b] [--rows ddp+compiled zero3 fsdp] [--out scaling.json]
    python benchmarks/scaling.py --processes 2 --shape 70b --rows zero3 fsdp fsdp+fp8+compiled+offload --checkpointing
    python benchmarks/scaling.py --processes 2 --rows zero2 zero3 --profile profiles    # what bounds a step
    python benchmarks/scaling.py --processes 1 2 --shape tiny    # without GPUs: gloo, float32

A step is forward, backward and AdamW's step of 2 x 4,096 tokens and 8 images in each process. Projector and embeddings are
trained, tower and decoder are frozen; with `lora/` adapters are trained as well. Weights are random. Each row is trained by
each number of processes in processes of its own, started by torchrun. A row is `[lora/]METHOD[+VARIANT ...]`:

    ddp, zero1, zero2, zero3, fsdp    how the processes share the training, set up as `dsvl train` does
    +compiled     compiled decoder layers
    +liger        Liger's kernels in the decoder
    +kept         fsdp: weights stay gathered between forward and backward
    +offload      the inputs of the decoder's layers wait for their backward in main memory (with --checkpointing)
    +fp8, +int8   frozen linear layers in 8 bits, but for the decoder's first and last layer; not zero3

What ZeRO-3 gathers when, as variants of `zero3` (DeepSpeed 0.19: runtime/zero/partitioned_param_coordinator.py):

    +single       linear layers are gathered one by one, as DeepSpeed does by itself, not whole decoder layers and a whole
                  tower: the host waits for the third last gather at each module (`__max_ongoing_fetch_events`)
    +layers       the tower is gathered layer by layer, as the decoder
    +persist      small weights stay everywhere, transformers' "auto": they are gathered one by one after each step
    +auto         fewer weights than one linear layer has are gathered in advance, transformers' "auto", not two layers
    +release      a weight is released after each use (`stage3_max_reuse_distance` 0); 10^9 keeps the last 500 million
    +live         up to 4 * 10^9 weights may be gathered (`stage3_max_live_parameters`); near 10^9 nothing is prefetched
    +allreduce    weights are gathered by an all-reduce, into the layout that they are used in
    +plainlinear  torch's linear layers instead of DeepSpeed's, which are Python functions for autograd
    +serial       communication on the stream that computes: the time that overlapping hides
    +hpz          a second partition of the weights on each host (ZeRO++): for several hosts

The table has the median, minimum and maximum time of a step, tokens per second, efficiency (tokens per second and process,
relative to the same row, and to the first row, with one process), peak memory of the fullest GPU and what `dsvl plan`
expects. `--profile` also writes a trace of two steps of each row, and prints how long the GPU computed, communicated, did
both, and idled.
"""

import argparse
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
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from flops import peak_tflops, step_flops, supervised_tokens
from measure import device_name, device_type, synchronize
from models import LORA_RANK, Shape, inputs, with_adapters
from steps import TINY

from dsvl import DSVLConfig, DSVLForConditionalGeneration, DSVLQwenVisionConfig
from dsvl.acceleration.memory.frozen_linear import NUMBERS, PRECISIONS
from dsvl.training.adapters import base_model
from dsvl.training.deepspeed_config import PREFETCHED_LAYERS, zero_configuration
from dsvl.training.distributed import destroy_process_groups
from dsvl.training.frozen_precision import freeze_in_8_bits, frozen_linears
from dsvl.training.fsdp import layer_classes, shard_with_accelerate
from dsvl.training.memory_plan import plan
from dsvl.training.model_loading import train_in_float32
from dsvl.training.trainer import count_parameters
from dsvl.training.zero3 import gather_layer_by_layer


@dataclass(frozen=True)
class QwenShape(Shape):
    """A shape with Qwen-VL's tower, which resamples an image to 256 tokens."""

    image_size: int = 448

    @property
    def per_image(self) -> int:
        return DSVLQwenVisionConfig().num_queries


SHAPES = {
    "tiny": replace(TINY, batch=1),
    "7b": Shape(),
    "30b": Shape(layers=60, hidden=6656, intermediate=17920, heads=52),
    # LLaMA-2-70B with Qwen-VL's ViT-bigG: 70.9 billion parameters.
    "70b": QwenShape(layers=80, hidden=8192, intermediate=28672, heads=64, key_value_heads=8),
}
BIG = ("30b", "70b")  # too large for one GPU: built in parts
QWEN_TOWER = ("70b",)
ROWS = ("ddp", "ddp+compiled", "zero1", "zero2", "zero2+compiled", "zero3", "zero3+compiled", "fsdp", "fsdp+compiled")
LEARNING_RATE = 1e-3  # large enough to change the loss in a few steps
WARM_UP = 3  # steps: compilation, optimizer states, ZeRO-3's trace of its weights

# Settings of `zero_optimization`, by variant; some depend on the run, and "single" and "layers" are none.
ZERO3_VARIANTS: dict[str, dict[str, Any]] = {
    "single": {},
    "layers": {},
    "persist": {},
    "auto": {},
    "release": {"stage3_max_reuse_distance": 0},
    "live": {"stage3_max_live_parameters": 4 * 10**9},
    "allreduce": {"stage3_use_all_reduce_for_fetch_params": True},
    "plainlinear": {"memory_efficient_linear": False},
    "serial": {"overlap_comm": False},
    "hpz": {},
}
VARIANTS = ("compiled", "liger", "kept", "offload", *PRECISIONS, *ZERO3_VARIANTS)


@dataclass(frozen=True)
class Row:
    """A row of the table, by its name.

    Raises:
        ValueError: if the name is none of a row.
    """

    lora: bool
    method: str
    variants: tuple[str, ...]

    @classmethod
    def parse(cls, name: str) -> "Row":
        match = re.fullmatch(r"(lora/)?(ddp|zero[123]|fsdp)((?:\+\w+)*)", name)
        variants = tuple(match[3].split("+")[1:]) if match else ()
        if match is None or not set(variants) <= set(VARIANTS):
            raise ValueError(f"{name!r} is not a row; expected [lora/]METHOD[+VARIANT ...], such as {', '.join(ROWS)}.")
        row = cls(lora=match[1] is not None, method=match[2], variants=variants)
        for variant in variants:
            if variant in ZERO3_VARIANTS and row.method != "zero3":
                raise ValueError(f"{name!r}: +{variant} is a variant of zero3; drop it.")
        if "kept" in variants and row.method != "fsdp":
            raise ValueError(f"{name!r}: +kept is a variant of fsdp; drop it.")
        if set(PRECISIONS) <= set(variants):
            raise ValueError(f"{name!r}: layers are in one of {' and '.join(PRECISIONS)}; drop the other.")
        if row.precision is not None and row.method == "zero3":
            raise ValueError(f"{name!r}: ZeRO-3 does not partition 8-bit weights; take fsdp+{row.precision}.")
        if {"compiled", "single"} <= set(variants):
            raise ValueError(f"{name!r}: weights would be gathered inside of compiled layers; drop +single.")
        return row

    @property
    def precision(self) -> str | None:
        """That of frozen linear layers, if they are in 8 bits."""
        return next((variant for variant in self.variants if variant in PRECISIONS), None)


# ----------------------------------------------------------------------------------------------------------------------
# One row, in the processes of torchrun


def configuration(name: str, shape: Shape) -> DSVLConfig:
    """The configuration of the model of a shape."""
    vision, text = shape.configs()
    tower: Any = DSVLQwenVisionConfig() if name in QWEN_TOWER else vision
    return DSVLConfig(tower, text, image_token_id=shape.image_token_id)


def zero_config(row: Row, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration: the package's, with the values of `dsvl train` for "auto", and the row's variants."""
    config = json.loads(zero_configuration(row.method).read_text(encoding="utf-8"))
    zero = config["zero_optimization"]
    layer = 2 * shape.hidden**2 * (1 + (shape.key_value_heads or shape.heads) / shape.heads)
    layer += 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    # transformers/integrations/deepspeed.py, but for the weights that are gathered in advance
    automatic = {
        "reduce_bucket_size": shape.hidden**2,
        "stage3_prefetch_bucket_size": PREFETCHED_LAYERS * int(layer),
    }
    zero |= {name: automatic[name] for name in automatic if zero.get(name) == "auto"}
    for variant in row.variants:
        zero |= ZERO3_VARIANTS.get(variant, {})
    if "auto" in row.variants:
        zero["stage3_prefetch_bucket_size"] = int(0.9 * shape.hidden**2)
    if "persist" in row.variants:
        zero["stage3_param_persistence_threshold"] = 10 * shape.hidden
    if "hpz" in row.variants:
        zero["zero_hpz_partition_size"] = int(os.environ["LOCAL_WORLD_SIZE"])
    return config | {
        "train_micro_batch_size_per_gpu": shape.batch,
        "train_batch_size": shape.batch * dist.get_world_size(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,  # torch's AdamW; DeepSpeed's would be compiled first
    }


def build(name: str, row: Row, shape: Shape, checkpointing: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of a row with random weights: on the device, in partitions, or without values for FSDP to shard."""
    context: Any = nullcontext()
    where: Any = device
    # ZeRO-3 partitions other models when it is initialized: transformers cannot initialize weights in partitions.
    if row.method == "zero3" and name in BIG:
        import deepspeed

        context = deepspeed.zero.Init(config_dict_or_path=zero_config(row, shape, dtype), dtype=dtype)
    elif row.method == "fsdp" and name in BIG:
        from accelerate import init_empty_weights

        context, where = init_empty_weights(include_buffers=False), torch.device("cpu")
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with where, context:
        model: Any = DSVLForConditionalGeneration(configuration(name, shape)).train()
    torch.set_default_dtype(torch.float32)
    model.set_trainable()
    if "liger" in row.variants:
        from dsvl.training.liger import use_liger

        use_liger(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if "offload" in row.variants:
        model.reduce_memory(offload=True)
    if row.lora:
        model = with_adapters(model)
    if row.precision is not None:
        freeze_in_8_bits(model, row.precision, sharded=row.method == "fsdp")
    base = base_model(model)
    if row.method == "zero3" and "single" not in row.variants:
        gather_layer_by_layer(model)
        if "layers" in row.variants:
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(base.model.vision_tower, False)
    if "compiled" in row.variants:
        base.compile_decoder_layers()
    return model


def fill(model: torch.nn.Module, device: torch.device) -> None:
    """Give a sharded model that was built without values random ones."""

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    model._apply(there)
    in_8_bits = {f"{name}.weight": layer for name, layer in frozen_linears(model)}
    with torch.no_grad():
        for layer in in_8_bits.values():
            numbers = layer.weight.to_local().view(NUMBERS[layer.precision])
            if layer.precision == "fp8":  # of both signs, without the two codes that are no numbers
                numbers.random_(0, 112).bitwise_or_(128 * torch.randint_like(numbers, 2))
            else:
                numbers.random_(-127, 128)
            layer.weight_scale.fill_(2.0**-11 if layer.precision == "fp8" else 2.0**-12)  # about 0.02, as the others
        for name, parameter in model.named_parameters():
            if name in in_8_bits:
                continue
            if "norm" in name or "lora_B" in name:
                parameter.fill_(float("lora_B" not in name))
            else:
                parameter.normal_(0, 0.02)


def training_step(
    name: str, row: Row, model: Any, shape: Shape, batch: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """Forward, backward and AdamW's step of a row."""
    on_gpu = device.type == "cuda"
    if not row.method.startswith("zero"):
        train_in_float32(model, dtype, casts_embeddings=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=on_gpu)
    if row.method.startswith("zero"):
        import deepspeed

        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero_config(row, shape, dtype))

        def by_engine() -> torch.Tensor:
            loss = engine(**batch, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            return loss.detach()

        return by_engine
    autocast: Any = nullcontext
    if row.method == "fsdp":
        model, optimizer = by_accelerate(name, row, model, optimizer, device, dtype)
    else:
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if on_gpu else None)
        if dtype != torch.float32:

            def autocast() -> Any:
                return torch.autocast(device.type, dtype)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def plain() -> torch.Tensor:
        with autocast():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return plain


def by_accelerate(
    name: str, row: Row, model: Any, optimizer: Any, device: torch.device, dtype: torch.dtype
) -> tuple[Any, torch.optim.Optimizer]:
    """The model sharded as `dsvl train --fsdp` does, and its optimizer."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward="kept" not in row.variants,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layer_classes(model),
    )
    mixed = "no" if dtype == torch.float32 else "bf16"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, fsdp_plugin=plugin)
    shard_with_accelerate(accelerator, plugin)
    if name not in BIG:
        return accelerator.prepare(model, optimizer)
    # accelerate finds an optimizer's parameters by their addresses, which these do not have yet: all of them are 0, as is
    # that of a parameter without elements. It shards no model without an optimizer.
    groups = optimizer.param_groups
    model, _ = accelerator.prepare(model, torch.optim.SGD([torch.nn.Parameter(torch.empty(0))]))
    fill(model, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, type(optimizer)(trained, lr=groups[0]["lr"], fused=device.type == "cuda")


def largest(value: float, device: torch.device) -> float:
    """The largest value of all processes."""
    tensor = torch.tensor(value, device=device, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def planned_gib(name: str, row: Row, shape: Shape, checkpointing: bool, supervised: int, dtype: torch.dtype) -> float | None:
    """The estimate of `dsvl plan`; None for rows that it does not support."""
    if "liger" in row.variants:
        return None
    zero, sharded = (row.method, False) if row.method.startswith("zero") else (None, row.method == "fsdp")
    made = plan(
        configuration(name, shape),
        micro_batch=shape.batch,
        world_size=dist.get_world_size(),
        deepspeed=zero,
        fsdp=sharded,
        sequence_length=shape.tokens,
        images=shape.images,
        lora_rank=LORA_RANK if row.lora else 0,
        activation_checkpointing=checkpointing,
        offload_activations="offload" in row.variants,
        frozen_precision=row.precision,
        compile_decoder_layers="compiled" in row.variants,
        supervised_share=supervised / (shape.batch * (shape.tokens - shape.images * shape.per_image)),
        dtype=str(dtype).removeprefix("torch."),
        mixed_precision=dtype != torch.float32,
    )
    return made.total / 2**30


def measure(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Build, warm up and time one row, in all processes."""
    row = Row.parse(options.row)
    on_gpu = device_type() == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if on_gpu:
        torch.cuda.set_device(device)
    if row.method.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo")
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    began = time.perf_counter()
    batch = inputs(shape, str(device), dtype)
    model = build(options.shape, row, shape, options.checkpointing, device, dtype)
    _, count = count_parameters(model)
    run = training_step(options.shape, row, model, shape, batch, device, dtype)
    built = time.perf_counter() - began
    losses = [run() for _ in range(WARM_UP)]
    synchronize()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(options.rounds):
        dist.barrier()
        synchronize()
        start = time.perf_counter()
        losses.append(run())
        synchronize()
        times.append(1000 * (time.perf_counter() - start))
    first, last = float(losses[0]), float(losses[-1])
    if not (math.isfinite(first) and math.isfinite(last)) or first == last:
        raise RuntimeError(f"{options.row}: the loss went from {first} to {last}; expected finite losses that change.")
    peak = largest(torch.cuda.max_memory_allocated() / 2**30, device) if on_gpu else None
    profile = profiled(run, options, device) if options.profile else None
    ms, supervised, world = statistics.median(times), supervised_tokens(batch["labels"]), dist.get_world_size()
    result = {
        "processes": world,
        "ms": ms,
        "ms_low": min(times),
        "ms_high": max(times),
        "tokens_per_second": 1000 * world * shape.batch * shape.tokens / ms,
        "peak_gib": peak,
        "planned_gib": planned_gib(options.shape, row, shape, options.checkpointing, supervised, dtype),
        "parameters": count,
        "losses": [first, last],
        "build_seconds": built,
        "device": device_name(),
        "torch": torch.__version__,
    }
    if options.shape not in QWEN_TOWER:  # whose operations flops.py does not count
        result["tflop_per_second"] = step_flops(shape, supervised, LORA_RANK if row.lora else 0) / ms / 1e9
    return result | ({"profile": profile} if profile is not None else {})


# ----------------------------------------------------------------------------------------------------------------------
# What bounds a step

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals (start, end) that do not overlap, and cover the same times."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """The time that intervals cover."""
    return sum(end - start for start, end in union(intervals))


def bounds(compute: Sequence[Interval], communication: Sequence[Interval], whole: Interval) -> dict[str, float]:
    """How a time splits into computing alone, both at once, communication that nothing hides, and idling.

    Args:
        compute, communication: when each was running.
        whole: start and end of the time.

    Returns:
        The fractions `compute`, `both`, `exposed_communication` and `idle`, whose sum is 1.
    """

    def within(intervals: Sequence[Interval]) -> list[Interval]:
        cut = [(max(start, whole[0]), min(end, whole[1])) for start, end in intervals]
        return [(start, end) for start, end in cut if end > start]

    compute, communication = within(compute), within(communication)
    total, either = whole[1] - whole[0], length([*compute, *communication])
    both = length(compute) + length(communication) - either
    return {
        "compute": (length(compute) - both) / total,
        "both": both / total,
        "exposed_communication": (either - length(compute)) / total,
        "idle": 1 - either / total,
    }


COLLECTIVES = ("all_gather", "allgather", "reduce_scatter", "reducescatter", "all_reduce", "allreduce", "broadcast")


def collective(name: str) -> str | None:
    """The collective that a kernel of NCCL, or an event of Gloo, belongs to; None for anything else."""
    plain = name.lower()
    if not (plain.startswith(("nccl", "gloo:")) or "nccldevkernel" in plain):
        return None
    kind = next((kind for kind in COLLECTIVES if kind in plain), "other")
    return kind.replace("_", "")


def profiled(run: Callable[[], torch.Tensor], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Trace two steps in the first process: how its GPU spent them, and the milliseconds of each collective in a step."""
    from torch.profiler import ProfilerActivity, profile

    steps, on_gpu = 2, device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as trace:
        for _ in range(steps):
            run()
        synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    compute, communication, kinds = [], [], dict[str, list[Interval]]()
    for event in trace.events():
        if event.device_type != kind:
            continue
        interval = (event.time_range.start, event.time_range.end)
        name = collective(event.name)
        if name is not None:
            communication.append(interval)
            kinds.setdefault(name, []).append(interval)
        # On a GPU every event is a kernel or a copy, but for the annotations of the profiler's user.
        elif (on_gpu and not event.is_user_annotation) or event.name.startswith(("aten::", "autograd::")):
            compute.append(interval)
    every = [*compute, *communication]
    whole = (min(start for start, _ in every), max(end for _, end in every))
    if dist.get_rank() == 0:
        folder = Path(options.profile)
        folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(folder / f"{re.sub('[^a-z0-9]+', '-', options.row)}-{dist.get_world_size()}.json.gz"))
    shares: dict[str, Any] = bounds(compute, communication, whole)
    shares["ms_of_collectives"] = {name: length(parts) / 1000 / steps for name, parts in sorted(kinds.items())}
    shares["calls_of_collectives"] = {name: len(parts) / steps for name, parts in sorted(kinds.items())}
    return shares


# ----------------------------------------------------------------------------------------------------------------------
# All rows


def by_torchrun(row: str, processes: int, timeout: float) -> dict[str, Any]:
    """Run a row by a number of processes; returns its results, or `skipped` or `error` with the reason."""
    if "liger" in Row.parse(row).variants and not torch.cuda.is_available():
        return {"skipped": "Liger's kernels need a GPU"}
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "row.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
        command += [__file__, *sys.argv[1:], "--row", row, "--out", str(out)]
        try:
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {timeout:.0f} s"}
        if out.exists():  # even if a process failed at exit
            return json.loads(out.read_text())
    output = [line for line in done.stdout.splitlines() if line.strip()]
    reasons = [line for line in output if re.match(r"(\[rank\d+\]: )?\w*(Error|Exception)\b", line)]
    return {"error": (reasons or output or [f"exit status {done.returncode}"])[0], "log": output[-80:]}


HEADER = (
    f"{'':34}{'GPUs':>5}{'ms':>10}{'low':>10}{'high':>10}{'tokens/s':>10}{'alone':>8}{'first':>8}{'MFU':>7}"
    f"{'peak GiB':>10}{'planned':>9}"
)


def describe(row: str, result: dict[str, Any], alone: float | None, first: float | None) -> str:
    """One line of the table.

    Args:
        alone, first: tokens per second of this row, and of the first, with one process.
    """
    if "ms" not in result:
        reason = "skipped" if "skipped" in result else "error"
        return f"{row:34}{result.get('processes', ''):>5}  {reason}: {result[reason]}"

    def number(value: float | None, width: int, form: str) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}{form}}"

    each = result["tokens_per_second"] / result["processes"]
    peak = peak_tflops(result["device"])
    rate = result.get("tflop_per_second")
    return (
        f"{row:34}{result['processes']:5}{result['ms']:10.1f}{result['ms_low']:10.1f}{result['ms_high']:10.1f}"
        f"{result['tokens_per_second']:10.0f}{number(each / alone if alone else None, 8, '.1%')}"
        f"{number(each / first if first else None, 8, '.1%')}"
        f"{number(rate / peak if rate and peak else None, 7, '.1%')}"
        f"{number(result['peak_gib'], 10, '.2f')}{number(result['planned_gib'], 9, '.2f')}"
    )


def describe_profile(profile: dict[str, Any]) -> str:
    """How a GPU spent a step, in a line."""
    shares = ", ".join(
        f"{name.replace('_', ' ')} {profile[name]:.0%}" for name in ("compute", "both", "exposed_communication", "idle")
    )
    calls = profile["calls_of_collectives"]
    parts = [f"{name} {ms:.1f} ms in {calls[name]:.0f} calls" for name, ms in profile["ms_of_collectives"].items()]
    return f"{'':39}{shares}; {', '.join(parts) or 'no communication'}"


def write_all(options: argparse.Namespace, shape: Shape, results: list[dict[str, Any]]) -> None:
    """Write all results as JSON. Unlike measure.write, this does not initialize CUDA in this process."""
    ran = next((result for result in results if "ms" in result), {})
    record = {
        "device": ran.get("device"),
        "torch": torch.__version__,
        "options": {name: value for name, value in vars(options).items() if name not in ("out", "row")},
        "shape": asdict(shape),
        "results": results,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


def measure_all(options: argparse.Namespace, shape: Shape) -> bool:
    """Measure and print rows until the budget is spent; returns whether no row failed."""
    began, results = time.monotonic(), list[dict[str, Any]]()
    print(f"{options.shape}: {shape.batch} x {shape.tokens} tokens and {shape.images} images a sample, in each process")
    print(f"\n{HEADER}", flush=True)
    rates: dict[tuple[str, int], float] = {}
    for processes in options.processes:
        for row in options.rows:
            left = options.budget - (time.monotonic() - began)
            if left < options.row_timeout / 4:
                result: dict[str, Any] = {"skipped": f"the budget of {options.budget:.0f} s is nearly spent"}
            else:
                result = by_torchrun(row, processes, min(left, options.row_timeout))
            result |= {"row": row, "processes": processes}
            results.append(result)
            if "ms" in result:
                rates[row, processes] = result["tokens_per_second"]
            first = rates.get((options.rows[0], 1))
            print(describe(row, result, rates.get((row, 1)), first), flush=True)
            if "profile" in result:
                print(describe_profile(result["profile"]), flush=True)
            if options.out:
                write_all(options, shape, results)
    ran = [result for result in results if "ms" in result]
    if ran:
        print(f"\n{ran[0]['device']}, torch {ran[0]['torch']}, {time.monotonic() - began:.0f} s in total")
    return not any("error" in result for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="names of rows, in this order")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="numbers of processes, one for each GPU")
    parser.add_argument("--shape", choices=SHAPES, default="7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing of all layers")
    parser.add_argument("--batch", type=int, help="samples in each process")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--images", type=int, help="images per sample")
    parser.add_argument("--layers", type=int, help="layers of the decoder; fewer for a smaller GPU")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps per row")
    parser.add_argument("--profile", metavar="DIR", help="directory for traces of two steps of each row")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no row is started")
    parser.add_argument("--row-timeout", type=float, default=180, help="seconds for a row, which may hang")
    parser.add_argument("--out", help="JSON file for the results")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = {key: getattr(options, key) for key in ("batch", "tokens", "images", "layers")}
    shape = replace(SHAPES[options.shape], **{key: value for key, value in given.items() if value is not None})
    if options.row is not None:
        result = measure(options, shape)
        if dist.get_rank() == 0:
            Path(options.out).write_text(json.dumps(result))
        dist.barrier()
        destroy_process_groups()
        return
    for name in options.rows:
        if "offload" in Row.parse(name).variants and not options.checkpointing:
            parser.error(f"{name}: +offload needs --checkpointing.")
    sys.exit(0 if measure_all(options, shape) else 1)


if __name__ == "__main__":
    main()
