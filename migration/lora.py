"""DeepSpeed-VisualChat's LoRA adapters: detecting whether they are merged, merging them, and saving them for PEFT."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from .state_dict_names import Lora, Translated


def is_fused(translated: Translated, untrained: Callable[[str], torch.Tensor]) -> bool:
    """Whether the adapters are merged into the weights.

    The original merges them before it saves and keeps their factors in the file, so that only a comparison with the weights
    before the training can tell.

    Args:
        translated: a checkpoint with adapters.
        untrained: a function from the name of a weight to its value before the training.

    Raises:
        ValueError: if a weight is neither its untrained value nor that plus the adapter.
    """
    for name, lora in sorted(translated.lora.items()):
        delta = lora.delta()
        size = delta.abs().max()
        if size == 0:  # not trained, so there is no difference
            continue
        weight, before = translated.tensors[f"{name}.weight"].float(), untrained(f"{name}.weight").float()
        if weight.shape != before.shape:
            raise ValueError(
                f"{name}.weight has shape {tuple(weight.shape)}, but {tuple(before.shape)} before the training."
            )
        distance, distance_with_delta = (weight - before).abs().max(), (weight - before - delta).abs().max()
        if min(distance, distance_with_delta) < 0.5 * size:
            return bool(distance_with_delta < distance)
        raise ValueError(
            f"{name}.weight is neither that of the untrained model nor that plus its adapter, so it is unknown whether the "
            "adapters are fused; pass the models it was trained from, or --lora fused or --lora unfused."
        )
    return False


def set_weights(translated: Translated, fused: bool, keep: bool) -> None:
    """Merge the adapters into the weights, or, to keep them, subtract them, unless this is the case already."""
    if fused != keep:
        return
    sign = -1 if keep else 1
    for name, lora in translated.lora.items():
        weight = translated.tensors[f"{name}.weight"]
        translated.tensors[f"{name}.weight"] = (weight.float() + sign * lora.delta()).to(weight.dtype)


def save_adapters(lora: dict[str, Lora], directory: Path, base_model: str) -> None:
    """Save adapters in PEFT's format, for `PeftModel.from_pretrained` and `dsvl merge`.

    Raises:
        ImportError: without PEFT.
    """
    from peft import LoraConfig

    ranks = {name: one.rank for name, one in lora.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    directory.mkdir()
    LoraConfig(
        r=rank,
        lora_alpha=1,  # the original's scale is 1 / rank
        rank_pattern={name: one for name, one in ranks.items() if one != rank},
        target_modules=sorted(lora),
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(directory))
    factors = {}
    for name, one in lora.items():
        assert one.left is not None and one.right is not None
        factors[f"base_model.model.{name}.lora_A.weight"] = one.right.T.contiguous()
        factors[f"base_model.model.{name}.lora_B.weight"] = one.left.T.contiguous()
    save_file(factors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
