"""Opening of uploaded image files."""

from pathlib import Path

from PIL import Image

from ..utils.image_loading import open_image
from .limits import PageLimits, Refusal

MAX_SIDE = 2048  # pixels; vision towers take smaller images


def open_upload(name: str, limits: PageLimits) -> Image.Image:
    """Open an uploaded image, scaled down to at most `MAX_SIDE` pixels per side.

    Raises:
        Refusal: if the file is gone, is too large, or is not an image. The message has the file name, without its directory.
    """
    file = Path(name)
    try:
        size = file.stat().st_size
        data = file.read_bytes() if size <= limits.image_bytes else b""
    except OSError:
        raise Refusal(f"{file.name} is not stored any more; add it again.") from None
    if size > limits.image_bytes:
        raise Refusal(f"{file.name} has {size / 2**20:.3g} MB; the limit is {limits.image_bytes / 2**20:.3g} MB.")
    try:
        image = open_image(data, max_pixels=limits.image_pixels)
    except ValueError:
        raise Refusal(
            f"{file.name} is refused: it is not a supported image (PNG, JPEG, WebP, ...), or has more than "
            f"{limits.image_pixels / 1e6:g} megapixels."
        ) from None
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image
