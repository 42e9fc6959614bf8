"""Time to the first token of a prompt about pictures that were seen before: `generate(..., picture_cache=...)`, which runs
the prompt's text, beside the ordinary prefill of text and pictures. Weights and pictures are random.

    python benchmarks/reuse.py [--size small|7b] [--pictures 8] [--text 60] [--repeats 20] [--out reuse.json]

Both run in turns in one process, from inputs on the device to the token on the host; the first repeats warm up.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from models import Shape

from dsvl import DSVLConfig, DSVLForConditionalGeneration

# CLIP ViT-L/14's 257 tokens a picture at widths that a CPU can run; and CLIP ViT-L/14 + LLaMA-7B.
SMALL = Shape(
    layers=8,
    hidden=512,
    intermediate=1376,
    heads=8,
    vocabulary=4096,
    vision_layers=4,
    vision_hidden=256,
    vision_intermediate=1024,
    vision_heads=4,
)
SHAPES = {"small": SMALL, "7b": Shape()}
WARM_UP = 3


def build(shape: Shape, backend: str, device: str, dtype: torch.dtype) -> DSVLForConditionalGeneration:
    vision, text = shape.configs()
    text.max_position_embeddings = 32768
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = DSVLForConditionalGeneration(DSVLConfig(vision, text, image_token_id=shape.image_token_id)).eval()
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation({"text_config": backend})
    model.generation_config.eos_token_id = None
    return model


def prompt(shape: Shape, pictures: int, text: int, device: str) -> dict[str, torch.Tensor]:
    """A little text before each picture, and the rest after the last."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, shape.image_token_id, (text,), generator=generator).tolist()
    between = min(4, (text - 1) // pictures)
    row: list[int] = []
    for number in range(pictures):
        row += ids[number * between : (number + 1) * between] + [shape.image_token_id] * shape.per_picture
    input_ids = torch.tensor([row + ids[pictures * between :]], device=device)
    pixels = torch.randn(pictures, 3, shape.image_size, shape.image_size, generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels.to(device)}


def seconds(run: Callable[[], torch.Tensor]) -> tuple[float, int]:
    """Until the token is on the host, and which it is."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    token = int(run()[0, -1])
    return time.perf_counter() - started, token


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--text", type=int, default=60, help="tokens of text in the prompt")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--backend", default="sdpa", help="sdpa, eager, flex_attention")
    parser.add_argument("--cache-implementation", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--compile", action="store_true", help="model.compile_text_prefill()")
    parser.add_argument("--out", help="write the figures as JSON")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = SHAPES[options.size]
    model = build(shape, options.backend, device, dtype)
    whole = prompt(shape, options.pictures, options.text, device)
    pixels = whole.pop("pixel_values")
    print(f"{options.size} on {name}, torch {torch.__version__}, {dtype}, {options.backend}, {options.cache_implementation}")

    encoding = [seconds(lambda: model.encode_pictures(pixels).keys.flatten()[None])[0] for _ in range(WARM_UP)]
    cache = model.encode_pictures(pixels)
    if options.compile:
        model.compile_text_prefill()
    how = {"max_new_tokens": 1, "do_sample": False, "disable_compile": True}
    how["cache_implementation"] = None if options.cache_implementation == "dynamic" else "static"
    ways = {
        "ordinary": lambda: model.generate(**whole, pixel_values=pixels, **how),
        "picture cache": lambda: model.generate(**whole, picture_cache=cache, **how),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    tokens: dict[str, int] = {}
    peaks: dict[str, float] = {}
    for repeat in range(WARM_UP + options.repeats):
        for way, run in ways.items():
            taken, tokens[way] = seconds(run)
            if repeat >= WARM_UP:
                times[way].append(1000 * taken)
            if device == "cuda":
                peaks[way] = torch.cuda.max_memory_allocated() / 2**30
    ratios = [one / other for one, other in zip(*times.values(), strict=True)]

    print(f"{whole['input_ids'].shape[1]} tokens, {options.text} of them text")
    results: dict[str, dict[str, float]] = {}
    for way, values in times.items():
        results[way] = {"ms": statistics.median(values), "ms_low": min(values), "ms_high": max(values)}
        memory = ""
        if way in peaks:
            results[way]["peak_gib"] = peaks[way]
            memory = f", peak {peaks[way]:.2f} GiB"
        print(f"{way:16}{results[way]['ms']:10.2f} ms ({min(values):.2f} to {max(values):.2f}){memory}")
    figures = {
        "speed": statistics.median(ratios),
        "speed_low": min(ratios),
        "speed_high": max(ratios),
        "same_token": tokens["ordinary"] == tokens["picture cache"],
        "mib_a_picture": cache.nbytes / len(cache) / 2**20,
        "encoding_ms_a_picture": 1000 * min(encoding) / len(cache),
    }
    print(
        f"{figures['speed']:.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"{'the same' if figures['same_token'] else 'another'} token; a picture takes "
        f"{figures['encoding_ms_a_picture']:.1f} ms to encode, once, and {figures['mib_a_picture']:.1f} MiB"
    )
    if options.out is not None:
        record = {
            "device": name,
            "torch": torch.__version__,
            "options": vars(options),
            "results": results | {"comparison": figures},
        }
        Path(options.out).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
