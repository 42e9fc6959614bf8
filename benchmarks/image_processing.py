"""Images per second of image processing on a CPU: DSVL's layouts beside transformers' LLaVA-NeXT and SmolVLM (Idefics 3).

    python benchmarks/image_processing.py [--rounds 5] [--size 384] [--max-tiles 9] [--scale 1.0] [--out FILE]

All make model inputs of the same photographs (scikit-image's and scikit-learn's), with tiles of the same size and filter and
about as many of them, by the same backend: Pillow, or torchvision where it is installed (`--backend`). LLaVA-NeXT chooses
among grids of up to `--max-tiles` tiles, as DSVL does; SmolVLM scales the longer edge to as many tiles as the square root of
`--max-tiles`, so that it makes at most so many. The table also has DSVL's layouts of one tile for an image ("crop", "pad")
and native images. `tiles_per_second` compares what is made, as the numbers of tiles differ a little. Measurements are
interleaved.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import measure
import transformers
from PIL import Image

from dsvl import DSVLProcessor
from dsvl.demo.photographs import photographs
from dsvl.demo.tiny_models import train_tokenizer

BACKENDS = ("pil", "torchvision")
NATIVE_PATCH, NATIVE_TOKENS = 16, 576  # as many patches as a tile of 384 pixels has


def image_processor(name: str, backend: str, **options: Any) -> Any:
    """An image processor of transformers in the form of a backend."""
    return getattr(transformers, f"{name}ImageProcessor{'Pil' if backend == 'pil' else ''}")(**options)


def grids(size: int, max_tiles: int) -> list[list[int]]:
    """The (height, width) in pixels of all grids of 2 to `max_tiles` tiles."""
    sides = range(1, max_tiles + 1)
    return [[size * rows, size * columns] for rows in sides for columns in sides if 1 < rows * columns <= max_tiles]


def ours(layout: str, size: int, max_tiles: int, backend: str) -> Callable[[list[Image.Image]], tuple[Any, int]]:
    """A function from images to DSVL's model inputs and their number of tiles."""
    if layout == "native":
        tower = image_processor("Siglip2", backend, patch_size=NATIVE_PATCH)
        arguments: dict[str, Any] = {"tile_size": NATIVE_PATCH, "max_image_tokens": NATIVE_TOKENS, "fixed_length": False}
    else:
        tower = image_processor("CLIP", backend, size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        arguments = {"tile_size": size, "max_tiles": max_tiles}
    processor = DSVLProcessor(tower, train_tokenizer(["none"]), image_layout=layout, **arguments)

    def run(images: list[Image.Image]) -> tuple[Any, int]:
        made = processor(images=images, return_tensors="pt")
        return made, len(made["pixel_values"])

    return run


def theirs(name: str, size: int, max_tiles: int, backend: str) -> Callable[[list[Image.Image]], tuple[Any, int]]:
    """The same of transformers' image processors."""
    bicubic = Image.Resampling.BICUBIC
    if name == "LlavaNext":
        side = {"height": size, "width": size}
        pinpoints = grids(size, max_tiles)
        processor = image_processor(
            name, backend, size={"shortest_edge": size}, crop_size=side, image_grid_pinpoints=pinpoints, resample=bicubic
        )
    else:
        longest = size * math.isqrt(max_tiles)
        processor = image_processor(
            name,
            backend,
            size={"longest_edge": longest},
            max_image_size={"longest_edge": size},
            resample=bicubic,
            return_row_col_info=True,
        )

    def run(images: list[Image.Image]) -> tuple[Any, int]:
        if name == "LlavaNext":
            made = processor(images, return_tensors="pt")
            tiles = len(made["pixel_values"].flatten(0, 1))
        else:
            made = processor([images], return_tensors="pt")
            tiles = sum(max(1, 1 + r * c) if r else 1 for r, c in zip(made["rows"][0], made["cols"][0], strict=True))
        return made, tiles

    return run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--size", type=int, default=384, help="side of a tile, in pixels (default 384)")
    parser.add_argument("--max-tiles", type=int, default=9, help="tiles of a grid, at most (default 9)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the photographs' sides (default 1)")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="torchvision" if transformers.utils.is_torchvision_available() else "pil",
        help="of all image processors (default: torchvision if it is installed)",
    )
    parser.add_argument("--out", metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(argv)

    images = [
        image.resize((max(1, round(image.width * options.scale)), max(1, round(image.height * options.scale))))
        for image in photographs().values()
    ]
    arguments = (options.size, options.max_tiles, options.backend)
    runs = {
        "LLaVA-NeXT": theirs("LlavaNext", *arguments),
        "SmolVLM (Idefics 3)": theirs("Idefics3", *arguments),
        **{f"DSVL {layout}": ours(layout, *arguments) for layout in ("tiles", "crop", "pad", "native")},
    }
    tiles = {name: run(images)[1] for name, run in runs.items()}
    table = measure.time_interleaved(
        {name: lambda run=run: run(images) for name, run in runs.items()}, options.rounds, 1, measure.host_ms
    )
    sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
    print(f"{measure.describe_device()}, {options.backend}; {len(images)} images of {sizes}")
    print(f"{'':24}{'ms':>9}{'tiles':>7}{'images/s':>10}{'tiles/s':>9}")
    for name, figures in table.items():
        seconds = figures["ms"] / 1000
        figures |= {
            "tiles": tiles[name],
            "images_per_second": len(images) / seconds,
            "tiles_per_second": tiles[name] / seconds,
        }
        print(
            f"{name:24}{figures['ms']:9.1f}{tiles[name]:7}{figures['images_per_second']:10.1f}"
            f"{figures['tiles_per_second']:9.1f}"
        )
    measure.write(options.out, options, table)


if __name__ == "__main__":
    main()
