"""Uploaded images: opened when a model reads them, and at other times files."""

from pathlib import Path

from PIL import Image

from ..utils.image_loading import open_image
from .limits import Limits, Refusal

KEPT_SIDE = 2048  # pixels: what towers see is smaller


def open_upload(name: str, limits: Limits) -> Image.Image:
    """An image, no larger than is of use.

    Raises:
        Refusal: naming the file as the visitor knows it.
    """
    file = Path(name)
    try:
        size = file.stat().st_size
        data = file.read_bytes() if size <= limits.image_bytes else b""
    except OSError:
        raise Refusal(f"{file.name} is not kept any more; add it again.") from None
    if size > limits.image_bytes:
        raise Refusal(f"{file.name} has {size / 2**20:.3g} MB; the most is {limits.image_bytes / 2**20:.3g} MB.")
    try:
        image = open_image(data, max_pixels=limits.image_pixels)
    except ValueError:
        raise Refusal(
            f"{file.name} is refused: it is no image that can be opened here (PNG, JPEG, WebP, ...), or has more than "
            f"{limits.image_pixels / 1e6:g} megapixels."
        ) from None
    image.thumbnail((KEPT_SIDE, KEPT_SIDE))
    return image
