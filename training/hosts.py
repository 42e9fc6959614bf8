"""Directories of several hosts: shared by all of them, or one on each.

The first process of each directory is its *leader*. In a shared directory there is one, process 0. On separate disks process
0's host gets the files that the Trainer writes once (weights, optimizer states, the trained model), and every host those of
its own processes (random states, partitions of ZeRO). What another host needs is sent to it: checkpoints when a run resumes,
models when they are complete.
"""

import copy
import logging
import os
import uuid
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from ..utils.atomic_files import atomic_path

logger = logging.getLogger(__name__)

CHUNK = 1 << 24  # bytes that are sent at once
SENT_LAST = ("config.json", "complete.json")  # they make a directory a model, and a checkpoint complete

T = TypeVar("T")


class Hosts:
    """The processes of a training, as far as they see the same directory. All processes must create it together.

    Args:
        directory: the directory; it is created.

    Attributes:
        members: the processes that see the directory of this process.
        leaders: the first process of each directory.

    Raises:
        ValueError: if it has another name on another host.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.members, self.leaders, self.rank = [0], [0], 0
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        self.rank = dist.get_rank()
        self.members = self._find_members()
        seen: list[tuple[list[int], str]] = [([], "") for _ in range(dist.get_world_size())]
        dist.all_gather_object(seen, (self.members, str(self.directory)))
        for rank, (_, name) in enumerate(seen):  # checkpoints refer to each other by it
            if name != seen[0][1]:
                raise ValueError(
                    f"process {rank} has the directory {name}, but process 0 {seen[0][1]}; pass the same on all hosts."
                )
        self.leaders = sorted({members[0] for members, _ in seen})
        # Files are sent through main memory, with any backend.
        self._group = dist.new_group(self.leaders, backend="gloo") if self.separate else None

    @property
    def separate(self) -> bool:
        """Whether there is more than one directory."""
        return len(self.leaders) > 1

    @property
    def leads(self) -> bool:
        """Whether this process is the leader of its directory."""
        return self.rank == self.members[0]

    def _find_members(self) -> list[int]:
        """Every process writes a file of its own, and looks which files of the others it sees."""
        token = [uuid.uuid4().hex]  # a new name, which no file system has cached as missing
        dist.broadcast_object_list(token, src=0)
        self.directory.mkdir(parents=True, exist_ok=True)
        own = self.directory / f".process-{token[0]}-{self.rank}"
        own.touch()
        dist.barrier()
        found = [int(path.name.rsplit("-", 1)[1]) for path in self.directory.glob(f".process-{token[0]}-*")]
        dist.barrier()
        own.unlink()
        return sorted(found)

    def each(self, work: Callable[[], T]) -> T | None:
        """Run a function in the leader of each directory; all processes wait, and raise the error of any of them.

        Returns:
            The function's result in leaders, None in other processes.
        """
        result: T | None = None
        failure: Exception | None = None
        if self.leads:
            try:
                result = work()
            except (ValueError, OSError) as error:
                failure = error
        if dist.is_initialized():
            failures: list[Exception | None] = [None] * dist.get_world_size()
            dist.all_gather_object(failures, failure)
            failure = next((one for one in failures if one is not None), None)
        if failure is not None:
            raise failure
        return result

    def at(self, directory: Path) -> "Hosts":
        """The same hosts with another directory on the same disks."""
        other = copy.copy(self)
        other.directory = directory
        return other

    def gather(self, collect: Callable[[], T]) -> list[T]:
        """What a function returns in each leader, in the order of the leaders; all processes must call it."""
        if not self.separate:
            return [collect()]
        found: list[T | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, collect() if self.leads else None)
        return [found[leader] for leader in self.leaders]  # type: ignore[misc]

    def share(self, list_files: Callable[[], Iterable[Path]], overwrite: bool = False) -> None:
        """Send files to the directories in which they are missing or have another size. All processes must call it.

        An error in one process is not caught, as the others are in the middle of a transfer.

        Args:
            list_files: the files of this process's directory that others may need; called in leaders.
            overwrite: whether process 0's files replace files of the same size too, *optional*, defaults to False.
        """
        if not self.separate:
            return
        if self.leads:
            self._share(list(list_files()), overwrite)
        dist.barrier()

    def _share(self, files: list[Path], overwrite: bool) -> None:
        own = {path.relative_to(self.directory).as_posix(): path.stat().st_size for path in files}
        listings: list[dict[str, int]] = [{} for _ in self.leaders]
        dist.all_gather_object(listings, own, group=self._group)
        sent = 0
        # Last, what says that the others are there.
        for name in sorted(set().union(*listings), key=lambda name: (Path(name).name in SENT_LAST, name)):
            owner = next(index for index, listing in enumerate(listings) if name in listing)
            size, replaces = listings[owner][name], overwrite and owner == 0
            if replaces or any(listing.get(name) != size for listing in listings):
                self._send(name, size, self.leaders[owner], replaces or own.get(name) != size)
                sent += size
        if sent:
            logger.info("Sent %.3f GiB of %s between the hosts.", sent / 2**30, self.directory)

    def _send(self, name: str, size: int, owner: int, receives: bool) -> None:
        """Broadcast a file from its owner among the leaders; those that lack it write it."""
        path = self.directory / name
        if self.rank == owner:
            with path.open("rb") as file:
                for _ in range(0, size, CHUNK):
                    block = torch.frombuffer(bytearray(file.read(CHUNK)), dtype=torch.uint8)
                    dist.broadcast(block, owner, group=self._group)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) if receives else nullcontext(Path(os.devnull)) as target, target.open("wb") as file:
            for start in range(0, size, CHUNK):
                block = torch.empty(min(CHUNK, size - start), dtype=torch.uint8)
                dist.broadcast(block, owner, group=self._group)
                file.write(block.numpy().tobytes())
