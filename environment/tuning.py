"""`dsvl env --tune`."""

import sys

import torch

from ..acceleration.attention.kernel_check import check_kernels
from ..acceleration.attention.kernel_choice import unsupported
from ..acceleration.attention.kernel_timings import HEAD_DIMS, cache_file, identity, tune


def tune_devices() -> None:
    """Time attention on each NVIDIA GPU of a kind, where the fused kernels are right, and say so on standard error.

    Raises:
        ValueError: if there is no GPU for which the kernels are written.
    """
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    refused = {device: unsupported(device) for device in devices}
    usable = [device for device in devices if refused[device] is None]
    if not usable:
        found = "; ".join(f"{device}: {reason}" for device, reason in refused.items()) or "no GPU was found"
        raise ValueError(
            f"--tune times the fused kernels, which need an NVIDIA GPU of compute capability 8.0 on, and Triton ({found}); "
            "run it on such a machine, or leave --tune out."
        )
    seen = []
    for device in usable:
        if identity(device) in seen:
            continue
        seen.append(identity(device))
        head_dims = []
        for head_dim in HEAD_DIMS:
            right, reason = check_kernels(device, torch.bfloat16, head_dim, 1, 0.0)
            if right:
                head_dims.append(head_dim)
            else:
                print(f"{device}: heads of {head_dim} are not timed: {reason}", file=sys.stderr)
        for times in tune(device, tuple(head_dims)) if head_dims else ():
            chosen = "fused kernels" if times.faster else "gathered sdpa"
            print(f"{device}: heads of up to {times.head_dim}: {chosen} ({times})", file=sys.stderr)
        print(f"{device}: kept in {cache_file(device)}", file=sys.stderr)
