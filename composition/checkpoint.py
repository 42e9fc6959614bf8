"""Saving a complete checkpoint directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hub_card import render_card
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..utils.atomic_files import atomic_directory
from .chat_template import chat_template_name


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

    Saving is atomic: everything is written to a temporary directory, which is renamed when it is complete.

    Args:
        model: the model to save.
        processor: its `DSVLProcessor`.
        directory: the new directory; it must not exist, or be empty.
        base_models: *optional*, names or directories of the base models, for the model card.
        origin: *optional*, where the weights come from, for the model card; see `render_card`.
        untrained: whether the projector is untrained, for the model card.
        max_shard_size: maximum size of a safetensors file.
        write_more: *optional*, a function that writes further files to the directory that it is given.

    Returns:
        The absolute path of the directory.

    Raises:
        FileExistsError: if the directory is not empty.
        PermissionError: if it cannot be written.
    """
    with atomic_directory(directory) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        processor.save_pretrained(partial)
        card = render_card(
            model.config,
            base_models or [],
            origin=origin,
            untrained=untrained,
            chat_template=chat_template_name(processor.chat_template),
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        if write_more is not None:
            write_more(partial)
    return Path(directory).absolute()
