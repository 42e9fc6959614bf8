"""Where the code that `torch.compile` writes is kept, so that other processes need not compile it again."""

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # of torch


def cache_directory() -> Path:
    """Where the package keeps what it has measured or compiled: `$XDG_CACHE_HOME/dsvl` or `~/.cache/dsvl`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "dsvl"


def compiled_code_directory() -> Path:
    """Where `keep_compiled_code` keeps it."""
    return Path(os.environ.get(VARIABLE) or cache_directory() / "compiled")


def keep_compiled_code() -> None:
    """Let compiled code, and what was found by tuning it, outlive a restart of the machine.

    torch keeps both in a directory of the temporary files. Here it is `compiled` in `cache_directory()`, unless the variable
    TORCHINDUCTOR_CACHE_DIR names another. Of a directory that cannot be written, a warning tells. Call it before torch is
    imported: some of its modules set the variable.
    """
    if os.environ.get(VARIABLE):
        return
    directory = compiled_code_directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds code that is executed
        is_writable = os.access(directory, os.W_OK)
    except OSError:
        is_writable = False
    if is_writable:
        os.environ[VARIABLE] = str(directory)
    else:
        logger.warning(
            "Compiled code is kept in the temporary directory, as %s cannot be written; set %s to one that can.",
            directory,
            VARIABLE,
        )


__all__ = ["VARIABLE", "cache_directory", "compiled_code_directory", "keep_compiled_code"]
