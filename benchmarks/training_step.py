"""Training steps of DSVL and transformers' Llava with random weights, interleaved: CLIP ViT-L/14 + LLaMA-7B in bf16 on a
GPU, a small model in float32 on a CPU.

Projector and embeddings are trained, tower and decoder are frozen, as in DeepSpeed-VisualChat. A step is forward and
backward without the optimizer. TFLOP/s are computed from the same FLOPs for both models (flops.py).

The table "frozen" has the frozen linear layers of tower and decoder in 8 bits, but for the first and the last layer of the
decoder, in both models alike (dsvl train --frozen-precision).

    python benchmarks/training_step.py [--tokens 4096] [--batch 2] [--images 8] [--layers 32] [--out step.json]
    python benchmarks/training_step.py --modes frozen
    python benchmarks/training_step.py --check    # run every row once at a tiny size, also on a CPU
"""

import argparse
import gc
from dataclasses import replace

import torch
from measure import Table, describe_device, device_type, large_product_tflops, report, time_interleaved, write
from models import SHAPES, Shape, dsvl, inputs, llava
from steps import (
    add_rates,
    check,
    compiled_and_recomputed,
    compiled_steps,
    frozen_steps,
    has_liger,
    liger_steps,
    step,
    weights_gib,
)

# Without and with gradient checkpointing, and frozen weights in 8 bits: of their own, as the copies take memory.
MODES = ("plain", "checkpointing", "frozen")


def attending(model, batch: dict[str, torch.Tensor], attention: str, backend: str):
    """A step of the same model with another attention; more copies of 7B parameters do not fit on a GPU."""
    run = step(model, batch)

    def switched():
        model.config.multimodal_attention = attention
        if model.config.text_config._attn_implementation != backend:
            model.set_attn_implementation({"text_config": backend})
        run()

    return switched


def compare(shape: Shape, options: argparse.Namespace, mode: str, liger: bool) -> Table:
    checkpointing = mode == "checkpointing"
    device = device_type()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = inputs(shape, device, dtype)
    ours, theirs = dsvl(shape, "mmca", "sdpa", device, dtype), llava(shape, device, dtype)
    if checkpointing:
        for model in (ours, theirs):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    other_weights: dict[str, float] = {}
    compiler = None if options.compiler == "none" else options.compiler
    if mode == "frozen":
        both = compiled_steps(ours, theirs, batch, options.compiler)
        in_8_bits, other_weights = frozen_steps(ours, theirs, batch, options.compiler)
        alternatives = {name: both[name] for name in ("Llava, compiled, chunked loss", "DSVL mmca, compiled layers")}
        alternatives |= in_8_bits
    elif liger:
        alternatives = liger_steps(ours, theirs, batch, compiler)
    else:
        alternatives = {
            "Llava, sdpa": step(theirs, batch),
            "DSVL causal, sdpa": attending(ours, batch, "causal", "sdpa"),
            "DSVL mmca, sdpa": attending(ours, batch, "mmca", "sdpa"),
        }
        if device == "cuda":
            alternatives["DSVL mmca, flex_attention"] = attending(ours, batch, "mmca", "flex_attention")
        if compiler is not None:
            alternatives |= compiled_steps(ours, theirs, batch, compiler)
            if not checkpointing:
                some = compiled_and_recomputed(ours, compiler, every=8)
                alternatives["DSVL mmca, compiled, recomputing 1/8"] = step(some, batch)
    warm_up = 3 if device == "cuda" else 1
    table = time_interleaved(alternatives, rounds=options.rounds, warm_up=warm_up, budget=options.budget)
    title = f"{shape.batch} x {shape.tokens} tokens, {shape.images} images per sample"
    title += ", gradient checkpointing" if checkpointing else ""
    title += ", frozen weights in 8 bits" if mode == "frozen" else ""
    title += ", Liger" if liger else ""
    add_rates(table, shape, batch, weights_gib(ours), options.large_product, other_weights)
    if device == "cuda":
        peak = f"{options.large_product:.0f} TFLOP/s, measured with a large bf16 product"
        title += f" (of peak: of {peak}; peak GiB: without weights, total GiB: with the weights of one model)"
    elif mode != "frozen" and not liger:
        table["DSVL mmca, flex_attention"] = {"skipped": "flex_attention has no backward on a CPU"}
    report(title, table)
    return table


def main(argv: list[str] | None = None) -> None:
    on_gpu = device_type() == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="7b" if on_gpu else "small")
    parser.add_argument("--tokens", type=int, default=4096 if on_gpu else 512)
    parser.add_argument("--batch", type=int, default=2 if on_gpu else 1)
    parser.add_argument("--images", type=int, default=8 if on_gpu else 1)
    parser.add_argument("--layers", type=int, help="layers of the decoder; fewer for a smaller GPU")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--budget", type=float, default=float("inf"), help="maximum seconds for each row")
    parser.add_argument(
        "--compiler", default="inductor" if on_gpu else "none", help="torch.compile's backend; none skips the compiled rows"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=MODES, help="tables to measure (default: all; frozen needs a compiler)"
    )
    parser.add_argument("--check", action="store_true", help="only run every row once at a tiny size, and compare losses")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    if options.check:
        check(options.compiler, device_type())
        return
    torch._dynamo.config.recompile_limit = 64  # all rows compile the same function, the forward of a layer
    print(describe_device())
    options.large_product = large_product_tflops() if on_gpu else None
    shape = SHAPES[options.size]
    layers = options.layers or shape.layers
    shape = replace(shape, batch=options.batch, tokens=options.tokens, images=options.images, layers=layers)
    results = {}
    for liger in (False, True) if on_gpu and has_liger() else (False,):  # last, as Liger patches transformers
        for mode in options.modes:
            if mode == "frozen" and (liger or options.compiler == "none"):
                continue
            results[mode + ", Liger" * liger] = compare(shape, options, mode, liger)
            torch._dynamo.reset()  # dynamo limits the number of graphs per function
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    write(options.out, options, results)


if __name__ == "__main__":
    main()
