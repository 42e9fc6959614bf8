"""Pinned main memory for images. torch rounds each pinned tensor up to a power of two, which can double its size; here
tensors are parts of a few large slabs."""

import ctypes
import weakref
from collections import deque
from threading import RLock

import torch

from .memory_tier import Tensors

MAX_SLAB = 2**31
ALIGNMENT = 512  # of tensors, in bytes


class PinnedArena:
    """Slabs of pinned memory, allocated when they are needed. All methods may be called by several threads.

    Args:
        limit: of all slabs together, in bytes.

    Attributes:
        largest: the size of the largest slab, in bytes, which bounds what is copied at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.largest = self._slab_size(limit)
        self._slabs: list[torch.Tensor] = []
        self._free: list[list[tuple[int, int]]] = []  # (start, end) of each slab, in order
        # Parts that were freed. Python frees objects anywhere, also while other locks are held, so no lock is taken for it.
        self._released: deque[tuple[int, int, int]] = deque()
        self._lock = RLock()

    @property
    def bytes(self) -> int:
        """Of all slabs."""
        return sum(slab.nbytes for slab in self._slabs)

    @staticmethod
    def _slab_size(room: int) -> int:
        """The largest power of two that fits; torch would take more for other sizes."""
        return min(MAX_SLAB, 2 ** (max(room, 1).bit_length() - 1))

    def copy(self, tensors: Tensors) -> Tensors | None:
        """Copies of tensors in pinned memory, which is free again when the last of them is deleted; None without room
        for them in one slab."""
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values()]
        buffer = self._allocate(sum(sizes))
        if buffer is None:
            return None
        made, start = {}, 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a copy from what was here before may still be running
        for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
            flat = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            made[name] = flat.view(tensor.shape).copy_(tensor)
            start += size
        return made

    def _allocate(self, size: int) -> ctypes.Array[ctypes.c_char] | None:
        with self._lock:
            self._reclaim()
            for number, free in enumerate(self._free):
                for index, (start, end) in enumerate(free):
                    if end - start >= size:
                        free[index : index + 1] = [(start + size, end)] if end - start > size else []
                        return self._buffer(number, start, size)
            slab = self._slab_size(self.limit - self.bytes)
            if size > slab:
                return None
            self._slabs.append(torch.empty(slab, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))
            self._free.append([(size, slab)] if size < slab else [])
            return self._buffer(len(self._slabs) - 1, 0, size)

    def _buffer(self, slab: int, start: int, size: int) -> ctypes.Array[ctypes.c_char]:
        """A part of a slab that Python frees like an object; tensors hold on to it."""
        buffer = (ctypes.c_char * size).from_address(self._slabs[slab].data_ptr() + start)
        weakref.finalize(buffer, self._released.append, (slab, start, start + size)).atexit = False
        return buffer

    def _reclaim(self) -> None:
        """Make what was freed available. The lock is held."""
        while self._released:
            slab, start, end = self._released.popleft()
            joined: list[tuple[int, int]] = []
            for one in sorted([*self._free[slab], (start, end)]):
                if joined and joined[-1][1] == one[0]:
                    joined[-1] = joined[-1][0], one[1]
                else:
                    joined.append(one)
            self._free[slab] = joined


__all__ = ["PinnedArena"]
