"""Pictures that strangers may have made: opened within bounds."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..processing_dsvl import decode_picture
from .addresses import AddressError, fetch
from .bad_samples import shortened
from .forms import decode_data_url
from .messages import is_address

MAX_PIXELS = 89_000_000  # decoded, 0.27 GB; from here on Pillow warns
MAX_BYTES = 64 * 2**20  # of a file
# Not all that Pillow reads: some of its formats start other programs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")


class PictureError(ValueError):
    """What is wrong with a picture, and what to do: words that follow its name, and say nothing of this machine."""


def open_picture(source: Any, allow_urls: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture as upright RGB (`decode_picture`), refused if decoding it could take the memory of the machine.

    Args:
        source: a PIL image, an array (height, width, 3) of bytes, a file's bytes or path, or an http(s) address.
        allow_urls: whether an address is fetched (see `addresses.fetch`).
        max_pixels: the largest picture.

    Raises:
        ValueError: naming the source and the reason.
    """
    name = shortened(str(source)) if isinstance(source, (str, Path)) else f"({type(source).__name__})"
    source = fetched(source, allow_urls)
    if isinstance(source, (str, Path)):
        source = _read(Path(source).expanduser(), name)
    try:
        if isinstance(source, bytes):
            return decode_within(source, max_pixels)
        if not isinstance(source, Image.Image) and hasattr(source, "__array_interface__"):
            source = Image.fromarray(source)
        if not isinstance(source, Image.Image):
            raise ValueError(f"A picture is a PIL image, an array, a path or bytes, not {type(source).__name__}.")
        return _within(source, max_pixels)
    except PictureError as error:
        raise ValueError(f"The picture {name} {error}.") from error


def fetched(source: Any, allow_urls: bool = False) -> Any:
    """An image's source, with what an address or a data URL stands for in its place: the file's bytes.

    Args:
        source: an http(s) address, a data URL; anything else is returned as it is. Not `file://`, which a stranger may have
            written: those of a data file have been made paths when it was read.
        allow_urls: whether an address is fetched (see `addresses.fetch`).

    Raises:
        ValueError: naming the source and the reason.
    """
    if isinstance(source, str) and source[:5].lower() == "data:":
        return decode_data_url(source)
    if not is_address(source):
        return source
    name = shortened(source)
    if not allow_urls:
        raise ValueError(
            f"The picture {name} is an address, and fetching is not allowed here; pass a file, or allow it (--allow-urls)."
        )
    try:
        return fetch(source, MAX_BYTES)
    except AddressError as error:
        raise ValueError(f"The picture {name} was not fetched: {error}.") from error


def decode_within(data: bytes, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS) -> Image.Image:
    """A file's pixels as upright RGB; its header is read first, so that nothing too large is unpacked.

    Args:
        data: the file.
        max_pixels: the largest picture.
        formats: Pillow's names of those that are read.

    Raises:
        PictureError: if it is larger, of another format, or broken.
    """
    try:
        Image.init()
        image = Image.open(io.BytesIO(data), formats=[name for name in formats if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"has too many pixels; at most {max_pixels:,} are taken, make it smaller") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise PictureError(f"cannot be read; pass one of {', '.join(formats)}, unbroken") from error
    return _within(image, max_pixels)


def thumbnail(image: Image.Image, width: int, quality: int = 80) -> str:
    """A picture for a page: a JPEG of at most `width` x `width` pixels, as a data URL."""
    small = image.copy()
    small.thumbnail((width, width))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _within(image: Image.Image, max_pixels: int) -> Image.Image:
    """Decode a picture unless it is too large."""
    if image.width * image.height > max_pixels:
        raise PictureError(f"has {image.width} x {image.height} pixels; at most {max_pixels:,} are taken, make it smaller")
    try:
        return decode_picture(image)
    except ValueError as error:
        raise PictureError("cannot be decoded; its file may be cut or broken, pass it whole") from error


def _read(path: Path, name: str) -> bytes:
    if not os.path.isfile(path):  # nor is a pipe or a device opened, which may never end
        raise ValueError(f"The picture {name} does not exist, or is no file.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"The picture {name} has {path.stat().st_size:,} bytes; the largest that is opened has {MAX_BYTES:,}."
        )
    return path.read_bytes()
