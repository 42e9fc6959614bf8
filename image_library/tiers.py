"""Where an image library keeps its entries: GPU memory, main memory and disk."""

import logging
from pathlib import Path
from threading import RLock

import torch

from ..utils.byte_sizes import available_memory, format_size
from .disk_store import DiskStore, DiskWriter
from .memory_tier import Lease, MemoryTier, Tensors, nbytes
from .pinned_arena import PinnedArena

logger = logging.getLogger(__name__)
DEVICE_SHARE = 4  # a quarter of main memory's size, and at most of the free GPU memory
NOT_KEPT = 5  # how often the log says that an image was not kept


class ImageTiers:
    """Entries by name. What is in GPU memory is in main memory too, and what is in main memory is on disk, if there is room.

    Args:
        device: the model's.
        memory_bytes, device_bytes: see `ImageLibrary`.

    Attributes:
        memory, device, disk: the tiers; None without a GPU, or a directory.
        uses_disk: whether entries are read from disk and written at present.
        disk_hits: how many entries were read from disk.
        unwritten: the names of entries that are not on disk, as too many others were waiting.
    """

    def __init__(self, device: torch.device, memory_bytes: int, device_bytes: int | None) -> None:
        self.memory = MemoryTier(memory_bytes)
        self.device: MemoryTier | None = None
        self.arena: PinnedArena | None = None
        if device.type == "cuda":
            self.arena = PinnedArena(memory_bytes)
            default = min(memory_bytes, available_memory(device)) // DEVICE_SHARE
            self.device = MemoryTier(default if device_bytes is None else device_bytes)
        self.disk: DiskStore | None = None
        self.writer: DiskWriter | None = None
        self.uses_disk, self.disk_hits = True, 0
        self.unwritten: set[str] = set()
        self._device = device
        self._version = 0  # how often it was cleared
        self._not_kept = 0
        self._lock = RLock()

    def open_directory(self, directory: str | Path, model: str, limit: int) -> None:
        """Also keep entries on disk; for the arguments see `DiskStore`."""
        self.disk = DiskStore(directory, model, limit)
        self.writer = DiskWriter(self.disk)

    def get(self, name: str) -> Tensors | None:
        """An entry in main memory, read from disk if necessary."""
        found = self.memory.get(name)
        if found is not None or self.disk is None:
            return found
        with self._lock:
            version, is_read = self._version, self.uses_disk
        if not is_read or (found := self.disk.get(name)) is None:
            return None
        with self._lock:
            if version != self._version:  # it is of other weights
                return None
            self.disk_hits += 1
            self.store(name, found)
        return self.memory.get(name) or found

    def get_on_device(self, name: str, held: Tensors | None = None) -> Tensors | None:
        """An entry on the model's device.

        Args:
            held: *optional*, the entry in main memory.
        """
        found = None if self.device is None else self.device.get(name)
        if found is None or held is None:
            held = held or self.get(name)  # in main memory it is used, too
        if held is None:
            return found
        if name in self.unwritten:
            self._write(name, held)
        if self.device is None:
            return held
        if found is None:
            found = {part: tensor.to(self._device, non_blocking=True) for part, tensor in held.items()}
            self.device.put(name, found)
        return found

    def lease(self, name: str) -> Lease | None:
        """An entry in main memory, read from disk if necessary, for as long as the lease exists."""
        lease = self.memory.lease(name)
        if lease is None and self.get(name) is not None:
            lease = self.memory.lease(name)
        return lease

    def keep(self, name: str, tensors: Tensors) -> None:
        """Add an entry to all tiers.

        Args:
            tensors: on the model's device; nobody else changes them.
        """
        if not self.store(name, tensors):
            self._not_kept += 1
            if self._not_kept <= NOT_KEPT:
                logger.warning(
                    "An image of %s was not kept: all %s of the library are in use. Give it more memory (--image-cache).",
                    format_size(nbytes(tensors)),
                    format_size(self.memory.limit),
                )
        if self.device is not None:
            self.device.put(name, tensors)
        kept = self.memory.get(name)
        if kept is not None:
            self._write(name, kept)

    def store(self, name: str, tensors: Tensors) -> bool:
        """Add an entry to main memory, pinned for a GPU; returns whether there is room."""
        if self.arena is None:
            return self.memory.put(name, tensors)
        if nbytes(tensors) > self.arena.largest:
            return False
        while (pinned := self.arena.copy(tensors)) is None:
            if not self.memory.drop_one():
                return False
        return self.memory.put(name, pinned)

    def clear(self) -> None:
        """Drop everything in memory."""
        with self._lock:
            self._version += 1
            self.memory.clear()
            self.unwritten.clear()
            self.free_device()

    def free_device(self) -> None:
        """Drop what is in GPU memory."""
        if self.device is not None:
            self.device.clear()

    def flush(self) -> None:
        """Wait until everything is written."""
        if self.writer is not None:
            self.writer.flush()

    def _write(self, name: str, tensors: Tensors) -> None:
        if self.writer is not None and self.uses_disk:
            is_waiting = self.writer.put(name, tensors)
            with self._lock:
                (self.unwritten.discard if is_waiting else self.unwritten.add)(name)

    def statistics(self) -> dict[str, int]:
        """Counts and bytes."""
        figures = {"images": len(self.memory), "bytes": self.memory.bytes, "evicted": self.memory.evicted}
        if self.device is not None:
            figures |= {"device_images": len(self.device), "device_bytes": self.device.bytes}
        if self.disk is not None:
            figures |= {"disk_hits": self.disk_hits, "disk_bytes": self.disk.bytes, "disk_deleted": self.disk.deleted}
            figures |= {"damaged": self.disk.damaged, "unwritten": len(self.unwritten)}
        return figures

    def describe(self) -> str:
        """The sizes of the tiers."""
        sizes = [f"{format_size(self.memory.limit)} of main memory"]
        if self.device is not None:
            sizes.insert(0, f"{format_size(self.device.limit)} of GPU memory")
        if self.disk is not None:
            sizes.append(f"{format_size(self.disk.limit)} in {self.disk.root}")
        return ", ".join(sizes)


__all__ = ["ImageTiers"]
