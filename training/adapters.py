"""LoRA by PEFT: adapters on the decoder and/or the tower; projector and embeddings still learn in full."""

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
    """The PEFT configuration for `peft.get_peft_model`.

    Args:
        model: what to adapt.
        rank: of the adapters.
        alpha: the adapters' outputs are multiplied by alpha / rank. The default, twice the rank, makes that 2;
            DeepSpeed-VisualChat's adapters have 1 / rank: pass 1.
        train: parts that learn in full beside the adapters, by the names of `dsvl train --train`.
        targets: last names of the linear layers to adapt (`q_proj`); all linear layers by default.
        language, vision: adapt the decoder, the tower.
        dropout: in front of the adapters.
        dora: DoRA, which learns the weights' magnitudes apart from their directions.

    Raises:
        ValueError: if `targets` names no linear layer of these parts.
        ImportError: without PEFT.
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
            f"--lora-targets {' '.join(unknown)}: no linear layer of {' and '.join(roots)} is called so; choose from "
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
    if vision:  # a layer counts as unused if its weight is
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
    """Load a checkpoint, and its trained adapters into its weights; on the CPU, in the checkpoint's dtype.

    Args:
        model: directory or Hub name of the checkpoint that was trained.
        adapters: directory that PEFT saved.

    Raises:
        ValueError: if `adapters` holds no adapters.
    """
    from peft import PeftModel

    if not (Path(adapters) / "adapter_config.json").is_file():
        raise ValueError(f"{adapters} holds no adapter_config.json; pass a directory of adapters that PEFT saved.")
    base = DSVLForConditionalGeneration.from_pretrained(model)
    return PeftModel.from_pretrained(base, str(adapters)).merge_and_unload()
