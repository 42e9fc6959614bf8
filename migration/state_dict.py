"""Names of DeepSpeed-VisualChat's state dicts, turned into ours."""

import re
from collections.abc import Mapping

import torch

# Original name -> our name; {n} stands for a layer's number. A rule may split one tensor into several names (in equal
# parts along the first dimension).
_CLIP_LAYER = [
    f"{module}.{kind}"
    for module in (
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    )
    for kind in ("weight", "bias")
]
_LLAMA_LAYER = [
    f"{module}.weight"
    for module in (
        "input_layernorm",
        "post_attention_layernorm",
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    )
]
_VISION = {
    f"vis_encoder.vision_model.{name}": f"model.vision_tower.{name}"
    for name in (
        "embeddings.class_embedding",
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        *(f"{norm}.{kind}" for norm in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")),
        *(f"encoder.layers.{{n}}.{name}" for name in _CLIP_LAYER),
    )
}
_LANGUAGE = {
    "lang_embed.weight": "model.language_model.embed_tokens.weight",
    "lang_decoder.lm_head.weight": "lm_head.weight",
    "lang_decoder.model.norm.weight": "model.language_model.norm.weight",
    **{f"lang_decoder.model.layers.{{n}}.{name}": f"model.language_model.layers.{{n}}.{name}" for name in _LLAMA_LAYER},
}
_OURS = "model.multi_modal_projector."


def _linear_and_norm(prefix: str) -> dict[str, str]:
    return {
        f"{prefix}{number}.{kind}": f"{_OURS}{name}.{kind}"
        for number, name in ((0, "linear"), (1, "layer_norm"))
        for kind in ("weight", "bias")
    }


_PROJECTORS: dict[str, dict[str, str | tuple[str, ...]]] = {
    "linear": {**_linear_and_norm("projection.")},
    "vit": {
        **_linear_and_norm("projection.projection."),
        **{f"projection.vis_layer.{name}": f"{_OURS}encoder_layer.{name}" for name in _CLIP_LAYER},
    },
    "perceiver": {
        "projection.query": f"{_OURS}query",
        "projection.pos_embed": f"{_OURS}position_embedding",
        "projection.attn.in_proj_weight": tuple(f"{_OURS}{name}_proj.weight" for name in "qkv"),
        "projection.attn.in_proj_bias": tuple(f"{_OURS}{name}_proj.bias" for name in "qkv"),
        **{
            f"projection.{theirs}.{kind}": f"{_OURS}{ours}.{kind}"
            for theirs, ours in (
                ("kv_proj", "kv_proj"),
                ("ln_q", "query_norm"),
                ("ln_kv", "kv_norm"),
                ("attn.out_proj", "out_proj"),
                ("projection.0", "layer_norm"),
                ("projection.1", "linear"),
            )
            for kind in ("weight", "bias")
        },
    },
}

# Read past: tables that are computed anew, and the frozen copy of the embeddings that `lang_embed` was trained from.
_COMPUTED = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)|lang_decoder\.model\.embed_tokens\.weight")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def convert_state_dict(original: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Map the state dict of a DeepSpeed-VisualChat model with a CLIP tower to DSVL's names.

    The trained embedding table (`lang_embed`) is used everywhere; the frozen copy that the original keeps beside it for
    generated tokens is dropped.

    Args:
        original: tensors by the original's names, as in its `pytorch_model.bin`.

    Returns:
        The same tensors by the names of `DSVLForConditionalGeneration`.

    Raises:
        ValueError: if names are unknown or missing; all of them are listed.
    """
    rules = _VISION | _LANGUAGE | _PROJECTORS[_projector_type(original)]
    converted: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    used: set[str] = set()
    numbers: dict[str, set[int]] = {}
    for name, tensor in original.items():
        if _COMPUTED.fullmatch(name):
            continue
        layer = _LAYER.search(name)
        rule = _LAYER.sub(".layers.{n}.", name)
        target = rules.get(rule)
        if target is None:
            unknown.append(name)
            continue
        used.add(name)
        if layer:
            numbers.setdefault(rule.split(".{n}.")[0], set()).add(int(layer[1]))
        targets = (target,) if isinstance(target, str) else target
        for part, ours in zip(tensor.chunk(len(targets)) if len(targets) > 1 else [tensor], targets, strict=True):
            converted[ours.replace("{n}", layer[1] if layer else "")] = part
    missing = sorted(_expected(rules, numbers) - used)
    if unknown or missing:
        raise ValueError(
            "This is not the state dict of a DeepSpeed-VisualChat model with a CLIP tower. "
            f"Unknown names ({len(unknown)}): {', '.join(sorted(unknown)) or 'none'}. "
            f"Missing names ({len(missing)}): {', '.join(missing) or 'none'}."
        )
    return converted


def _projector_type(original: Mapping[str, torch.Tensor]) -> str:
    if "projection.query" in original:
        return "perceiver"
    if any(name.startswith("projection.vis_layer.") for name in original):
        return "vit"
    return "linear"


def _expected(rules: Mapping[str, object], numbers: Mapping[str, set[int]]) -> set[str]:
    """Every original name that a complete model with the layers that were found must have."""
    names = set()
    for rule in rules:
        if "{n}" not in rule:
            names.add(rule)
            continue
        layers = numbers.get(rule.split(".{n}.")[0]) or {0}
        names.update(rule.replace("{n}", str(n)) for n in range(max(layers) + 1))
    return names
