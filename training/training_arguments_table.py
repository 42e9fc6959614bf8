"""How `dsvl train` treats every field of transformers' `TrainingArguments`: supported, refused, or without effect.

The fields are those of transformers 5.23 and 5.24; a test fails if the installed release has another field.
The documentation contains the table (`markdown`).
"""

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any

from transformers import TrainingArguments

SUPPORTED = (
    "output_dir",
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "gradient_accumulation_steps",
    "average_tokens_across_devices",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "tf32",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "use_liger_kernel",
    "neftune_noise_alpha",
    "torch_empty_cache_steps",
    "auto_find_batch_size",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "log_on_each_node",
    "logging_nan_inf_filter",
    "include_num_input_tokens_seen",
    "log_level",
    "log_level_replica",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "per_device_eval_batch_size",
    "eval_on_start",
    "save_only_model",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "push_to_hub",
    "hub_token",
    "hub_private_repo",
    "hub_model_id",
    "hub_revision",
    "hub_strategy",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "ignore_data_skip",
    "restore_callback_states_from_checkpoint",
    "full_determinism",
    "seed",
    "data_seed",
    "use_cpu",
    "accelerator_config",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "dataloader_in_order",
    "remove_unused_columns",
    "train_sampling_strategy",
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    "ddp_backend",
    "ddp_timeout",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "debug",
    "skip_memory_metrics",
    "resume_from_checkpoint",
    "local_rank",
)

# Values of supported fields that are refused: field -> value -> reason and remedy.
REFUSED_VALUES: dict[str, dict[Any, str]] = {
    "train_sampling_strategy": {
        "group_by_length": "lengths are not known before a conversation is rendered; use --packing to avoid padding.",
        "batch_rebalance": "lengths are not known before a conversation is rendered; use --packing to avoid padding.",
    },
    "remove_unused_columns": {True: "the collator needs the columns of the conversations; drop it."},
    "hub_strategy": {
        "checkpoint": "only the finished model is published; drop it, and copy checkpoints by other means.",
        "all_checkpoints": "only the finished model is published; drop it, and copy checkpoints by other means.",
    },
}

# Fields of which only the default is accepted: field -> reason and remedy.
REFUSED = {
    "bf16_full_eval": "the last evaluation would round the trained weights before they are saved; train with --bf16.",
    "fp16_full_eval": "the last evaluation would round the trained weights before they are saved; train with --bf16.",
    "liger_kernel_config": "--use-liger-kernel has one set of kernels for this model; drop it.",
    "save_on_each_node": "hosts with output directories of their own are detected, and get what they lack; drop it.",
    "enable_jit_checkpoint": "a stopped run would be saved as if it were finished; lower --save-steps, and repeat the "
    "command to resume from the last checkpoint.",
    "label_names": "the only labels of a batch are `labels`; drop it.",
    "parallelism_config": "sequences are not split over devices; pass --deepspeed zero3 or --fsdp to split the model.",
}

# Fields that have no effect: field -> reason.
WITHOUT_EFFECT = {
    "do_train": "dsvl train always trains.",
    "do_eval": "evaluation is enabled by --eval-data or --eval-share.",
    "do_predict": "dsvl evaluate generates answers.",
    "length_column_name": "it belongs to --train-sampling-strategy group_by_length, which is refused.",
    "use_cache": "training uses no KV cache.",
    "hub_always_push": "the model is published once, at the end.",
    "prediction_loss_only": "evaluations compute only the loss.",
    "eval_do_concat_batches": "evaluations collect no predictions.",
    "eval_use_gather_object": "evaluations collect no predictions.",
    "eval_accumulation_steps": "evaluations collect no predictions.",
    "include_for_metrics": "evaluations collect no predictions.",
    "batch_eval_metrics": "evaluations collect no predictions.",
}


def check_training_arguments(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Refuse values that are not supported.

    Args:
        values: fields of `TrainingArguments`, name -> value; missing fields have their defaults.
        defaults: default values, name -> value.

    Returns:
        A sentence for each field that was set and has no effect.

    Raises:
        ValueError: if a value is refused; the message names the flag, the reason and the remedy.
    """
    notes = []
    for name, value in values.items():
        value = value.value if isinstance(value, Enum) else value
        if name in REFUSED_VALUES and value in REFUSED_VALUES[name]:
            raise ValueError(f"{_flag(name)} {value}: {REFUSED_VALUES[name][value]}")
        if value == defaults.get(name):
            continue
        if name in REFUSED:
            raise ValueError(f"{_flag(name)} {value}: {REFUSED[name]}")
        if name in WITHOUT_EFFECT:
            notes.append(f"{_flag(name)} {value} has no effect: {WITHOUT_EFFECT[name]}")
    return notes


def markdown() -> str:
    """The table as Markdown."""
    lines = [
        "# Fields of `TrainingArguments` in `dsvl train`",
        "",
        "Every field is a flag and a key of a YAML file.",
        "",
        "| field | status | note |",
        "|---|---|---|",
    ]
    for name in sorted([*SUPPORTED, *REFUSED, *WITHOUT_EFFECT]):
        if name in REFUSED:
            row = ("refused", REFUSED[name])
        elif name in WITHOUT_EFFECT:
            row = ("no effect", WITHOUT_EFFECT[name])
        else:
            values = [f"`{value}` is refused: {why}" for value, why in REFUSED_VALUES.get(name, {}).items()]
            row = ("supported", " ".join(values))
        lines.append(f"| `{name}` | {row[0]} | {row[1]} |")
    return "\n".join(lines) + "\n"


def unlisted() -> set[str]:
    """Fields of the installed transformers that are missing in this table."""
    return {field.name for field in dataclasses.fields(TrainingArguments)} - {*SUPPORTED, *REFUSED, *WITHOUT_EFFECT}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
