"""LoRA adapters by PEFT on the decoder and the vision tower; projector and embeddings are trained in full beside them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..modeling_dsvl import DSVLForConditionalGeneration
from .adapter_targets import target_pattern

TOWERS = {"language": "model.language_model", "vision": "model.vision_tower"}
LABELS = {"language": "decoder", "vision": "vision tower"}


def base_model(model: Any) -> Any:
    """The model itself, or the one within PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lora_config(
    model: DSVLForConditionalGeneration,
    rank: int,
    alpha: int | None = None,
    *,
    train: Sequence[str] = ("projector", "embeddings"),
    targets: Sequence[str] | None = None,
    language: bool = True,
    vision: bool = False,
    vision_rank: int | None = None,
    vision_targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    dora: bool = False,
) -> Any:
    """The configuration of adapters for `peft.get_peft_model`.

    Args:
        model: the model to adapt.
        rank: rank of the adapters.
        alpha: scale of the adapters: their outputs are multiplied by alpha / rank, *optional*, defaults to twice the rank
            (of the tower's adapters: twice theirs). DeepSpeed-VisualChat uses 1.
        train: parts that are trained in full beside the adapters, by the names of `dsvl train --train`, *optional*, defaults
            to projector and embeddings.
        targets: linear layers to adapt, by name (`q_proj`) or path (`layers.0-15`), see `adapter_targets.target_pattern`,
            *optional*, defaults to all linear layers.
        language: adapt the decoder, *optional*, defaults to True.
        vision: adapt the vision tower, *optional*, defaults to False.
        vision_rank: rank of the tower's adapters, *optional*, defaults to `rank`.
        vision_targets: linear layers of the tower to adapt; `targets` then selects layers of the decoder alone. *Optional*,
            defaults to `targets`.
        dropout: dropout probability in front of the adapters, *optional*, defaults to 0.
        dora: use DoRA, which trains magnitudes and directions of the weights separately, *optional*, defaults to False.

    Raises:
        ValueError: if a target matches no linear layer, a part has no layer to adapt, a list is a text, or an argument for
            the tower is given without `vision`.
        ImportError: if PEFT is not installed.
    """
    from peft import LoraConfig

    for argument, names in (("train", train), ("targets", targets), ("vision_targets", vision_targets)):
        if isinstance(names, str):
            raise ValueError(f"{argument}={names!r} is a text; pass a list of names, such as [{names!r}].")
    for argument, value in (("vision_rank", vision_rank), ("vision_targets", vision_targets)):
        if value is not None and not vision:
            raise ValueError(f"{argument}={value!r} without vision=True has no effect; pass both, or omit it.")
    unused = set()
    if vision:  # layers whose output the features do not use
        names = [name for name in model.model.unused_tower_parameters() if name.endswith(".weight")]
        unused = {f"{TOWERS['vision']}.{name.removesuffix('.weight')}" for name in names}
    layers = {
        part: [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(f"{TOWERS[part]}.") and name not in unused
        ]
        for part, adapted in (("language", language), ("vision", vision))
        if adapted
    }
    patterns = {}
    if vision_targets is not None and vision:
        patterns["vision"] = target_pattern(vision_targets, layers["vision"], "--lora-vision-targets")
    others = [part for part in layers if part not in patterns]
    if others:
        together = [name for part in others for name in layers[part]]
        patterns |= dict.fromkeys(others, target_pattern(targets or (), together, "--lora-targets"))
    for part, pattern in patterns.items():
        if not any(re.fullmatch(pattern, name) for name in layers[part]):
            raise ValueError(
                f"--lora-targets {' '.join(targets or ())}: no linear layer of the {LABELS[part]} matches; choose from "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in layers[part]}))}, or do not adapt this part."
            )
    table = model.get_input_embeddings()
    embeddings = next(name for name, module in model.named_modules() if module is table)
    parts = {
        "projector": "model.multi_modal_projector",
        "embeddings": embeddings,
        "vision": "model.vision_tower",
        "language": "model.language_model",
        "head": "lm_head",
    }
    tower = rf"{re.escape(TOWERS['vision'])}\..*"
    own_rank = {tower: vision_rank} if vision and vision_rank is not None else {}
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        rank_pattern=own_rank,
        alpha_pattern={name: 2 * rank for name, rank in own_rank.items()} if alpha is None else {},
        lora_dropout=dropout,
        use_dora=dora,
        exclude_modules="|".join(map(re.escape, sorted(unused))) or None,
        target_modules="|".join(rf"(?={re.escape(TOWERS[part])}\.){pattern}" for part, pattern in patterns.items()),
        modules_to_save=[parts[part] for part in train] or None,
        ensure_weight_tying=bool(model.config.tie_word_embeddings),
        task_type="CAUSAL_LM",
    )


def describe_adapters(model: Any) -> str:
    """The adapters of PEFT's model for the model card: rank, alpha and number of adapted layers of each part.

    Args:
        model: PEFT's wrapper of a `DSVLForConditionalGeneration`, with LoRA adapters.
    """
    adapted: dict[str, dict[str, int]] = {part: {} for part in TOWERS}
    linear = dict.fromkeys(TOWERS, 0)
    for name, module in model.named_modules():
        part = next((part for part, root in TOWERS.items() if f".{root}." in f".{name}."), None)
        names = set(name.split("."))
        if part is None or names & {"base_layer", "original_module"} or any(one.startswith("lora_") for one in names):
            continue
        is_adapted = hasattr(module, "lora_A")
        linear[part] += is_adapted or isinstance(module, nn.Linear)
        if is_adapted:
            key = f"rank {module.r['default']}, alpha {module.lora_alpha['default']}"
            adapted[part][key] = adapted[part].get(key, 0) + 1
    found = [
        f"{LABELS[part]} {key} ({count} of {linear[part]} linear layers)"
        for part, counts in adapted.items()
        for key, count in counts.items()
    ]
    kind = "DoRA" if model.peft_config["default"].use_dora else "LoRA"
    return f"{kind}: {'; '.join(found)}" if found else kind


def merge_adapters(model: str | Path, adapters: str | Path) -> DSVLForConditionalGeneration:
    """Load a checkpoint and merge trained adapters into its weights, on the CPU in the checkpoint's dtype.

    Args:
        model: directory or Hub name of the checkpoint that the adapters were trained on.
        adapters: directory that PEFT saved.

    Raises:
        ValueError: if `adapters` contains no adapters, or those of another model.
        ImportError: if PEFT is not installed.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    if not (Path(adapters) / "adapter_config.json").is_file():
        raise ValueError(f"{adapters} contains no adapter_config.json; pass a directory of adapters that PEFT saved.")
    base = DSVLForConditionalGeneration.from_pretrained(model)
    config, saved = PeftConfig.from_pretrained(str(adapters)), load_peft_weights(str(adapters), device="cpu")
    config.base_model_name_or_path = str(model)  # PEFT warns about another path, but weights are compared below
    try:
        adapted = get_peft_model(base, config)
    except ValueError as error:  # no layer has a name that was adapted
        raise ValueError(f"{_of_another_model(model, adapters)} ({error})") from error
    # PEFT loads what fits: it drops names that the model does not have, and leaves others at their initial values.
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name in sorted(saved.keys() | expected.keys()):
        ours, theirs = (tuple(one[name].shape) if name in one else None for one in (expected, saved))
        if ours != theirs:
            raise ValueError(
                f"{_of_another_model(model, adapters)} (first difference: {name.removeprefix('base_model.model.')} is "
                f"{theirs or 'missing'} in the adapters, and {ours or 'missing'} in the model)."
            )
    set_peft_model_state_dict(adapted, saved)
    return adapted.merge_and_unload()


def _of_another_model(model: str | Path, adapters: str | Path) -> str:
    return f"{adapters}: these adapters were trained on another model than {model}; pass the one they were trained on"
