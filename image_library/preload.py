"""Filling an image library before the first request."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..utils.image_loading import ImageReadError, decode_image_file
from .library import ImageLibrary

FLUSH = 8  # images, after which it waits until they are written
NAMED = 5  # unreadable files that the error names


def image_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files of paths: files, and all files in directories and below, except hidden ones.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: for a directory without files.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{str(path)!r} does not exist; pass image files, or directories of them.")
        found = [path]
        if path.is_dir():
            names = sorted(path.rglob("*"))
            found = [name for name in names if name.is_file() and not _is_hidden(name.relative_to(path))]
            if not found:
                raise ValueError(f"{str(path)!r} holds no files; pass image files, or directories of them.")
        files += found
    return list(dict.fromkeys(files))


def preload(
    library: ImageLibrary,
    model: Any,
    processor: Any,
    files: Iterable[Path],
    source_of: Callable[[bytes], str],
    max_pixels: int,
    formats: tuple[str, ...],
) -> tuple[int, int]:
    """Encode image files, with a progress bar. In models with `numbered_images`, each as the first image of a conversation.

    Args:
        library: where to.
        model: the model.
        processor: its `DSVLProcessor`.
        files: the image files.
        source_of: names a file's content, see `ImageLibrary.find`.
        max_pixels: of an image.
        formats: Pillow's names of the accepted formats.

    Returns:
        How many of them the library keeps, and how many there are.

    Raises:
        ValueError: naming the files that cannot be read.
    """
    unreadable: list[str] = []
    sources: list[str] = []
    for file in tqdm(list(files), desc="Preloading images", unit="image", disable=None):
        data = file.read_bytes()
        try:
            image = decode_image_file(data, max_pixels, formats)
        except ImageReadError as error:
            unreadable.append(f"{file} {error}")
            continue
        if unreadable:  # the others are only checked
            continue
        inputs = dict(processor(images=[image], return_tensors="pt"))
        sources.append(source_of(data))
        library.add(model, inputs, processor.tile_lengths(image.height, image.width), sources[-1])
        if len(sources) % FLUSH == 0:
            library.tiers.flush()
    if unreadable:
        more = f", and {len(unreadable) - NAMED} more" if len(unreadable) > NAMED else ""
        raise ValueError(
            f"These files cannot be preloaded: {'; '.join(unreadable[:NAMED])}{more}. Remove them, or pass others."
        )
    library.tiers.flush()
    return sum(library.find(source, 1) is not None for source in sources), len(sources)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


__all__ = ["image_files", "preload"]
