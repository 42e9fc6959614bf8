"""Fills the model card's template."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from ..configuration_dsvl import DSVLConfig


def render_card(config: DSVLConfig, base_models: list[str], training: dict[str, Any] | None = None) -> str:
    """The README.md of a checkpoint.

    Args:
        config: the model's configuration.
        base_models: names or directories of the models it was made of; directories of this machine are left out.
        training: of a fine-tuned model: `data` (its name), `conversations` (how many), and the tables `settings` and
            `results`, name -> value.
    """
    on_hub = [name for name in base_models if not Path(name).exists()]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["dsvl", "multi-image", "custom_code"],
        base_model=on_hub or None,
    )
    template = files(__package__).joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    return environment.from_string(template).render(
        metadata=metadata.to_yaml(), config=config, base_models=on_hub, training=training
    )
