"""Running a script in a fresh process that can import the packages of this environment, except `dsvl`."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HIDDEN = ("dsvl", "__editable__")


def packages_without_dsvl(view: Path) -> list[Path]:
    """Make directories of links to every installed package except `dsvl`.

    Args:
        view: a directory for the links.

    Returns:
        One directory for each package directory of this process, in the same order.
    """
    sources = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    views = []
    for number, source in enumerate(sources):
        target = view / str(number)
        target.mkdir(parents=True)
        for entry in source.iterdir():
            if not entry.name.lower().startswith(HIDDEN):
                (target / entry.name).symlink_to(entry.resolve())
        views.append(target)
    return views


def run_without_dsvl(script: Path, *arguments: str | Path, capture: bool = False) -> "subprocess.CompletedProcess[str]":
    """Run a copy of a script from an empty directory, offline and with a fresh cache for remote code.

    Args:
        script: the Python file.
        arguments: paths, made absolute.
        capture: capture the output, and return the finished process whatever its exit status is.

    Raises:
        subprocess.CalledProcessError: if the script fails and `capture` is False.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        views = packages_without_dsvl(folder / "packages")
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        copied = shutil.copy(script, elsewhere)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, views)),
            "HF_MODULES_CACHE": str(folder / "modules"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums have the same order as in this process
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait slow small models down
        }
        # -S and -s: no site directories, whose .pth files would make an editable install of dsvl importable again.
        command = [sys.executable, "-S", "-s", str(copied), *(str(Path(argument).absolute()) for argument in arguments)]
        return subprocess.run(command, cwd=elsewhere, env=environment, check=not capture, capture_output=capture, text=True)


def check_standalone(checkpoint: str | Path) -> dict[str, Any]:
    """Load a checkpoint in a fresh process without `dsvl` and answer a question; see `standalone_check.check`.

    Args:
        checkpoint: the directory.

    Returns:
        What `standalone_check.check` returns.

    Raises:
        ValueError: with the end of the process's error output, if it fails.
    """
    script = Path(__file__).with_name("standalone_check.py")
    process = run_without_dsvl(script, checkpoint, capture=True)
    if process.returncode != 0:
        output = "\n".join(process.stderr.strip().splitlines()[-8:])
        raise ValueError(f"{checkpoint} does not load in a process without the package dsvl:\n{output}")
    return json.loads(process.stdout.splitlines()[-1])
