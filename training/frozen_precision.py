"""Frozen weights in 8 bits: which linear layers of a model, where their original weights are, and how it is described."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..acceleration.decoder_run import layers_of
from ..acceleration.memory.frozen_linear import FrozenLinear, why_not_in_fp8
from .adapter_targets import target_pattern
from .adapters import LABELS, TOWERS, base_model
from .plan import size
from .source_weights import SourceWeights

KEEP_NONE = "none"  # the value of --frozen-precision-keep for no layer
ROUTERS = ("gate", "router")  # small layers of mixtures of experts, which choose between experts


def freeze_in_8_bits(
    model: Any,
    precision: str,
    keep: Sequence[str] | None = None,
    source: str | None = None,
    in_fp8: bool | None = None,
    sharded: bool = False,
) -> int:
    """Keep the frozen linear layers of decoder and vision tower in 8 bits, in place.

    Call it after the trained parts were chosen and adapters were added, and before `reduce_memory`,
    `compile_decoder_layers` and `dsvl.acceleration.decoder_layers.compile_8_bit_tower`. The model's state dict keeps the
    original weights, see `FrozenLinear`; with a `source`, all frozen weights in it have the dtype of the source. Routers,
    and layers that other modules compute (in `nn.MultiheadAttention`), keep their precision.

    Args:
        model: a model with `model.language_model` and `model.vision_tower`, such as `DSVLForConditionalGeneration`.
        precision: "fp8" or "int8", see `dsvl.acceleration.memory.frozen_linear`.
        keep: linear layers that keep their precision, by name or path as for `--lora-targets`, *optional*, defaults to the
            first and the last layer of the decoder. The output head always keeps it.
        source: directory or Hub name of the checkpoint that the model was loaded from; original weights are read from its
            files, *optional*, defaults to None: they are kept in main memory.
        in_fp8, sharded: see `FrozenLinear`, *optional*. Layers with an odd number of inputs are not sharded in 8 bits, and
            keep their precision.

    Returns:
        The number of layers in 8 bits.

    Raises:
        ValueError: if no layer is frozen, `keep` names no layer, or the weights are not those of the source.
    """
    layers = dict(_frozen_layers(model))
    if not layers:
        raise ValueError(
            f"precision={precision!r}: the model has no frozen linear layer in its decoder or vision tower, which are "
            "trained in full; omit the precision."
        )
    kept = _kept(model, list(layers), keep)
    if sharded:
        kept |= {name for name, layer in layers.items() if layer.in_features % 2}
    files = None if source is None else SourceWeights(source)
    for name, layer in layers.items():
        if name in kept:
            continue
        original = None
        if files is not None:
            files.check(f"{saved_name(name)}.weight", layer.weight.detach())
            original = partial(files.get, f"{saved_name(name)}.weight")
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, FrozenLinear(layer, precision, original, in_fp8, sharded))
    if files is not None:
        _save_originals(model, files)
    buffers = {f"{name}.{buffer}" for name, one in frozen_linears(model) for buffer, _ in one.named_buffers()}
    # DistributedDataParallel would broadcast buffers before every forward pass; these are the same in all processes.
    model._ddp_params_and_buffers_to_ignore = sorted(buffers)
    return len(layers) - len(kept)


def frozen_linears(model: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    """The names and layers of a model that are in 8 bits."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            yield name, module


def describe_frozen_weights(model: nn.Module) -> str | None:
    """Which linear layers of decoder and tower are in 8 bits, and which frozen ones are not; None if none is.

    Args:
        model: the model, with or without adapters.
    """
    in_8_bits = dict(frozen_linears(model))
    if not in_8_bits:
        return None
    others = [name for name, _ in _frozen_layers(model)]
    parts = []
    for part, label in LABELS.items():
        count = sum(_part(name) == part for name in in_8_bits)
        total = count + sum(_part(name) == part for name in others)
        parts += [f"{count} of {total} linear layers of the {label}"] if total else []
    first = next(iter(in_8_bits.values()))
    dtype = str(first.dtype).removeprefix("torch.")
    before = sum(layer.out_features * layer.in_features for layer in in_8_bits.values()) * first.dtype.itemsize
    now = sum(layer.nbytes for layer in in_8_bits.values())
    names = [*_grouped(others, list(in_8_bits)), "the output head"]
    saved = f"{size(now)} instead of {size(before)}"
    return f"{first.precision} in {' and '.join(parts)} ({saved}); {dtype} in {' and '.join(names)}"


def describe_products(model: nn.Module) -> str:
    """In which precision the products of 8-bit layers are computed here, and why.

    Args:
        model: a model with 8-bit layers.
    """
    layers = [layer for _, layer in frozen_linears(model)]
    dtype = str(layers[0].dtype).removeprefix("torch.")
    if layers[0].precision == "int8":
        return f"in {dtype}, with dequantized weights"
    number = sum(layer.in_fp8 for layer in layers)
    if number and layers[0].dtype == torch.bfloat16:
        fits = "" if number == len(layers) else f" in {number} of {len(layers)} layers, whose sizes are multiples of 16"
        return f"on FP8 tensor cores{fits}"
    why = why_not_in_fp8() or f"FP8 tensor cores are used with bfloat16, not {dtype}"
    return f"in {dtype}, of numbers rounded to FP8 ({why})"


def _frozen_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The frozen linear layers of decoder and tower that are not in 8 bits."""
    for name, module in model.named_modules():
        # Subclasses are read by other modules, as the output projection of nn.MultiheadAttention.
        if type(module) is not nn.Linear or _part(name) is None:
            continue
        path = name.split(".")
        is_frozen = not any(parameter.requires_grad for parameter in module.parameters())
        # PEFT keeps the original of a module that is trained in full.
        if is_frozen and not {"original_module", *ROUTERS}.intersection(path) and "lora_" not in name:
            yield name, module


def _part(name: str) -> str | None:
    """ "language" or "vision", by the path of a module."""
    return next((part for part, root in TOWERS.items() if f".{root}." in f".{name}."), None)


def saved_name(name: str) -> str:
    """The path of a module in a checkpoint, by its path in a model with adapters."""
    path = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in path if part != "base_layer")


def _kept(model: Any, names: list[str], keep: Sequence[str] | None) -> set[str]:
    if keep is None:
        last = len(layers_of(base_model(model).model.language_model)) - 1
        ends = tuple(f"{TOWERS['language']}.layers.{number}." for number in (0, last))
        return {name for name in names if saved_name(name).startswith(ends)}
    if not keep or list(keep) == [KEEP_NONE]:
        return set()
    saved = {saved_name(name): name for name in names}
    pattern = target_pattern(keep, list(saved), "--frozen-precision-keep")
    return {name for own, name in saved.items() if re.fullmatch(pattern, own)}


def _save_originals(model: Any, files: SourceWeights) -> None:
    """Let the state dict of a model have all other frozen weights as in the source, where that has another dtype."""
    frozen = [(name, one) for name, one in model.named_parameters(remove_duplicate=False) if not one.requires_grad]
    # A tied weight is in the files by one of its names.
    saved = {id(one): name for name, one in frozen if name in files and files.get(name).dtype != one.dtype}
    names = {name: saved[id(one)] for name, one in frozen if id(one) in saved}

    def replace(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        originals = {own: files.get(own) for own in set(names.values())}
        state.update({f"{prefix}{name}": originals[own] for name, own in names.items()})

    if names:
        model.register_state_dict_post_hook(replace)


def _grouped(names: list[str], others: list[str]) -> list[str]:
    """Paths of linear layers in few words: whole layers of a transformer, and the same linear layer of several of them."""
    taken = [saved_name(name) for name in others]
    grouped = []
    for part, label in LABELS.items():
        root = f"{TOWERS[part]}."
        found: dict[str, list[str]] = {}
        for name in map(saved_name, names):
            if _part(name) != part:
                continue
            path = name.removeprefix(root)
            layer = re.match(r"(?:.*\.)?\d+(?=\.)", path)
            if layer and not any(other.startswith(f"{root}{layer[0]}.") for other in taken):
                found[layer[0]] = []
            else:
                found.setdefault(re.sub(r"\.\d+\.", ".*.", path), []).append(path)
        words = [
            f"{len(paths)} x {text}" if len(paths) > 1 else paths[0] if paths else text for text, paths in found.items()
        ]
        grouped += [f"{', '.join(words)} of the {label}"] if words else []
    return grouped
