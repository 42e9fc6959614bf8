"""The base models of a checkpoint, and the licences that its weights inherit."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

logger = logging.getLogger(__name__)

# Compatible open-source licences, in order of their conditions: a combination has the last of its licences.
PERMISSIVE = ("cc0-1.0", "unlicense", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0")

# Conditions for sharing a derived model, by the licence's name on the Hub.
_LLAMA = (
    'pass a copy of the licence on, keep its notice in a file `NOTICE`, show "Built with {}", begin the model\'s name with '
    '"{}", and respect the acceptable use policy'
)
CONDITIONS = {
    "llama2": "pass a copy of the licence on, keep its notice in a file `NOTICE`, and respect the acceptable use policy",
    "llama3": _LLAMA.format("Meta Llama 3", "Llama 3"),
    "llama3.1": _LLAMA.format("Llama", "Llama"),
    "llama3.2": _LLAMA.format("Llama", "Llama"),
    "llama3.3": _LLAMA.format("Llama", "Llama"),
    "llama4": _LLAMA.format("Llama", "Llama"),
    "gemma": "pass a copy of the Gemma Terms of Use on with its notice, say that the files were modified, and bind users to "
    "the prohibited use policy",
}


@dataclass(frozen=True)
class BaseModel:
    """A base model.

    Attributes:
        name: on the Hub; None for a local directory.
        license, license_name, license_link: as in the metadata of its card; None if they are not known.
    """

    name: str | None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None

    @property
    def terms(self) -> str | None:
        """The name of the licence; for a licence of the model's own, its `license_name`."""
        return (self.license_name or "of-the-base-model") if self.license == "other" else self.license


def read_base_models(names: Sequence[str]) -> list[BaseModel]:
    """Read names and licences of base models from their cards, in local directories or the Hub's cache, without downloads.

    For a local DSVL checkpoint, the base models of its card are returned, so that their names and licences pass from
    composing to fine-tuning.
    """
    found: list[BaseModel] = []
    for name in map(str, names):
        metadata = _metadata(name)
        terms = {key: metadata[key] for key in ("license", "license_name", "license_link") if _is_text(metadata.get(key))}
        if not Path(name).exists():
            found.append(BaseModel(name if is_repo_id(name) else None, **terms))
        elif _model_type(name) == "dsvl":
            made_of = metadata.get("base_model") or []
            ancestors = [made_of] if isinstance(made_of, str) else made_of
            found += [BaseModel(ancestor, **terms) for ancestor in ancestors] or [BaseModel(None, **terms)]
        else:
            found.append(BaseModel(None, **terms))
    return list(dict.fromkeys(found))


def inherited_license(base_models: Sequence[BaseModel]) -> dict[str, Any]:
    """The licence metadata for a model that is derived from these; empty if it cannot be determined.

    A restrictive licence takes precedence over permissive ones; several restrictive ones become "other" with all names.
    """
    restrictive = [base for base in restrictions(base_models) if base.license]
    if len({base.terms for base in restrictive}) > 1:
        return {"license": "other", "license_name": "-and-".join(sorted({str(base.terms) for base in restrictive}))}
    if restrictive:
        base = restrictive[0]
        own = base.terms if base.license == "other" else None
        terms = {"license": base.license, "license_name": own, "license_link": base.license_link}
        return {key: value for key, value in terms.items() if value}
    known = [base.license for base in base_models if base.license]
    if not known or len(known) < len(base_models):
        return {}
    return {"license": max(known, key=PERMISSIVE.index)}


def restrictions(base_models: Sequence[BaseModel]) -> list[BaseModel]:
    """The models with a restrictive licence, one for each licence."""
    return list({base.terms: base for base in base_models if base.license and base.license not in PERMISSIVE}.values())


def is_repo_id(name: str) -> bool:
    """Whether a name is a valid repository id."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _metadata(name: str) -> dict[str, Any]:
    card: Any = Path(name) / "README.md"
    if not Path(name).exists():
        card = try_to_load_from_cache(name, "README.md") if is_repo_id(name) else None
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return {}
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("The metadata of %s cannot be read (%s); its licence counts as unknown.", card, error)
        return {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _model_type(directory: str) -> str | None:
    config = Path(directory) / "config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
