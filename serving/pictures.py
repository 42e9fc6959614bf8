"""Pictures of strangers: from a data URL, or an address, to pixels."""

import base64
import binascii
import io
import warnings
from typing import Any

from PIL import Image

from ..processing_dsvl import decode_picture
from .requests import Limits, RequestError
from .urls import AddressError, fetch

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow's other readers are many, and some start programs


def load_pictures(messages: list[dict[str, Any]], limits: Limits) -> None:
    """Put pixels in the place of the `url` of every picture, in place.

    Raises:
        RequestError: for too many of them, and for one that is too large, cannot be decoded, or is no data URL (nor, if that
            is allowed, a public http(s) address).
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if len(parts) > limits.pictures:
        raise RequestError(
            f"{len(parts)} pictures in one request; this server takes {limits.pictures} at most.", param="messages"
        )
    for number, part in enumerate(parts, 1):
        part["image"] = decode(read(part.pop("url"), number, limits), number, limits)


def read(url: str, number: int, limits: Limits) -> bytes:
    """The bytes that a picture's URL stands for."""
    if url[:5].lower() == "data:":
        head, comma, data = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise _wrong(number, "is no base64 data URL", "pass data:image/png;base64,...")
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise _wrong(number, "is not valid base64", "encode its file's bytes") from None
    if url.split(":", 1)[0].lower() not in ("http", "https"):
        raise _wrong(number, "is neither a data URL nor an http(s) address", "pass data:image/png;base64,...")
    if not limits.allow_urls:
        raise _wrong(number, "is an address, and this server fetches none", "pass data:image/png;base64,...")
    try:
        return fetch(url)
    except AddressError as error:
        raise _wrong(number, f"was not fetched: {error}", "pass it as a data URL") from None


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


def _wrong(number: int, what: str, remedy: str) -> RequestError:
    return RequestError(f"Picture {number} {what}; {remedy}.", code="invalid_image", param="messages")
