"""Images and videos of requests: from a data URL or an http(s) URL to pixels. They are untrusted."""

import time
from dataclasses import replace
from typing import Any

from PIL import Image

from ..image_reading_dsvl import ImageError, image_size
from ..utils.image_loading import ImageReadError, decode_image_file
from ..utils.url_fetching import FetchError, fetch_url
from ..utils.urls import decode_data_url, is_data_url
from ..video_decoding_dsvl import VideoLimits, VideoSampling
from ..video_reading_dsvl import Video, VideoError
from .requests import RequestError, RequestLimits

FETCH_SECONDS = 10.0  # for downloading all images of a request
EXAMPLES = {"image": "data:image/png;base64,...", "video": "data:video/mp4;base64,..."}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what browsers send; other decoders are not exposed


def fetch_images(messages: list[dict[str, Any]], limits: RequestLimits) -> None:
    """Download the images and videos that are given as http(s) URLs, and replace their `url` by the bytes.

    Args:
        messages: messages in the format of the processor; changed in place.
        limits: `images`, `videos`, `allow_urls` and `body_bytes`, which all downloads together may not exceed.

    Raises:
        RequestError: for a URL that cannot or may not be downloaded.
    """
    deadline, remaining = time.monotonic() + FETCH_SECONDS, limits.body_bytes
    for kind, parts in (("image", image_parts(messages, limits)), ("video", video_parts(messages, limits))):
        for number, part in enumerate(parts, 1):
            if not _is_http_url(part["url"]):
                continue
            if not limits.allow_urls:
                what = "is an http(s) URL, which this server does not download"
                raise _invalid(number, what, f"pass {EXAMPLES[kind]}", kind)
            try:
                part["url"] = fetch_url(part["url"], max_bytes=remaining, seconds=deadline - time.monotonic())
            except FetchError as error:
                raise _invalid(number, f"was not fetched: {error}", "pass it as a data URL", kind) from None
            remaining -= len(part["url"])


def expand_videos(messages: list[dict[str, Any]], sampling: VideoSampling, limits: RequestLimits) -> None:
    """Replace the videos by their frames, decoded and as image parts with a time, in place.

    Raises:
        RequestError: if a video is not a data URL, exceeds a limit, or cannot be decoded.
    """
    videos = video_parts(messages, limits)
    if not videos:
        return
    bounds = VideoLimits(seconds=limits.video_seconds, pixels=limits.image_pixels, decode_seconds=limits.decode_seconds)
    own = replace(sampling, max_frames=max(1, min(sampling.max_frames, limits.video_frames // len(videos))))
    number = 0
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] != "video":
                content.append(part)
                continue
            number += 1
            url = part.pop("url")
            data = url if isinstance(url, bytes) else _data_url_bytes(url, number, "video")
            try:
                frames = Video(data, own, limits=bounds).parts()
                content += [frame | {"image": frame["image"].read_frame()} for frame in frames]
            except ImportError:
                raise _invalid(number, "cannot be read: this server lacks PyAV", "pass a GIF", "video") from None
            except VideoError as error:
                what, remedy = error.words.split("; ", 1)
                raise _invalid(number, what, remedy, "video") from None
        message["content"] = content


def load_image(part: dict[str, Any], number: int, limits: RequestLimits) -> Image.Image:
    """Decode an image part. Its `url`, a data URL or bytes, is removed from the part to free memory.

    Raises:
        RequestError: if it is not a data URL, is too large, or cannot be decoded.
    """
    if "url" not in part:
        return part.pop("image")  # a frame
    image_file(part, number)
    return decode_image(part.pop("url"), number, limits)


def image_file(part: dict[str, Any], number: int) -> bytes | None:
    """The file of an image part, decoded from base64, which the part has as its `url` from now on; None for a frame.

    Raises:
        RequestError: if it is not a data URL.
    """
    if "url" not in part:
        return None
    if isinstance(part["url"], str):
        part["url"] = _data_url_bytes(part["url"], number)
    return part["url"]


def measure_images(messages: list[dict[str, Any]], limits: RequestLimits) -> None:
    """Give each image part its `image_size` (height, width), from the header of its file. Nothing is decoded, except base64:
    data URLs become bytes.

    Raises:
        RequestError: as `load_image`, as far as the header tells.
    """
    for number, part in enumerate(image_parts(messages, limits), 1):
        data = image_file(part, number)
        if data is None:  # a frame
            continue
        try:
            width, height = image_size(data, max_pixels=limits.image_pixels, formats=FORMATS)
        except ImageError as error:
            raise RequestError(f"Image {number} {error.words}.", code="invalid_image", param="messages") from None
        part["image_size"] = (height, width)


def _data_url_bytes(url: str, number: int, kind: str = "image") -> bytes:
    if not is_data_url(url):
        raise _invalid(number, "is neither a data URL nor an http(s) URL", f"pass {EXAMPLES[kind]}", kind)
    try:
        return decode_data_url(url)
    except ValueError:
        raise _invalid(number, "is not a valid base64 data URL", f"pass {EXAMPLES[kind]}", kind) from None


def decode_image(data: bytes, number: int, limits: RequestLimits) -> Image.Image:
    """Decode an image file within the limits."""
    try:
        return decode_image_file(data, limits.image_pixels, FORMATS)
    except ImageReadError as error:
        raise RequestError(f"Image {number} {error}.", code="invalid_image", param="messages") from None


def image_parts(messages: list[dict[str, Any]], limits: RequestLimits) -> list[dict[str, Any]]:
    """The image parts of all messages.

    Raises:
        RequestError: if there are more than `limits.images`.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    images = sum(not part.get("time") for part in parts)  # frames of videos have their own limit
    if images > limits.images:
        raise RequestError(f"The request has {images} images; the limit is {limits.images}.", param="messages")
    return parts


def video_parts(messages: list[dict[str, Any]], limits: RequestLimits) -> list[dict[str, Any]]:
    """The video parts of all messages.

    Raises:
        RequestError: if there are more than `limits.videos`.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == "video"]
    if len(parts) > limits.videos:
        raise RequestError(f"The request has {len(parts)} videos; the limit is {limits.videos}.", param="messages")
    return parts


def _is_http_url(url: str) -> bool:
    return url.split(":", 1)[0].lower() in ("http", "https")


def _invalid(number: int, what: str, remedy: str, kind: str = "image") -> RequestError:
    return RequestError(f"{kind.title()} {number} {what}; {remedy}.", code=f"invalid_{kind}", param="messages")
