"""Composing a vision tower and a language model into a DSVL checkpoint."""

from .chat_template import chat_template_name, prepare_chat_template
from .checkpoint import save_checkpoint
from .compose import compose

__all__ = ["chat_template_name", "compose", "prepare_chat_template", "save_checkpoint"]
