"""Image parallelism: steps of one long sample on one GPU and on all, in one run; CLIP ViT-L/14 + LLaMA-7B shapes in bf16.

    torchrun --nproc-per-node 2 benchmarks/image_parallel.py --tokens 65536 [--out image_parallel.json]
    torchrun --nproc-per-node 4 benchmarks/image_parallel.py --tokens 131072
    torchrun --nproc-per-node 4 benchmarks/image_parallel.py --tokens 1000000 --only-all     # does not fit one GPU
    torchrun --nproc-per-node 4 benchmarks/image_parallel.py --tokens 131072 --text 65536    # the text is shared too
    torchrun --nproc-per-node 2 benchmarks/image_parallel.py --tiny                          # on CPUs, with gloo

A step is forward, backward and the mean of the gradients over the processes (`dsvl train --image-parallel`), of a sample
with --text tokens of text beside its images. Projector and embeddings are trained, tower and decoder are frozen. Every layer
is checkpointed; by default MLPs run in tiles, the queries of image tokens are not projected, and checkpoints are in main
memory (--levers, as in many_images.py). The first process measures a step alone, while the others wait; then all of them
share the images. The table has the time of a step, peak allocated memory of the first process, its pinned main memory, the
loss, the speed relative to one process, and the ceiling of it: tokens of the sample over the most that a process runs.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from fine_tuning import TINY, device_type, synchronize
from many_images import LEVERS, Row, build, gib, host_gib
from models import Shape
from torch import distributed

from dsvl.acceleration.parallel.image_parallelism import image_parallel
from dsvl.acceleration.parallel.split_batch import deals_text
from dsvl.acceleration.parallel.split_images import assign_images
from dsvl.training.distributed import destroy_process_groups

DEFAULT_LEVERS = ("tiles", "queries", "offload")
HEADER = f"{'tokens':>10}{'processes':>11}{'ms':>11}{'peak GiB':>10}{'host GiB':>10}{'loss':>10}{'speed':>8}{'ceiling':>9}"


def sample(shape: Shape, text: int, own: list[int] | None) -> dict[str, torch.Tensor]:
    """A sample: half of the text is spread between the images, the rest follows; its last quarter is supervised.

    Args:
        own: the images whose pixels are made, *optional*, defaults to None: all.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, shape.image_token_id, (1, shape.tokens), generator=generator)
    for number in range(shape.images):
        start = text // 2 * (number + 1) // shape.images + number * shape.per_image
        ids[:, start : start + shape.per_image] = shape.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -max(text // 4, 1) :] = ids[:, -max(text // 4, 1) :]
    numbers = range(shape.images) if own is None else own
    pixels = torch.empty(len(numbers), 3, shape.image_size, shape.image_size, dtype=torch.bfloat16)
    for index, number in enumerate(numbers):  # the same image in any process
        pixels[index].copy_(torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(number)))
    return {key: value.to(device_type()) for key, value in dict(input_ids=ids, labels=labels, pixel_values=pixels).items()}


def measure(model: Any, batch: dict[str, torch.Tensor], is_split: bool, rounds: int) -> dict[str, Any]:
    """The fastest of some steps, after one that warms up."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(rounds + 1):
        if is_split:
            distributed.barrier()
        synchronize()
        began = time.perf_counter()
        with image_parallel(model) if is_split else contextlib.nullcontext():
            loss = model(**batch, use_cache=False).loss if not is_split else model(**batch).loss
        loss.backward()
        if is_split:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    distributed.all_reduce(parameter.grad.div_(distributed.get_world_size()))
        model.zero_grad(set_to_none=True)
        synchronize()
        times.append(time.perf_counter() - began)
        losses.append(loss.item())
    if not all(math.isfinite(loss) and loss > 0 for loss in losses):
        raise RuntimeError(f"The losses are {losses}; expected positive ones.")
    return {
        "ms": 1000 * min(times[1:]),
        "all_ms": [1000 * one for one in times],
        "loss": losses[-1],
        "peak_gib": gib("max_memory_allocated"),
        "host_gib": host_gib(model),
    }


def describe(figures: dict[str, Any], alone: dict[str, Any] | None) -> str:
    """One line of the table."""
    peak = "-" if figures["peak_gib"] is None else f"{figures['peak_gib']:.2f}"
    speed = "-" if alone is None else f"{alone['ms'] / figures['ms']:.2f}"
    return (
        f"{figures['tokens']:10,}{figures['processes']:11}{figures['ms']:11.1f}{peak:>10}{figures['host_gib']:10.2f}"
        f"{figures['loss']:10.4f}{speed:>8}{figures['ceiling']:9.2f}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of a sample, at most (default: 65,536)")
    parser.add_argument("--text", type=int, help="tokens of text (default: 2,048)")
    parser.add_argument("--levers", nargs="*", choices=LEVERS, default=list(DEFAULT_LEVERS), help="see many_images.py")
    parser.add_argument("--only-all", action="store_true", help="do not measure one process alone, as it lacks the memory")
    parser.add_argument("--rounds", type=int, default=2, help="steps that are timed (default: 2)")
    parser.add_argument("--layers", type=int, help="layers of the decoder; fewer for a smaller GPU")
    parser.add_argument("--tiny", action="store_true", help="use a tiny shape, to check that it runs")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    if "compiled" in options.levers:
        raise ValueError("--levers compiled: image parallelism does not take compiled layers; drop it.")
    text = options.text or (32 if options.tiny else 2048)
    shape = replace(TINY if options.tiny else Shape(), batch=1)
    shape = replace(shape, layers=options.layers or shape.layers)
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30))
    size = distributed.get_world_size()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results = []
    if rank == 0:
        print(f"{text} tokens of text, {shape.per_image} tokens per image, {device}\n\n{HEADER}", flush=True)
    model = None
    for tokens in options.tokens or ([256] if options.tiny else [65536]):
        images = (tokens - text) // shape.per_image
        its = replace(shape, images=images, tokens=text + images * shape.per_image)
        if model is None or its.tokens > model.config.text_config.max_position_embeddings:
            model = build(Row("dsvl", frozenset(options.levers)), its, 16 if options.tiny else 8192)
        owners = assign_images([[its.per_image] * images], size)
        is_dealt = deals_text(text, images * its.per_image, size, fuses=torch.cuda.is_available())
        its_text = -(-text // size) if is_dealt else text
        most = its_text + max(owners.count(one) for one in range(size)) * its.per_image
        alone = None
        for processes in (size,) if options.only_all else (1, size):
            is_split = processes > 1
            if is_split or rank == 0:
                own = [image for image, owner in enumerate(owners) if owner == rank] if is_split else None
                figures = measure(model, sample(its, text, own), is_split, options.rounds)
                figures |= {"tokens": its.tokens, "images": images, "processes": processes}
                figures["ceiling"] = its.tokens / most if is_split else 1.0
                if rank == 0:
                    print(describe(figures, alone), flush=True)
                    results.append(figures)
                alone = alone or (None if options.only_all else figures)
            distributed.barrier()
    if rank == 0 and options.out:
        used = {key: value for key, value in vars(options).items() if key != "out"}
        record = {"device": device, "torch": torch.__version__, "options": used, "shape": asdict(shape)}
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(record | {"results": results}, indent=1) + "\n", encoding="utf-8")
    destroy_process_groups()


if __name__ == "__main__":
    main()
