"""A tier of an image library in memory: entries by key, the least recently used dropped first, bounded in bytes."""

from collections import OrderedDict
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def nbytes(tensors: Tensors) -> int:
    """The memory of an entry."""
    return sum(tensor.nbytes for tensor in tensors.values())


def as_buffer(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor in main memory, for hashes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


@dataclass(eq=False)
class _Entry:
    tensors: Tensors
    size: int
    leases: int = 0


class Lease:
    """The right to an entry: it is not dropped for others while the lease exists.

    Attributes:
        tensors: the entry.
    """

    def __init__(self, entry: _Entry, lock: RLock) -> None:  # type: ignore[valid-type]  # a function in typeshed
        self._entry, self._lock = entry, lock
        entry.leases += 1

    @property
    def tensors(self) -> Tensors:
        return self._entry.tensors

    def __del__(self) -> None:
        with self._lock:
            self._entry.leases -= 1


class MemoryTier:
    """Entries in memory. All methods may be called by several threads.

    Args:
        limit: its size in bytes.

    Attributes:
        bytes: of all entries.
        evicted: how many entries were dropped for others.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.evicted = limit, 0, 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently used first
        self._lock = RLock()  # reentrant, as a lease may end wherever Python frees memory

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @property
    def leased(self) -> int:
        """How many entries have leases."""
        with self._lock:
            return sum(entry.leases > 0 for entry in self._entries.values())

    def names(self) -> list[str]:
        """The keys, the least recently used first."""
        with self._lock:
            return list(self._entries)

    def get(self, key: str) -> Tensors | None:
        """An entry, which becomes the most recently used one; None if it is not there."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
            return found.tensors

    def lease(self, key: str) -> Lease | None:
        """As `get`, for as long as the lease exists."""
        with self._lock:
            return None if self.get(key) is None else Lease(self._entries[key], self._lock)

    def put(self, key: str, tensors: Tensors) -> bool:
        """Add an entry, and drop the least recently used ones without leases to make room.

        Returns:
            False if it does not fit, even then. Nothing is dropped in this case.
        """
        size = nbytes(tensors)
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return True
            surplus, dropped = self.bytes + size - self.limit, []
            for other, entry in self._entries.items():
                if surplus <= 0:
                    break
                if entry.leases == 0:
                    dropped.append(other)
                    surplus -= entry.size
            if surplus > 0:
                return False
            for other in dropped:
                self.bytes -= self._entries.pop(other).size
            self.evicted += len(dropped)
            self._entries[key] = _Entry(tensors, size)
            self.bytes += size
            return True

    def drop_one(self) -> bool:
        """Drop the least recently used entry without leases; False if there is none."""
        with self._lock:
            oldest = next((key for key, entry in self._entries.items() if entry.leases == 0), None)
            if oldest is None:
                return False
            self.bytes -= self._entries.pop(oldest).size
            self.evicted += 1
            return True

    def clear(self) -> None:
        """Forget all entries. Leases keep what they have."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0


__all__ = ["Lease", "MemoryTier", "Tensors", "as_buffer", "nbytes"]
