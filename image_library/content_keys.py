"""What identifies an image, the weights and the code: hashes of what the computation depends on."""

import hashlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from .memory_tier import as_buffer

PACKAGE = Path(__file__).resolve().parent.parent
# The code that computes an image's keys and values, and how they are stored.
CODE = ("*_dsvl.py", "acceleration/**/*.py", "image_library/*.py")


def tile_keys(images: dict[str, torch.Tensor]) -> list[str]:
    """A SHA-256 for each tile (an image, unless `image_layout` is "tiles"): of its pixels, their type and shape.

    Args:
        images: `pixel_values`, and of native images `spatial_shapes` and `pixel_attention_mask` where they are given.
            Padding after the patches of a native image does not count.
    """
    pixels, shapes, masks = (
        None if (part := images.get(name)) is None else part.detach().cpu().contiguous()
        for name in ("pixel_values", "spatial_shapes", "pixel_attention_mask")
    )
    assert pixels is not None
    keys = []
    for number, tile in enumerate(pixels):
        digest = hashlib.sha256()
        if shapes is not None:
            rows, columns = shapes[number].tolist()
            digest.update(f"{rows} {columns} ".encode())
            tile = tile[: rows * columns]
            if masks is not None:
                digest.update(as_buffer(masks[number, : rows * columns].to(torch.uint8)))
        digest.update(f"{tile.dtype} {tuple(tile.shape)} ".encode())
        digest.update(as_buffer(tile))
        keys.append(digest.hexdigest())
    return keys


def numbered_key(key: str, number: int) -> str:
    """The key of what holds an image's number as well."""
    return f"{key}-{number}"


@cache
def code_version() -> str:
    """A hash of the package's code that computes images, and of the releases of torch and transformers."""
    digest = hashlib.sha256(f"torch {torch.__version__} transformers {transformers.__version__}".encode())
    for pattern in CODE:
        for path in sorted(PACKAGE.glob(pattern)):
            digest.update(f"{path.name} ".encode() + path.read_bytes())
    return digest.hexdigest()


def adapter_state(model: torch.nn.Module) -> str:
    """Which of PEFT's adapters influence a model at present: its weights do not tell. Empty without adapters."""
    if "peft" not in sys.modules:  # looking at all modules takes a millisecond
        return ""
    states = [
        (layer.disable_adapters, layer.active_adapters, layer.merged_adapters, getattr(layer, "scaling", None))
        for layer in model.modules()
        if hasattr(layer, "merged_adapters")
    ]
    return repr(states) if states else ""


def is_random(model: torch.nn.Module) -> bool:
    """Whether a model in training mode computes an image differently each time, by dropout."""
    return any(
        layer.training and max(_rate(layer, name) for name in ("p", "drop_prob", "attention_dropout", "dropout")) > 0
        for layer in model.modules()
    )


def _rate(layer: torch.nn.Module, name: str) -> float:
    value = layer.__dict__.get(name, 0.0)
    return float(value) if isinstance(value, (int, float)) else 0.0


def preprocessing_version(processor: Any, *limits: Any) -> str:
    """A hash of how a processor makes pixels of an image file.

    Args:
        processor: a `DSVLProcessor`.
        limits: what else decides.
    """
    settings = sorted((key, repr(value)) for key, value in processor.image_processor.to_dict().items())
    return hashlib.sha256(repr([settings, repr(processor.layout), limits]).encode()).hexdigest()


__all__ = [
    "adapter_state",
    "code_version",
    "is_random",
    "numbered_key",
    "preprocessing_version",
    "tile_keys",
]
