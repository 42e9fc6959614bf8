"""Data sets of conversations about images: loading, checking, conversion, mixtures, packing and streaming."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from .conversations import load_conversations
    from .messages import check_conversation, complete_messages
    from .trl_datasets import trl_dataset

__all__ = ["check_conversation", "complete_messages", "load_conversations", "trl_dataset"]
__getattr__ = lazy_attributes(
    __name__,
    {
        "check_conversation": "messages",
        "complete_messages": "messages",
        "load_conversations": "conversations",
        "trl_dataset": "trl_datasets",
    },
)
