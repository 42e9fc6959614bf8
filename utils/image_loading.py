"""Images from untrusted sources: bounds on file size and pixels, and on where they may come from."""

import base64
import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..image_reading_dsvl import FORMATS, MAX_BYTES, MAX_PIXELS, ImageError, file_of, image_size, read_image
from .text import shortened
from .url_fetching import FetchError, fetch_url
from .urls import decode_data_url, is_data_url, is_url

SIZES_KEPT = 2**18  # of image files, in each process: 60 MB

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")


class ImageReadError(ValueError):
    """An image cannot be used: the problem and the remedy, to be printed after the image's name.

    The message holds nothing about this machine, so that a server may send it to a client.
    """


def open_image(source: Any, allow_urls: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image as upright RGB.

    Args:
        source: A path, URL, data URL, bytes, array or PIL image, as for `read_image`.
        allow_urls (`bool`, *optional*, defaults to `False`): Whether http(s) URLs are fetched; see `fetch_url`.
        max_pixels (`int`, *optional*): The largest width x height.

    Raises:
        ValueError: If the image cannot be read, or is too large; the message names the source.
    """
    source = file_of(source)
    is_text = isinstance(source, (str, os.PathLike))
    if is_data_url(source):
        name = "(a data URL)"
    else:
        name = shortened(os.fspath(source)) if is_text else f"({type(source).__name__})"
    source = fetch_image_source(source, allow_urls)
    if isinstance(source, (str, os.PathLike)):
        source = _read(Path(source).expanduser(), name)
    try:
        return read_image(source, max_pixels=max_pixels, allow_urls=False)
    except ImageError as error:
        raise ValueError(f"The image {name} {error.words}.") from error


def fetch_image_source(
    source: Any, allow_urls: bool = False, kind: str = "image", max_bytes: int = MAX_BYTES, **limits: float
) -> Any:
    """Replace an http(s) URL or a data URL by the bytes of its file.

    Args:
        source: Any source of an image. Sources other than URLs are returned unchanged. `file://` URLs are refused: they may
            come from a client. Those of a data file have become paths when it was read.
        allow_urls (`bool`, *optional*, defaults to `False`): Whether http(s) URLs are fetched; see `fetch_url`.
        kind (`str`, *optional*, defaults to `"image"`): What it is, for messages: "image" or "video".
        max_bytes (`int`, *optional*): The largest file that is fetched.
        limits: Further limits of `fetch_url`.

    Raises:
        ValueError: If a URL is not allowed or cannot be fetched; the message names it.
    """
    if is_data_url(source):
        return decode_data_url(source)
    if not is_url(source):
        return source
    name = shortened(source)
    if not allow_urls:
        raise ValueError(
            f"The {kind} {name} is a URL, and fetching is not allowed here; pass a file, or allow it (--allow-urls)."
        )
    try:
        return fetch_url(source, max_bytes, **limits)
    except FetchError as error:
        raise ValueError(f"The {kind} {name} was not fetched: {error}.") from error


def image_source_size(source: Any, allow_urls: bool = False) -> tuple[int, int]:
    """(height, width) of an image, from the header of its file. The sizes of files and URLs are remembered.

    Args:
        source: Any source of an image, as for `fetch_image_source`.
        allow_urls (`bool`, *optional*, defaults to `False`): Whether http(s) URLs are fetched.

    Raises:
        ValueError: If a URL is not allowed or cannot be fetched, or the file is not an image.
    """
    source = file_of(source)
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        status = os.stat(source)
        width, height = _size_of_file(os.fspath(source), status.st_mtime_ns, status.st_size)
    elif is_url(source) and not is_data_url(source) and allow_urls:
        width, height = _size_of_url(source)
    else:
        width, height = image_size(fetch_image_source(source, allow_urls), allow_urls=False)
    return height, width


@functools.lru_cache(SIZES_KEPT)
def _size_of_file(path: str, modified: int, size: int) -> tuple[int, int]:
    return image_size(path, allow_urls=False)


@functools.lru_cache(SIZES_KEPT)
def _size_of_url(url: str) -> tuple[int, int]:
    return image_size(fetch_image_source(url, allow_urls=True), allow_urls=False)


def decode_image_file(data: bytes, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Decode an image file to upright RGB; the size in its header is checked before pixels are decoded.

    Args:
        data (`bytes`): The content of the file.
        max_pixels (`int`, *optional*): The largest width x height.
        formats (`Sequence[str]`, *optional*): Pillow's names of the accepted formats.

    Raises:
        ImageReadError: If the image is too large, broken or of another format.
    """
    try:
        return read_image(data, formats=formats, max_pixels=max_pixels)
    except ImageError as error:
        raise ImageReadError(error.words) from error


def thumbnail_data_url(image: Image.Image, width: int, quality: int = 80) -> str:
    """A JPEG of at most `width` x `width` pixels as a data URL, for an HTML page."""
    small = image.copy()
    small.thumbnail((width, width))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _read(path: Path, name: str) -> bytes:
    if not os.path.isfile(path):  # reading a pipe or a device may never end
        raise ValueError(f"The image {name} does not exist, or is not a file.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"The image {name} has {path.stat().st_size:,} bytes; the largest that is opened has {MAX_BYTES:,}."
        )
    return path.read_bytes()
