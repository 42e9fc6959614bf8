"""A complete checkpoint directory, or none."""

import shutil
import tempfile
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

    Returns:
        The directory.

    Raises:
        FileExistsError: if there is something there.
    """
    target = Path(directory).absolute()
    check_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        processor.save_pretrained(partial)
        card = render_card(model.config, base_models or [], origin=origin, untrained=untrained)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp's is private
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:  # an interrupt too: nothing half-written stays behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def check_new(directory: str | Path) -> None:
    """Refuse a directory that holds anything."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty; remove it or choose another directory.")
