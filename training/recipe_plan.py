"""The memory of each stage of a recipe, for `dsvl plan RECIPE`."""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ..composition.chat_template import choose_chat_template
from ..composition.compose import VOCABULARY_MULTIPLE, image_defaults
from ..composition.towers import (
    count_prefix_tokens,
    load_image_processor,
    processed_size,
    tower_config,
)
from ..configuration_dsvl import NATIVE_TOWERS, DSVLConfig
from ..transformers_dsvl import no_init_weights
from .deepspeed_config import ZERO, zero_stage
from .memory_plan import Planner
from .plan import LORA
from .ready_recipes import find_recipe
from .recipe import Recipe, compose_arguments, naming_stage, read_recipe

NEW_TOKENS = 2  # at most: `<image>` and a token for padding


@dataclass(frozen=True)
class StagePlan:
    """The planner of a stage.

    Attributes:
        name: name of the stage.
        micro_batch: `per_device_train_batch_size` of the stage.
        planner: plans the memory for any micro-batch.
        notes: what the plan assumes or leaves out.
    """

    name: str
    micro_batch: int
    planner: Planner
    notes: tuple[str, ...] = ()


def plan_stages(
    name: str,
    flags: list[str],
    *,
    world_size: int = 1,
    sequence_length: int = 2048,
    images: int = 1,
    tiles: int | None = None,
    supervised_share: float = 0.25,
) -> Iterator[StagePlan]:
    """The planner of each stage of a recipe. Data and weights are not needed.

    Args:
        name: name or file of a recipe.
        flags: flags of `dsvl train` that override the recipe, such as `--model` and `--stage`.
        world_size: number of GPUs, *optional*, defaults to 1.
        sequence_length: tokens per sample of a stage without `max_length`, *optional*, defaults to 2048.
        images: images per sample, *optional*, defaults to 1; a stage with `max_images_per_pack` has as many (of tiles
            with `image_layout="tiles"`).
        tiles: tiles per image, *optional*; see `Planner`.
        supervised_share: see `Planner`.

    Raises:
        ValueError: if the recipe is invalid, or a stage cannot be planned.
    """
    path = find_recipe(name)
    recipe = read_recipe(path, flags)
    if recipe is None:
        raise ValueError(f"{path} has no stages; pass its values as flags of dsvl plan.")
    config = _config(recipe)
    for stage in recipe.stages:
        with naming_stage(stage):
            values, _ = recipe.values(stage)
            length = values["max_length"] or sequence_length
            most = values["max_images_per_pack"]
            number, of_image = (most, 1) if most else (images, tiles)
            has_tiles = config.image_layout == "tiles"
            notes = [f"{length:,} tokens and {number} {'tiles' if most and has_tiles else 'images'} a sample"]
            if values["qlora"]:
                notes.append("weights are counted in 16 bits, not in 4")
            planner = Planner(
                config,
                world_size=world_size,
                image_parallel=values["image_parallel"],
                deepspeed=_zero(values["deepspeed"]),
                fsdp=bool(values["fsdp"]),
                sequence_length=length,
                images=number,
                tiles=of_image,
                train=values["train"],
                lora_rank=values["lora_rank"],
                lora={name: values[f"lora_{name}"] for name in LORA} if values["lora_rank"] else None,
                activation_checkpointing=bool(values["activation_checkpointing"] or values["gradient_checkpointing"]),
                mlp_tile=values["tiled_mlp"],
                offload_activations=values["offload_activations"],
                frozen_precision=values["frozen_precision"],
                frozen_keep=values["frozen_precision_keep"],
                compile_decoder_layers=values["compile_decoder_layers"],
                gradient_accumulation=values["gradient_accumulation_steps"] > 1,
                supervised_share=supervised_share,
                dtype="bfloat16" if values["bf16"] else "float16" if values["fp16"] else "float32",
                mixed_precision=True,
            )
        yield StagePlan(stage, values["per_device_train_batch_size"], planner, tuple(notes))


def _config(recipe: Recipe) -> DSVLConfig:
    """The configuration of the model that a recipe starts from."""
    if recipe.composes:
        return composed_config(compose_arguments(recipe.compose or {}, "unused"))
    model = recipe.given.get("model") or recipe.shared.get("model")
    if model is None:
        raise ValueError(f"{recipe.path} has neither `model` nor `compose`; pass --model DIR.")
    return DSVLConfig.from_pretrained(model)


def composed_config(arguments: argparse.Namespace) -> DSVLConfig:
    """The configuration that `dsvl compose` would write, from the configurations of its parts.

    The vocabulary may differ by the few tokens that composing adds.

    Args:
        arguments: arguments of `dsvl compose`.
    """
    tower, text = (AutoConfig.from_pretrained(name) for name in (arguments.vision, arguments.language))
    tower = tower_config(tower, arguments.vision)
    image_size, prefix = None, 0
    if tower.model_type not in NATIVE_TOWERS:
        image_size = processed_size(load_image_processor(arguments.vision))
        with torch.device("meta"), no_init_weights():
            prefix = count_prefix_tokens(AutoModel.from_config(copy.deepcopy(tower)), image_size)
    template_name, _ = choose_chat_template(arguments.chat_template, AutoTokenizer.from_pretrained(arguments.language))
    layout, positions, numbered = image_defaults(tower, template_name, arguments.multimodal_attention)
    text.vocab_size += NEW_TOKENS
    text.vocab_size += -text.vocab_size % VOCABULARY_MULTIPLE
    return DSVLConfig(
        vision_config=tower,
        text_config=text,
        projector_type=arguments.projector_type,
        multimodal_attention=arguments.multimodal_attention,
        image_positions=arguments.image_positions or positions,
        numbered_images=numbered if arguments.numbered_images is None else arguments.numbered_images,
        image_token_id=text.vocab_size - 1,
        vision_feature_layer=arguments.vision_feature_layer,
        vision_feature_select_strategy=arguments.vision_feature_select_strategy,
        image_size=image_size,
        num_prefix_tokens=prefix,
        image_layout=arguments.image_layout or layout,
        max_tiles=arguments.max_tiles,
        max_image_tokens=arguments.max_image_tokens,
        downsample=arguments.downsample,
        num_queries=arguments.num_queries,
    )


def _zero(deepspeed: dict[str, Any] | str | None) -> str | None:
    """The planner's name of a `--deepspeed` argument."""
    if deepspeed is None or (isinstance(deepspeed, str) and deepspeed in ZERO):
        return deepspeed
    stage = zero_stage(deepspeed)
    return f"zero{stage}" if stage else None
