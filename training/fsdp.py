"""FSDP2 (`--fsdp`): torch's `fully_shard` splits weights, gradients and optimizer states of every layer over all processes.

accelerate shards the model: every layer of the decoder and of the vision tower is a unit of its own, as are the embeddings
and the head; the rest (projector, norms) is one more. Frozen and trained parameters may be in one unit.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

from ..transformers_dsvl import GradientCheckpointingLayer

# Keys of --fsdp-config, in the form without the prefix fsdp_.
SETTINGS = ("version", "reshard_after_forward")
INSTEAD = {
    "activation_checkpointing": "pass --activation-checkpointing",
    "cpu_offload": "pass --deepspeed zero3-offload instead of --fsdp",
    "offload_params": "pass --deepspeed zero3-offload instead of --fsdp",
}
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


def fsdp_config(value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The settings of `--fsdp-config`, without their prefix `fsdp_`.

    Args:
        value: a mapping, the same in JSON, or the path of a JSON file; None is an empty mapping.

    Raises:
        ValueError: if it is none of these, or a setting is unknown or not supported.
    """
    if isinstance(value, str):
        text = value if value.lstrip().startswith("{") else _read(Path(value))
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--fsdp-config {value} is not JSON: {error}.") from error
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"--fsdp-config {value}: expected a mapping, such as {{'reshard_after_forward': False}}.")
    settings = {str(name).removeprefix("fsdp_"): setting for name, setting in value.items()}
    for name in settings:
        if name not in SETTINGS:
            raise ValueError(
                f"--fsdp-config {name} is not supported (only {', '.join(SETTINGS)} are); {INSTEAD.get(name, 'drop it')}."
            )
    if int(settings.get("version", 2)) != 2:
        raise ValueError(f"--fsdp-config version {settings['version']}: only FSDP2 is supported; pass 2, or drop it.")
    return settings


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--fsdp-config {path} is neither a file nor a mapping in JSON; pass one of them.")
    return path.read_text(encoding="utf-8")


def check_fsdp(values: Mapping[str, Any]) -> None:
    """Refuse what FSDP would train differently, or not at all.

    Args:
        values: arguments of `dsvl train`, name -> value; missing ones have their defaults.

    Raises:
        ValueError: naming the flags and the remedy.
    """
    config = values.get("fsdp_config")
    if not values.get("fsdp"):
        if config is not None:
            raise ValueError(f"--fsdp-config {config} without --fsdp; pass both.")
        return
    if values["fsdp"] is not True:
        raise ValueError(
            f"--fsdp {values['fsdp']}: FSDP2 has no strategies; pass --fsdp alone, and settings by --fsdp-config "
            "('{\"reshard_after_forward\": false}' shards no weights between forward and backward)."
        )
    fsdp_config(config)
    if values.get("deepspeed") is not None:
        raise ValueError("--fsdp with --deepspeed: both shard the model; choose one of them.")
    if values.get("qlora"):
        raise ValueError("--fsdp with --qlora: 4-bit weights are not sharded; pass --deepspeed zero2, or drop --fsdp.")
    if values.get("fp16"):
        raise ValueError("--fsdp with --fp16: its loss scaling does not see gradients in shards; pass --bf16.")
    if values.get("torch_compile"):
        raise ValueError(
            "--fsdp with --torch-compile: a graph of the whole model cannot gather its layers one by one; pass "
            "--compile-decoder-layers instead."
        )
    optimizer = getattr(values.get("optim"), "value", values.get("optim")) or OPTIMIZERS[0]
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"--fsdp with --optim {optimizer}: it does not know sharded parameters; choose from {', '.join(OPTIMIZERS)}."
        )


def check_processes(use_cpu: bool) -> None:
    """Refuse `--fsdp` in a process that was started alone, and on CPUs beside GPUs.

    Raises:
        ValueError: naming the flags and the remedy.
    """
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "--fsdp in a single process has nothing to shard; start several, for example by torchrun --nproc-per-node 2 -m "
            "dsvl.training, or drop --fsdp. Only a run of several goes on in one, by torchrun --nproc-per-node 1."
        )
    if use_cpu and torch.accelerator.is_available():
        raise ValueError(
            "--fsdp with --use-cpu beside GPUs: torch would shard over these; hide them (CUDA_VISIBLE_DEVICES='')."
        )


def shard_with_accelerate(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Have an accelerator shard the model that it prepares, on CPUs too, where accelerate would train by DDP.

    In 16-bit precision, weights are gathered and multiplied in it, and gradients are summed in float32. accelerate's own
    policy would also sum gradients, and return the loss, in 16 bits.

    Args:
        accelerator: an accelerator that was made with `plugin`.
        plugin: its settings of FSDP2, which are changed.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = plugin
        # Both are shared by all of accelerate's objects.
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if accelerator.distributed_type != DistributedType.FSDP or not accelerator.is_fsdp2:
        raise RuntimeError(
            f"--fsdp was passed, but accelerate chose {accelerator.distributed_type.value}; check its environment variables."
        )
    # Of the optimizer; whole weights are saved by `full_state`.
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("SHARDED_STATE_DICT")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"FSDP with mixed precision {accelerator.mixed_precision} is not supported; pass bf16, or none.")
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a model, in the decoder and the vision tower."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def layer_classes(model: torch.nn.Module) -> list[str]:
    """The names of the classes of `layers`. FSDP shards, and ZeRO-3 gathers, each layer alone."""
    return sorted({type(layer).__name__ for layer in layers(model)})


def full_state(model: torch.nn.Module, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """The whole weights of a sharded model, in the main memory of the first process; the others get an empty mapping.

    Args:
        model: the sharded model. All processes must call this function.
        trained_only: without frozen weights, *optional*, defaults to False.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def load_full_state(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the whole weights of a checkpoint, or its adapters, into a sharded model.

    Every process reads the files, one weight at a time, and keeps its shards.

    Args:
        model: the sharded model, or PEFT's wrapper around it.
        checkpoint: directory of safetensors files.

    Raises:
        ValueError: if a weight is missing in the files, has another shape, or is frozen in 8 bits and another one.
    """
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor, distribute_tensor

    weights, own = _saved_names(model), dict(model.named_parameters())
    missing = set(weights)
    is_adapted = hasattr(model, "peft_config")
    for path in sorted(checkpoint.glob("adapter_model*.safetensors" if is_adapted else "model*.safetensors")):
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in sorted(missing.intersection(file.keys())):
                missing.remove(name)
                whole, weight = file.get_tensor(name), weights[name]
                if whole.shape != weight.shape:
                    raise ValueError(
                        f"{path}: {name} has the shape {tuple(whole.shape)}, but {tuple(weight.shape)} in the model; pass a "
                        "checkpoint of this model."
                    )
                if isinstance(own.get(name), DTensor) and not isinstance(weight, DTensor):
                    # The state of a frozen weight that is rounded here is the original (training/frozen_precision.py).
                    if not torch.equal(whole, weight):
                        raise ValueError(
                            f"{path}: {name} differs from the frozen weight that this model has in lower precision; resume "
                            "with the model that this run began with (--model)."
                        )
                    continue
                if isinstance(weight, DTensor):  # of which every process has read the whole: nothing is communicated
                    whole = whole.to(weight.device_mesh.device_type, weight.dtype)
                    shard = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
                    weight, whole = weight.to_local(), shard.to_local()
                weight.copy_(whole)
    if missing:
        raise ValueError(
            f"{checkpoint} lacks {len(missing)} weights, such as {min(missing)}; copy it again, or resume from another."
        )


def _saved_names(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a model by the names that they have in a saved checkpoint."""
    weights = model.state_dict()
    if not hasattr(model, "peft_config"):
        tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
        return {name: weight for name, weight in weights.items() if name not in tied}
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
