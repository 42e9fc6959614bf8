"""Reading an image in any form as upright 8-bit RGB, within limits.

All code that needs pixels reads them here: the processor, the collator, the data tools, chat, serving, evaluation.
"""

import base64
import binascii
import io
import math
import os
import struct
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

import numpy as np
import torch

from .transformers_dsvl import requires_backends

try:
    from PIL import Image, ImageFile
except ImportError:  # not needed for text alone
    Image = ImageFile = None  # type: ignore[assignment]

MAX_PIXELS = 89_000_000  # decoded, 0.27 GB; Pillow warns from here on
MAX_BYTES = 64 * 2**20  # of a file that is fetched
FETCH_SECONDS = 60.0  # without a byte
# Not all that Pillow reads: some of its formats start other programs (EPS, Ghostscript), and most are hardly ever used.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# An image processor may make this many pixels (25 MB) of any image; of a larger one, as many as that has.
RESIZED_PIXELS = 2**23
_SUPPORT = 3  # source pixels on each side, at most, that a filter (Lanczos) reads when it enlarges

_ORIENTATION = 0x0112  # EXIF's tag
_TIFF_WIDTH, _TIFF_HEIGHT, _BITS_PER_SAMPLE = 256, 257, 258  # TIFF's
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = 100_000  # of a file, beyond which they are not looked through; with 8 KiB each, 0.8 GB
_SMALLEST_FILE = 24  # bytes; anything smaller is not an image, even if it is valid base64
_RESCALE = "pass integers of 0..255 or 0..65535, or floats of 0..1 or 0..255"


class ImageError(ValueError):
    """An image that is refused.

    Attributes:
        words: what is wrong and what to do, without the image's name: a message for the sender of the image, which reveals
            nothing of this machine.
    """

    words: str = ""


class Refused(Exception):
    """Why an image or a video is refused; its name is added later."""

    def __init__(self, detail: str, remedy: str, words: str | None = None) -> None:
        super().__init__(detail)
        self.detail, self.remedy = detail, remedy
        self.words = words or f"cannot be decoded: {detail}; {remedy}"

    def of(self, name: str) -> ImageError:
        """The error for an image of this name."""
        error = ImageError(f"The image {name} cannot be decoded: {self.detail}; {self.remedy}.")
        error.words = self.words
        return error


def read_image(
    source: Any,
    *,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    input_data_format: str | None = None,
    allow_urls: bool = True,
) -> "Image.Image":
    """Read an image in any form as upright 8-bit RGB.

    The first frame of a file is read, EXIF's rotation is applied, and transparent pixels are blended with white. The data
    type decides the grey levels, and if it is ambiguous, the range of the values:

    - bool: black and white;
    - 8 bits: as they are; 16 bits unsigned, and the 16-bit greys of PNG, PPM and TIFF: their whole range becomes 0..255;
    - other integers: as they are if all lie in 0..255, as 16 bits if all lie in 0..65535;
    - floats: 0..1 becomes 0..255 if all lie in 0..1, and they are rounded if all lie in 0..255 and one is at
      least 2.

    Args:
        source: one of
            - a PIL image;
            - a file: its path (`str` or `os.PathLike`), its bytes, an object to read bytes from such as `io.BytesIO`, or
              `{"bytes", "path"}` as `datasets` stores it;
            - text: an http(s) or file URL, a data URL, or base64;
            - a `VideoFrame` (`video_reading_dsvl.py`);
            - an array or tensor of shape (height, width), (height, width, channels) or (channels, height, width) with 1
              (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels. Where both ends of a shape could be the channels, 3 or 4
              are preferred to 1 or 2.
        formats: Pillow's names of the file formats that are read.
        max_pixels: of the largest image.
        input_data_format: "channels_first" or "channels_last", for arrays whose shape is ambiguous.
        allow_urls: whether http(s) URLs are fetched and file URLs opened.

    Returns:
        A PIL image of mode RGB; the given one itself if it is upright RGB already.

    Raises:
        ImageError: (a `ValueError`) naming the source, the reason and the remedy: for what is not an image, is broken, of
            another format, without pixels or of too many, or has ambiguous values.
    """
    requires_backends(read_image, ["vision"])
    if hasattr(source, "read_frame"):  # of a video, which has limits of its own
        return source.read_frame()
    try:
        return _read(source, formats, max_pixels, input_data_format, allow_urls)
    except Refused as refused:
        raise refused.of(source_name(source)) from refused.__cause__


def image_size(
    source: Any, max_pixels: int = MAX_PIXELS, allow_urls: bool = True, formats: Sequence[str] = FORMATS
) -> tuple[int, int]:
    """(width, height) of an image as `read_image` makes it, in pixels. Of a file only the header is read, not the pixels.

    Args:
        source, max_pixels, allow_urls, formats: as for `read_image`.

    Raises:
        ImageError: if by its header alone `read_image` would refuse it.
    """
    requires_backends(image_size, ["vision"])
    if hasattr(source, "read_frame"):  # only its pixels tell how it is turned
        return source.read_frame().size
    try:
        return _upright_size(source, max_pixels, allow_urls, formats)
    except Refused as refused:
        raise refused.of(source_name(source)) from refused.__cause__


def _upright_size(source: Any, max_pixels: int, allow_urls: bool, formats: Sequence[str]) -> tuple[int, int]:
    source = _source(source, allow_urls)
    if hasattr(source, "__array__") and not isinstance(source, Image.Image) or isinstance(source, torch.Tensor):
        return _read(source, formats, max_pixels, None, allow_urls).size
    if isinstance(source, Image.Image):
        return _turned_size(source)
    if isinstance(source, os.PathLike):
        with open_file(source) as file:
            return _turned_size(_opened(file, formats, max_pixels))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _turned_size(_opened(io.BytesIO(source), formats, max_pixels))
    if hasattr(source, "read") and hasattr(source, "seek") and not isinstance(source, io.TextIOBase):
        start = source.tell()
        size = _turned_size(_opened(source, formats, max_pixels))
        source.seek(start)
        return size
    return _read(source, formats, max_pixels, None, allow_urls).size


def _turned_size(image: "Image.Image") -> tuple[int, int]:
    """The upright (width, height) of an opened image."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]) if _TIFF_HEIGHT in tags else image.size
    try:
        # Of a PNG it decodes the image if there is none in front of the pixels.
        exif = Image.Image.getexif(image) if image.format == "PNG" and not _speaks_after_pixels(image) else image.getexif()
        turned = exif.get(_ORIENTATION, 1) >= 5
    except Exception:  # a broken header can make Pillow's readers raise anything; reading the pixels will say so
        turned = False
    return (height, width) if turned else (width, height)


def _speaks_after_pixels(image: "Image.Image") -> bool:
    """Whether a PNG file has texts or EXIF behind its pixels, or so many chunks that it may. Their contents are skipped."""
    file = getattr(image, "fp", None)
    if file is None:  # it is decoded already
        return False
    start = file.tell()
    try:
        file.seek(len(_PNG))
        seen_pixels, chunks = False, 0
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            chunks += 1
            if chunks > _PNG_CHUNKS or seen_pixels and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            seen_pixels = seen_pixels or head[4:] == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
        return False
    finally:
        file.seek(start)


def file_of(source: Any) -> Any:
    """The bytes or the path of an image that `datasets` stores as `{"bytes", "path"}`; other sources unchanged.

    Raises:
        ValueError: if it holds neither.
    """
    if not isinstance(source, dict):
        return source
    if strange := sorted(map(str, set(source) - {"bytes", "path"})):
        raise ValueError(f"A stored image has the keys bytes and path; got {', '.join(strange)}.")
    held = source.get("bytes") if source.get("bytes") is not None else source.get("path")
    if held is None:
        raise ValueError("A stored image has neither bytes nor a path; pass one of them.")
    return held


# -- sources -------------------------------------------------------------------------------------------------------------


def _read(
    source: Any, formats: Sequence[str], max_pixels: int, input_data_format: str | None, allow_urls: bool
) -> "Image.Image":
    source = _source(source, allow_urls)
    if isinstance(source, Image.Image):
        # Loading a file that the caller has only opened is reading it.
        if (getattr(source, "tile", None) or isinstance(source, ImageFile.StubImageFile)) and source.format not in formats:
            raise _other_format(source.format, formats)
        return _to_rgb(source, max_pixels)
    if isinstance(source, (torch.Tensor, np.ndarray)) or hasattr(source, "__array__"):
        return _to_rgb(_from_array(source, max_pixels, input_data_format), max_pixels)
    if isinstance(source, os.PathLike):
        with open_file(source) as file:
            return _to_rgb(_opened(file, formats, max_pixels), max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _to_rgb(_opened(io.BytesIO(source), formats, max_pixels), max_pixels)
    if hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        return _to_rgb(_opened(source, formats, max_pixels), max_pixels)
    raise Refused(
        "it is a text file" if isinstance(source, io.TextIOBase) else f"it is of type {type(source).__name__}",
        "pass a PIL image, an array of shape (height, width, 3), an image file's path or bytes, or a file in binary mode",
    )


def _source(source: Any, allow_urls: bool) -> Any:
    """What a stored image or a text stands for; anything else unchanged."""
    if isinstance(source, dict):
        try:
            source = file_of(source)
        except ValueError as error:
            raise Refused(str(error).rstrip("."), 'pass {"bytes": ..., "path": ...}') from error
    return resolve_text(source, allow_urls) if isinstance(source, str) else source


def resolve_text(text: str, allow_urls: bool, kind: str = "image", max_bytes: int = MAX_BYTES) -> Any:
    """A path, or the bytes that a URL or base64 stands for.

    Args:
        kind: what it is, for messages: "image" or "video".
        max_bytes: of a file that is fetched.
    """
    scheme = text.partition(":")[0].lower() if "://" in text[:10] else ""
    if text[:5].lower() == "data:":
        head, comma, data = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            example = {"image": "image/png", "video": "video/mp4"}[kind]
            raise Refused("it is not a base64 data URL", f"pass data:{example};base64,...")
        decoded = _from_base64(data)
        if decoded is None:
            raise Refused("its base64 is not valid", "encode its file's bytes")
        return decoded
    if scheme in ("http", "https", "file") and not allow_urls:
        raise Refused("it is an address, and fetching is not allowed here", "pass a file")
    if scheme in ("http", "https"):
        return _fetch(text, max_bytes)
    if scheme == "file":
        return Path(url2pathname(urlsplit(text).path))
    if os.path.isfile(text):
        return Path(text)
    decoded = _from_base64(text)
    if decoded is None or len(decoded) < _SMALLEST_FILE:
        raise Refused(f"it is not a file, an address or base64 of {kind} data", f"pass the path of an existing {kind} file")
    return decoded


def _from_base64(text: str) -> bytes | None:
    """Decoded; None if it is not base64. Lines may be broken anywhere."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _fetch(url: str, max_bytes: int) -> bytes:
    # Not by the Hub's HTTP client, whose library has changed its name.
    request = Request(url, headers={"User-Agent": "dsvl"})
    try:
        with urlopen(request, timeout=FETCH_SECONDS) as response:
            body = response.read(max_bytes + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise Refused(f"it was not fetched ({error})", "pass an address that answers, or a file") from error
    if len(body) > max_bytes:
        raise Refused(f"it is larger than {max_bytes:,} bytes", "pass a smaller file")
    return bytes(body)


def open_file(path: str | os.PathLike, kind: str = "image") -> BinaryIO:
    """Open an image or video file for reading bytes."""
    if not os.path.isfile(path):  # nor is a pipe or a device opened, which may never end
        raise Refused("it does not exist, or is not a file", f"pass the path of an existing {kind} file")
    try:
        return open(path, "rb")
    except OSError as error:
        raise Refused(f"its file cannot be opened ({error.strerror})", "make it readable") from error


def source_name(source: Any) -> str:
    """How a message calls an image or a video: by what finds it again, and never by its content."""
    if isinstance(source, dict):
        source = next((source[key] for key in ("path", "bytes") if source.get(key) is not None), source)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"of {len(source)} bytes"
    if isinstance(source, str):
        short = len(source) < 300 and source[:5].lower() != "data:"
        return source if short else f"given as {len(source):,} characters"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or f"of mode {source.mode}"
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return f"of shape {tuple(source.shape)} and type {source.dtype}"
    return type(source).__name__


# -- files ---------------------------------------------------------------------------------------------------------------


def _opened(file: BinaryIO, formats: Sequence[str], max_pixels: int) -> "Image.Image":
    """A file's header; its pixels are not decoded yet."""
    Image.init()
    try:
        image = Image.open(file, formats=[name for name in formats if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("too many", max_pixels) from error
    except MemoryError:
        raise
    except Exception as error:  # a broken header can make Pillow's readers raise anything
        raise _unknown_format(file, formats) from error
    _check_size(image.width, image.height, max_pixels)
    return image


def _unknown_format(file: BinaryIO, formats: Sequence[str]) -> Refused:
    """The error for a file that is none of these formats, by its first bytes."""
    try:
        file.seek(0)
        start = file.read(32).ljust(32, b"\0")
    except (OSError, ValueError):  # it cannot be read a second time
        start = bytes(32)
    if start.startswith(_PNG) and "PNG" in formats:
        width, height = struct.unpack(">II", start[16:24])
        if not width or not height:
            return _without_pixels(width, height)
    for name, (_, accepts) in sorted(Image.OPEN.items()):
        if name not in formats and accepts is not None and accepts(start) is True:
            return _other_format(name, formats)
    remedy = f"pass one of {', '.join(formats)}, unbroken"
    return Refused("cannot identify its format", remedy, f"cannot be read; {remedy}")


def _other_format(name: str | None, formats: Sequence[str]) -> Refused:
    remedy = f"pass one of {', '.join(formats)}"
    return Refused(f"its format is {name}", remedy, f"cannot be read: its format is {name}; {remedy}")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise _without_pixels(width, height)
    if width * height > max_pixels:
        raise _too_large(f"{width} x {height}", max_pixels)


def _without_pixels(width: int, height: int) -> Refused:
    remedy = "pass one with at least one pixel"
    return Refused(f"it has {width} x {height} pixels", remedy, f"has {width} x {height} pixels; {remedy}")


def _too_large(pixels: str, max_pixels: int) -> Refused:
    remedy = f"at most {max_pixels:,} are taken, make it smaller"
    return Refused(f"it has {pixels} pixels", remedy, f"has {pixels} pixels; {remedy}")


# -- pixels --------------------------------------------------------------------------------------------------------------


def _to_rgb(image: "Image.Image", max_pixels: int) -> "Image.Image":
    """Decode an opened image, and make it upright RGB."""
    _check_size(image.width, image.height, max_pixels)
    try:
        image.load()
        # After loading: Pillow turns a TIFF by itself then, and says so here.
        orientation = image.getexif().get(_ORIENTATION, 1)
        upright = _to_mode_rgb(image)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # a broken file can make Pillow's readers raise anything
        raise Refused(
            str(error) or type(error).__name__,
            "its file may be cut or broken, pass it whole",
            "cannot be decoded; its file may be cut or broken, pass it whole",
        ) from error
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    if orientation in turns:
        upright = upright.transpose(turns[orientation])
    if upright is not image:
        upright.info = {}  # what it says of rotation and transparency has been done
    return upright


def _to_mode_rgb(image: "Image.Image") -> "Image.Image":
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        # Of a TIFF's 12 bits Pillow makes 16 without scaling them.
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        return _from_greys(_scaled(np.asarray(image), 2**bits - 1), image)
    if image.mode == "I":
        # PNG and PPM have no more than 16 bits, which Pillow may give as 32.
        greys = np.asarray(image)
        return _from_greys(_scaled(greys, 65535) if image.format in ("PNG", "PPM") else _to_bytes(greys), image)
    if image.mode == "F":
        return _from_greys(_to_bytes(np.asarray(image)), image)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_greys(greys: np.ndarray, image: "Image.Image") -> "Image.Image":
    """RGB of an image's grey levels in 8 bits, white where the image is transparent."""
    clear = image.info.get("transparency")  # one of its own grey levels
    if isinstance(clear, int):
        greys = np.where(np.asarray(image) == clear, np.uint8(255), greys)
    return Image.fromarray(greys).convert("RGB")


def _from_array(source: Any, max_pixels: int, input_data_format: str | None) -> "Image.Image":
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    try:
        array = np.asarray(source)
    except Exception as error:  # a type of the caller's can raise anything
        raise Refused(f"it does not give an array ({error})", "pass a NumPy array") from error
    array = _channels_last(array, input_data_format)
    _check_size(array.shape[1], array.shape[0], max_pixels)
    array = np.ascontiguousarray(_to_bytes(array))
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """An image of any layout as (height, width, channels)."""
    if array.ndim == 2:
        return array[..., None]
    expected = "pass (height, width), (height, width, channels) or (channels, height, width) with 1 to 4 channels"
    if array.ndim != 3:
        raise Refused(f"it has {array.ndim} dimensions", f"{expected}, and several images as a list")
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise Refused(f"input_data_format={input_data_format!r} is not known", "pass 'channels_first' or 'channels_last'")
    ends = {"channels_first": array.shape[0], "channels_last": array.shape[2]}
    possible = [name for name, channels in ends.items() if 1 <= channels <= 4 and input_data_format in (None, name)]
    if len(possible) == 2:
        possible = [name for name in possible if ends[name] >= 3] or possible
    if not possible:
        raise Refused(f"its shape {array.shape} has no channels", expected)
    if len(possible) == 2 and array.shape != (1, 1, 1):
        raise Refused(f"its shape {array.shape} may have its channels first or last", "pass input_data_format=")
    return array if possible[0] == "channels_last" else np.moveaxis(array, 0, -1)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Grey levels of any type as 8 bits; see `read_image` for the rule."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint16:
        return _scaled(values, 65535)
    if kind not in "iuf":
        raise Refused(f"its values are of type {values.dtype}", _RESCALE)
    low, high = values.min(), values.max()
    if kind in "iu" and low >= 0 and high <= 65535:
        return values.astype(np.uint8) if high <= 255 else _scaled(values, 65535)
    # Half a level beyond the ends still rounds to them.
    if kind == "f" and low >= -0.5 / 255 and high <= 1 + 0.5 / 255:
        return _rounded(values, 255)
    if kind == "f" and low >= -0.5 and 2 <= high <= 255.5:
        if values.ndim == 3 and values.shape[2] in (2, 4) and 0 < values[..., -1].max() <= 1:
            raise Refused(f"its values go up to {high:g} and its alpha to {values[..., -1].max():g}", _RESCALE)
        return _rounded(values, 1)
    features = ", or what a vision tower gave as image_features=" if values.ndim == 3 and values.shape[2] == 1 else ""
    raise Refused(f"its values lie between {low:g} and {high:g}, which are not grey levels", _RESCALE + features)


def _scaled(values: np.ndarray, largest: int) -> np.ndarray:
    """Integers of 0..largest as 0..255."""
    if values.max() > largest or values.min() < 0:
        raise Refused(f"its values lie between {values.min()} and {values.max()}", f"expected 0 to {largest}")
    if largest == 65535:  # in the type's own width: 65535 is 255 times 257
        return (values // 257).astype(np.uint8)
    return (values.astype(np.uint32) * 255 // largest).astype(np.uint8)


def _rounded(values: np.ndarray, factor: int) -> np.ndarray:
    values = values.astype(np.float32) * factor
    return np.clip(np.rint(values, out=values), 0, 255, out=values).astype(np.uint8)


# -- thin images -----------------------------------------------------------------------------------------------------------


def fit_thin_image(image: "Image.Image", image_processor: Any, **kwargs: Any) -> "Image.Image":
    """Replace a thin image by its resized middle, so that the image processor needs no more memory than for other images.

    An image processor that resizes the shorter edge makes 224 x 224 N pixels of 1 x N, and keeps the 224 x 224 in the middle
    (CLIP's). Here the middle alone is resized, with a small margin, so that the image processor resizes nothing more and
    crops the same pixels. Where N is not an integer they may differ by one grey level, as Pillow rounds the box to 32-bit
    floats.

    Args:
        image: of mode RGB. Returned unchanged if the image processor makes at most `RESIZED_PIXELS` of it, or no more than
            it has.
        image_processor: the one that will process it.
        kwargs: the arguments of its call, such as `size`, which override its own settings.

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
        largest, made = max(RESIZED_PIXELS, short * long), (edge or short) * resized
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
    # The same middle; where `resized` was not rounded, its ends lie between two source pixels, which a float holds exactly.
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
    return part.resize(shape, pillow_filter(settings["resample"]), box=box)


def _sides(size: Any, default_to_square: bool) -> dict[str, int]:
    """A size in any of the forms that transformers takes, by the names of its sides."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"height": size, "width": size} if default_to_square else {"shortest_edge": size}
    if isinstance(size, (list, tuple)):
        return dict(zip(("height", "width"), size, strict=True))
    return {name: side for name, side in dict(size).items() if side is not None}


def pillow_filter(resample: Any) -> "Image.Resampling":
    """Pillow's filter by its number, or by the name that torchvision has for it."""
    if resample is None:
        return Image.Resampling.BILINEAR
    return Image.Resampling(resample) if isinstance(resample, int) else Image.Resampling[str(resample.value).upper()]


def tower_size(image_processor: Any) -> tuple[int, "Image.Resampling"]:
    """The shorter side, in pixels, to which an image processor brings images (448 if unknown), and its filter."""
    size = _sides(getattr(image_processor, "size", None), True)
    edge = size.get("shortest_edge") or max(size.get("height", 0), size.get("width", 0)) or size.get("longest_edge")
    return edge or 448, pillow_filter(getattr(image_processor, "resample", None))
