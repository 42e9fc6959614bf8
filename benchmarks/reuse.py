"""Time to first token of a prompt with cached images: `generate(..., image_cache=...)`, which processes the text only, and
the ordinary prefill of text and images. And of a later turn with a new image: the whole conversation again, and the new
tokens over its KV cache. Weights and images are random.

    python benchmarks/reuse.py [--size small|7b] [--images 8] [--text 60] [--compile] [--out reuse.json]

Times are interleaved in one process, from inputs on the device to the token on the host, after a warm-up.
"""

import argparse
from collections.abc import Callable

import torch
from measure import describe_device, device_type, host_ms, report, time_interleaved, write
from models import SHAPES, Shape, build, twin
from transformers import DynamicCache, StaticCache

from dsvl import DSVLConfig, DSVLForConditionalGeneration
from dsvl.utils.cache_cropping import crop

WARM_UP = 3


def build_model(shape: Shape, backend: str, device: str, dtype: torch.dtype) -> DSVLForConditionalGeneration:
    vision, text = shape.configs()
    text.max_position_embeddings = 32768
    config = DSVLConfig(vision, text, image_token_id=shape.image_token_id)
    model = build(DSVLForConditionalGeneration, config, device, dtype).eval()
    model.set_attn_implementation({"text_config": backend})
    model.generation_config.eos_token_id = None
    return model


def prompt(shape: Shape, images: int, text: int, device: str) -> dict[str, torch.Tensor]:
    """A prompt with some text before each image, and the rest after the last one."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, shape.image_token_id, (text,), generator=generator).tolist()
    between = min(4, (text - 1) // images)
    row: list[int] = []
    for number in range(images):
        row += ids[number * between : (number + 1) * between] + [shape.image_token_id] * shape.per_image
    input_ids = torch.tensor([row + ids[images * between :]], device=device)
    pixels = torch.randn(images, 3, shape.image_size, shape.image_size, generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels.to(device)}


def later_turn(
    models: dict[str, DSVLForConditionalGeneration],
    whole: dict[str, torch.Tensor],
    pixels: torch.Tensor,
    shape: Shape,
    static: bool,
) -> tuple[dict[str, Callable[[], None]], dict[str, int], int]:
    """Ways to the first token of a turn with a new image, the tokens that they give, and the tokens of the conversation.

    Args:
        models: name -> model that computes the new tokens over a KV cache of the tokens before.
        whole: the model inputs of the conversation before, without its `pixels`.
        static: whether the KV cache is static.
    """
    new = prompt(shape, 1, 40, pixels.device.type)
    ids = torch.cat([whole["input_ids"], new["input_ids"]], 1)
    past, tokens = whole["input_ids"].shape[1], ids.shape[1]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    how = {"max_new_tokens": 1, "do_sample": False, "disable_compile": True}
    found: dict[str, int] = {}
    first = next(iter(models.values()))

    def again() -> None:
        found["whole"] = int(first.generate(**inputs, pixel_values=torch.cat([pixels, new["pixel_values"]]), **how)[0, -1])

    def over(name: str, model: DSVLForConditionalGeneration) -> Callable[[], None]:
        config = model.config.text_config
        cache = StaticCache(config=config, max_cache_len=tokens) if static else DynamicCache(config=config)
        model.generate(**whole, pixel_values=pixels, past_key_values=cache, **how)

        def run() -> None:
            crop(cache, past)  # what the run before has added
            found[name] = int(
                model.generate(**inputs, pixel_values=new["pixel_values"], past_key_values=cache, **how)[0, -1]
            )

        return run

    return {"whole conversation": again} | {name: over(name, model) for name, model in models.items()}, found, tokens


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--text", type=int, default=60, help="tokens of text in the prompt")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--backend", default="sdpa", help="sdpa, eager, flex_attention")
    parser.add_argument("--cache-implementation", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--compile", action="store_true", help="add a row with model.compile_text_prefill()")
    parser.add_argument("--mode", help="of torch.compile, such as max-autotune-no-cudagraphs (with --compile)")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    device = device_type()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = SHAPES[options.size]
    model = build_model(shape, options.backend, device, dtype)
    whole = prompt(shape, options.images, options.text, device)
    pixels = whole.pop("pixel_values")
    print(f"{options.size} on {describe_device()}, {dtype}, {options.backend}, {options.cache_implementation}")

    encoding = [host_ms(lambda: model.encode_images(pixels)) for _ in range(WARM_UP)]
    cache = model.encode_images(pixels)
    how = {"max_new_tokens": 1, "do_sample": False, "disable_compile": True}
    how["cache_implementation"] = None if options.cache_implementation == "dynamic" else "static"
    tokens: dict[str, int] = {}

    def first_token(way: str, model: DSVLForConditionalGeneration, **images: object) -> Callable[[], None]:
        def run() -> None:
            tokens[way] = int(model.generate(**whole, **images, **how)[0, -1])

        return run

    ways = {
        "ordinary": first_token("ordinary", model, pixel_values=pixels),
        "image KV cache": first_token("image KV cache", model, image_cache=cache),
    }
    turns = {"over its KV cache": model}
    if options.compile:
        fast = twin(model)
        fast.compile_text_prefill(**({} if options.mode is None else {"mode": options.mode}))
        turns["over its KV cache, compiled"] = fast
        ways["image KV cache, compiled"] = first_token("image KV cache, compiled", fast, image_cache=cache)
    results = time_interleaved(ways, rounds=options.repeats, warm_up=WARM_UP, clock=host_ms)
    report(f"{whole['input_ids'].shape[1]} tokens, {options.text} of them text", results)
    figures = {
        "same_token": len(set(tokens.values())) == 1,
        "mib_per_image": cache.nbytes / len(cache) / 2**20,
        "encoding_ms_per_image": min(encoding) / len(cache),
    }
    print(
        f"{'equal' if figures['same_token'] else 'different'} first tokens; an image takes "
        f"{figures['encoding_ms_per_image']:.1f} ms to encode, once, and {figures['mib_per_image']:.1f} MiB"
    )
    ways, found, length = later_turn(turns, whole, pixels, shape, options.cache_implementation == "static")
    later = time_interleaved(ways, rounds=options.repeats, warm_up=WARM_UP, clock=host_ms)
    report(f"a later turn with a new image, {length} tokens, {length - whole['input_ids'].shape[1]} of them new", later)
    figures["same_token_in_later_turn"] = len(set(found.values())) == 1
    print(f"{'equal' if figures['same_token_in_later_turn'] else 'different'} first tokens")
    results |= {f"later turn: {name}": row for name, row in later.items()}
    write(options.out, options, results | {"images": figures})


if __name__ == "__main__":
    main()
