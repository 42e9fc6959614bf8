"""Checkpoints that vLLM serves with DSVL's plugin, requests to them, and what they answer here."""

import base64
import io
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from exported_models import DECODERS, HEAD, SIZE, TEXT, WINDOW, compose_for_export, image_processor
from layout_models import NATIVE_PATCH, native_tower_config
from PIL import Image

import dsvl

NEW_TOKENS = 10
WORDS = ["red", "green", "blue", "cup", "dog", "house", "where", "what", "colour", "is", "the", "of", "and", "how", "many"]
_TOWER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def decoder_config(name: str, softcap: float) -> Any:
    """Those of the export's tests, except where LLaVA or padded heads cannot express them."""
    if name == "gemma3_text":
        layers = ["sliding_attention", "full_attention"]
        return transformers.Gemma3TextConfig(**TEXT, **HEAD, sliding_window=WINDOW, layer_types=layers)
    if name == "bitnet":  # which vLLM does not have
        return transformers.BitNetConfig(**TEXT)
    config = DECODERS[name]()
    if name == "mistral":  # all of its layers have a window: the answers would see no image in a smaller one
        config.sliding_window = 64
    if name == "gemma2":  # the released one's: a small cap is refused
        config.attn_logit_softcapping, config.final_logit_softcapping = softcap, 30.0
    return config


def other_tower(name: str) -> tuple[Any, Any]:
    """A tower that LLaVA does not take, and its image processor."""
    if name == "native":
        return native_tower_config(), transformers.Siglip2ImageProcessor(patch_size=NATIVE_PATCH)
    if name == "qwen":
        tower: Any = dsvl.DSVLQwenVisionConfig(
            **_TOWER, intermediate_size=48, image_size=SIZE, patch_size=14, num_positions=16, output_dim=64, num_queries=9
        )
        return tower, image_processor("clip")
    tower = transformers.DINOv3ViTConfig(
        **_TOWER, intermediate_size=48, image_size=SIZE, patch_size=14, num_register_tokens=4
    )
    return tower, image_processor("siglip")  # its own needs torchvision


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


def noise(count: int, width: int, height: int) -> list[Image.Image]:
    """Images of random pixels."""
    pixels = np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(held.getvalue()).decode()


def as_conversation(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A request as `DSVLProcessor` takes it."""

    def part(one: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "url": one["image_url"]["url"]} if one["type"] == "image_url" else one

    return [
        message | {"content": [part(one) for one in message["content"]]} if isinstance(message["content"], list) else message
        for message in messages
    ]


def checkpoint(
    folder: Path,
    decoder: str = "llama",
    tower: str = "clip",
    softcap: float = 50.0,
    reversed_images: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Save a model of this decoder, and return it with its processor.

    Args:
        folder: of the checkpoint.
        decoder: of `decoder_config`.
        tower: of `exported_models.TOWERS` or `other_tower`.
        softcap: of Gemma 2's attention.
        reversed_images: as in models that DeepSpeed-VisualChat's code trained.
        options: of `compose_for_export` and `dsvl.compose`.
    """
    defaults: dict[str, Any] = {"multimodal_attention": "mmca"}
    vision: Any = tower
    if tower in ("native", "qwen", "dinov3"):
        vision, defaults["processor"] = other_tower(tower)
        defaults |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    model, processor = compose_for_export(vision, decoder_config(decoder, softcap), **defaults | options)
    model.eval()
    model.config.reversed_images = reversed_images
    dsvl.save_checkpoint(model, processor, folder)
    return model, processor


def model_inputs(processor: Any, messages: list[dict[str, Any]]) -> Any:
    """The inputs of a request to a model."""
    return processor.apply_chat_template(
        as_conversation(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def plain_entry_point(folder: Path) -> Path:
    """A folder for PYTHONPATH in which `dsvl` is this checkout, with the entry points of pyproject.toml, as if installed."""
    root, site = Path(dsvl.__file__).parent, folder / "site"
    information = site / "dsvl-0.dist-info"
    if not information.exists():
        information.mkdir(parents=True)
        (site / "dsvl").symlink_to(root)
        points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
        lines = [
            line for group, names in points.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in names.items()))
        ]
        (information / "entry_points.txt").write_text("\n".join(lines))
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: dsvl\nVersion: 0\n")
    return site


@torch.no_grad()
def reference(model: Any, processor: Any, messages: list[dict[str, Any]], new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """What `generate()` answers, and the log probabilities of its tokens by one forward pass of the whole."""
    inputs = model_inputs(processor, messages)
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
    images = {
        name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    ids = torch.cat([inputs["input_ids"], answer[None]], dim=1)
    logits = model(input_ids=ids, **images).logits[0, -len(answer) - 1 : -1].float()
    forbidden = [model.config.image_token_id, *(model.generation_config.suppress_tokens or [])]
    logits[:, forbidden] = -torch.inf
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].tolist()
