"""One training step at CLIP ViT-L/14 + LLaMA-7B size with random weights, bf16: DSVL beside transformers' Llava.

Projector and embeddings learn, tower and decoder are frozen, as DeepSpeed-VisualChat trains. No optimizer step: forward and
backward are what differs.

    python benchmarks/training_step.py [--tokens 4096] [--batch 2] [--pictures 8] [--layers 32] [--out step.json]
    python benchmarks/training_step.py --check    # every row once, tiny, on a CPU as well
"""

import argparse
import gc

import torch
from measure import in_turns, report, write
from models import Shape, dsvl, inputs, llava
from steps import add_rates, check, compiled_steps, has_liger, liger_steps, step, weights_gib


def attending(model, batch: dict[str, torch.Tensor], attention: str, backend: str):
    """The same model under another attention: the weights are the same, and two 7B models are enough for one GPU."""
    run = step(model, batch)

    def switched():
        model.config.multimodal_attention = attention
        if model.config.text_config._attn_implementation != backend:
            model.set_attn_implementation({"text_config": backend})
        run()

    return switched


def compare(options: argparse.Namespace, checkpointing: bool, liger: bool) -> dict[str, dict[str, float]]:
    shape = Shape(batch=options.batch, tokens=options.tokens, pictures=options.pictures, layers=options.layers)
    batch = inputs(shape)
    ours, theirs = dsvl(shape, "mmca", "sdpa"), llava(shape)
    if checkpointing:
        for model in (ours, theirs):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    compiler = None if options.compiler == "none" else options.compiler
    if liger:
        alternatives = liger_steps(ours, theirs, batch, compiler)
    else:
        alternatives = {
            "Llava, sdpa": step(theirs, batch),
            "DSVL causal, sdpa": attending(ours, batch, "causal", "sdpa"),
            "DSVL mmca, sdpa": attending(ours, batch, "mmca", "sdpa"),
            "DSVL mmca, flex_attention": attending(ours, batch, "mmca", "flex_attention"),
        }
        if compiler is not None:
            alternatives |= compiled_steps(ours, theirs, batch, compiler)
    table = in_turns(alternatives, rounds=options.rounds, warm_up=3)
    title = f"{options.batch} x {options.tokens} tokens, {options.pictures} pictures a sample"
    title += ", gradient checkpointing" if checkpointing else ""
    title += ", Liger" if liger else ""
    weights = torch.cuda.memory_allocated() / 2**30
    report(f"{title} (peak: above the {weights:.1f} GiB of both models' weights)", table, base=next(iter(table)))
    add_rates(table, shape, batch, weights_gib(ours))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32, help="of the decoder; fewer for a smaller GPU")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend; none leaves its rows out")
    parser.add_argument("--check", action="store_true", help="run every row once at a tiny size instead, and compare losses")
    parser.add_argument("--out", help="write the figures as JSON")
    options = parser.parse_args()
    if options.check:
        check(options.compiler, "cuda" if torch.cuda.is_available() else "cpu")
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    results = {}
    for liger in (False, True) if has_liger() else (False,):  # last: it changes transformers' functions
        for checkpointing in (False, True):
            name = ("checkpointing" if checkpointing else "plain") + ", Liger" * liger
            results[name] = compare(options, checkpointing, liger)
            torch._dynamo.reset()  # which makes so many graphs of the layers' code, and no more
            gc.collect()
            torch.cuda.empty_cache()
    write(options.out, results)


if __name__ == "__main__":
    main()
