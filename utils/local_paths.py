"""Telling local paths from repositories on the Hub."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

# Extensions of files that commands accept. A list, because names of models on the Hub may end in ".1-8B".
_EXTENSION = re.compile(
    r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|ya?ml|txt|tar|gz|zip|zst|bin|pt|pth|safetensors|html?|png|jpe?g|webp)$",
    re.I,
)


def looks_like_path(name: str) -> bool:
    """Whether a name is a path rather than a repository on the Hub (`owner/name`)."""
    separators = name.count("/") + (name.count(os.sep) if os.sep != "/" else 0)
    return name.startswith((".", "/", "~")) or os.path.isabs(name) or separators > 1 or bool(_EXTENSION.search(name))


def check_exists(name: str) -> str:
    """Check that a path exists, instead of looking for it on the Hub; the `type` of command-line arguments.

    Args:
        name (`str`): A path, or the name of a repository on the Hub.

    Returns:
        The name.

    Raises:
        FileNotFoundError: If the name looks like a path that does not exist.
    """
    if looks_like_path(name) and not os.path.exists(os.path.expanduser(name)):
        raise FileNotFoundError(f"{name} does not exist (looked for in {os.getcwd()}); check the path.")
    return name


def check_outputs(outputs: Mapping[str, str | Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Check that a command overwrites none of its inputs, and writes no file twice.

    Args:
        outputs (`Mapping`): Name of the flag -> path to write; None for flags that are not given.
        inputs (`Iterable`): Paths that the command reads, or names on the Hub; None for those that are not given.

    Raises:
        ValueError: If an output is an input or another output, also by another spelling or a symbolic link.
    """
    read = {Path(path).resolve() for path in inputs if path is not None and os.path.exists(path)}
    written: dict[Path, str] = {}
    for flag, path in outputs.items():
        if path is None:
            continue
        target = Path(path).resolve()
        if target in read:
            raise ValueError(
                f"{flag} {path} is a file that this command reads, and would be overwritten; pass another path."
            )
        if target in written:
            raise ValueError(f"{written[target]} and {flag} are the same file, {path}; pass different paths.")
        written[target] = flag
