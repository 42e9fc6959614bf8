"""Atomic writes: a file or a directory gets its name only when it is complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_path(path: Path) -> Path:
    """The name under which `atomic_path` writes a file until it is complete."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def atomic_path(path: Path, concurrent: bool = False) -> Iterator[Path]:
    """A temporary path in the same directory, which replaces `path` when the block ends and is deleted if it raises.

    Args:
        path (`Path`): The file to write.
        concurrent (`bool`, *optional*, defaults to `False`): Whether other processes may write the same file at the same
            time. Each process then uses a temporary name of its own.

    Yields:
        The path to write to.
    """
    partial = partial_path(path.with_name(f"{path.name}.{os.getpid()}") if concurrent else path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:  # KeyboardInterrupt too
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: str | bytes, concurrent: bool = False) -> None:
    """Write a file atomically, and flush it to the disk before it gets its name.

    Args:
        path (`Path`): The file to write.
        data (`str` or `bytes`): Its content; text is encoded as UTF-8.
        concurrent (`bool`, *optional*, defaults to `False`): As for `atomic_path`.
    """
    with atomic_path(path, concurrent) as partial, partial.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_directory(directory: str | Path) -> Iterator[Path]:
    """A temporary directory, which is renamed to `directory` when the block ends and is deleted if it raises.

    Args:
        directory (`str` or `Path`): The directory to write. It must not exist, or be empty.

    Yields:
        The directory to write to.

    Raises:
        FileExistsError: If the directory is not empty.
        PermissionError: If it cannot be written.
    """
    target = Path(directory).absolute()
    check_new_directory(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp creates it with 0o700
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:  # KeyboardInterrupt too
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_new_directory(directory: str | Path) -> None:
    """Check that a directory can be written and holds nothing yet.

    Raises:
        FileExistsError: If it exists and is not empty.
        PermissionError: If it cannot be written.
    """
    directory = Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty; remove it or choose another directory.")
    parent = next(parent for parent in directory.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{directory} cannot be written, as {parent} does not allow it; choose another directory.")
