"""The tier of an image library on disk: a safetensors file for each entry, the least recently used deleted first."""

import contextlib
import hashlib
import json
import logging
import os
import queue
import threading
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file

from ..utils.atomic_files import atomic_path
from .memory_tier import Tensors, as_buffer, nbytes

logger = logging.getLogger(__name__)
SUFFIX = ".safetensors"
# Partial files of writers that are gone are deleted after so many seconds; no write takes as long.
ABANDONED_SECONDS = 600.0
WAITING = 8  # entries that wait to be written
NAMED = 5  # damaged files that the log names


class DiskStore:
    """Entries on disk, which several processes may use at the same time.

    A file gets its name when it is complete. It is read as a whole, and its checksum is compared: a damaged file is deleted,
    counted, and not an entry. Entries of one model are in a directory of their own; the limit is one for all of them.

    Args:
        root: the directory, for all models; created if it does not exist.
        model: names the model, its code, and how entries are stored: `[0-9a-f]+`.
        limit: bytes of all files in `root`.

    Attributes:
        damaged: how many files could not be read.
        deleted: how many files were deleted to make room.

    Raises:
        ValueError: if the directory cannot be written.
    """

    def __init__(self, root: str | Path, model: str, limit: int) -> None:
        self.root, self.limit = Path(root), limit
        self.directory = self.root / model
        self.damaged = self.deleted = 0
        self._lock = threading.Lock()
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{str(root)!r} cannot hold images ({error}); pass a directory that can be written.") from error
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise ValueError(f"{str(self.directory)!r} cannot be written; pass another directory.")
        self._sweep()
        self._make_room(0)

    def path(self, key: str) -> Path:
        """The file of an entry."""
        return self.directory / f"{key}{SUFFIX}"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def __len__(self) -> int:
        return sum(1 for _ in self.directory.glob(f"*{SUFFIX}"))

    @property
    def bytes(self) -> int:
        """The size of all files, those of other models included."""
        return sum(size for _, size, _ in self._files())

    def get(self, key: str) -> Tensors | None:
        """An entry; None if there is none, or its file is damaged."""
        path = self.path(key)
        try:
            data = path.read_bytes()  # opened once, as another process may delete it
        except FileNotFoundError:
            return None
        try:
            metadata, tensors = _metadata(data), load(data)
        except (SafetensorError, ValueError) as error:
            self._discard(path, str(error))
            return None
        if metadata.get("key") != key or metadata.get("checksum") != checksum(tensors):
            self._discard(path, "its checksum is another one")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the least recently used is the one that was modified first
        return tensors

    def put(self, key: str, tensors: Tensors) -> bool:
        """Write an entry, unless it is there.

        Returns:
            False if it is larger than the limit, or could not be written, which the log says.
        """
        path, size = self.path(key), nbytes(tensors) + 4096  # with the header
        if path.exists():
            return True
        if size > self.limit:
            return False
        with self._lock:
            try:
                self._make_room(size)
                with atomic_path(path, concurrent=True) as partial:
                    save_file(tensors, partial, {"key": key, "checksum": checksum(tensors)})
            except (OSError, SafetensorError) as error:
                logger.warning("An image could not be kept in %s: %s", self.directory, error)
                return False
            self._make_room(0)  # other processes may have written meanwhile
        return True

    def _discard(self, path: Path, reason: str) -> None:
        self.damaged += 1
        if self.damaged <= NAMED:
            logger.warning("Deleted %s, which is damaged (%s); its image is encoded again.", path, reason)
        with contextlib.suppress(OSError):
            path.unlink()

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of the last use, bytes, path) of all entries of all models."""
        found = []
        for path in self.root.glob(f"*/*{SUFFIX}*"):
            with contextlib.suppress(OSError):  # deleted meanwhile
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _make_room(self, size: int) -> None:
        files = self._files()
        surplus = sum(own for _, own, _ in files) + size - self.limit
        for _, own, path in sorted(files):
            if surplus <= 0:
                return
            if path.suffix == SUFFIX:  # others are being written
                with contextlib.suppress(OSError):
                    path.unlink()
                    self.deleted += 1
                    surplus -= own

    def _sweep(self) -> None:
        """Delete the partial files of processes that are gone."""
        for path in self.root.glob(f"*/*{SUFFIX}.*.partial"):
            process = path.name.split(".")[-2]
            with contextlib.suppress(OSError):
                is_old = time.time() - path.stat().st_mtime > ABANDONED_SECONDS
                if is_old or not process.isdigit() or not _is_running(int(process)):
                    path.unlink()


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: its header is JSON, after eight bytes with its length."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found = header.get("__metadata__") if isinstance(header, dict) else None
    return found if isinstance(found, dict) else {}


def _is_running(process: int) -> bool:
    """Whether a process of this machine runs. (On a shared disk, other machines' numbers may be taken for it: their partial
    files are deleted when they are old.)"""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def checksum(tensors: Tensors) -> str:
    """A hash of names, types, shapes and numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_buffer(tensor))
    return digest.hexdigest()


class DiskWriter:
    """Writes entries in a thread of its own, which starts with the first.

    Args:
        store: where to.
    """

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self._queue: queue.Queue[tuple[str, Tensors]] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def put(self, key: str, tensors: Tensors) -> bool:
        """Write an entry later; False if too many are waiting already."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dsvl-image-library", daemon=True)
                self._thread.start()
        try:
            self._queue.put_nowait((key, tensors))
        except queue.Full:
            return False
        return True

    def flush(self) -> None:
        """Wait until everything is written."""
        self._queue.join()

    def _run(self) -> None:
        while True:
            key, tensors = self._queue.get()
            try:
                self._store.put(key, tensors)
            finally:
                del tensors
                self._queue.task_done()


__all__ = ["DiskStore", "DiskWriter", "checksum"]
