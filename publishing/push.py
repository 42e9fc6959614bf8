"""Pushing a checkpoint directory, or a model in memory, to the Hub in one commit."""

import shutil
import sys
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from ..hub_card import at_repository, render_card
from .directory_checks import Contents, read_contents
from .fresh_process import check_standalone

CARD = "README.md"
ADAPTERS = "adapters"  # directory that `dsvl train` writes
# The base class of httpx's errors; huggingface_hub uses httpx or httpx2. A failed connection is not an OSError.
HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]
# Files of an earlier push that a new one deletes unless it replaces them: stale shards would be loaded instead of the new
# weights, and adapters belong to the old ones.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*_dsvl.py", f"{ADAPTERS}/*")


def check_directory(directory: str | Path) -> Contents:
    """Check that a directory can be published, and that it loads in a process without this package.

    Returns:
        Its contents.

    Raises:
        ValueError: listing all faults.
        NotADirectoryError: if it is not a directory.
    """
    contents = read_contents(directory)
    if contents.faults:
        raise ValueError(f"{directory} is not published:\n" + "\n".join(f"  - {fault}" for fault in contents.faults))
    try:
        check_standalone(directory)
    except ValueError as error:
        raise ValueError(f"{directory} is not published: {error}") from error
    return contents


def push_directory(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload a DSVL model",
) -> CommitInfo:
    """Publish a checkpoint directory, after the checks of `check_directory`, in one commit.

    After an interruption, call it again; files that were uploaded already are not uploaded again.

    Args:
        directory: a complete checkpoint.
        repo_id: `owner/name`; created if it does not exist.
        private: *optional*, make the repository private; an error for an existing public repository.
        revision: *optional*, a branch, created if it does not exist; defaults to main.
        create_pr: open a pull request instead of committing to the branch.
        token: of the Hub, *optional*, defaults to the saved one.
        commit_message: title of the commit.

    Raises:
        ValueError: if a check fails, or the arguments contradict each other or the repository.
        OSError: if the Hub refuses or cannot be reached, or the files on the Hub are not those that were pushed.
    """
    contents = check_directory(directory)
    root = Path(directory)
    files: dict[str, Path | bytes] = {name: root / name for name in contents.files}
    api = HfApi(token=token)
    try:
        repo_id = _prepare_repository(api, repo_id, private, revision, create_pr)
        files[CARD] = at_repository((root / CARD).read_text(encoding="utf-8"), repo_id).encode()
        commit = _commit(api, repo_id, files, REPLACED, revision, create_pr, commit_message)
        _verify(api, repo_id, files, commit.oid)
    except (HTTP_ERROR, RuntimeError) as error:  # the client raises RuntimeError for a failed upload
        raise OSError(
            f"{repo_id} could not be pushed: {error}. Check the name and your access rights, then run the same again: "
            "files that were uploaded are not uploaded twice."
        ) from error
    return commit


def push_part(
    part: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """`push_to_hub` of a model or a processor; the arguments are transformers'.

    All remote code is uploaded with either part, and a model card with a model, unless the repository has one.
    """
    is_model = hasattr(part, "state_dict")
    api = HfApi(token=token)
    repo_id = _prepare_repository(api, repo_id, private, revision, create_pr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part.save_pretrained(folder, **({"max_shard_size": max_shard_size} if is_model else {}))
        for code in Path(str(sys.modules[type(part).__module__].__file__)).parent.glob("*_dsvl.py"):
            shutil.copy(code, folder)
        files: dict[str, Path | bytes] = {
            path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
        }
        tags = [*(tags or []), *(getattr(part, "model_tags", None) or [])]
        if is_model and not api.file_exists(repo_id, CARD, revision=revision):
            source = [part.name_or_path] if part.name_or_path else []
            files[CARD] = _tagged(at_repository(render_card(part.config, source), repo_id), tags).encode()
        replaced = REPLACED if is_model else ("*_dsvl.py",)
        message = commit_message or f"Upload {'model' if is_model else 'processor'}"
        return _commit(api, repo_id, files, replaced, revision, create_pr, message, commit_description)


def _tagged(card: str, tags: list[str]) -> str:
    if not tags:
        return card
    tagged = ModelCard(card)
    tagged.data["tags"] = list(dict.fromkeys([*tagged.data.get("tags", []), *tags]))
    return str(tagged)


def _prepare_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> str:
    """Create the repository and the branch if they do not exist; returns the repository's full name."""
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request goes to main, not to {revision}; pass create_pr or revision, not both.")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public; make it private on the Hub first, or choose another name.")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _commit(
    api: HfApi,
    repo_id: str,
    files: dict[str, Path | bytes],
    replaced: Iterable[str],
    revision: str | None,
    create_pr: bool,
    message: str,
    description: str | None = None,
) -> CommitInfo:
    """Add files and delete those that they replace, in one commit."""
    existing = api.list_repo_files(repo_id, revision=revision)
    stale = [
        name
        for name in existing
        if name not in files and any(fnmatch(name, one) and name.count("/") == one.count("/") for one in replaced)
    ]
    operations: list[Any] = [
        *(
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in files.items()
        ),
        *(CommitOperationDelete(name) for name in stale),
    ]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
    )


def _verify(api: HfApi, repo_id: str, files: dict[str, Path | bytes], revision: str) -> None:
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    expected = {
        name: content.stat().st_size if isinstance(content, Path) else len(content) for name, content in files.items()
    }
    wrong = [name for name, size in expected.items() if sizes.get(name) != size]
    if wrong:
        raise OSError(f"{repo_id} at {revision} does not hold {', '.join(wrong)} as pushed; push again.")


def describe(contents: Contents) -> str:
    """List the files with their sizes, and the skipped directories, a line each."""
    lines = [f"{size:>16,}  {name}" for name, size in contents.files.items()]
    lines.append(f"{sum(contents.files.values()):>16,}  bytes in {len(contents.files)} files")
    folders = sorted({name.partition("/")[0] for name in contents.skipped})
    return "\n".join([*lines, *(f"{'skipped':>16}  {folder}" for folder in folders)])
