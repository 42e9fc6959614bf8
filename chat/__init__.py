"""Talking to a checkpoint: conversations whose earlier rounds are not computed again, and `dsvl chat`."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from .conversation import DSVLChat

__all__ = ["DSVLChat"]
__getattr__ = lazy_attributes(
    __name__,
    {
        "DSVLChat": "conversation",
    },
)
