"""Limits of the web page."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PageLimits:
    """What visitors may send, and how much of it is kept.

    Args:
        images: images and videos per question.
        conversation_images: images and videos per conversation.
        image_bytes: size of an image file.
        image_pixels: pixels of an image, or of a frame of a video.
        video_bytes: size of a video file.
        video_frames: frames of a video; of a longer one, as many at equal distances.
        video_seconds: length of a video.
        decode_seconds: time to read a video.
        characters: characters of a question.
        waiting: questions in the queue; further ones are refused.
        conversations: conversations kept; the least recently used ones are deleted.
        caches: KV caches kept, for the most recently used conversations. They take the most memory.
        idle_seconds: age at which conversations may be deleted, and uploaded files are.
        upload_bytes: total size of all uploaded files.
        memory_bytes: total size of the decoded images of all conversations; of the least recently used ones, only the files
            are kept.
    """

    images: int = 8
    conversation_images: int = 16
    image_bytes: int = 16 * 2**20
    image_pixels: int = 25_000_000
    video_bytes: int = 64 * 2**20
    video_frames: int = 32
    video_seconds: float = 600.0
    decode_seconds: float = 20.0
    characters: int = 8000
    waiting: int = 32
    conversations: int = 64
    caches: int = 4
    idle_seconds: float = 3600.0
    upload_bytes: int = 2 * 2**30
    memory_bytes: int = 2**30


class Refusal(Exception):
    """A visitor's request is refused. The message is shown to the visitor and contains no path of this machine."""
