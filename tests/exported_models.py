"""Tiny random models of many towers and decoders, composed to be exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import REFERENCE, tiny_tower_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import dsvl

SIZE, PATCH = 28, 14
_WIDTHS = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, patch_size=PATCH, image_size=SIZE)
TEXT = dict(
    vocab_size=400,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,  # far from uniform attention
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
HEAD = dict(head_dim=32)  # the smallest that vLLM takes on a CPU
WINDOW = 24  # shorter than the longest prompts
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**TEXT, **HEAD),
    "qwen2": lambda: transformers.Qwen2Config(**TEXT | {"hidden_size": 128}),
    "qwen3": lambda: transformers.Qwen3Config(**TEXT, **HEAD),
    "mistral": lambda: transformers.MistralConfig(**TEXT, **HEAD, sliding_window=WINDOW),
    "gemma2": lambda: transformers.Gemma2Config(
        **TEXT,
        **HEAD,
        sliding_window=WINDOW,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=None,  # which LLaVA cannot express
    ),
    "phi3": lambda: transformers.Phi3Config(**TEXT | {"hidden_size": 128}),
}
TOWERS: dict[str, Callable[[], Any]] = {
    "clip": lambda: transformers.CLIPVisionConfig(**tiny_tower_config().to_dict() | _WIDTHS),
    "siglip": lambda: transformers.SiglipVisionConfig(**_WIDTHS, intermediate_size=48),
    "dinov2": lambda: transformers.Dinov2Config(**_WIDTHS | {"image_size": 42}),  # positions of a larger grid
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersConfig(**_WIDTHS, num_register_tokens=4),
    "vit": lambda: transformers.ViTConfig(**_WIDTHS, intermediate_size=48),
}


def image_processor(tower: str) -> Any:
    """The image processor that towers of a kind come with."""
    squares = {"height": SIZE, "width": SIZE}
    if tower == "siglip":
        return transformers.SiglipImageProcessor(size=squares)
    if tower.startswith("dinov2"):
        return transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size=squares)
    if tower == "vit":
        return transformers.ViTImageProcessor(size=squares)
    return transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=squares)


def compose_for_export(
    tower: Any = "clip", decoder: Any = "llama", text: dict[str, Any] | None = None, processor: Any = None, **options: Any
) -> tuple[Any, Any]:
    """A model that LLaVA can express, and its processor.

    Args:
        tower, decoder: keys of `TOWERS` and `DECODERS`, or configurations.
        text: values of the decoder's configuration that differ.
        processor: of images, if the tower is a configuration.
        options: of `dsvl.compose`.
    """
    torch.manual_seed(0)
    text_config = DECODERS[decoder]() if isinstance(decoder, str) else decoder
    for name, value in (text or {}).items():
        setattr(text_config, name, value)
    language = AutoModelForCausalLM.from_config(text_config)
    vision = transformers.AutoModel.from_config(TOWERS[tower]() if isinstance(tower, str) else tower)
    with torch.no_grad():
        for parameter in vision.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # norms that are not the identity
        if text_config.tie_word_embeddings:
            language.get_input_embeddings().weight *= 0.1  # or the head repeats the last token
    defaults = dict(
        projector_type="mlp",
        multimodal_attention="causal",
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if tower == "dinov2_with_registers" else "default",
    )
    model, processor = dsvl.compose(
        vision,
        language,
        tokenizer=AutoTokenizer.from_pretrained(REFERENCE / "tokenizer"),
        image_processor=processor or image_processor(tower),
        **defaults | options,
    )
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # images weigh as much as text
    return model, processor


def save_and_export(folder: Path, model: Any, processor: Any) -> Path:
    """Save a checkpoint in `folder/checkpoint` and export it to `folder/llava`."""
    dsvl.save_checkpoint(model, processor, folder / "checkpoint")
    return dsvl.export_llava(folder / "checkpoint", folder / "llava")
