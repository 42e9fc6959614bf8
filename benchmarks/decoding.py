"""Decoding speed of DSVL and transformers' Llava, with a dynamic KV cache, and with a static one and a compiled step.
Weights and images are random; the prompt is an image and some text.

    python benchmarks/decoding.py [--size demo|small|7b] [--batches 1 16] [--new-tokens 128] [--caches dynamic static]
                                  [--quantize int8 fp8] [--out FILE]

Measurements are interleaved in one process. A streamer measures the time from the first new token to the last on the host,
so that the prefill does not count. Speeds are relative to Llava with the same kind of KV cache in the same round. The table
also has the bandwidth of reading the weights in GB/s, which bounds a step at batch size 1. With the demo's tiny model on a
CPU, or with a dynamic cache on a GPU, the host's work for each step counts.
"""

import argparse
import statistics
import time

import torch
from measure import describe_device, device_type, write
from models import SHAPES, Shape, llava
from reuse import build_model, prompt
from transformers import CompileConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from chat import DEMO
from dsvl.utils.quantization import quantization_config, stored_tensors

CACHES = ("dynamic", "static")


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decode step reads: those of the decoder and the head."""
    table = model.get_input_embeddings().weight
    parts = [*model.model.language_model.parameters(), model.lm_head.weight]
    read = {id(weight): weight for weight in parts if weight is not table or weight is model.lm_head.weight}
    return sum(part.nbytes for weight in read.values() for part in stored_tensors(weight))


class Clock(BaseStreamer):
    """A streamer that records when tokens reach the host, and the process's processor time then; the first entry is the
    prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.processor_times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.processor_times.append(time.process_time())

    def end(self) -> None:
        pass


def tokens_per_second(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], new_tokens: int, static: bool
) -> tuple[float, float]:
    """Tokens per second of all rows of a batch, without the first token; and milliseconds of processor time per step."""
    options: dict = {}
    if static:
        options = {"cache_implementation": "static"}
        if not torch.cuda.is_available():  # transformers compiles on a CPU only if forced
            options["compile_config"] = CompileConfig(mode="default")
            options["compile_config"]._compile_all_devices = True
    clock = Clock()
    made = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, **options)
    assert made.shape[1] == inputs["input_ids"].shape[1] + new_tokens == inputs["input_ids"].shape[1] + len(clock.times) - 1
    used = clock.processor_times[-1] - clock.processor_times[1]
    return len(made) * (new_tokens - 1) / (clock.times[-1] - clock.times[1]), 1000 * used / (new_tokens - 1)


def quantized(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Quantize the decoder to 8 bits, as `from_pretrained(quantization_config=...)` does."""
    from torchao.quantization import quantize_

    quantize_(model.model.language_model, quantization_config(kind, model.dtype).quant_type)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SHAPES, "demo"], default="small")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--images", type=int, default=1, help="images in a prompt")
    parser.add_argument("--text", type=int, default=60, help="tokens of text in a prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="sdpa", help="sdpa, eager, flex_attention")
    parser.add_argument("--caches", choices=CACHES, nargs="+", default=CACHES, help="kinds of KV cache")
    parser.add_argument(
        "--quantize", choices=("int8", "fp8"), nargs="+", default=[], help="add rows with DSVL's decoder in 8 bits"
    )
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    device = device_type()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape: Shape = DEMO if options.size == "demo" else SHAPES[options.size]
    print(f"{options.size} on {describe_device()}, {dtype}, {options.backend}")

    theirs = llava(shape, device).to(dtype).eval()
    theirs.generation_config.eos_token_id = None
    models = {"Llava": theirs, "DSVL": build_model(shape, options.backend, device, dtype)}
    for kind in options.quantize:
        models[f"DSVL {kind}"] = quantized(build_model(shape, options.backend, device, dtype), kind)
    results: dict[str, dict[str, float]] = {}
    for batch in options.batches:
        one = prompt(shape, options.images, options.text, device)
        inputs = {key: tensor.repeat(batch, *[1] * (tensor.ndim - 1)) for key, tensor in one.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        ways = {(model, kind == "static"): [] for kind in CACHES if kind in options.caches for model in models}
        processor_ms = {way: [] for way in ways}
        for number in range(options.rounds + 1):
            for (model, static), rates in ways.items():
                rate, used = tokens_per_second(models[model], inputs, options.new_tokens, static)
                if number:  # the first compiles
                    rates.append(rate)
                    processor_ms[model, static].append(used)
        print(f"\nbatch {batch}, prompts of {inputs['input_ids'].shape[1]} tokens, {options.new_tokens} new tokens")
        for (model, static), rates in ways.items():
            base = ways[("Llava", static)]
            way = f"{model}, {'static, compiled' if static else 'dynamic'}"
            row = {
                "tokens_per_s": statistics.median(rates),
                "tokens_per_s_low": min(rates),
                "tokens_per_s_high": max(rates),
                "ms_per_step": 1000 * batch / statistics.median(rates),
                "processor_ms_per_step": statistics.median(processor_ms[model, static]),
                "speed": statistics.median([rate / other for rate, other in zip(rates, base, strict=True)]),
                "weights_gb_per_s": weight_bytes(models[model]) / 1e9 * statistics.median(rates) / batch,
            }
            results[f"{way}, batch {batch}"] = row
            print(
                f"{way:28}{row['tokens_per_s']:9.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f})"
                f"{row['ms_per_step']:9.2f} ms per step, {row['processor_ms_per_step']:.2f} of the processor"
                f"{row['weights_gb_per_s']:8.0f} GB/s{row['speed']:7.2f}x"
            )
    write(options.out, options, results)


if __name__ == "__main__":
    main()
