"""Checkpoints that vLLM serves with DSVL's plugin, requests to them, and what they answer here."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from exported_models import DECODERS as EXPORTED
from exported_models import HEAD, SIZE, WINDOW, compose_for_export
from exported_models import TEXT as SIZES
from PIL import Image

import dsvl

NEW_TOKENS = 10
WORDS = "red green blue cup dog house where what colour is the of and picture how many".split()
DECODERS = EXPORTED | {
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **SIZES, **HEAD, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    )
}
# Where tiny decoders differ from those of the export's tests.
CHANGES = {
    # Caps of the released Gemma 2: a smaller one is refused.
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
}


def requests(count: int = 8, sizes: tuple[tuple[int, int], ...] = ((SIZE, SIZE),), seed: int = 0) -> list[Any]:
    """Conversations with 0 to 4 images, as clients of the chat completions API send them.

    Args:
        count: how many.
        sizes: (width, height) of the images, in turn.
        seed: of words and pixels.
    """
    chance = np.random.default_rng(seed)

    def words(least: int, most: int) -> dict[str, Any]:
        return {"type": "text", "text": " ".join(chance.choice(WORDS, chance.integers(least, most)))}

    made, images = [], 0
    for number in range(count):
        content = []
        for _ in range(number % 5):
            width, height = sizes[images % len(sizes)]
            images += 1
            pixels = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
            content += [{"type": "image_url", "image_url": {"url": data_url(Image.fromarray(pixels))}}, words(1, 5)]
        made.append([{"role": "user", "content": [*content, words(2, 12)]}])
    return made


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    held = io.BytesIO()
    image.save(held, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(held.getvalue()).decode()


def as_conversation(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A request as `DSVLProcessor` takes it."""

    def part(one: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "url": one["image_url"]["url"]} if one["type"] == "image_url" else one

    return [
        message | {"content": [part(one) for one in message["content"]]} if isinstance(message["content"], list) else message
        for message in messages
    ]


def checkpoint(folder: Path, decoder: str = "llama", tower: str = "clip", **options: Any) -> tuple[Any, Any]:
    """Save a model of this decoder, and return it with its processor.

    Args:
        folder: of the checkpoint.
        decoder, tower: names of `DECODERS` and of `exported_models.TOWERS`.
        options: of `compose_for_export` and `dsvl.compose`.
    """
    text = CHANGES.get(decoder, {}) | (options.pop("text", None) or {})
    model, processor = compose_for_export(tower, decoder, text=text, **{"multimodal_attention": "mmca"} | options)
    model.eval()
    dsvl.save_checkpoint(model, processor, folder)
    return model, processor


@torch.no_grad()
def reference(model: Any, processor: Any, messages: list[dict[str, Any]], new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """What `generate()` answers, and the log probabilities of its tokens by one forward pass of the whole."""
    inputs = processor.apply_chat_template(
        as_conversation(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt = inputs["input_ids"].shape[1]
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    model.generation_config.eos_token_id = eos
    return {
        "prompt_ids": inputs["input_ids"][0].tolist(),
        "ids": ids[0, prompt:].tolist(),
        "logprobs": log_probabilities(model, inputs, ids[0, prompt:]),
    }


@torch.no_grad()
def log_probabilities(model: Any, inputs: Any, answer: torch.Tensor) -> list[float]:
    """Of the tokens of an answer, without those that are never generated."""
    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    ids = torch.cat([inputs["input_ids"], answer[None]], dim=1)
    logits = model(input_ids=ids, **images).logits[0, -len(answer) - 1 : -1].float()
    forbidden = [model.config.image_token_id, *(model.generation_config.suppress_tokens or [])]
    logits[:, forbidden] = -torch.inf
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].tolist()
