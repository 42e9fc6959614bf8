"""A complete checkpoint directory, or none."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..hub_card import render_card
from ..modeling_dsvl import DSVLForConditionalGeneration


def save_checkpoint(
    model: DSVLForConditionalGeneration,
    processor: Any,
    directory: str | Path,
    *,
    base_models: list[str] | None = None,
    origin: str | None = None,
    untrained: bool = False,
    max_shard_size: str = "5GB",
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write weights, configuration, processor, chat template, remote code and model card to a new directory.

    Everything is written beside the directory first and moved there when it is complete, so that an interrupted call
    leaves nothing that looks like a checkpoint.

    Args:
        model: the model to save.
        processor: its `DSVLProcessor`.
        directory: where; it must not exist, or be empty.
        base_models: names or directories of the models it was made of, for the card.
        origin: for the card, where the weights are from if they were neither composed nor trained here; see `render_card`.
        untrained: for the card, whether the projector is fresh.
        max_shard_size: of one safetensors file.
        write_more: writes what else belongs into the directory that it is given.

    Returns:
        The directory.

    Raises:
        FileExistsError: if there is something there.
        PermissionError: if it cannot be written.
    """
    with new_directory(directory) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        processor.save_pretrained(partial)
        card = render_card(model.config, base_models or [], origin=origin, untrained=untrained)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if write_more is not None:
            write_more(partial)
    return Path(directory).absolute()


@contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """A directory beside `directory`, which takes its place when the block ends, and is gone if it fails."""
    target = Path(directory).absolute()
    check_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's is private
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:  # an interrupt too: nothing half-written stays behind
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_new(directory: str | Path) -> None:
    """Refuse a directory that holds anything, or cannot be written."""
    directory = Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty; remove it or choose another directory.")
    parent = next(parent for parent in directory.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{directory} cannot be written, as {parent} does not allow it; choose another directory.")
