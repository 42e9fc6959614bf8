"""Images of strangers: from a data URL, or an address, to pixels."""

import time
from typing import Any

from PIL import Image

from ..utils.image_loading import ImageReadError, decode_image_file
from ..utils.url_fetching import FetchError, fetch_url
from ..utils.urls import decode_data_url, is_data_url
from .requests import Limits, RequestError

FETCH_SECONDS = 10.0  # for all images of a request
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what browsers send; the fewer readers a stranger reaches, the better


def fetch_images(messages: list[dict[str, Any]], limits: Limits) -> None:
    """Put the bytes of every image that is given as an address in its `url`'s place; together within the limits.

    Raises:
        RequestError: for an address that cannot or may not be fetched.
    """
    deadline, left = time.monotonic() + FETCH_SECONDS, limits.body_bytes
    for number, part in enumerate(image_parts(messages, limits), 1):
        if not _is_address(part["url"]):
            continue
        if not limits.allow_urls:
            raise _wrong(number, "is an address, and this server fetches none", "pass data:image/png;base64,...")
        try:
            part["url"] = fetch_url(part["url"], max_bytes=left, seconds=deadline - time.monotonic())
        except FetchError as error:
            raise _wrong(number, f"was not fetched: {error}", "pass it as a data URL") from None
        left -= len(part["url"])


def load_image(part: dict[str, Any], number: int, limits: Limits) -> Image.Image:
    """A part's pixels; its `url`, a data URL or bytes, is taken out of it.

    Raises:
        RequestError: for one that is no data URL, is too large, or cannot be decoded.
    """
    url = part.pop("url")
    return decode(url if isinstance(url, bytes) else read(url, number), number, limits)


def read(url: str, number: int) -> bytes:
    """The bytes of a data URL."""
    if not is_data_url(url):
        raise _wrong(number, "is neither a data URL nor an http(s) address", "pass data:image/png;base64,...")
    try:
        return decode_data_url(url)
    except ValueError:
        raise _wrong(number, "is no valid base64 data URL", "pass data:image/png;base64,...") from None


def decode(data: bytes, number: int, limits: Limits) -> Image.Image:
    """An image's pixels."""
    try:
        return decode_image_file(data, limits.image_pixels, FORMATS)
    except ImageReadError as error:
        raise RequestError(f"Image {number} {error}.", code="invalid_image", param="messages") from None


def image_parts(messages: list[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """The parts of messages that are images.

    Raises:
        RequestError: for too many of them.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if len(parts) > limits.images:
        raise RequestError(
            f"{len(parts)} images in one request; this server takes {limits.images} at most.", param="messages"
        )
    return parts


def _is_address(url: str) -> bool:
    return url.split(":", 1)[0].lower() in ("http", "https")


def _wrong(number: int, what: str, remedy: str) -> RequestError:
    return RequestError(f"Image {number} {what}; {remedy}.", code="invalid_image", param="messages")
