"""Images that strangers may have made: opened within bounds."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..image_reading_dsvl import FORMATS, MAX_BYTES, MAX_PIXELS, ImageError, file_of, read_image
from .addresses import AddressError, fetch
from .bad_samples import shortened
from .forms import decode_data_url
from .messages import is_address

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")


class ImageReadError(ValueError):
    """What is wrong with an image, and what to do: words that follow its name, and say nothing of this machine."""


def open_image(source: Any, allow_urls: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image as upright RGB, whatever `read_image` takes, within bounds: of its file's size, and of where it comes from.

    Args:
        source: see `read_image`.
        allow_urls: whether an http(s) address is fetched (see `addresses.fetch`).
        max_pixels: the largest image.

    Raises:
        ValueError: naming the source and the reason.
    """
    source = file_of(source)
    is_text = isinstance(source, (str, os.PathLike))
    is_data = isinstance(source, str) and source[:5].lower() == "data:"
    name = "(a data URL)" if is_data else shortened(os.fspath(source)) if is_text else f"({type(source).__name__})"
    source = fetched(source, allow_urls)
    if isinstance(source, (str, os.PathLike)):
        source = _read(Path(source).expanduser(), name)
    try:
        return read_image(source, max_pixels=max_pixels, allow_urls=False)
    except ImageError as error:
        raise ValueError(f"The image {name} {error.words}.") from error


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
            f"The image {name} is an address, and fetching is not allowed here; pass a file, or allow it (--allow-urls)."
        )
    try:
        return fetch(source, MAX_BYTES)
    except AddressError as error:
        raise ValueError(f"The image {name} was not fetched: {error}.") from error


def decode_within(data: bytes, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS) -> Image.Image:
    """A file's pixels as upright RGB; its header is read first, so that nothing too large is unpacked.

    Args:
        data: the file.
        max_pixels: the largest image.
        formats: Pillow's names of those that are read.

    Raises:
        ImageReadError: if it is larger, of another format, or broken.
    """
    try:
        return read_image(data, formats=formats, max_pixels=max_pixels)
    except ImageError as error:
        raise ImageReadError(error.words) from error


def thumbnail(image: Image.Image, width: int, quality: int = 80) -> str:
    """An image for a page: a JPEG of at most `width` x `width` pixels, as a data URL."""
    small = image.copy()
    small.thumbnail((width, width))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _read(path: Path, name: str) -> bytes:
    if not os.path.isfile(path):  # nor is a pipe or a device opened, which may never end
        raise ValueError(f"The image {name} does not exist, or is no file.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"The image {name} has {path.stat().st_size:,} bytes; the largest that is opened has {MAX_BYTES:,}."
        )
    return path.read_bytes()
