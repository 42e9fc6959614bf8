"""What vLLM's server imports (`--middleware`): the gateway, and with it the media connector, which registers itself."""

from .gateway import Gateway
from .media import Media

__all__ = ["Gateway", "Media"]
