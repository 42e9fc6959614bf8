"""A process whose children write to directories of an image library.

    python library_writers.py DIRECTORY

Ten children write to DIRECTORY/killed one after the other, and are killed at random moments; two to DIRECTORY/shared at the
same time. Each reads and writes entries at random, and fails if one is not what was written under its key. Standard output:
the exit status of each child, negative for signals.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from dsvl.image_library.disk_store import DiskStore
from dsvl.image_library.memory_tier import Tensors

ENTRIES, LIMIT = 12, 2**21


def entry(number: int, numbers: int = 20_000) -> Tensors:
    generator = torch.Generator().manual_seed(number)
    keys, values = (torch.randn(2, numbers, 3, generator=generator).to(torch.bfloat16) for _ in range(2))
    return {"keys": keys, "values": values}


def same(one: Tensors | None, other: Tensors) -> bool:
    return one is not None and one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def write(directory: Path, seed: int, steps: int) -> int:
    store, generator = DiskStore(directory, "abc", LIMIT), random.Random(seed)
    entries = [entry(number) for number in range(ENTRIES)]
    for _ in range(steps):
        number = generator.randrange(ENTRIES)
        found = store.get(str(number))
        if found is not None and not same(found, entries[number]):
            return 1
        store.put(str(number), entries[number])
    return 2 if store.damaged else 0


def start(directory: Path, seed: int, steps: int) -> int:
    child = os.fork()
    if child == 0:
        status = 3
        try:
            status = write(directory, seed, steps)
        except Exception:  # which os._exit would not print
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    children = []
    for seed in range(10):
        children.append(start(directory / "killed", seed, 10**6))
        time.sleep(random.Random(seed).uniform(0.05, 0.3))
        os.kill(children[-1], signal.SIGKILL)
    children += [start(directory / "shared", seed, 100) for seed in range(2)]
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    main()
