"""The models of the benchmarks, of equal shapes with random weights, and their inputs.

Projector and embeddings are trained, tower and decoder are frozen, as in DeepSpeed-VisualChat.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dsvl import DSVLConfig, DSVLForConditionalGeneration


@dataclass(frozen=True)
class Shape:
    """Sizes of model and batch; the defaults are CLIP ViT-L/14 and LLaMA-7B with 64 more rows of vocabulary."""

    batch: int = 2
    tokens: int = 4096
    images: int = 8  # per sample

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    key_value_heads: int | None = None  # as many as heads
    vocabulary: int = 32064

    vision_layers: int = 24
    vision_hidden: int = 1024
    vision_intermediate: int = 4096
    vision_heads: int = 16
    image_size: int = 224
    patch_size: int = 14

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def per_image(self) -> int:
        return self.patches + 1

    @property
    def image_token_id(self) -> int:
        return self.vocabulary - 64

    def configs(self) -> tuple[CLIPVisionConfig, LlamaConfig]:
        vision = CLIPVisionConfig(
            hidden_size=self.vision_hidden,
            intermediate_size=self.vision_intermediate,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )
        text = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads or self.heads,
            max_position_embeddings=max(self.tokens, 2048),
        )
        return vision, text


# A model for CPUs with CLIP ViT-L/14's 257 tokens per image, and CLIP ViT-L/14 + LLaMA-7B.
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
LORA_RANK = 16


def build(cls: Any, config: Any, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model with random weights, created on the device and in the dtype."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = cls(config).train()
    torch.set_default_dtype(torch.float32)
    return model


def dsvl(
    shape: Shape, attention: str, backend: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> DSVLForConditionalGeneration:
    vision, text = shape.configs()
    config = DSVLConfig(vision, text, multimodal_attention=attention, image_token_id=shape.image_token_id)
    model = build(DSVLForConditionalGeneration, config, device, dtype).set_trainable()
    model.set_attn_implementation({"text_config": backend})
    return model


def llava(shape: Shape, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> LlavaForConditionalGeneration:
    """transformers' Llava with sdpa (its default), all 257 tokens per image, and the same parts frozen."""
    vision, text = shape.configs()
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=shape.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = build(LlavaForConditionalGeneration, config, device, dtype)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)
    return model


def with_adapters(model: Any) -> Any:
    """A model with adapters of `LORA_RANK` in the decoder; projector and embeddings are trained in full."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=r".*\.language_model\..*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector", "embed_tokens"],
    )
    # In bf16, as DeepSpeed casts them: with PEFT's default of float32, the inputs of adapters are copied to float32.
    return get_peft_model(model, adapters, autocast_adapter_dtype=False)


def twin(model: Any) -> Any:
    """A second model that shares its weights, since more copies of 7B parameters do not fit on a GPU."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})


def inputs(shape: Shape, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A batch with evenly spaced images; the last quarter of the text between two images is supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, shape.image_token_id, (shape.batch, shape.tokens), generator=generator)
    labels = torch.full_like(ids, -100)
    stride = shape.tokens // max(shape.images, 1)
    for number in range(shape.images):
        start, end = 1 + number * stride, (number + 1) * stride
        ids[:, start : start + shape.per_image] = shape.image_token_id
        answer = (end - start - shape.per_image) // 4
        labels[:, end - answer : end] = ids[:, end - answer : end]
    size = (shape.batch * shape.images, 3, shape.image_size, shape.image_size)
    pixels = torch.randn(size, generator=generator, dtype=torch.float32)
    made = {"input_ids": ids, "labels": labels}
    if shape.images:
        made["pixel_values"] = pixels.to(dtype)
    return {key: tensor.to(device) for key, tensor in made.items()}
