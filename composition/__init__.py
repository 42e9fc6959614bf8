"""Composing a vision tower and a language model into a DSVL checkpoint."""

from .checkpoint import save_checkpoint
from .compose import compose

__all__ = ["compose", "save_checkpoint"]
