"""LoRA adapters by PEFT on the decoder and the vision tower; projector and embeddings are trained in full beside them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..modeling_dsvl import DSVLForConditionalGeneration

TOWERS = {"language": "model.language_model", "vision": "model.vision_tower"}


def lora_config(
    model: DSVLForConditionalGeneration,
    rank: int,
    alpha: int | None = None,
    *,
    train: Sequence[str] = ("projector", "embeddings"),
    targets: Sequence[str] | None = None,
    language: bool = True,
    vision: bool = False,
    dropout: float = 0.0,
    dora: bool = False,
) -> Any:
    """The configuration of adapters for `peft.get_peft_model`.

    Args:
        model: the model to adapt.
        rank: rank of the adapters.
        alpha: scale of the adapters: their outputs are multiplied by alpha / rank, *optional*, defaults to twice the rank.
            DeepSpeed-VisualChat uses 1.
        train: parts that are trained in full beside the adapters, by the names of `dsvl train --train`, *optional*, defaults
            to projector and embeddings.
        targets: names of the linear layers to adapt, such as `q_proj`, *optional*, defaults to all linear layers.
        language: adapt the decoder, *optional*, defaults to True.
        vision: adapt the vision tower, *optional*, defaults to False.
        dropout: dropout probability in front of the adapters, *optional*, defaults to 0.
        dora: use DoRA, which trains magnitudes and directions of the weights separately, *optional*, defaults to False.

    Raises:
        ValueError: if `targets` contains a name that no linear layer of these parts has.
        ImportError: if PEFT is not installed.
    """
    from peft import LoraConfig

    roots = [TOWERS["language"]] * language + [TOWERS["vision"]] * vision
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(f"{root}." for root in roots))
    }
    unknown = sorted(set(targets or ()) - linear)
    if unknown:
        raise ValueError(
            f"--lora-targets {' '.join(unknown)}: no linear layer of {' and '.join(roots)} has this name; choose from "
            f"{', '.join(sorted(linear))}."
        )
    names = "|".join(map(re.escape, sorted(targets or linear)))
    table = model.get_input_embeddings()
    embeddings = next(name for name, module in model.named_modules() if module is table)
    parts = {
        "projector": "model.multi_modal_projector",
        "embeddings": embeddings,
        "vision": "model.vision_tower",
        "language": "model.language_model",
        "head": "lm_head",
    }
    unused = ""
    if vision:  # layers whose output the features do not use
        weights = [name for name in model.model.unused_tower_parameters() if name.endswith(".weight")]
        unused = "|".join(re.escape(f"{TOWERS['vision']}.{name.removesuffix('.weight')}") for name in weights)
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        use_dora=dora,
        exclude_modules=rf"(?:{unused})" if unused else None,
        target_modules=rf"(?:{'|'.join(map(re.escape, roots))})\..*\.(?:{names})",
        modules_to_save=[parts[part] for part in train] or None,
        ensure_weight_tying=bool(model.config.tie_word_embeddings),
        task_type="CAUSAL_LM",
    )


def merge_adapters(model: str | Path, adapters: str | Path) -> DSVLForConditionalGeneration:
    """Load a checkpoint and merge trained adapters into its weights, on the CPU in the checkpoint's dtype.

    Args:
        model: directory or Hub name of the checkpoint that the adapters were trained on.
        adapters: directory that PEFT saved.

    Raises:
        ValueError: if `adapters` contains no adapters.
        ImportError: if PEFT is not installed.
    """
    from peft import PeftModel

    if not (Path(adapters) / "adapter_config.json").is_file():
        raise ValueError(f"{adapters} contains no adapter_config.json; pass a directory of adapters that PEFT saved.")
    base = DSVLForConditionalGeneration.from_pretrained(model)
    return PeftModel.from_pretrained(base, str(adapters)).merge_and_unload()
