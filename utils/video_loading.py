"""Videos from untrusted sources: bounds on where they may come from, and on what is fetched."""

import io
import os
from functools import partial
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ..image_layouts_dsvl import FRAME
from ..image_reading_dsvl import read_image
from ..video_decoding_dsvl import VideoLimits, VideoSampling
from ..video_reading_dsvl import Video, expand_videos, mark_frames
from .image_loading import fetch_image_source

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".3gp")
FETCH_SECONDS = 120.0  # a video takes longer than an image


def with_frames(
    messages: list[dict[str, Any]],
    sampling: VideoSampling | None = None,
    allow_urls: bool = False,
    limits: VideoLimits | None = None,
) -> list[dict[str, Any]]:
    """Replace the videos of messages by their frames, which are images with a time and not decoded yet.

    Args:
        messages: As `data.complete_messages` returns them.
        sampling (`VideoSampling`, *optional*): Which frames; `processor.video_sampling`.
        allow_urls (`bool`, *optional*, defaults to `False`): Whether videos are fetched from http(s) URLs.
        limits (`VideoLimits`, *optional*): What is refused.

    Raises:
        ValueError: If a video cannot be read.
    """
    fetch = partial(fetch_video_source, allow_urls=allow_urls)
    return mark_frames(expand_videos(messages, sampling, fetch, limits))


def open_video(
    source: Any,
    sampling: VideoSampling | None = None,
    allow_urls: bool = False,
    limits: VideoLimits | None = None,
    frame_rate: float | None = None,
) -> Video:
    """Open a video that a user names; a path may begin with `~`. For the arguments see `with_frames` and `read_video`."""
    source = fetch_video_source(source, allow_urls)
    if isinstance(source, (str, os.PathLike)):
        source = Path(source).expanduser()
    return Video(source, sampling, frame_rate, limits, allow_urls=False)


def frame_file(source: Any) -> bytes:
    """A PNG file of a frame, or of another image; that of a frame says so, and `read_image` keeps it.

    Args:
        source: A frame or an image, as for `read_image`.
    """
    image, file, note = read_image(source), io.BytesIO(), PngInfo()
    if image.info.get(FRAME):
        note.add_text(FRAME, "1")
    image.save(file, "PNG", pnginfo=note)
    return file.getvalue()


def fetch_video_source(source: Any, allow_urls: bool = False) -> Any:
    """Replace an http(s) URL or a data URL by the bytes of its file; see `fetch_image_source`."""
    return fetch_image_source(source, allow_urls, "video", VideoLimits().fetched_bytes, seconds=FETCH_SECONDS)
