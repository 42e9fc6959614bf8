"""Fills the model card's template."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from ..configuration_dsvl import DSVLConfig
from .base_models import CONDITIONS, inherited_license, read_base_models, restrictions

TAGS = ["dsvl", "multi-image", "custom_code"]

# A card does not know where it will lie; `at_repository` puts the address in its place.
HERE = 'name = "."  # this directory'


@dataclass(frozen=True)
class TrainingFacts:
    """What a card says of a training.

    Attributes:
        data: data set -> how many of its conversations; None if it was streamed.
        datasets: of these, the names on the Hub.
        settings: hyperparameters, name -> value.
        results: name -> number.
        hardware: the devices, in words.
        seconds: how long it took on the clock, from the last resumption on if it was `resumed`.
        resumed: whether the training was interrupted.
        emissions: codecarbon's estimate, in kg of CO2 equivalents; None without one.
        plot: the file beside the card that shows loss and metrics over the steps; None without one.
    """

    data: dict[str, int | None]
    settings: dict[str, Any]
    results: dict[str, float] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    hardware: str | None = None
    seconds: float | None = None
    resumed: bool = False
    emissions: float | None = None
    plot: str | None = None


def render_card(
    config: DSVLConfig,
    base_models: Sequence[str],
    training: TrainingFacts | None = None,
    origin: str | None = None,
    untrained: bool = False,
) -> str:
    """The README.md of a checkpoint.

    Args:
        config: the model's configuration.
        base_models: names or directories of the models it was made of. Directories of this machine are not named; what
            their cards say of licences and origins goes on (see `read_base_models`). If no name is known, those that the
            configurations of tower and language model remember.
        training: of a fine-tuned model.
        origin: where weights are from that were neither composed nor trained here, in a sentence or two of Markdown; of a
            migrated model.
        untrained: whether the projector is fresh, as composing leaves it.
    """
    bases = read_base_models(base_models)
    if not any(base.name for base in bases):  # the parts' configurations remember names on the Hub
        parts = [part.name_or_path for part in (config.vision_config, config.text_config) if part.name_or_path]
        bases = [*(base for base in bases if base.license), *read_base_models(parts)] or bases
    names = list(dict.fromkeys(base.name for base in bases if base.name))
    licence, restricted = inherited_license(bases), restrictions(bases)
    unknown = list(dict.fromkeys(base.name or "a base model" for base in bases if not base.license))
    if not bases:
        unknown = ["the base models"]
    metadata: dict[str, Any] = dict(licence)
    if names:
        # Models that were put together without training are a "merge" to the Hub.
        metadata["base_model_relation"] = "merge" if untrained else "finetune"
    if training is not None and training.emissions is not None:
        metadata["co2_eq_emissions"] = {
            "emissions": training.emissions * 1000,  # in grams
            "source": "codecarbon",
            "training_type": "fine-tuning",
        } | ({"hardware_used": training.hardware} if training.hardware else {})
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(TAGS),
        base_model=names or None,
        datasets=(training.datasets if training else None) or None,
        **metadata,
    )
    template = files(__package__).joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|")
    return environment.from_string(template).render(
        metadata=data.to_yaml(),
        config=config,
        names=names,
        origin=origin,
        untrained=untrained,
        here=HERE,
        training=training,
        duration=_duration(training.seconds) if training and training.seconds is not None else None,
        restricted=restricted,
        conditions=CONDITIONS,
        terms=licence.get("license"),
        unknown=unknown,
    )


def at_repository(card: str, repo_id: str) -> str:
    """A card whose example loads the model from a repository on the Hub."""
    return card.replace(HERE, f'name = "{repo_id}"')


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"
