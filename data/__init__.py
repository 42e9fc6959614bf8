"""Conversations about images: the one format that everything here reads."""

from .conversations import load_conversations
from .messages import check_conversation, complete_messages

__all__ = ["check_conversation", "complete_messages", "load_conversations"]
