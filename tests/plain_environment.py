"""Python processes in which torch, transformers, Pillow and what these require can be imported, and nothing else."""

import importlib.metadata as metadata
import os
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def plain_packages(folder: Path, *roots: str) -> Path:
    """A directory of links to distributions of this environment, with all that they require.

    Args:
        folder: a new directory for the links.
        roots: names of distributions.
    """
    wanted, waiting = set(), [canonicalize_name(root) for root in roots]
    while waiting:
        name = waiting.pop()
        if name in wanted:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for other platforms, or left out: torch's CPU build names CUDA's parts
            continue
        wanted.add(name)
        parsed = [Requirement(line) for line in requirements]
        waiting += [canonicalize_name(one.name) for one in parsed if not one.marker or one.marker.evaluate({"extra": ""})]
    folder.mkdir()
    for name in wanted:
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder


def run_plainly(
    script: Path, *arguments: str | Path, packages: list[Path], home: Path, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run a script where only `packages` can be imported, with empty caches in `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    return subprocess.run(
        # -S: no site directories, so nothing of the environment itself; -s: nothing of the user
        [sys.executable, "-S", "-s", script, *map(str, arguments)],
        cwd=home,
        env=kept
        | {"PYTHONPATH": os.pathsep.join(map(str, packages)), "HF_HOME": str(home / "hub"), "HF_HUB_DISABLE_XET": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
