"""Checks of the arguments of `dsvl train` before anything is loaded."""

import importlib.util
import json
from typing import Any

import torch

from ..acceleration.memory.frozen_linear import PRECISIONS
from ..utils.transformers_names import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from ..video_decoding_dsvl import VideoSampling
from .deepspeed_config import zero_stage
from .learning_rates import check_rated_parts
from .trainable_parts import PARTS
from .watchdog import SHORTEST


def check_options(values: dict[str, Any]) -> None:
    """Refuse arguments that do not go together, or that this machine cannot satisfy.

    Args:
        values: fields of the three argument classes, name -> value.

    Raises:
        ValueError: if one is found; the message names the arguments and the remedy.
    """
    unknown = [part for part in values["train"] if part not in PARTS]
    if unknown:
        raise ValueError(f"--train {' '.join(unknown)}: no such part; choose from {', '.join(PARTS)}.")
    check_setup(values)
    if values["lora_rank"] == 0 and not values["train"]:
        raise ValueError("--train names nothing to train; name parts, or pass --lora-rank.")
    check_rated_parts(values.get("learning_rates") or {}, values["train"], adapters=values["lora_rank"] > 0)
    stage = zero_stage(values.get("deepspeed"))
    if values["qlora"] and stage == 3:
        raise ValueError("--qlora with ZeRO-3: 4-bit weights cannot be partitioned; choose --deepspeed zero2.")
    if values["qlora"] and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--qlora needs bitsandbytes, which is not installed; pip install bitsandbytes, or drop --qlora.")
    if stage is not None and values.get("torch_compile"):
        raise ValueError("--torch-compile with --deepspeed: their hooks are not compatible; choose one of them.")
    if values.get("compile_decoder_layers"):
        _check_compilation(values)
    held_out = values.get("eval_data") or values.get("eval_share")
    if values.get("early_stopping_patience") and not held_out:
        raise ValueError("--early-stopping-patience needs evaluations; pass --eval-data or --eval-share.")
    if values["eval_exact_match"] and not held_out:
        raise ValueError("--eval-exact-match needs held-out data; pass --eval-data or --eval-share.")
    if values.get("cache_image_features") and ("vision" in values["train"] or values["lora_vision"]):
        raise ValueError("--cache-image-features with a trained vision tower: its features change; choose one of them.")
    timeout = values.get("lost_process_timeout") or 0
    if timeout and timeout < SHORTEST:
        raise ValueError(
            f"--lost-process-timeout {timeout:g}: a busy process would count as lost; pass {SHORTEST:g} or more seconds, or "
            "0 for none."
        )
    _check_data_options(values)
    _check_device(values)
    _check_reports(values.get("report_to"))


def check_setup(values: dict[str, Any]) -> None:
    """Refuse adapters, 8-bit weights, and ways to save memory that do not go together, for `dsvl train` and `dsvl plan`.

    Args:
        values: name of the argument -> value; others are ignored.

    Raises:
        ValueError: naming the flags and the remedy.
    """
    check_adapters(values)
    _check_frozen_precision(values, zero_stage(values.get("deepspeed")))
    _check_memory_reduction(values)
    if values.get("image_parallel", 1) != 1:
        _check_image_parallel(values)


def _check_compilation(values: dict[str, Any]) -> None:
    if values.get("torch_compile") or values.get("torch_compile_backend") or values.get("torch_compile_mode"):
        raise ValueError(
            "--compile-decoder-layers with --torch-compile: the layers would be compiled twice; choose one of them."
        )


def _check_frozen_precision(values: dict[str, Any], stage: int | None) -> None:
    precision = values.get("frozen_precision")
    if precision is None:
        for name in ("frozen_precision_keep", "frozen_precision_report"):
            if values.get(name):
                raise ValueError(f"--{name.replace('_', '-')} without --frozen-precision; pass both.")
        return
    if precision not in PRECISIONS:
        raise ValueError(f"--frozen-precision {precision} is unknown; choose from {', '.join(PRECISIONS)}.")
    flag = f"--frozen-precision {precision}"
    if values.get("qlora"):
        raise ValueError(f"{flag} with --qlora, which keeps frozen weights in 4 bits; drop one of them.")
    if values.get("dora"):
        raise ValueError(f"{flag} with --dora, which reads the norms of the original weights; drop one of them.")
    if stage == 3:
        raise ValueError(f"{flag} with ZeRO-3, which does not partition 8-bit weights; choose --fsdp, or --deepspeed zero2.")
    if values.get("frozen_precision_report") and values.get("fsdp"):
        raise ValueError(
            "--frozen-precision-report with --fsdp: it measures before the model is sharded, on one device; write the "
            "report in a run of a few steps without --fsdp, and drop it here."
        )
    if {"language", "vision"} <= set(values["train"]):
        raise ValueError(f"{flag} with --train {' '.join(values['train'])}: no linear layer is frozen; drop one of them.")
    if values.get("frozen_precision_report") and values.get("streaming"):
        raise ValueError("--frozen-precision-report with --streaming, whose samples are read once; drop one of them.")


def _check_image_parallel(values: dict[str, Any]) -> None:
    flag = f"--image-parallel {values['image_parallel']}"
    if values["image_parallel"] < 1:
        raise ValueError(f"{flag}: pass a positive number of processes, such as 2.")
    if values.get("attn_implementation") not in (None, "sdpa"):
        raise ValueError(
            f"{flag} with --attn-implementation {values['attn_implementation']}: it needs sdpa; drop the latter."
        )
    if values.get("lora_dropout"):
        raise ValueError(
            f"{flag} with --lora-dropout {values['lora_dropout']:g}: text, which all processes compute, would differ "
            "between them; pass --lora-dropout 0."
        )
    if values.get("fsdp"):
        raise ValueError(f"{flag} with --fsdp has not been tested; choose --deepspeed zero3, which partitions weights too.")
    for name in ("compile_decoder_layers", "torch_compile"):
        if values.get(name):
            raise ValueError(
                f"{flag} with --{name.replace('_', '-')}: a graph cannot exchange results of attention; drop one of them."
            )
    if values.get("train_sampling_strategy") == "batch_rebalance":
        raise ValueError(
            f"{flag} with --train-sampling-strategy batch_rebalance, which gives every process a batch of its own; choose "
            "another strategy."
        )


def _check_memory_reduction(values: dict[str, Any]) -> None:
    tile, checkpoints = values.get("tiled_mlp"), ("activation_checkpointing", "gradient_checkpointing")
    if tile is not None and tile < 1:
        raise ValueError(f"--tiled-mlp {tile}: pass a positive number of tokens, such as 8192.")
    if tile is not None and values.get("torch_compile"):
        raise ValueError(
            "--tiled-mlp with --torch-compile: a graph of the whole model cannot hold the tiles; pass "
            "--compile-decoder-layers instead."
        )
    if not values.get("offload_activations"):
        return
    if not any(values.get(name) for name in checkpoints):
        raise ValueError(
            "--offload-activations without --activation-checkpointing would move every intermediate state to main memory; "
            "pass both."
        )
    for name in checkpoints:
        options = values.get(f"{name}_kwargs") or {}
        if (json.loads(options) if isinstance(options, str) else options).get("offload"):
            raise ValueError(
                f"--offload-activations with offload in --{name.replace('_', '-')}-kwargs moves activations twice; drop one."
            )


def _check_data_options(values: dict[str, Any]) -> None:
    names = values.get("dataset_names") or []
    for option in ("dataset_samples", "dataset_concatenate_samples"):
        given, flag = values.get(option), f"--{option.replace('_', '-')}"
        if given and not names:
            raise ValueError(f"{flag} without --dataset-names; pass both, or a YAML file of a mixture as --data.")
        if given and len(given) not in (1, len(names)):
            raise ValueError(f"{flag} has {len(given)} values for {len(names)} names; pass one for each, or one for all.")
    for number in values.get("dataset_samples") or []:
        if number != "all" and not (number.isdigit() and int(number) > 0):
            raise ValueError(f"--dataset-samples {number}: expected a number of conversations, or all.")
    if values.get("max_num_image_per_sample") is not None and not names:
        raise ValueError("--max-num-image-per-sample needs --dataset-names; a YAML file of a mixture sets it in the file.")
    if values.get("streaming"):
        _check_streaming(values)
    share = values.get("eval_share")
    if share is not None and (values.get("eval_data") or not 0 < share < 1):
        raise ValueError(f"--eval-share {share}: expected a number between 0 and 1, and no --eval-data beside it.")
    given = {"fps": values.get("video_fps"), "max_frames": values.get("max_frames")}
    VideoSampling(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    if values.get("packing") and not values.get("max_length"):
        raise ValueError("--packing needs the length of a pack; pass --max-length (for example 4096).")
    if values.get("max_images_per_pack") is not None and not values.get("packing"):
        raise ValueError("--max-images-per-pack without --packing; pass both.")


def check_adapters(values: dict[str, Any]) -> None:
    """Refuse arguments of adapters that do not go together, for `dsvl train` and `dsvl plan`.

    Args:
        values: name of the argument -> value; others are ignored.

    Raises:
        ValueError: naming the flags and the remedy.
    """
    rank, tower_rank, adapters = values["lora_rank"], values.get("lora_vision_rank"), values["lora_rank"] > 0
    if rank < 0:
        raise ValueError(f"--lora-rank {rank}: pass a positive rank, or 0 for no adapters.")
    names = ("lora_vision", "dora", "qlora", "lora_targets", "lora_alpha", "lora_vision_rank", "lora_vision_targets")
    asked = [name for name in names if values.get(name)]
    if asked and not adapters:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ValueError(f"{flags} without adapters; also pass --lora-rank (for example 16).")
    for part, flag in (("language", "lora_language"), ("vision", "lora_vision")):
        if adapters and part in values["train"] and values[flag]:
            instead = "pass --no-lora-language" if part == "language" else "drop --lora-vision"
            remedy = f"remove {part} from --train, or {instead}"
            raise ValueError(f"--train {part} trains in full what --lora-rank freezes and adapts; {remedy}.")
    if adapters and not (values["lora_language"] or values["lora_vision"]):
        raise ValueError("--lora-rank with nothing to adapt; keep --lora-language on, or pass --lora-vision.")
    for name in ("lora_vision_rank", "lora_vision_targets"):
        if values.get(name) is not None and not values["lora_vision"]:
            raise ValueError(f"--{name.replace('_', '-')} without --lora-vision; pass both.")
    if tower_rank is not None and tower_rank < 1:
        raise ValueError(f"--lora-vision-rank {tower_rank}: pass a positive rank, or omit --lora-vision.")
    if values["lora_language"]:
        return
    # The tower alone is adapted, so the same thing would be said twice.
    for general, own in (("lora_rank", tower_rank), ("lora_targets", values.get("lora_vision_targets"))):
        if own is not None and values.get(general):
            flag = f"--{general.replace('_', '-')}"
            raise ValueError(
                f"--no-lora-language with both {flag} and {flag.replace('lora', 'lora-vision')}: only the vision tower is "
                f"adapted; pass {flag} alone."
            )


def _check_streaming(values: dict[str, Any]) -> None:
    if values["max_steps"] <= 0:
        raise ValueError("--streaming never ends; pass --max-steps.")
    if values.get("dataset_names") or str(values["data"]).endswith((".yaml", ".yml")):
        raise ValueError(
            "--streaming reads one data set, not a mixture; choose one of them, or write the mixture to a file first."
        )
    for option, why in (("eval_share", "cannot be split"), ("cache_image_features", "does not know its images in advance")):
        if values.get(option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} with --streaming: a stream {why}; choose one of them.")


def _check_device(values: dict[str, Any]) -> None:
    if values.get("fp16") and (values.get("use_cpu") or not torch.accelerator.is_available()):
        raise ValueError("--fp16 on a CPU: CPUs do not multiply matrices in float16; pass --bf16, or neither.")


def _check_reports(report_to: str | list[str] | None) -> None:
    """Refuse reporting integrations that are unknown or not installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    installed = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"--report-to {name} is unknown; choose from none, all, {known}.")
        if name not in installed and name not in ("azure_ml", "flyte"):  # transformers does not detect these
            remedy = "pip install 'dsvl[train]'" if name == "tensorboard" else f"pip install {name}"
            raise ValueError(f"--report-to {name} needs the package {name}, which is not installed; {remedy}.")
