"""The flags of commands that use an image library, and the library that they ask for."""

import argparse
from typing import TYPE_CHECKING, Any

from ..utils.byte_sizes import available_host_memory, format_size, parse_size

if TYPE_CHECKING:
    from .library import ImageLibrary

DEFAULT_BYTES = 8 * 2**30
DEFAULT_SHARE = 4  # at most a quarter of the available memory


def add_library_arguments(parser: argparse.ArgumentParser, default: str) -> argparse._ArgumentGroup:
    """Add the arguments of `make_library`; returns their group.

    Args:
        parser: the command's parser.
        default: "on", for `DEFAULT_BYTES`, or "off".
    """
    said = "8GiB, or a quarter of the available memory if that is less" if default == "on" else "off"
    group = parser.add_argument_group("image library: images are computed once, and kept for all conversations")
    group.add_argument(
        "--image-cache",
        type=library_size,
        metavar="SIZE|off",
        default=None if default == "on" else 0,
        help="main memory for images, such as 8GiB, and on a GPU a quarter of it in addition, of the GPU's memory; "
        f"or off (default: {said})",
    )
    group.add_argument(
        "--image-cache-dir",
        metavar="DIR",
        help="also keep images in this directory, in up to ten times as many bytes; several processes may share it",
    )
    group.add_argument(
        "--image-cache-bits", type=int, choices=(8, 16), help="8: half the memory, slightly different answers (default 16)"
    )
    return group


def library_size(text: str) -> int:
    """The value of `--image-cache` in bytes; 0 for "off"."""
    if text == "off":
        return 0
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{str(error).rstrip('.')}, or off") from None
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds no image; pass more, or off")
    return size


def make_library(arguments: argparse.Namespace, model: Any) -> "ImageLibrary | None":
    """The library that a command's arguments ask for; None if it is off.

    Raises:
        ValueError: if it is larger than the available memory, or arguments without effect are given.
    """
    size, available = arguments.image_cache, available_host_memory()
    if size == 0:
        given = {
            "--image-cache-dir": arguments.image_cache_dir,
            "--image-cache-bits": arguments.image_cache_bits,
            "--preload": getattr(arguments, "preload", None),
        }
        without = [flag for flag, value in given.items() if value]
        if without:
            raise ValueError(f"{', '.join(without)} without an image library has no effect; pass --image-cache 8GiB too.")
        return None
    if size is None:
        size = min(DEFAULT_BYTES, available // DEFAULT_SHARE)
    if size > available:
        raise ValueError(
            f"--image-cache is {format_size(size)}, but only {format_size(available)} of main memory are available; pass "
            "less."
        )
    from .library import ImageLibrary

    return ImageLibrary(model, size, directory=arguments.image_cache_dir, quantize=arguments.image_cache_bits == 8)


__all__ = ["add_library_arguments", "library_size", "make_library"]
