"""Replacing the code files that a checkpoint carries by those of this package."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download

from ..configuration_dsvl import AUTO_MAP, QWEN_VISION_AUTO_MAP, DSVLConfig, DSVLQwenVisionConfig
from ..hub_card.base_models import is_repo_id
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..processing_dsvl import DSVLProcessor
from ..publishing.fresh_process import check_standalone
from ..publishing.push import HTTP_ERROR
from ..publishing.standalone_check import eager_logits
from ..publishing.travelling_code import PATTERN, travelling_code
from ..utils.local_paths import check_exists

TOLERANCE = 1e-5  # relative to the largest logit, or absolute where all are below 1
AUTO_MAPS = {DSVLConfig.model_type: AUTO_MAP, DSVLQwenVisionConfig.model_type: QWEN_VISION_AUTO_MAP}
# What is downloaded of a repository: first what decides whether anything changes, then what loading a model takes.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
WEIGHTS = ("*.safetensors",)
PULL_REQUEST = (
    "`dsvl migrate code` replaced the Python files `*_dsvl.py` and `auto_map` by those of the current release of DSVL. The "
    "weights are unchanged. The logits of a prompt with an image differ by {difference:g} at most."
)


@dataclass(frozen=True)
class CodeMigration:
    """What `migrate_code` changed.

    Attributes:
        source: the directory or repository.
        written: names of files that were added or replaced.
        removed: names of code files that are no longer used.
        difference: the largest difference between logits before and after; None if nothing had to change.
        pull_request: its address, *optional*.
    """

    source: str
    written: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    difference: float | None = None
    pull_request: str | None = None


def migrate_code(source: str | Path, *, create_pr: bool = False, token: str | bool | None = None) -> CodeMigration:
    """Replace a checkpoint's code files and its `auto_map` by those of this package.

    A checkpoint carries its own code for `trust_remote_code=True`, and code of an older release can fail with a newer
    transformers. Weights, tokenizer and chat template are left as they are. The logits of a prompt with an image are
    compared before anything is replaced: those of this package's classes on the old files with those of the new files,
    loaded by remote code in a process that cannot import this package. Replacing a directory is atomic.

    Args:
        source: a checkpoint directory, or the name of a repository on the Hub. Of a repository, the weights are
            downloaded only if something has to change; they are needed for the comparison.
        create_pr: for a repository, open a pull request with the changes. Without it the repository is only checked.
        token: of the Hub, *optional*, defaults to the saved one.

    Returns:
        What was changed. For a repository without `create_pr`, what would change.

    Raises:
        FileNotFoundError: if `source` looks like a path and does not exist.
        ValueError: if `source` is not a DSVL checkpoint, if its new files do not load, or if the logits differ.
        OSError: if the directory cannot be written, or the Hub refuses or cannot be reached.
    """
    name = str(source)
    directory = Path(source).expanduser().resolve()
    _restore_interrupted(directory)
    if directory.is_dir():
        if create_pr:
            raise ValueError(f"{name} is a directory; create_pr (--create-pr) takes the name of a repository on the Hub.")
        return _migrate_directory(directory, name)
    check_exists(name)
    if directory.exists() or not is_repo_id(name):
        raise ValueError(f"{name} is neither a directory nor the name of a repository on the Hub (owner/name).")
    try:
        return _migrate_repository(name, create_pr, token)
    except (HTTP_ERROR, RuntimeError) as error:
        raise OSError(f"{name} could not be migrated: {error}. Check the name and your access rights.") from error


def _migrate_directory(directory: Path, name: str) -> CodeMigration:
    written, removed = _changes(directory, name)
    if not written and not removed:
        return CodeMigration(name)
    if Path.cwd().is_relative_to(directory):
        raise ValueError(f"{name} is the current directory, which will be replaced; run this from another directory.")
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        new = partial / directory.name
        _copy(directory, new, written, removed, _link)
        difference = compare_logits(directory, new, name)
        backup = _backup(directory)
        directory.rename(backup)
        try:
            new.rename(directory)
        except BaseException:
            backup.rename(directory)
            raise
        shutil.rmtree(backup)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return CodeMigration(name, sorted(written), removed, difference)


def _migrate_repository(repo_id: str, create_pr: bool, token: str | bool | None) -> CodeMigration:
    api = HfApi(token=token)
    revision = api.model_info(repo_id).sha

    def download(patterns: tuple[str, ...]) -> Path:
        # Subdirectories hold adapters or training checkpoints, which are not part of the model.
        options: dict[str, Any] = {"revision": revision, "token": token, "endpoint": api.endpoint}
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns), ignore_patterns=["*/*"], **options))

    written, removed = _changes(download(SMALL_FILES), repo_id)
    if not written and not removed:
        return CodeMigration(repo_id)
    old = download(SMALL_FILES + WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder) / "checkpoint"
        _copy(old, new, written, removed, lambda one, other: os.symlink(Path(one).resolve(), other))
        difference = compare_logits(old, new, repo_id)
    address = None
    if create_pr:
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in written.items()),
                *(CommitOperationDelete(name) for name in removed),
            ],
            commit_message="Update the model's code to the current release of DSVL",
            commit_description=PULL_REQUEST.format(difference=difference),
            parent_commit=revision,
            create_pr=True,
        )
        address = commit.pr_url
    return CodeMigration(repo_id, sorted(written), removed, difference, address)


def _changes(directory: Path, name: str) -> tuple[dict[str, bytes], list[str]]:
    """The files to write, with their content, and the code files to remove."""
    config = _read_json(directory / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != DSVLConfig.model_type:
        found = f"config.json has model_type {config.get('model_type')!r}" if isinstance(config, dict) else "no config.json"
        raise ValueError(
            f"{name} is not a DSVL checkpoint ({found}); pass a directory that dsvl compose, train or merge has written."
        )
    code = travelling_code()
    new = code.copy()
    for path in directory.glob("*config.json"):
        text = path.read_text(encoding="utf-8")
        content = _read_json(path)
        if (updated := _update(content)) != content:
            new[path.name] = (json.dumps(updated, indent=2, ensure_ascii=text.isascii()) + "\n").encode()
    written = {
        file: content
        for file, content in new.items()
        if not (directory / file).is_file() or (directory / file).read_bytes() != content
    }
    return written, sorted(path.name for path in directory.glob(PATTERN) if path.name not in code)


def _update(value: Any) -> Any:
    """A configuration with the current `auto_map`, at every level, and with the current names of its keys."""
    if not isinstance(value, dict):
        return value
    model_type = value.get("model_type")
    renamed = DSVLConfig.attribute_map if model_type == DSVLConfig.model_type else {}
    updated = {renamed.get(key, key): _update(content) for key, content in value.items()}
    if model_type in AUTO_MAPS:
        updated["auto_map"] = dict(AUTO_MAPS[model_type])
    elif isinstance(updated.get("auto_map"), dict):  # of a processor or tokenizer; a tokenizer may have code of its own
        updated["auto_map"] = {
            auto_class: AUTO_MAP.get(auto_class, target) if "_dsvl." in str(target) else target
            for auto_class, target in updated["auto_map"].items()
        }
    return updated


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again.") from error


def _copy(
    directory: Path, new: Path, written: dict[str, bytes], removed: list[str], copy_file: Callable[[str, str], Any]
) -> None:
    """Copy a checkpoint with its changes; `copy_file` may link the files that stay as they are."""
    changed = {*written, *removed}

    def ignore(folder: str, names: list[str]) -> set[str]:
        return changed & set(names) if Path(folder) == directory else set()

    shutil.copytree(directory, new, symlinks=copy_file is _link, ignore=ignore, copy_function=copy_file)
    for name, content in written.items():
        (new / name).write_bytes(content)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links in this file system
        shutil.copy2(source, target)


def compare_logits(old: Path, new: Path, name: str) -> float:
    """Compare the logits of this package's classes on the old files with those of the new files and their own code.

    Args:
        old: directory of the checkpoint as it is.
        new: directory of the checkpoint with its new code.
        name: of the checkpoint, for the error.

    Returns:
        The largest difference.

    Raises:
        ValueError: if the difference exceeds the tolerance, or the new files do not load.
    """
    model = DSVLForConditionalGeneration.from_pretrained(old).eval()
    before = eager_logits(model, DSVLProcessor.from_pretrained(old))
    del model  # the process below loads the weights a second time
    after = torch.tensor(check_standalone(new)["logits"])
    difference = float((before - after).abs().max()) if before.shape == after.shape else float("inf")
    if not difference <= TOLERANCE * max(1.0, float(before.abs().max())):  # NaN is refused, too
        raise ValueError(
            f"{name}: the logits of a prompt with an image differ by {difference:g} between the old files and the new ones; "
            f"expected at most {TOLERANCE:g}. Nothing was changed. Please report this."
        )
    return difference


def _backup(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.before-migration")


def _restore_interrupted(directory: Path) -> None:
    """Restore a directory whose replacement was killed between its two renames."""
    backup = _backup(directory)
    if not backup.is_dir():
        return
    if not directory.exists():
        backup.rename(directory)
    else:
        shutil.rmtree(backup)  # the replacement was complete


__all__ = ["CodeMigration", "migrate_code"]
