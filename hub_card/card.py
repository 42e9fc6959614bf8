"""Rendering the model card."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from ..configuration_dsvl import DSVLConfig
from .base_models import CONDITIONS, inherited_license, read_base_models, restrictions

# What a chat template is, by its name.
CHAT_FORMATS = {
    None: None,
    "language": "the language model's own",
    "visualchat": "DeepSpeed-VisualChat's",
}

TAGS = ["dsvl", "multi-image", "custom_code"]

# A line of the example in the card; `at_repository` replaces it.
HERE = 'name = "."  # this directory'


@dataclass(frozen=True)
class TrainingFacts:
    """The facts about a training on the model card.

    Attributes:
        data: data set -> number of conversations; None if it was streamed.
        datasets: names of those data sets that are on the Hub.
        settings: hyperparameters, name -> value.
        results: name -> number.
        hardware: description of the devices.
        seconds: wall-clock time; since the last resumption if it was `resumed`.
        resumed: whether the training was resumed.
        emissions: codecarbon's estimate, in kg of CO2 equivalents; *optional*.
        plot: name of the image file with loss and metrics, in the same directory; *optional*.
        stage: name of the stage of a recipe; *optional*.
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
    stage: str | None = None


def render_card(
    config: DSVLConfig,
    base_models: Sequence[str],
    training: TrainingFacts | Sequence[TrainingFacts] | None = None,
    origin: str | None = None,
    untrained: bool = False,
    chat_template: str | None = None,
) -> str:
    """Render the README.md of a checkpoint.

    Args:
        config: the model's configuration.
        base_models: names or directories of the base models. Local paths are not shown; licences and base models on their
            cards are (see `read_base_models`). Without any name, those in the configurations of tower and language model.
        training: *optional*, facts about the training of a fine-tuned model, or of each of its stages.
        origin: *optional*, a sentence or two of Markdown that says where the weights of a migrated model come from.
        untrained: whether the projector is untrained.
        chat_template: *optional*, what the chat template is (`composition.chat_template_name`).
    """
    trainings = [training] if isinstance(training, TrainingFacts) else list(training or ())
    bases = read_base_models(base_models)
    if not any(base.name for base in bases):  # configurations hold the names they were loaded from
        parts = [part.name_or_path for part in (config.vision_config, config.text_config) if part.name_or_path]
        bases = [*(base for base in bases if base.license), *read_base_models(parts)] or bases
    names = list(dict.fromkeys(base.name for base in bases if base.name))
    licence, restricted = inherited_license(bases), restrictions(bases)
    unknown = list(dict.fromkeys(base.name or "a base model" for base in bases if not base.license))
    if not bases:
        unknown = ["the base models"]
    metadata: dict[str, Any] = dict(licence)
    if names:
        # The Hub calls a combination of models without training a "merge".
        metadata["base_model_relation"] = "merge" if untrained else "finetune"
    emissions = [one.emissions for one in trainings if one.emissions is not None]
    if emissions and len(emissions) == len(trainings):
        metadata["co2_eq_emissions"] = {
            "emissions": sum(emissions) * 1000,  # in grams
            "source": "codecarbon",
            "training_type": "fine-tuning",
        } | ({"hardware_used": trainings[-1].hardware} if trainings[-1].hardware else {})
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(TAGS),
        base_model=names or None,
        datasets=list(dict.fromkeys(name for one in trainings for name in one.datasets)) or None,
        **metadata,
    )
    template = files(__package__).joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.filters["duration"] = _duration
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|")
    return environment.from_string(template).render(
        metadata=data.to_yaml(),
        config=config,
        image_tokens=image_tokens(config),
        names=names,
        origin=origin,
        untrained=untrained,
        chat_template=CHAT_FORMATS.get(chat_template, f"written for this model (`{chat_template}`)"),
        here=HERE,
        trainings=trainings,
        restricted=restricted,
        conditions=CONDITIONS,
        terms=licence.get("license"),
        unknown=unknown,
    )


def image_tokens(config: DSVLConfig) -> str:
    """How many tokens an image takes, in words."""
    if config.image_layout == "tiles":
        return f"{config.image_seq_length} tokens per tile, up to {1 + config.max_tiles} tiles per image"
    most = "up to " if config.image_layout == "native" and config.projector_type != "perceiver" else ""
    return f"{most}{config.image_seq_length} tokens per image"


def at_repository(card: str, repo_id: str) -> str:
    """Make the example of a card load the model from a repository on the Hub."""
    return card.replace(HERE, f'name = "{repo_id}"')


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"
