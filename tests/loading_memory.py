"""`dsvl.training` in a process that writes how many bytes of its own it took at most: those of mapped files are shared by
all processes, and not counted.

torchrun tests/loading_memory.py FOLDER FLAGS ...    # writes FOLDER/RANK: until the model is loaded, until the first step
"""

import json
import os
import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dsvl import DSVLForConditionalGeneration


def memory() -> int:
    """Bytes of this process that are no pages of a file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


if __name__ == "__main__":
    from dsvl.training.trainer import DSVLTrainer

    file = Path(sys.argv.pop(1), os.environ["RANK"])
    load, step = DSVLForConditionalGeneration.from_pretrained.__func__, DSVLTrainer.training_step  # type: ignore[attr-defined]
    found: list[int] = []

    def watch() -> None:
        while True:
            found.append(memory())
            time.sleep(0.02)

    def write() -> None:
        found.append(memory())
        most = max(found) - found[0]
        file.write_text(json.dumps([*json.loads(file.read_text()), most] if file.exists() else [most]))

    def loaded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(memory())
        threading.Thread(target=watch, daemon=True).start()
        model = load(cls, *args, **kwargs)
        write()
        return model

    def stepped(*args: Any, **kwargs: Any) -> Any:
        write()
        return step(*args, **kwargs)

    DSVLForConditionalGeneration.from_pretrained = classmethod(loaded)  # type: ignore[assignment]
    DSVLTrainer.training_step = stepped  # type: ignore[method-assign]
    runpy.run_module("dsvl.training", run_name="__main__")
