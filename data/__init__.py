"""Conversations about pictures: the one format that everything here reads."""

from .conversations import check_conversation, complete_messages, load_conversations

__all__ = ["check_conversation", "complete_messages", "load_conversations"]
