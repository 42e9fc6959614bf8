"""Names of transformers that are not part of its documented API, in one place.

If a new release renames one, `tests/test_transformers_names.py` fails and this file is the only one to change.
`transformers_dsvl.py` does the same for the code that travels with a checkpoint.
"""

from importlib import import_module
from typing import Any

# Name -> the module that defines it. Imported on use: those for serving need packages of an extra.
NAMES = {
    "INTEGRATION_TO_CALLBACK": "transformers.integrations",
    "get_available_reporting_integrations": "transformers.integrations",
    "_hf_deepspeed_config_weak_ref": "transformers.integrations.deepspeed",
    "set_hf_deepspeed_config": "transformers.integrations.deepspeed",
    "unset_hf_deepspeed_config": "transformers.integrations.deepspeed",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "transformers.models.auto.modeling_auto",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "transformers.models.auto.modeling_auto",
    "SCHEDULER_NAME": "transformers.trainer",
    "TRAINER_STATE_NAME": "transformers.trainer",
    "get_parameter_names": "transformers.trainer_pt_utils",
    "EvalLoopOutput": "transformers.trainer_utils",
    "custom_object_save": "transformers.dynamic_module_utils",
    "rotate_checkpoints": "transformers.trainer_utils",
    "render_jinja_template": "transformers.utils.chat_template_utils",
    "cached_file": "transformers.utils.hub",
    "DynamicLayer": "transformers.cache_utils",
    "DynamicSlidingWindowLayer": "transformers.cache_utils",
    "StaticLayer": "transformers.cache_utils",
    "GenerationMode": "transformers.generation",
    "BaseStreamer": "transformers.generation.streamers",
    "sliding_window_causal_mask_function": "transformers.masking_utils",
    "ChatCompletionHandler": "transformers.cli.serving.chat_completion",
    "BaseGenerateManager": "transformers.cli.serving.utils",
    "Modality": "transformers.cli.serving.utils",
    "_StreamError": "transformers.cli.serving.utils",
}
# Class -> its members that are overridden, called or read.
MEMBERS = {
    "transformers.GenerationMixin": (
        "_get_logits_processor",
        "_get_stopping_criteria",
        "_optimize_model_for_decode",
        "_prefill",
        "_prepare_cache_for_generation",
        "_prepare_generation_config",
        "_prepare_position_ids_for_generation",
        "_prepare_special_tokens",
        "_sample",
        "_update_model_kwargs_for_generation",
        "_valid_auto_compile_criteria",
    ),
    "transformers.PreTrainedModel": ("get_compiled_call",),
    "transformers.DynamicCache": ("layers", "offloading"),
    "transformers.cache_utils.DynamicLayer": (
        "is_sliding",
        "is_croppable",
        "keys",
        "values",
        "is_initialized",
        "lazy_initialization",
    ),
    "transformers.cache_utils.StaticLayer": (
        "is_sliding",
        "keys",
        "values",
        "is_initialized",
        "cumulative_length",
        "lazy_initialization",
    ),
    "transformers.Trainer": (
        "_get_dataloader",
        "_get_num_items_in_batch",
        "_load_best_model",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_prepare_for_training",
        "_push_from_checkpoint",
        "_run_epoch",
        "_save",
        "_save_optimizer_and_scheduler",
        "_track_num_input_tokens",
    ),
}
# Attributes that transformers sets on objects while it generates, by the module that sets them.
MENTIONED = {
    "transformers.cache_utils": (
        "device",
        "cumulative_length",
        "layer_class_to_replicate",
        "max_cache_len",
        "record_past",
    ),
    "transformers.generation.utils": ("_pad_token_tensor", "_is_user_defined", "_mask_length"),
}


def __getattr__(name: str) -> Any:
    """Not cached, because some of these are variables."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(NAMES[name]), name)
