"""Tiny random models and processors of every image layout, which tests of several files share."""

from functools import cache
from typing import Any

import numpy as np
import torch
from conftest import FAMILIES, REFERENCE, number_images, tiny_tower_config
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, Siglip2ImageProcessor, Siglip2VisionConfig

from dsvl import DSVLConfig, DSVLForConditionalGeneration, DSVLProcessor

SIDE, PATCH, NATIVE_PATCH = 28, 14, 4
NUMBERED = 9  # images of a conversation that know their number, as in composed models
# Fields of the configuration; native images have a tower of their own.
CASES: dict[str, dict[str, Any]] = {
    "crop": {},
    "pad": {"image_layout": "pad"},
    "tiles": {"image_layout": "tiles", "max_tiles": 4},
    "tiles, downsample": {"image_layout": "tiles", "max_tiles": 6, "projector_type": "mlp", "downsample": 2},
    "tiles, perceiver": {"image_layout": "tiles", "max_tiles": 4, "projector_type": "perceiver", "num_queries": 9},
    "native": {"image_layout": "native", "max_image_tokens": 12},
    "native, downsample": {"image_layout": "native", "max_image_tokens": 9, "projector_type": "mlp", "downsample": 2},
    "native, perceiver": {
        "image_layout": "native",
        "max_image_tokens": 12,
        "projector_type": "perceiver",
        "num_queries": 4,
    },
}
# Whose images differ in their number of tiles or tokens.
VARYING = [name for name in CASES if name not in ("crop", "pad")]
SIZES = [(40, 30), (90, 20), (10, 12), (20, 90), (56, 56)]  # (width, height)


def native_tower_config() -> Siglip2VisionConfig:
    return Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=NATIVE_PATCH,
        num_patches=16,
    )


def layout_config(case: str, vocabulary: int, image_token_id: int, family: str = "llama", **fields: Any) -> DSVLConfig:
    text = FAMILIES[family]()
    text.vocab_size, text.max_position_embeddings = vocabulary, 4096
    values = CASES[case] | fields
    if values.get("multimodal_attention", "mmca") == "mmca" and not values.get("reversed_images"):
        values = {"numbered_images": NUMBERED} | values
    tower = native_tower_config() if values.get("image_layout") == "native" else tiny_tower_config()
    return DSVLConfig(tower, text, image_token_id=image_token_id, **values)


def layout_processor(case: str, config: DSVLConfig | None = None, **arguments: Any) -> DSVLProcessor:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "tokenizer")
    if config is None:
        config = layout_config(case, 401, 400)
    if config.image_layout == "native":
        image_processor: Any = Siglip2ImageProcessor(patch_size=NATIVE_PATCH)
    else:
        side = {"height": SIDE, "width": SIDE}
        image_processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side)
    return DSVLProcessor(image_processor, tokenizer, **(config.processor_arguments | arguments))


def layout_parts(case: str, family: str = "llama", dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[Any, Any]:
    """A random model in evaluation mode, whose answers do not end by themselves, and its processor. Images are numbered."""
    processor = layout_processor(case)
    config = layout_config(case, len(processor.tokenizer), processor.image_token_id, family, **fields)
    torch.manual_seed(0)
    model = number_images(DSVLForConditionalGeneration(config).to(dtype).eval())
    model.generation_config.eos_token_id = None
    return model, layout_processor(case, config)


shared_parts = cache(layout_parts)  # for tests that leave them as they are


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An image of random pixels, of (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def question(images: list[Image.Image], text: str = "What is it?") -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def model_inputs(processor: Any, conversations: list[Any], side: str = "left", dtype: torch.dtype = torch.float64) -> Any:
    """A batch of conversations, ready to be answered."""
    inputs = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": side},
    )
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return dict(inputs)
