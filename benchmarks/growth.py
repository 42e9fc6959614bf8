"""Scaling with sequence length, number of images and batch size: attention, and the prefill of a whole model.

    python benchmarks/growth.py [--sweep length images batch] [--what attention prefill] [--values 512 1024] [--out FILE]

    length    tokens of a sequence, of which a fraction (--share) are image tokens
    images    images in a text of --text tokens, so that the sequence length grows with them
    batch     samples of --tokens tokens, of which a fraction (--share) are image tokens

`attention` is the layer of attention.py: causal sdpa, MMCA, and the released computation. `prefill` is a model of models.py
(--size) with its vision tower, up to the logits of the first token: transformers' Llava, DSVL with causal attention, with
MMCA, and with encoded images. An implementation whose run would take longer than --patience, extrapolated from the size
before, is skipped.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from attention import (
    BASE,
    BOTH,
    FORWARD,
    Attention,
    Heads,
    add_layer_options,
    compare,
    default_ways,
    free_memory,
    layer_options,
    row,
)
from measure import Table, describe_device, device_type, report, time_interleaved, write
from models import SHAPES, Shape, dsvl, inputs, llava

SWEEPS = ("length", "images", "batch")
DEFAULTS = {
    ("cuda", "attention"): {
        "length": [1024 * 2**n for n in range(8)],
        "images": [0, 8, 32, 64, 128, 256, 512, 1024],
        "batch": [1, 2, 4, 8, 16],
    },
    ("cuda", "prefill"): {"length": [1024, 4096, 16384], "images": [0, 8, 32, 64, 128], "batch": [1, 2, 4]},
    ("cpu", "attention"): {"length": [512, 1024, 2048, 4096, 8192], "images": [0, 4, 16, 64, 256], "batch": [1, 2, 4, 8]},
    ("cpu", "prefill"): {"length": [512, 1024, 2048], "images": [0, 2, 6], "batch": [1, 2]},
}


@dataclass(frozen=True)
class Point:
    """One size of a sweep: the number of samples, and of tokens and images per sample."""

    batch: int
    tokens: int
    images: int

    @property
    def pairs(self) -> int:
        """Cost of dense attention, up to a factor."""
        return self.batch * self.tokens**2


def point(sweep: str, value: int, options: argparse.Namespace, per_image: int) -> Point:
    """The size of a sweep at a value."""
    if sweep == "images":
        return Point(1, options.text + value * per_image, value)
    tokens, batch = (value, 1) if sweep == "length" else (options.tokens, value)
    return Point(batch, tokens, round(options.share * tokens / per_image))


def sweep_attention(
    points: dict[int, Point], size: Heads, ways: list[str], backward: bool, timing: dict[str, Any], patience: float
) -> dict[int, Table]:
    """Measure a layer at each point; returns value -> table."""
    tables: dict[int, Table] = {}
    seconds_per_pair: dict[str, float] = {}
    for value, where in points.items():
        attention = Attention(size, where.batch, where.tokens, where.images)
        expected = {way: seconds_per_pair.get(row(way), 0.0) * where.pairs for way in ways}
        table = compare(attention, [way for way in ways if expected[way] <= patience], backward, timing)[0]
        for way, seconds in expected.items():
            if seconds > patience:
                table[row(way)] = {"skipped": f"one run would take about {seconds:.0f} s"}
        for name, figures in table.items():
            if "ms" in figures and name != BASE:
                seconds_per_pair[name] = figures["ms"] / 1000 / where.pairs
        report(f"{BOTH if backward else FORWARD}: {attention}", table)
        tables[value] = table
        del attention
        free_memory()
    return tables


class Prefill:
    """Measures the prefill of both models up to the logits of the next token."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.device = shape, device_type()
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.ours = dsvl(shape, "mmca", "sdpa", self.device, self.dtype).eval()
        self.theirs = llava(shape, self.device, self.dtype).eval()

    def measure(self, where: Point, timing: dict[str, Any]) -> Table:
        shape = replace(self.shape, batch=where.batch, tokens=where.tokens, images=where.images)
        batch = inputs(shape, self.device, self.dtype)
        batch.pop("labels")

        def by_llava() -> object:
            return self.theirs(**batch, logits_to_keep=1, use_cache=True).logits

        def by_dsvl(attention: str) -> object:
            self.ours.config.multimodal_attention = attention
            return self.ours(**batch, logits_to_keep=1, use_cache=True).logits

        alternatives: dict[str, Callable[[], object]] = {
            "Llava, sdpa": by_llava,
            "DSVL causal, sdpa": partial(by_dsvl, "causal"),
            "DSVL mmca, sdpa": partial(by_dsvl, "mmca"),
        }
        if where.images:
            self.ours.config.multimodal_attention = "mmca"
            cache = self.ours.encode_images(batch["pixel_values"])
            alternatives["DSVL mmca, encoded images"] = lambda: self.ours.prefill(batch["input_ids"], cache).logits
        with torch.no_grad():
            table = time_interleaved(alternatives, **timing)
        report(f"prefill: {where.batch} x {where.tokens} tokens, {where.images} images of {shape.per_image}", table)
        free_memory()
        return table


def main(argv: list[str] | None = None) -> None:
    on_gpu = device_type() == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument(
        "--what", nargs="+", choices=["attention", "prefill"], default=["attention"] if on_gpu else ["attention", "prefill"]
    )
    parser.add_argument("--values", type=int, nargs="+", help="values of one sweep: tokens, images or samples")
    parser.add_argument("--share", type=float, default=0.5, help="fraction of image tokens in a sample")
    parser.add_argument("--tokens", type=int, default=4096 if on_gpu else 512, help="tokens of a sample in the batch sweep")
    parser.add_argument("--text", type=int, default=4096 if on_gpu else 256, help="tokens of text in the images sweep")
    parser.add_argument(
        "--directions",
        nargs="+",
        choices=[FORWARD, BOTH],
        default=[FORWARD, BOTH] if on_gpu else [FORWARD],
        help="of attention",
    )
    parser.add_argument(
        "--patience", type=float, default=3 if on_gpu else 1.5, help="maximum seconds of one run of attention"
    )
    parser.add_argument("--size", choices=SHAPES, default="7b" if on_gpu else "small", help="of the models for prefill")
    add_layer_options(parser)
    options = parser.parse_args(argv)
    if options.values is not None and len(options.sweep) != 1:
        parser.error("--values needs exactly one sweep; pass --sweep")
    if options.ways is None:  # it cannot be captured in a CUDA graph
        options.ways = [way for way in default_ways() if way != "flex_attention"]
    size, ways, timing = layer_options(options)
    print(describe_device())

    def points(what: str, sweep: str, per_image: int) -> dict[int, Point]:
        values = options.values or DEFAULTS[device_type(), what][sweep]
        return {value: point(sweep, value, options, per_image) for value in values}

    results: dict[str, dict[str, dict[int, Table]]] = {sweep: {} for sweep in options.sweep}
    if "attention" in options.what:
        for sweep in options.sweep:
            for direction in options.directions:
                sizes = points("attention", sweep, size.per_image)
                results[sweep][f"attention, {direction}"] = sweep_attention(
                    sizes, size, ways, direction == BOTH, timing, options.patience
                )
    if "prefill" in options.what:
        models = Prefill(SHAPES[options.size])
        for sweep in options.sweep:
            sizes = points("prefill", sweep, models.shape.per_image)
            results[sweep]["prefill"] = {value: models.measure(where, timing) for value, where in sizes.items()}
    write(options.out, options, results)


if __name__ == "__main__":
    main()
