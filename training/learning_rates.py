"""Learning rates of the parts of a model: `--learning-rates projector=1e-3,vision=2e-6`."""

import json
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..utils.command_line import did_you_mean
from .trainable_parts import PARTS

ADAPTERS = "adapters"
RATED_PARTS = (*PARTS, ADAPTERS)  # the parts that can have a learning rate of their own


def parse_learning_rates(value: Mapping[str, Any] | str | None) -> dict[str, float]:
    """The learning rates of parts.

    Args:
        value: part -> rate; or a text, `projector=1e-3,vision=2e-6` or the mapping in JSON. None is an empty mapping.

    Raises:
        ValueError: if a part is unknown or named twice, or a rate is not a positive number.
    """
    if value is None:
        return {}
    rates: dict[str, float] = {}
    for part, rate in value.items() if isinstance(value, Mapping) else _pairs(value):
        if part not in RATED_PARTS:
            raise ValueError(
                f"--learning-rates {part}: no such part; choose from {', '.join(RATED_PARTS)}"
                f"{did_you_mean(str(part), RATED_PARTS) or '.'}"
            )
        if part in rates:
            raise ValueError(f"--learning-rates names {part} twice; keep one of them.")
        try:
            number = float("nan" if isinstance(rate, bool) else rate)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"--learning-rates {part}={rate}: expected a positive number, such as 1e-4.")
        rates[part] = number
    return rates


def _pairs(text: str) -> list[tuple[str, Any]]:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=list)
        except json.JSONDecodeError as error:
            raise ValueError(f"--learning-rates {text} is not JSON: {error}.") from error
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    for part, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--learning-rates {part.strip()}: expected PART=RATE, such as projector=1e-3,vision=2e-6.")
    return [(part.strip(), rate.strip()) for part, _, rate in pairs]


def check_rated_parts(rates: Mapping[str, float], train: list[str], adapters: bool) -> None:
    """Refuse learning rates of parts that are not trained.

    Raises:
        ValueError: naming the parts.
    """
    trained = [*train, *([ADAPTERS] if adapters else [])]
    idle = [part for part in rates if part not in trained]
    if idle:
        raise ValueError(
            f"--learning-rates has a rate for {' and '.join(idle)}, which is not trained ({', '.join(trained)} are); drop "
            "it, or train the part (--train, --lora-rank)."
        )


def parts_of_parameters(model: Any) -> dict[str, str]:
    """The part of each parameter of a model, parameter name -> element of `RATED_PARTS`.

    Args:
        model: a model with `get_input_embeddings`, with or without PEFT adapters. Embeddings that are tied to the head are
            embeddings. Parameters of no other part belong to `language`.
    """
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}

    def part(name: str, parameter: nn.Parameter) -> str:
        if "lora_" in name:
            return ADAPTERS
        if id(parameter) in embeddings:
            return "embeddings"
        for fragment, found in (("multi_modal_projector.", "projector"), ("vision_tower.", "vision"), ("lm_head.", "head")):
            if fragment in name:
                return found
        return "language"

    return {name: part(name, parameter) for name, parameter in model.named_parameters()}
