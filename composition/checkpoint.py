"""A complete checkpoint directory, or none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hub_card import render_card
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..utils.atomic_files import atomic_directory


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
    with atomic_directory(directory) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        processor.save_pretrained(partial)
        card = render_card(model.config, base_models or [], origin=origin, untrained=untrained)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if write_more is not None:
            write_more(partial)
    return Path(directory).absolute()
