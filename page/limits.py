"""What a page takes on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What visitors may send, and what is kept of them.

    Args:
        images: of a question.
        conversation_images: of a conversation.
        image_bytes: of an image's file.
        image_pixels: of an image.
        characters: of a question.
        waiting: answers that wait for their turn; more questions are refused.
        conversations: kept at once, and forgotten from the least recently used on; of the most recent ones
            (`caches`) the model's cache is kept too, which takes the most memory.
        caches: see there.
        idle_seconds: after which a conversation may be forgotten, and uploaded files are deleted.
        upload_bytes: of all files that are kept.
        memory_bytes: of the pixels of all conversations; of the least recently used ones, only the files are kept.
    """

    images: int = 8
    conversation_images: int = 16
    image_bytes: int = 16 * 2**20
    image_pixels: int = 25_000_000
    characters: int = 8000
    waiting: int = 32
    conversations: int = 64
    caches: int = 4
    idle_seconds: float = 3600.0
    upload_bytes: int = 2 * 2**30
    memory_bytes: int = 2**30


class Refusal(Exception):
    """What a visitor asked for is not done; the message is for the visitor, and names no file of this machine."""
