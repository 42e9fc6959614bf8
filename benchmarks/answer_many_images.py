"""Answering over hundreds of images that are encoded already; `python benchmarks/many_images.py --what answer`."""

import gc
import time
from dataclasses import replace
from typing import Any

import torch
from decoding import Clock
from fine_tuning import device_type, synchronize
from models import Shape, dsvl

from dsvl import SharedImagesCache

# Row -> numbers of images.
ANSWER_ROWS = {
    "16bit": (64,),
    "16bit+shared": (64, 500),
    "16bit+kv8": (64, 500),
    "16bit+kv8+shared": (64, 500, 1000),
    "8bit+shared": (64, 500, 1000),
    "8bit+kv8+shared": (500,),
    "16bit+offloaded": (64, 500),
    "8bit+offloaded": (500,),
}
OPTIONS = ("shared", "offloaded", "kv8")
NEW_TOKENS = {False: 33, True: 5}  # by whether the images are offloaded
ENCODED_AT_ONCE = 16


def parse(name: str) -> tuple[str, frozenset[str]]:
    """The bits and the options of a row."""
    bits, *options = name.split("+")
    is_known = bits in ("16bit", "8bit") and set(options) <= set(OPTIONS) and len(options) == len(set(options))
    # Images in 8 bits and on the host are shared in any case; the row says so once.
    if not is_known or ("shared" in options and "offloaded" in options) or (bits == "8bit" and not options):
        raise ValueError(f"{name!r} is not a row; expected one like {', '.join(ANSWER_ROWS)}.")
    return bits, frozenset(options)


def row_shape(name: str, shape: Shape) -> Shape:
    """The shape of a row's model."""
    return replace(shape, key_value_heads=min(8, max(shape.heads // 2, 1))) if "kv8" in parse(name)[1] else shape


def build(name: str, shape: Shape) -> Any:
    """The model of a row."""
    model = dsvl(shape, "mmca", "sdpa", device_type()).eval()
    model.generation_config.eos_token_id = None
    return model


def measure(name: str, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Encode the images, once, then answer twice and report the second answer.

    Args:
        batch: `input_ids` and `pixel_values` of one prompt, which ends with text.
    """
    bits, options = parse(name)
    is_offloaded, on_gpu = "offloaded" in options, torch.cuda.is_available()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model.encode_images(batch["pixel_values"][:1], quantize=bits == "8bit")  # warms up
    synchronize()
    began = time.perf_counter()
    images = model.encode_images(batch["pixel_values"], ENCODED_AT_ONCE, quantize=bits == "8bit", offload=is_offloaded)
    synchronize()
    encoding = time.perf_counter() - began
    encoding_peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    figures: dict[str, Any] = {}
    ids = batch["input_ids"]
    for new_tokens in (2, NEW_TOKENS[is_offloaded]):
        clock = Clock()
        cache = {"past_key_values": SharedImagesCache(config=model.config)} if options & {"shared"} else {}
        synchronize()
        began = time.perf_counter()
        made = model.generate(ids, image_cache=images, max_new_tokens=new_tokens, do_sample=False, streamer=clock, **cache)
        assert made.shape[1] == ids.shape[1] + new_tokens
        steps = clock.times[2:]
        figures = {
            "first_token_ms": 1000 * (clock.times[1] - began),
            "ms_per_token": 1000 * (steps[-1] - clock.times[1]) / len(steps),
            "tokens_per_s": len(steps) / (steps[-1] - clock.times[1]),
        }
        del cache, made
    return figures | {
        "encoding_s": encoding,
        "tokens": ids.shape[1],
        "images_gib": images.nbytes / 2**30,
        "encoding_peak_gib": encoding_peak,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
    }


HEADER = (
    f"{'':26}{'images':>7}{'first ms':>10}{'ms/token':>10}{'tokens/s':>10}{'encode s':>10}{'images GiB':>12}{'peak GiB':>10}"
    f"{'reserved':>10}"
)


def describe(name: str, number: str, figures: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in figures:
        return f"{name:26}{number:>7}  {figures['error']}"

    def memory(key: str) -> str:
        return f"{'-':>10}" if figures[key] is None else f"{figures[key]:10.2f}"

    return (
        f"{name:26}{number:>7}{figures['first_token_ms']:10.1f}{figures['ms_per_token']:10.2f}{figures['tokens_per_s']:10.2f}"
        f"{figures['encoding_s']:10.2f}{figures['images_gib']:12.2f}{memory('peak_gib')}{memory('reserved_gib')}"
    )
