"""Multi-turn chat with a checkpoint: `DSVLChat`, which reuses the KV cache of earlier turns, and `dsvl chat`."""

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
