"""The model card that travels with a checkpoint."""

from .card import render_card

__all__ = ["render_card"]
