"""Image layouts: how an image of any size becomes tiles, each an ordinary input of the vision tower.

`"pad"` puts the whole image on a square of the mean colour. `"tiles"` adds the parts of a grid that keeps more of its
pixels; short texts behind the tiles say what each is, as image tokens cannot see text, but text behind them can see both.
`"native"` resizes the image to whole patches, for towers that take any shape. (`"crop"` is the tower's own image processor
alone.)
"""

import math
from dataclasses import dataclass
from typing import Any

try:
    from PIL import Image
except ImportError:  # not needed for text alone
    Image = None  # type: ignore[assignment]

# Arguments of image processors that a layout decides.
DECIDED = ("do_resize", "size", "do_center_crop", "crop_size", "do_pad", "pad_size", "max_num_patches", "patch_size")

# In `Image.info`: the image is a frame of a video, which is one tile.
FRAME = "dsvl_frame"


@dataclass(frozen=True)
class ImageLayout:
    """What a layout makes of images.

    Attributes:
        name: "pad", "tiles" or "native".
        side: of a tile, in pixels; for "native" that of the square of patches that becomes a token.
        max_tiles: parts of the grid, at most.
        max_tokens: of a native image, at most.
    """

    name: str
    side: int
    max_tiles: int
    max_tokens: int

    def grid(self, height: int, width: int, is_frame: bool = False) -> tuple[int, int]:
        """Rows and columns of an image of this size: of its tiles; of a native image, of its tokens.

        (1, 1) is a tile that holds the whole image.
        """
        if self.name == "native":
            height, width = native_size(height, width, self.side, self.max_tokens)
            return height // self.side, width // self.side
        return best_grid(height, width, self.side, self.max_tiles) if self.name == "tiles" and not is_frame else (1, 1)

    def num_tiles(self, rows: int, columns: int) -> int:
        """How many inputs of the tower an image of such a grid has."""
        return 1 if self.name != "tiles" or (rows, columns) == (1, 1) else 1 + rows * columns

    def tiles(self, image: "Image.Image", colour: tuple[int, int, int], resample: int) -> list["Image.Image"]:
        """The tiles of an image: the whole image first, then the parts of the grid, row by row.

        Args:
            image: of mode RGB.
            colour: of the borders.
            resample: Pillow's filter.
        """
        rows, columns = self.grid(image.height, image.width, is_frame=bool(image.info.get(FRAME)))
        side = self.side
        if self.name == "native":
            return [_resized(image, (columns * side, rows * side), resample)]
        tiles = [letterbox(image, (side, side), colour, resample)]
        if (rows, columns) != (1, 1):
            whole = letterbox(image, (columns * side, rows * side), colour, resample)
            tiles += [
                whole.crop((left * side, top * side, (left + 1) * side, (top + 1) * side))
                for top in range(rows)
                for left in range(columns)
            ]
        return tiles

    def text(self, tile: str, rows: int, columns: int) -> str:
        """The text of an image in a prompt.

        Args:
            tile: what stands for a tile.
            rows, columns: of its grid.
        """
        if self.name == "native" or (rows, columns) == (1, 1):
            return tile
        places = [f"row {row} column {column}" for row in range(1, rows + 1) for column in range(1, columns + 1)]
        return "\n".join(tile + place for place in ["whole", *places])


def best_grid(height: int, width: int, side: int, max_tiles: int) -> tuple[int, int]:
    """The grid (rows, columns) of at most `max_tiles` square tiles that keeps most pixels of an image; of several, the one
    of the fewest tiles, and then the squarest.

    An image is scaled to fit into the grid, its aspect ratio kept; pixels that enlarging adds do not count.
    """
    best, best_key = (1, 1), (-1.0, 0, 0)
    for rows in range(1, max_tiles + 1):
        for columns in range(1, max_tiles // rows + 1):
            scale = min(1.0, rows * side / height, columns * side / width)
            key = (scale, -rows * columns, -abs(rows - columns))
            if key > best_key:
                best, best_key = (rows, columns), key
    return best


def native_size(height: int, width: int, side: int, max_tokens: int) -> tuple[int, int]:
    """The largest size (height, width) of whole squares, at most `max_tokens` of them, that about keeps the aspect ratio:
    SigLIP 2's (arXiv 2502.14786), to the pixel as in transformers, whose module needs Pillow to be imported."""

    def grid(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(length * scale / side)) for length in (height, width))
        return rows, columns

    tolerance = 1e-5
    low, high = tolerance / 10, 100.0
    while high - low >= tolerance:
        middle = (low + high) / 2
        rows, columns = grid(middle)
        low, high = (middle, high) if rows * columns <= max_tokens else (low, middle)
    rows, columns = grid(low)
    return rows * side, columns * side


def letterbox(image: "Image.Image", size: tuple[int, int], colour: tuple[int, int, int], resample: int) -> "Image.Image":
    """An image scaled to fit into `size` (width, height), in the middle of a canvas of one colour; nothing is cut off."""
    width, height = size
    scale = min(width / image.width, height / image.height)
    # At least one pixel, and not one too many by rounding.
    fitted = (
        min(width, max(1, round(image.width * scale))),
        min(height, max(1, round(image.height * scale))),
    )
    scaled = _resized(image, fitted, resample)
    if fitted == size:
        return scaled
    canvas = Image.new("RGB", size, colour)
    canvas.paste(scaled, ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    return canvas


def mean_colour(image_processor: Any) -> tuple[int, int, int]:
    """The colour that an image processor normalizes to 0, in 8 bits; black if it does not normalize."""
    mean = getattr(image_processor, "image_mean", None)
    if mean is None or getattr(image_processor, "do_normalize", True) is False:
        return (0, 0, 0)
    mean = [mean] * 3 if isinstance(mean, (int, float)) else mean
    red, green, blue = (min(255, max(0, round(255 * channel))) for channel in mean)
    return red, green, blue


def _resized(image: "Image.Image", size: tuple[int, int], resample: int) -> "Image.Image":
    return image if image.size == size else image.resize(size, resample)


__all__ = ["ImageLayout", "best_grid", "letterbox", "mean_colour", "native_size"]
