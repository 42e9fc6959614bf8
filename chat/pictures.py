"""Pictures that strangers may have made: opened within bounds."""

import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

from ..processing_dsvl import decode_picture
from .addresses import fetch

MAX_PIXELS = 89_000_000  # decoded, 0.27 GB; from here on Pillow warns
MAX_BYTES = 64 * 2**20  # of a file
# Not all that Pillow reads: some of its formats start other programs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")


def open_picture(source: Any, allow_urls: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture as upright RGB (`decode_picture`), refused if decoding it could take the memory of the machine.

    Args:
        source: a PIL image, an array (height, width, 3) of bytes, a file's bytes or path, or an http(s) address.
        allow_urls: whether an address is fetched.
        max_pixels: the largest picture.

    Raises:
        ValueError: naming the source and the reason.
    """
    if isinstance(source, Image.Image):
        return _within(source, "", max_pixels)
    if hasattr(source, "__array_interface__"):
        return _within(Image.fromarray(source), "", max_pixels)
    name = "of these bytes" if isinstance(source, bytes) else str(source)[:300]
    if isinstance(source, str) and "://" in source:
        if not allow_urls:
            raise ValueError(f"The picture {name} is an address, and fetching is not allowed here; pass a file.")
        source = fetch(source, MAX_BYTES)
    elif isinstance(source, (str, Path)):
        source = _read(Path(source).expanduser(), name)
    if not isinstance(source, bytes):
        raise ValueError(f"A picture is a PIL image, an array, a path or bytes, not {type(source).__name__}.")
    try:
        Image.init()
        image = Image.open(io.BytesIO(source), formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ValueError(f"The picture {name} is refused: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"The picture {name} is none of {', '.join(FORMATS)}, or it is broken.") from error
    return _within(image, name, max_pixels)


def _within(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode a picture unless it is too large."""
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"The picture {name} has {image.width} x {image.height} pixels; the largest that is opened has {max_pixels:,}."
        )
    return decode_picture(image)


def _read(path: Path, name: str) -> bytes:
    if not os.path.isfile(path):  # nor is a pipe or a device opened, which may never end
        raise ValueError(f"The picture {name} does not exist, or is no file.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"The picture {name} has {path.stat().st_size:,} bytes; the largest that is opened has {MAX_BYTES:,}."
        )
    return path.read_bytes()
