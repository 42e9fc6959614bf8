"""Loads the model to train, or its vision tower alone."""

import copy
from typing import Any

import torch
from transformers import AutoModel, set_seed
from transformers.utils import logging

from ..acceleration.decoder_layers import compile_8_bit_tower
from ..configuration_dsvl import DSVLConfig
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..transformers_dsvl import is_deepspeed_zero3_enabled, no_init_weights
from ..utils.quantization import quantization_config
from .adapters import base_model, lora_config
from .arguments import DSVLTrainingArguments, ModelArguments
from .frozen_precision import freeze_in_8_bits
from .liger import use_liger
from .trainable_parts import PARTS
from .zero3 import gather_layer_by_layer, prefetch_layers, without_zero3


def precision(arguments: DSVLTrainingArguments) -> torch.dtype:
    """The dtype of frozen weights during training, and of all weights of the saved model."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def check_model_arguments(config: DSVLConfig, model_arguments: ModelArguments) -> None:
    """Check from a configuration that attention, adapters and 8-bit layers can be as requested; no weights are loaded.

    Raises:
        ValueError: if not.
    """
    with torch.device("meta"), no_init_weights():
        model = DSVLForConditionalGeneration(copy.deepcopy(config))
    if model_arguments.attn_implementation is not None:
        model.set_attn_implementation({"text_config": model_arguments.attn_implementation})
    if model_arguments.lora_rank > 0:
        _adapters(model, model_arguments)
    if model_arguments.frozen_precision is not None:
        _set_trainable(model, model_arguments)
        freeze_in_8_bits(model, model_arguments.frozen_precision, model_arguments.frozen_precision_keep, in_fp8=False)


def _set_trainable(model: DSVLForConditionalGeneration, model_arguments: ModelArguments) -> None:
    model.set_trainable(**{argument: part in model_arguments.train for part, argument in PARTS.items()})


def _adapters(model: DSVLForConditionalGeneration, model_arguments: ModelArguments) -> Any:
    return lora_config(
        model,
        model_arguments.lora_rank,
        model_arguments.lora_alpha,
        train=model_arguments.train,
        targets=model_arguments.lora_targets,
        language=model_arguments.lora_language,
        vision=model_arguments.lora_vision,
        vision_rank=model_arguments.lora_vision_rank,
        vision_targets=model_arguments.lora_vision_targets,
        dropout=model_arguments.lora_dropout,
        dora=model_arguments.dora,
    )


def load_model(model_arguments: ModelArguments, arguments: DSVLTrainingArguments) -> Any:
    """Load the model in the precision of the training, and freeze what is not trained.

    With `--bf16` (`--fp16`) weights are loaded in bfloat16 (float16). Trainable weights are float32, so that small updates
    are not rounded away, except under DeepSpeed, which keeps float32 copies itself.

    Returns:
        A `DSVLForConditionalGeneration`, or PEFT's wrapper around it.
    """
    dtype = precision(arguments)
    options: dict[str, Any] = {"dtype": dtype}
    if model_arguments.attn_implementation is not None:
        options["attn_implementation"] = {"text_config": model_arguments.attn_implementation}
    if model_arguments.qlora:
        options["quantization_config"] = quantization_config("4bit", dtype)
    model = DSVLForConditionalGeneration.from_pretrained(model_arguments.model, **options)
    model.config.text_config.use_cache = False
    if arguments.use_liger_kernel:
        use_liger(model)
        arguments.use_liger_kernel = False  # the Trainer would look for kernels of the model type "dsvl"
    if model_arguments.lora_rank > 0:
        from peft import get_peft_model

        config = _adapters(model, model_arguments)
        set_seed(arguments.seed)  # adapters start the same, however many random numbers loading drew
        model = get_peft_model(model, config, autocast_adapter_dtype=arguments.deepspeed is None)
    else:
        _set_trainable(model, model_arguments)
    if is_deepspeed_zero3_enabled():
        gather_layer_by_layer(model)
        prefetch_layers(model)
    if model_arguments.frozen_precision is not None:
        freeze_in_8_bits(
            model,
            model_arguments.frozen_precision,
            model_arguments.frozen_precision_keep,
            source=model_arguments.model,
            sharded=bool(arguments.fsdp),
        )
    base = base_model(model)
    base.reduce_memory(
        mlp_tile=model_arguments.tiled_mlp,
        offload=model_arguments.offload_activations,
        skip_image_queries=model_arguments.skip_image_queries,
    )
    if model_arguments.compile_decoder_layers:
        base.compile_decoder_layers()
        compile_8_bit_tower(base)
    if arguments.deepspeed is None:
        train_in_float32(model, dtype, casts_embeddings="language" not in model_arguments.train)
    return model


def train_in_float32(model: Any, dtype: torch.dtype, casts_embeddings: bool) -> None:
    """Make the trainable weights of a model in 16 bits float32, in place.

    Args:
        model: the model, with or without adapters.
        dtype: dtype of the other weights.
        casts_embeddings: whether embeddings are rounded to `dtype`, in which a frozen decoder computes.
    """
    if dtype == torch.float32:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if casts_embeddings:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.to(dtype))


def load_checkpoint_tower(name: str, config: DSVLConfig, dtype: torch.dtype) -> Any:
    """Load the vision tower of a DSVL checkpoint without its other weights, in evaluation mode.

    Args:
        name: directory or Hub name of the checkpoint.
        config: configuration of the checkpoint.
        dtype: dtype of the tower's weights.

    Raises:
        ValueError: if weights of the tower are missing in the checkpoint.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the other weights are reported as unexpected
    try:
        with without_zero3():
            tower, info = AutoModel.from_pretrained(
                name,
                config=config.vision_config,
                dtype=dtype,
                key_mapping={r"^model\.vision_tower\.": ""},
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks weights of its vision tower ({sorted(info['missing_keys'])[:3]}); compose it again.")
    return tower.eval()
