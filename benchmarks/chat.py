"""Time to first token in each turn of a conversation: `DSVLChat`, which reuses its KV cache, and processing the whole
conversation again. Eight turns with an image each, then a question without an image. Weights are random.

    python benchmarks/chat.py [--size demo|7b] [--turns 8] [--repeats 10] [--out chat.json]

The first repeat is a warm-up. Tokenizing the text of a random answer gives other tokens than were generated, so the last
answer is processed again each time; with a trained model it is reused as well.
"""

import argparse
import time

import torch
from measure import compared, describe_device, device_type, write
from models import Shape, build
from PIL import Image
from transformers import CLIPImageProcessor

from dsvl import DSVLConfig, DSVLForConditionalGeneration, DSVLProcessor
from dsvl.chat import DSVLChat
from dsvl.demo.conversations import vocabulary_texts
from dsvl.demo.tiny_models import HEADINGS, train_tokenizer
from dsvl.utils.shape_images import IMAGE_SIZE

# The demo's model as demo/tiny_models.py makes it, but for room for longer conversations; and CLIP ViT-L/14 + LLaMA-7B.
DEMO = Shape(
    layers=3,
    hidden=128,
    intermediate=256,
    heads=4,
    vocabulary=512,
    vision_layers=2,
    vision_hidden=64,
    vision_intermediate=128,
    vision_heads=2,
    image_size=IMAGE_SIZE,
    patch_size=16,
)
SHAPES = {"demo": DEMO, "7b": Shape()}
QUESTION = "What do you see in this image, and how does it differ from the one before?"


def build_parts(
    shape: Shape, backend: str, device: str, dtype: torch.dtype
) -> tuple[DSVLForConditionalGeneration, DSVLProcessor]:
    """A model of this shape, with the demo's tokenizer."""
    tokenizer = train_tokenizer([HEADINGS["visualchat"].format(text) for text in vocabulary_texts()])
    side = {"height": shape.image_size, "width": shape.image_size}
    image_processor = CLIPImageProcessor(size={"shortest_edge": shape.image_size}, crop_size=side)
    processor = DSVLProcessor(image_processor, tokenizer, image_seq_length=shape.per_image)
    vision, text = shape.configs()
    config = DSVLConfig(vision, text, image_token_id=processor.image_token_id)
    model = build(DSVLForConditionalGeneration, config, device, dtype).eval()
    model.set_attn_implementation({"text_config": backend})
    return model, processor


def draw_image(seed: int, width: int = 640, height: int = 480) -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy())


def run_again(model: DSVLForConditionalGeneration, processor: DSVLProcessor, messages: list) -> tuple[float, int]:
    """Process the whole conversation: seconds to the first token, and that token."""
    started = time.perf_counter()
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    ).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    token = int(ids[0, -1])
    return time.perf_counter() - started, token


def compare(chat: DSVLChat, repeats: int, with_image: bool) -> dict[str, object]:
    """Measure the next turn both ways, interleaved, each time with another question so that it is not cached."""
    times: dict[str, list[float]] = {"run again": [], "incremental": []}
    same = 0
    length = len(chat.messages)
    for repeat in range(repeats + 1):
        if not chat.messages:  # before the first turn
            chat.reset()
        chat.ask(f"{repeat}. {QUESTION}", [draw_image(1000 + repeat)] if with_image else [], max_new_tokens=1)
        seconds, token = run_again(chat.model, chat.processor, chat.messages[:-1])
        if repeat:
            times["incremental"].append(1000 * chat.last_turn.first_token_seconds)
            times["run again"].append(1000 * seconds)
            same += chat.last_turn.answer_ids == [token]
        del chat.messages[length:]
    cost = chat.last_turn
    return compared(times) | {
        "tokens": cost.prompt_tokens,
        "reused": cost.reused_tokens,
        "images_encoded": cost.encoded_images,
        "same_first_token": same / repeats,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="demo")
    parser.add_argument("--turns", "--rounds", type=int, default=8, help="turns with an image")
    parser.add_argument("--answer-tokens", type=int, default=64, help="length of earlier answers")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--backend", default="sdpa", help="sdpa, eager, flex_attention")
    parser.add_argument("--cache-implementation", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--compile", action="store_true", help="model.compile_text_prefill() for the incremental turns")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    device = device_type()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(f"{options.size} on {describe_device()}, {dtype}, {options.backend}, {options.cache_implementation}")

    model, processor = build_parts(SHAPES[options.size], options.backend, device, dtype)
    if options.compile:
        model.compile_text_prefill()
    chat = DSVLChat(
        model,
        processor,
        do_sample=False,
        min_new_tokens=1,
        max_new_tokens=1,
        cache_implementation=options.cache_implementation,
    )
    answer = {"min_new_tokens": options.answer_tokens, "max_new_tokens": options.answer_tokens}
    results: dict[str, dict] = {}
    print(f"{'':28}{'incremental':>13}{'run again':>13}{'speed':>8}{'tokens':>8}{'reused':>8}{'same':>7}")
    for number in range(1, options.turns + 2):
        with_image = number <= options.turns
        title = f"turn {number}, {'with an image' if with_image else 'text only'}"
        row = results[title] = compare(chat, options.repeats, with_image)
        print(
            f"{title:28}{row['incremental']['ms']:10.1f} ms{row['run again']['ms']:10.1f} ms"
            f"{row['incremental']['speed']:8.1f}{row['tokens']:8.0f}{row['reused']:8.0f}{row['same_first_token']:7.0%}",
            flush=True,
        )
        if with_image:
            chat.ask(QUESTION, draw_image(number - 1), **answer)
    write(options.out, options, results)


if __name__ == "__main__":
    main()
