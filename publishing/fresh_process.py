"""Running a script in a process where the packages of this environment can be imported, and `dsvl` cannot."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HIDDEN = ("dsvl", "__editable__")


def packages_without_dsvl(view: Path) -> list[Path]:
    """Directories that hold links to everything installed here but `dsvl`.

    Args:
        view: a directory for the links.

    Returns:
        One directory for each of this process's package directories, in the same order.
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
    """Run a copy of a script from an empty directory, with a fresh cache for remote code and no network.

    Args:
        script: the Python file.
        arguments: paths, made absolute.
        capture: keep what the script prints, and return whatever its exit status is.

    Raises:
        subprocess.CalledProcessError: if it fails, unless its output is captured.
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
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait busily slow small models down
        }
        # -S: no site directories, so no .pth file brings an editable install back; -s: none of the user's either.
        command = [sys.executable, "-S", "-s", str(copied), *(str(Path(argument).absolute()) for argument in arguments)]
        return subprocess.run(command, cwd=elsewhere, env=environment, check=not capture, capture_output=capture, text=True)
