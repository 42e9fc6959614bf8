"""Exporting a checkpoint to a model of transformers' own, which other programs open without this package."""

from .checkpoint import export_llava
from .llava import to_llava

__all__ = ["export_llava", "to_llava"]
