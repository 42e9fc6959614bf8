"""From a directory, or from a model in memory, to a repository on the Hub; always in one commit."""

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
ADAPTERS = "adapters"  # as `dsvl train` calls their folder
HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever the library has; no OSError if nobody answers
# What an earlier push may have left and a new one may not bring: other shards would be loaded in the place of the new ones.
# In the repository's first level; and adapters, which are of other weights.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*_dsvl.py", f"{ADAPTERS}/*")


def check_directory(directory: str | Path) -> Contents:
    """Make sure that a directory can be published, and opens in a process without this package.

    Returns:
        Its contents.

    Raises:
        ValueError: listing every reason why not.
        NotADirectoryError: if it is none.
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

    Whatever was uploaded before an interruption need not be uploaded again: call it again to complete it.

    Args:
        directory: a complete checkpoint.
        repo_id: `owner/name`; made if it is not there.
        private: make the repository private; refused for one that exists and is public.
        revision: a branch, made if it is not there; main by default.
        create_pr: propose the commit as a pull request.
        token: of the Hub; the saved one by default.
        commit_message: its title.

    Raises:
        ValueError: if it must not be published, or cannot be as asked.
        OSError: if the Hub refuses or cannot be reached, or does not hold afterwards what was pushed.
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
    except (HTTP_ERROR, RuntimeError) as error:  # RuntimeError: what the client makes of a failed upload
        raise OSError(
            f"{repo_id} could not be pushed: {error}. If nothing is wrong with the name or your rights, run the same again: "
            "what was uploaded is not uploaded twice."
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

    All remote code goes along, whichever part comes first. A model brings its card, unless the repository has one.
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
    made = ModelCard(card)
    made.data["tags"] = list(dict.fromkeys([*made.data.get("tags", []), *tags]))
    return str(made)


def _prepare_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> str:
    """Make the repository and the branch if they are not there; returns the repository's full name."""
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
    """Add files and delete what they replace; all of it is there afterwards, or nothing has changed."""
    there = api.list_repo_files(repo_id, revision=revision)
    stale = [
        name
        for name in there
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
    there = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    expected = {
        name: content.stat().st_size if isinstance(content, Path) else len(content) for name, content in files.items()
    }
    wrong = [name for name, size in expected.items() if there.get(name) != size]
    if wrong:
        raise OSError(f"{repo_id} at {revision} does not hold {', '.join(wrong)} as pushed; push again.")


def describe(contents: Contents) -> str:
    """The files with their sizes, and what is left out, a line each."""
    lines = [f"{size:>16,}  {name}" for name, size in contents.files.items()]
    lines.append(f"{sum(contents.files.values()):>16,}  bytes in {len(contents.files)} files")
    folders = sorted({name.partition("/")[0] for name in contents.left_out})
    return "\n".join([*lines, *(f"{'left out':>16}  {folder}" for folder in folders)])
