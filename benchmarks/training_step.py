"""One training step with random weights, in turns: DSVL beside transformers' Llava. CLIP ViT-L/14 + LLaMA-7B in bf16 on a
GPU, a small model in float32 on a CPU.

Projector and embeddings learn, tower and decoder are frozen, as DeepSpeed-VisualChat trains. No optimizer step: forward and
backward are what differs. TFLOP/s are of what a step is worth, whichever model computes it (flops.py).

    python benchmarks/training_step.py [--tokens 4096] [--batch 2] [--pictures 8] [--layers 32] [--out step.json]
"""

import argparse
import gc
from dataclasses import replace

import torch
from flops import step_flops, supervised_tokens
from measure import Table, describe_device, device_type, in_turns, report, utilise, write
from models import SHAPES, Shape, dsvl, inputs, llava


def step(model, batch: dict[str, torch.Tensor]):
    """Forward and backward of one batch."""

    def run():
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def attending(model, batch: dict[str, torch.Tensor], attention: str, backend: str):
    """The same model under another attention: the weights are the same, and two 7B models are enough for one GPU."""
    run = step(model, batch)

    def switched():
        model.config.multimodal_attention = attention
        if model.config.text_config._attn_implementation != backend:
            model.set_attn_implementation({"text_config": backend})
        run()

    return switched


def compare(shape: Shape, checkpointing: bool, rounds: int, budget: float) -> Table:
    device = device_type()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = inputs(shape, device, dtype)
    ours, theirs = dsvl(shape, "mmca", "sdpa", device, dtype), llava(shape, device, dtype)
    if checkpointing:
        for model in (ours, theirs):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    alternatives = {
        "Llava, sdpa": step(theirs, batch),
        "DSVL causal, sdpa": attending(ours, batch, "causal", "sdpa"),
        "DSVL mmca, sdpa": attending(ours, batch, "mmca", "sdpa"),
    }
    title = f"{shape.batch} x {shape.tokens} tokens, {shape.pictures} pictures a sample"
    title += ", gradient checkpointing" if checkpointing else ""
    if device == "cuda":
        alternatives["DSVL mmca, flex_attention"] = attending(ours, batch, "mmca", "flex_attention")
        title += f" (peak: above the {torch.cuda.memory_allocated() / 2**30:.1f} GiB of both models' weights)"
    table = in_turns(alternatives, rounds=rounds, warm_up=3 if device == "cuda" else 1, budget=budget)
    utilise(table, dict.fromkeys(table, step_flops(shape, supervised_tokens(batch["labels"]))))
    if device == "cpu":
        table["DSVL mmca, flex_attention"] = {"left_out": "flex_attention has no backward on a CPU"}
    report(title, table)
    return table


def main(argv: list[str] | None = None) -> None:
    on_gpu = device_type() == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="7b" if on_gpu else "small")
    parser.add_argument("--tokens", type=int, default=4096 if on_gpu else 512)
    parser.add_argument("--batch", type=int, default=2 if on_gpu else 1)
    parser.add_argument("--pictures", type=int, default=8 if on_gpu else 1)
    parser.add_argument("--layers", type=int, help="of the decoder; fewer for a smaller GPU")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for each row, if that is less")
    parser.add_argument("--out", help="write the figures as JSON")
    options = parser.parse_args(argv)
    print(describe_device())
    shape = SHAPES[options.size]
    layers = options.layers or shape.layers
    shape = replace(shape, batch=options.batch, tokens=options.tokens, pictures=options.pictures, layers=layers)
    results = {}
    for checkpointing in (False, True):
        results["checkpointing" if checkpointing else "plain"] = compare(
            shape, checkpointing, options.rounds, options.budget
        )
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    write(options.out, options, results)


if __name__ == "__main__":
    main()
