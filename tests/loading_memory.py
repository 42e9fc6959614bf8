"""`dsvl.training` in a process that writes how many bytes of its own loading the model took at most: those of mapped files
are shared by all processes, and not counted.

torchrun tests/loading_memory.py FOLDER FLAGS ...    # writes FOLDER/RANK
"""

import os
import runpy
import sys
import threading
from pathlib import Path
from typing import Any

from dsvl import DSVLForConditionalGeneration


def memory() -> int:
    """Bytes of this process that are no pages of a file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


if __name__ == "__main__":
    file = Path(sys.argv.pop(1), os.environ["RANK"])
    load = DSVLForConditionalGeneration.from_pretrained.__func__  # type: ignore[attr-defined]

    def measured(cls: Any, *args: Any, **kwargs: Any) -> Any:
        before, done = memory(), threading.Event()
        found = [before]

        def watch() -> None:
            while not done.wait(0.02):
                found.append(memory())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            return load(cls, *args, **kwargs)
        finally:
            done.set()
            thread.join()
            file.write_text(str(max(found) - before))

    DSVLForConditionalGeneration.from_pretrained = classmethod(measured)  # type: ignore[assignment]
    runpy.run_module("dsvl.training", run_name="__main__")
