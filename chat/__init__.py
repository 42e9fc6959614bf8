"""Talking to a checkpoint: conversations whose earlier rounds are not computed again, and `dsvl chat`."""

from .conversation import DSVLChat

__all__ = ["DSVLChat"]
