"""Checks of a checkpoint directory before it is published."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import metadata_load
from safetensors import SafetensorError, safe_open

from ..configuration_dsvl import AUTO_MAP

# Files of a training run, which are needed to resume it only: skipped.
SKIPPED = (
    "checkpoint-*/*",
    "incomplete-*/*",
    "superseded-*/*",
    "run.json",
    "stages/*",
    "runs/*",
    "wandb/*",
    "emissions.csv",
    ".trained.partial/*",
    ".git/*",
    ".cache/*",
    "*/__pycache__/*",
    "__pycache__/*",
    ".DS_Store",
)
# Formats that can run code when they are loaded, and states of a training.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")
TRAINING_STATES = (
    "optimizer*",
    "scheduler.*",
    "rng_state*",
    "global_step*/*",
    "zero_pp_rank_*",
    "*_optim_states*",
    "latest",
)
SECRET_FILES = (
    ".env",
    ".env.*",
    ".netrc",
    "*.pem",
    "*.key",
    "id_rsa*",
    "id_ed25519*",
    "credentials",
    "token",
    "stored_tokens",
)

SECRETS = {
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{30,}\b",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})",
    "a key of OpenAI or Anthropic": r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a key of Google": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a token of Slack": r"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
}
# A value that is an absolute path (of two or more components, as a token of a vocabulary may start with a slash), or a value
# that contains a path of a home directory.
_PATH = re.compile(r"(?:/[^/\s]+){2,}/?|~/.+|file://.+|[A-Za-z]:[\\/].+|\\\\\S+\\.+")
_HOME = re.compile(r"(?<![\w.])/(?:home|Users|root|mnt|tmp|scratch)/[^\s\"']+|[A-Za-z]:\\Users\\")


@dataclass(frozen=True)
class Contents:
    """The files of a checkpoint directory.

    Attributes:
        files: files to publish: path in the repository -> size in bytes.
        skipped: paths of files of a training run, which are not published.
        faults: the reasons not to publish the directory, a sentence each.
    """

    files: dict[str, int]
    skipped: list[str]
    faults: list[str]


def read_contents(directory: str | Path) -> Contents:
    """List the files of a checkpoint directory, and find files that are missing or must not be published.

    Raises:
        NotADirectoryError: if it is not a directory.
    """
    root = Path(directory)
    if not root.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory; pass one that dsvl compose, train or merge has written.")
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    names = [path.relative_to(root).as_posix() for path in paths]
    skipped = [name for name in names if _matches(name, SKIPPED)]
    files = {name: path.stat().st_size for name, path in zip(names, paths, strict=True) if name not in skipped}
    faults = [*_missing(root, set(files))]
    for name in files:
        faults += _faults(root / name, name)
    return Contents(files, skipped, faults)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) or fnmatch(PurePosixPath(name).name, pattern) for pattern in patterns)


def _missing(root: Path, names: set[str]) -> Iterator[str]:
    """Faults for files that a working repository needs."""
    if "config.json" not in names:
        yield "config.json is missing: this is not a checkpoint."
        return
    config = _json(root / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != "dsvl":
        yield "config.json does not belong to a DSVL model."
        return
    auto_map = config.get("auto_map") or {}
    if set(AUTO_MAP) - set(auto_map):
        yield f"auto_map in config.json lacks {', '.join(sorted(set(AUTO_MAP) - set(auto_map)))}; save the model again."
    for name in ("README.md", "generation_config.json", "chat_template.jinja", "processor_config.json", "tokenizer.json"):
        if name not in names:
            yield f"{name} is missing; save model and processor with dsvl.save_checkpoint, which writes all files."
    for module in sorted({str(value).partition(".")[0] for value in auto_map.values()}):
        if f"{module}.py" not in names:
            yield f"{module}.py is missing, which auto_map names; save the model again."
    yield from _missing_weights(root, names)


def _missing_weights(root: Path, names: set[str]) -> Iterator[str]:
    index = "model.safetensors.index.json"
    if index in names:
        content = _json(root / index)
        shards = set(content["weight_map"].values()) if isinstance(content, dict) and "weight_map" in content else set()
        for shard in sorted(shards - names):
            yield f"{shard} is missing, which {index} names; the weights are incomplete."
        for stray in sorted(name for name in names if fnmatch(name, "model*.safetensors") and "/" not in name):
            if stray not in shards:
                yield f"{stray} is not in {index}, so it belongs to other weights; remove it."
    elif "model.safetensors" not in names:
        yield "model.safetensors and model.safetensors.index.json are missing; there are no weights."


def _faults(path: Path, name: str) -> Iterator[str]:
    """Faults of one file."""
    if _matches(name, TRAINING_STATES):
        yield f"{name} is the state of an optimizer or a training, not of the model; remove it."
    elif _matches(name, SECRET_FILES):
        yield f"{name} may hold credentials; remove it."
    elif _matches(name, PICKLES):
        yield f"{name} is in a format that can run code when it is loaded; remove it, or save it as safetensors."
    elif name.endswith(".safetensors"):
        yield from _faults_of_weights(path, name)
    else:
        yield from _faults_of_text(path, name)


def _faults_of_weights(path: Path, name: str) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        yield f"{name} cannot be read ({error}); it is truncated or damaged. Save the model again."
        return
    yield from _secrets(json.dumps(metadata), name)
    yield from _paths(metadata, name)


def _faults_of_text(path: Path, name: str) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return  # a binary file, such as an image
    yield from _secrets(text, name)
    if name == "README.md":
        yield from _faults_of_card(path)
    if not name.endswith(".json"):
        return
    try:
        content = json.loads(text)
    except ValueError as error:
        yield f"{name} is not JSON: {error}."
        return
    if name.endswith("tokenizer.json") and isinstance(content, dict):
        content = {
            key: value for key, value in content.items() if key != "model"
        }  # tokens of a vocabulary may look like paths
    if not name.endswith("vocab.json"):
        yield from _paths(content, name)


def _faults_of_card(path: Path) -> Iterator[str]:
    try:
        metadata = metadata_load(path) or {}
    except (ValueError, yaml.YAMLError) as error:
        yield f"The metadata of README.md cannot be read: {error}."
        return
    for key, value in (("library_name", "transformers"), ("pipeline_tag", "image-text-to-text")):
        if metadata.get(key) != value:
            yield f"The metadata of README.md has {key}: {metadata.get(key)}, expected {value} (hub_card.render_card)."


def _secrets(text: str, name: str) -> Iterator[str]:
    for what, pattern in SECRETS.items():
        found = re.search(pattern, text)
        if found:
            yield f"{name} holds {what} ({found[0][:7]}...); remove it, and revoke it if others could have read it."


def _paths(content: Any, name: str, where: str = "") -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _paths(key, name, where)
            yield from _paths(value, name, f"{where}.{key}" if where else str(key))
    elif isinstance(content, list):
        for value in content:
            yield from _paths(value, name, where)
    elif isinstance(content, str) and len(content) < 4096 and (_PATH.fullmatch(content) or _HOME.search(content)):
        yield f"{name} holds a path of this machine ({where or 'as a key'}: {content}); remove it, or make it relative."


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # reported with the faults of the file itself
