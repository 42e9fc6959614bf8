"""Thin images: of one much longer than wide, an image processor that resizes the shorter edge makes a giant."""

import math
from typing import Any

from .image_reading_dsvl import MAX_PIXELS

try:
    from PIL import Image
except ImportError:  # texts alone do without
    Image = None  # type: ignore[assignment]

PIXELS = 2**23  # 25 MB: what an image processor may make of any image on its way; of a larger one, as much as that one has
_SUPPORT = 3  # source pixels on each side, at most, that a filter (Lanczos) looks at when it enlarges


def fit_thin_image(image: "Image.Image", image_processor: Any, **kwargs: Any) -> "Image.Image":
    """What to give the image processor in the place of a thin image, so that it needs no more memory than for others.

    CLIP's image processor makes 224 x 224 N pixels of 1 x N, and keeps the 224 x 224 in their middle. Here that middle alone
    is resized, with a few more pixels than are kept, so that the image processor resizes nothing more and crops the same
    pixels. Where N is no whole number they may differ by a grey level: Pillow takes the ends of what it resizes as 32-bit
    floats.

    Args:
        image: of mode RGB. Returned as it is if the image processor makes at most `PIXELS` of it, or as many as it has.
        image_processor: the one that is to process it.
        kwargs: what it will be called with, such as `size`; they take the place of its own settings.

    Raises:
        ValueError: naming the size of a thin image, if the image processor does not crop the center.
    """
    short, long = sorted(image.size)
    names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_pad")
    settings = {name: kwargs.get(name) for name in names}
    settings = {name: getattr(image_processor, name, None) if one is None else one for name, one in settings.items()}
    size = _sides(settings["size"], getattr(image_processor, "default_to_square", True))
    edge = size.get("shortest_edge")
    resized = int(edge * long / short) if edge and settings["do_resize"] else long  # as transformers computes it
    if settings["do_pad"]:  # to a square
        largest, made = max(MAX_PIXELS, 2 * short * long), max(long, resized) ** 2
    else:
        largest, made = max(PIXELS, short * long), (edge or short) * resized
    if made <= largest:
        return image
    crop = _sides(settings["crop_size"], True) if settings["do_center_crop"] else {}
    tall = image.height > image.width
    kept = crop.get("height" if tall else "width")
    least = max(edge or 0, kept or 0)
    if settings["do_pad"] or not edge or size.get("longest_edge") or not kept or least + 2 * edge > resized:
        raise ValueError(
            f"The image of {image.width} x {image.height} pixels is too thin: {type(image_processor).__name__} would make "
            f"{made:,} pixels of it, more than {largest:,}. Crop it, or use an image processor that resizes to a fixed "
            "height and width, or crops the center (do_center_crop)."
        )
    # The same middle; and where `resized` was not rounded, ends between two source pixels, which are exact in a float.
    window = least + (resized - least) % (2 * edge)
    first = (resized - window) / 2 * long / resized
    last = long - first
    begin, end = max(0, math.floor(first) - _SUPPORT - 1), min(long, math.ceil(last) + _SUPPORT + 1)
    # Cropped first, as floats are exact enough for small numbers only.
    ends = (first - begin, last - begin)
    if tall:
        part, shape, box = image.crop((0, begin, short, end)), (edge, window), (0.0, ends[0], float(short), ends[1])
    else:
        part, shape, box = image.crop((begin, 0, end, short)), (window, edge), (ends[0], 0.0, ends[1], float(short))
    return part.resize(shape, _filter(settings["resample"]), box=box)


def _sides(size: Any, default_to_square: bool) -> dict[str, int]:
    """A size in any of the forms that transformers takes, by the names of its sides."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"height": size, "width": size} if default_to_square else {"shortest_edge": size}
    if isinstance(size, (list, tuple)):
        return dict(zip(("height", "width"), size, strict=True))
    return {name: side for name, side in dict(size).items() if side is not None}


def _filter(resample: Any) -> "Image.Resampling":
    """Pillow's filter by its number, or by the name that torchvision has for it."""
    if resample is None:
        return Image.Resampling.BILINEAR
    return Image.Resampling(resample) if isinstance(resample, int) else Image.Resampling[str(resample.value).upper()]
