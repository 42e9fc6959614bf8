"""Names that may be a path here or a repository on the Hub."""

import os
import re

# Of what commands take; a model's name on the Hub may end in ".1-8B".
_EXTENSION = re.compile(
    r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|ya?ml|txt|tar|gz|zip|zst|bin|pt|pth|safetensors|html?|png|jpe?g|webp)$",
    re.I,
)


def looks_like_path(name: str) -> bool:
    """Whether a name can be no repository's on the Hub, owner/name, or is unlikely to be."""
    separators = name.count("/") + (name.count(os.sep) if os.sep != "/" else 0)
    return name.startswith((".", "/", "~")) or os.path.isabs(name) or separators > 1 or bool(_EXTENSION.search(name))


def check_exists(name: str) -> str:
    """Refuse a path that does not exist, at once, instead of looking for it on the Hub; the `type` of commands' arguments.

    Args:
        name: a path, or the name of a repository on the Hub.

    Returns:
        the name.

    Raises:
        FileNotFoundError: if it looks like a path and there is nothing.
    """
    if looks_like_path(name) and not os.path.exists(os.path.expanduser(name)):
        raise FileNotFoundError(f"{name} does not exist (looked for in {os.getcwd()}); check the path.")
    return name
