"""DeepSpeed-VisualChat's adapters: whether they are in the weights already, and into the weights or beside them."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from .state_dict_names import Lora, Translated


def is_fused(translated: Translated, untrained: Callable[[str], torch.Tensor]) -> bool:
    """Whether the adapters have been added to the weights.

    The original's training adds them before it saves and keeps their factors in the file, so that names do not tell; only
    the weights from before the training do.

    Args:
        translated: a checkpoint with adapters.
        untrained: from the name of one of our weights to what it was before.

    Raises:
        ValueError: if the weights are neither what they were nor that with the adapters added.
    """
    for name, lora in sorted(translated.lora.items()):
        delta = lora.delta()
        size = delta.abs().max()
        if size == 0:  # not trained: fused or not, it is the same
            continue
        weight, before = translated.tensors[f"{name}.weight"].float(), untrained(f"{name}.weight").float()
        if weight.shape != before.shape:
            raise ValueError(
                f"{name}.weight has shape {tuple(weight.shape)}, and {tuple(before.shape)} before its training."
            )
        apart, with_delta = (weight - before).abs().max(), (weight - before - delta).abs().max()
        if min(apart, with_delta) < 0.5 * size:
            return bool(with_delta < apart)
        raise ValueError(
            f"{name}.weight is neither that of the untrained model nor that with its adapter added, so whether the adapters "
            "are fused cannot be told; pass the models that it was trained from, or --lora fused or --lora unfused."
        )
    return False


def set_weights(translated: Translated, fused: bool, keep: bool) -> None:
    """Add the adapters to the weights, or, to keep them, take them out; where that is not so already."""
    if fused != keep:
        return
    sign = -1 if keep else 1
    for name, lora in translated.lora.items():
        weight = translated.tensors[f"{name}.weight"]
        translated.tensors[f"{name}.weight"] = (weight.float() + sign * lora.delta()).to(weight.dtype)


def save_adapters(lora: dict[str, Lora], directory: Path, base_model: str) -> None:
    """Write adapters as PEFT does, for `PeftModel.from_pretrained` and `dsvl merge`.

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
