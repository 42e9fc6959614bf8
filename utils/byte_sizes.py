"""Sizes in bytes as people write them, such as `8GiB`, and how much memory is available."""

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
}


def parse_size(text: str) -> int:
    """The bytes of a size: a number with a unit, such as `8GiB`, `500MB` or `1.5T` (as TiB).

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!r} is not a size in bytes; pass a number with a unit, such as 8GiB or 500MB.")
    return int(float(match[1]) * units[match[2].lower()])


def format_size(size: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:.4g} {units[0]}"


def available_host_memory() -> int:
    """Bytes of main memory that processes can still allocate, within the limit of a container (cgroups)."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 2**33
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            figures = dict(line.split(":", 1) for line in file)
        available = int(figures["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # another system than Linux
        pass
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit, open("/sys/fs/cgroup/memory.current") as used:
            most = limit.read().strip()
            if most != "max":
                available = min(available, max(int(most) - int(used.read()), 0))
    except OSError:  # no container, or cgroups of version 1
        pass
    return available


def available_memory(device: "torch.device") -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_host_memory()


__all__ = ["available_host_memory", "available_memory", "format_size", "parse_size"]
