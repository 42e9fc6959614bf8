"""Pictures of strangers: from a data URL, or an address, to pixels."""

import base64
import binascii
import io
import time
import warnings
from typing import Any

from PIL import Image

from ..processing_dsvl import decode_picture
from .requests import Limits, RequestError
from .urls import AddressError, fetch

FETCH_SECONDS = 10.0  # for all pictures of a request
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow's other readers are many, and some start programs


def fetch_pictures(messages: list[dict[str, Any]], limits: Limits) -> None:
    """Put the bytes of every picture that is given as an address in its `url`'s place; together within the limits.

    Raises:
        RequestError: for an address that cannot or may not be fetched.
    """
    deadline, left = time.monotonic() + FETCH_SECONDS, limits.body_bytes
    for number, part in enumerate(_parts(messages, limits), 1):
        if not _is_address(part["url"]):
            continue
        if not limits.allow_urls:
            raise _wrong(number, "is an address, and this server fetches none", "pass data:image/png;base64,...")
        try:
            part["url"] = fetch(part["url"], max_bytes=left, seconds=deadline - time.monotonic())
        except AddressError as error:
            raise _wrong(number, f"was not fetched: {error}", "pass it as a data URL") from None
        left -= len(part["url"])


def load_pictures(messages: list[dict[str, Any]], limits: Limits) -> None:
    """Put pixels in the place of the `url` of every picture, a data URL or bytes.

    Raises:
        RequestError: for too many of them, and for one that is no data URL, is too large, or cannot be decoded.
    """
    for number, part in enumerate(_parts(messages, limits), 1):
        url = part.pop("url")
        part["image"] = decode(url if isinstance(url, bytes) else read(url, number), number, limits)


def read(url: str, number: int) -> bytes:
    """The bytes of a data URL."""
    head, comma, data = url.partition(",")
    if head[:5].lower() != "data:":
        raise _wrong(number, "is neither a data URL nor an http(s) address", "pass data:image/png;base64,...")
    if not comma or not head.lower().endswith(";base64"):
        raise _wrong(number, "is no base64 data URL", "pass data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise _wrong(number, "is not valid base64", "encode its file's bytes") from None


def decode(data: bytes, number: int, limits: Limits) -> Image.Image:
    """A picture's pixels; its header is read first, so that nothing too large is unpacked."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise _wrong(number, "cannot be read", f"pass one of {', '.join(FORMATS)}") from None
    if width * height > limits.picture_pixels:
        raise _wrong(
            number, f"has {width} x {height} pixels", f"this server takes {limits.picture_pixels:,} at most; make it smaller"
        )
    try:
        return decode_picture(image)
    except ValueError:
        raise _wrong(number, "cannot be decoded", "its file may be cut or broken; send it whole") from None


def _parts(messages: list[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if len(parts) > limits.pictures:
        raise RequestError(
            f"{len(parts)} pictures in one request; this server takes {limits.pictures} at most.", param="messages"
        )
    return parts


def _is_address(url: str) -> bool:
    return url.split(":", 1)[0].lower() in ("http", "https")


def _wrong(number: int, what: str, remedy: str) -> RequestError:
    return RequestError(f"Picture {number} {what}; {remedy}.", code="invalid_image", param="messages")
