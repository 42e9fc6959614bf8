"""Translating the names in DeepSpeed-VisualChat's state dicts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

# Original name -> new name; {n} is the index of a layer. A rule may split a tensor into several (in equal parts along the
# first dimension).
Rules = dict[str, str | tuple[str, ...]]


def _both(*pairs: tuple[str, str]) -> Rules:
    """Rules for modules that have a weight and a bias."""
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in pairs for kind in ("weight", "bias")}


def _qkv(theirs: str, ours: str) -> Rules:
    """Rules for torch's MultiheadAttention, whose projection concatenates query, key and value."""
    return {f"{theirs}.in_proj_{kind}": tuple(f"{ours}{name}_proj.{kind}" for name in "qkv") for kind in ("weight", "bias")}


_CLIP_LAYER = (
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
)
_CLIP: Rules = {
    f"vis_encoder.vision_model.{name}": f"model.vision_tower.{name}"
    for name in (
        "embeddings.class_embedding",
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        *_both(("pre_layrnorm", ""), ("post_layernorm", "")),
        *(name for module in _CLIP_LAYER for name in _both((f"encoder.layers.{{n}}.{module}", ""))),
    )
}
# The names in Qwen-VL's checkpoints, without the prefix `transformer.visual.`.
QWEN_TOWER: Rules = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    **_both(("ln_pre", "pre_layernorm"), ("ln_post", "post_layernorm")),
    **_both(
        *(
            (f"transformer.resblocks.{{n}}.{theirs}", f"layers.{{n}}.{ours}")
            for theirs, ours in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("attn.in_proj", "self_attn.qkv_proj"),
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            )
        )
    ),
    "attn_pool.query": "resampler.query",
    "attn_pool.pos_embed": "resampler.position_embedding",
    "attn_pool.kv_proj.weight": "resampler.kv_proj.weight",
    **_qkv("attn_pool.attn", "resampler."),
    **_both(
        ("attn_pool.ln_q", "resampler.query_norm"),
        ("attn_pool.ln_kv", "resampler.kv_norm"),
        ("attn_pool.attn.out_proj", "resampler.out_proj"),
    ),
}
_TOWERS: dict[str, Rules] = {
    "clip_vision_model": _CLIP,
    "dsvl_qwen_vision": {
        f"vis_encoder.{theirs}": f"model.vision_tower.{ours}"
        if isinstance(ours, str)
        else tuple(f"model.vision_tower.{part}" for part in ours)
        for theirs, ours in QWEN_TOWER.items()
    },
}
_LANGUAGE: Rules = {
    "lang_embed.weight": "model.language_model.embed_tokens.weight",
    "lang_decoder.lm_head.weight": "lm_head.weight",
    "lang_decoder.model.norm.weight": "model.language_model.norm.weight",
    **{
        f"lang_decoder.model.layers.{{n}}.{name}.weight": f"model.language_model.layers.{{n}}.{name}.weight"
        for name in (
            *("input_layernorm", "post_attention_layernorm"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
            *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
        )
    },
}
_PROJECTOR = "model.multi_modal_projector."
_PROJECTORS: dict[str, Rules] = {
    "linear": _both(("projection.0", f"{_PROJECTOR}linear"), ("projection.1", f"{_PROJECTOR}layer_norm")),
    "vit": {
        **_both(("projection.projection.0", f"{_PROJECTOR}linear"), ("projection.projection.1", f"{_PROJECTOR}layer_norm")),
        **_both(*((f"projection.vis_layer.{name}", f"{_PROJECTOR}encoder_layer.{name}") for name in _CLIP_LAYER)),
    },
    "perceiver": {
        "projection.query": f"{_PROJECTOR}query",
        "projection.pos_embed": f"{_PROJECTOR}position_embedding",
        **_qkv("projection.attn", _PROJECTOR),
        **_both(
            *(
                (f"projection.{theirs}", f"{_PROJECTOR}{ours}")
                for theirs, ours in (
                    ("kv_proj", "kv_proj"),
                    ("ln_q", "query_norm"),
                    ("ln_kv", "kv_norm"),
                    ("attn.out_proj", "out_proj"),
                    ("projection.0", "layer_norm"),
                    ("projection.1", "linear"),
                )
            )
        ),
    },
}

_UNUSED = {
    "a buffer that is computed": re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)"),
    "the frozen copy of the embedding table; lang_embed is the trained one": re.compile(
        r"lang_decoder\.model\.embed_tokens\.weight"
    ),
}
# Position tables may be missing, for example with ZeRO-3; the tower's weights or a formula give their values.
_POSITION_TABLES = re.compile(r".*\.(position_embedding\.weight|positional_embedding|pos_embed)")
_LAYER = re.compile(r"\.(layers|resblocks)\.(\d+)\.")
_LORA = re.compile(r"(.*)\.lora_(left|right)_weight")


@dataclass
class Lora:
    """DeepSpeed-VisualChat's adapter of a linear layer, which adds `right @ left` / rank, of shape (in, out)."""

    left: torch.Tensor | None = None  # (rank, out)
    right: torch.Tensor | None = None  # (in, rank)

    @property
    def rank(self) -> int:
        assert self.left is not None
        return self.left.shape[0]

    def delta(self) -> torch.Tensor:
        """The update of the weight: float32 of shape (out, in)."""
        assert self.left is not None and self.right is not None
        return (self.left.float().T @ self.right.float().T) / self.rank


@dataclass
class Translated:
    """A state dict with new names, and what happened to each original name."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    lora: dict[str, Lora] = field(default_factory=dict)  # new name of the linear layer -> adapter
    taken: dict[str, tuple[str, ...]] = field(default_factory=dict)  # original name -> new names
    unused: dict[str, str] = field(default_factory=dict)  # original name -> why it is not needed
    absent: list[str] = field(default_factory=list)  # new names of missing position tables

    def original_name(self, ours: str) -> str:
        return next(theirs for theirs, names in self.taken.items() if ours in names)


def translate(original: Mapping[str, torch.Tensor], tied: bool = False) -> Translated:
    """Translate the state dict of a DeepSpeed-VisualChat model.

    The trained embedding table (`lang_embed`) is used for all tokens; the frozen copy, which the original uses for generated
    tokens, is dropped.

    Args:
        original: the state dict in `pytorch_model.bin`, with or without LoRA weights.
        tied: whether the language model's head is tied to its embeddings. ZeRO-3 then does not save the head, which is the
            frozen copy.

    Raises:
        ValueError: listing all unknown and missing names, if there are any.
    """
    head, frozen = "lang_decoder.lm_head.weight", "lang_decoder.model.embed_tokens.weight"
    is_head = tied and head not in original and frozen in original
    if is_head:
        original = {head if name == frozen else name: tensor for name, tensor in original.items()}
    rules = _TOWERS[tower_type(original)] | _LANGUAGE | _PROJECTORS[projector_type(original)]
    result = translate_by(rules, original, "the state dict of a DeepSpeed-VisualChat model")
    if is_head:
        result.taken[frozen] = result.taken.pop(head)
    return result


def translate_by(rules: Rules, original: Mapping[str, torch.Tensor], what: str) -> Translated:
    """Translate a state dict by rules; `what` names the expected kind of state dict in the error."""
    result, unknown, used = Translated(), [], set()
    numbers: dict[str, set[int]] = {}
    for name, tensor in original.items():
        reason = next((reason for reason, pattern in _UNUSED.items() if pattern.fullmatch(name)), None)
        if reason is not None:
            result.unused[name] = reason
            continue
        lora = _LORA.fullmatch(name)
        plain = f"{lora[1]}.weight" if lora else name
        layer = _LAYER.search(plain)
        rule = _LAYER.sub(r".\1.{n}.", plain)
        target = rules.get(rule)
        if target is None or (lora and not isinstance(target, str)):
            unknown.append(name)
            continue
        targets = (target,) if isinstance(target, str) else target
        targets = tuple(ours.replace("{n}", layer[2] if layer else "") for ours in targets)
        if lora:
            setattr(result.lora.setdefault(targets[0].removesuffix(".weight"), Lora()), lora[2], tensor)
            result.taken[name] = (f"{targets[0].removesuffix('.weight')} (LoRA)",)
            continue
        used.add(name)
        if layer:
            numbers.setdefault(rule.split(".{n}.")[0], set()).add(int(layer[2]))
        result.taken[name] = targets
        parts = [part.clone() for part in tensor.chunk(len(targets))] if len(targets) > 1 else [tensor]
        result.tensors.update(zip(targets, parts, strict=True))
    absent = sorted(_expected(rules, numbers) - used)
    missing = [name for name in absent if not _POSITION_TABLES.fullmatch(name)]
    result.absent = [str(rules[name]) for name in absent if _POSITION_TABLES.fullmatch(name)]
    halves = [f"{name} (LoRA)" for name, one in result.lora.items() if one.left is None or one.right is None]
    missing += halves
    if unknown or missing:
        raise ValueError(
            f"This is not {what}. Unknown names ({len(unknown)}): {', '.join(sorted(unknown)) or 'none'}. "
            f"Missing names ({len(missing)}): {', '.join(missing) or 'none'}."
        )
    return result


def tower_type(original: Mapping[str, torch.Tensor]) -> str:
    """The `model_type` of a state dict's vision tower."""
    return (
        "dsvl_qwen_vision" if any(name.startswith("vis_encoder.transformer.") for name in original) else "clip_vision_model"
    )


def projector_type(original: Mapping[str, torch.Tensor]) -> str:
    """The `projector_type` of a state dict's projector."""
    if "projection.query" in original:
        return "perceiver"
    if any(name.startswith("projection.vis_layer.") for name in original):
        return "vit"
    return "linear"


def _expected(rules: Mapping[str, object], numbers: Mapping[str, set[int]]) -> set[str]:
    """All original names of a complete model with the layers that were found."""
    names = set()
    for rule in rules:
        if "{n}" not in rule:
            names.add(rule)
            continue
        layers = numbers.get(rule.split(".{n}.")[0]) or {0}
        names.update(rule.replace("{n}", str(n)) for n in range(max(layers) + 1))
    return names
