"""Ends a training when one of its processes was lost.

A launcher ends the other processes of its own host. On other hosts a collective operation would wait for the lost process:
NCCL until `--ddp-timeout`, and nothing would say which process is missing. So all processes write a sign of life to a store
every `INTERVAL` seconds; the first process watches them and tells the others.
"""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

logger = logging.getLogger(__name__)

INTERVAL = 2.0  # seconds between two signs of life
SHORTEST = 5 * INTERVAL  # shorter timeouts would take a busy process for a lost one
LOST = "lost"  # key: what is known about the lost process


class Watchdog:
    """Watches all processes of a training from a thread.

    Args:
        store: a store of its own, as clients of a store do not share a thread; the first process holds the server.
        rank: index of this process.
        processes: number of processes.
        timeout: seconds without a sign of life after which a process is lost.
    """

    def __init__(self, store: dist.Store, rank: int, processes: int, timeout: float) -> None:
        self.store, self.rank, self.processes, self.timeout = store, rank, processes, timeout
        self._stopped = threading.Event()
        self._beats = 0
        store.set(f"host/{rank}", socket.gethostname())
        self._first = self._name(0)  # the store cannot be asked when the first process is lost
        self._seen: dict[int, tuple[bytes, float]] = {}  # of each process: its last sign of life, and when it came
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; the other processes no longer expect signs of life of this one."""
        self._stopped.set()
        self._thread.join()
        self.store.set(f"beat/{self.rank}", "stopped")

    def leave(self, reason: str) -> None:
        """Stop watching because this process ends with an error, and let the others end too."""
        self._stopped.set()
        self._thread.join()
        try:
            if not self.store.check([LOST]):
                self.store.set(LOST, f"{self._name(self.rank)} ended with an error: {reason}")
        except dist.DistError:  # the first process, which holds the store, has ended before
            return

    def await_verdict(self) -> None:
        """Wait until it is known which process was lost. Returns only if none is, or this process is the last one."""
        self._thread.join(self.timeout + 3 * INTERVAL)

    def _name(self, rank: int) -> str:
        return f"process {rank} on {self.store.get(f'host/{rank}').decode()}"

    def _watch(self) -> None:
        while not self._stopped.wait(INTERVAL):
            try:
                lost = self._beat()
            except dist.DistError:
                lost = f"{self._first} has ended, or cannot be reached"
            if lost is not None and not self._stopped.is_set():
                self._end(lost)

    def _beat(self) -> str | None:
        """Give a sign of life; returns what is known about a lost process."""
        self._beats += 1
        self.store.set(f"beat/{self.rank}", str(self._beats))
        if self.rank == 0 and (missing := self._find_missing()) is not None:
            self.store.set(LOST, missing)
        return self.store.get(LOST).decode() if self.store.check([LOST]) else None

    def _find_missing(self) -> str | None:
        """What to say about a process without a sign of life; None if there is none."""
        now = time.monotonic()
        for rank in range(1, self.processes):
            key = f"beat/{rank}"
            beat = self.store.get(key) if self.store.check([key]) else b""
            last, since = self._seen.setdefault(rank, (beat, now))
            if beat != last:
                self._seen[rank] = (beat, now)
            elif beat != b"stopped" and now - since > self.timeout:
                return (
                    f"{self._name(rank)} has given no sign of life for {self.timeout:g} seconds: it was killed, or is stuck"
                )
        return None

    def _end(self, lost: str) -> None:
        """End this process, whose main thread may wait for the lost one in a collective operation."""
        if self.rank == 0 or os.environ.get("LOCAL_RANK", "0") == "0":  # once on each host
            print(
                f"\ndsvl train: {lost}. All processes end; start the same command again to resume from the last complete "
                "checkpoint.",
                file=sys.stderr,
                flush=True,
            )
        if self.rank == 0:
            time.sleep(2 * INTERVAL)  # the others read it from the store of this process
        os._exit(1)


@contextmanager
def watching(timeout: float) -> Iterator[None]:
    """Within this context, the loss of a process ends all others.

    Args:
        timeout: seconds without a sign of life after which a process is lost; 0 does not watch.
    """
    if timeout == 0 or not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    watchdog = Watchdog(_open_store(timeout), dist.get_rank(), dist.get_world_size(), timeout)
    try:
        yield
    except BaseException as error:  # KeyboardInterrupt and SystemExit too: this process ends
        if _follows_from_a_loss(error):
            logger.error("%s. Waiting up to %g seconds to learn which process was lost.", _first_line(error), timeout)
            watchdog.await_verdict()
        watchdog.leave(_first_line(error))
        raise
    watchdog.stop()
    dist.barrier()  # the store ends with the first process


def _open_store(timeout: float) -> dist.TCPStore:
    """A store of the watchdogs, on a free port of the first process."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    wait = timedelta(seconds=timeout)
    if dist.get_rank() == 0:
        server = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=wait)
        dist.broadcast_object_list([server.port], src=0)
        return server
    port = [0]
    dist.broadcast_object_list(port, src=0)
    return dist.TCPStore(address, port[0], is_master=False, wait_for_workers=False, timeout=wait)


def _follows_from_a_loss(error: BaseException) -> bool:
    """Whether an error is that of a collective operation whose peer has gone. Gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
