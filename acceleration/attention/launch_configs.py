"""Block sizes and launch options of the fused kernels, by compute capability.

A configuration must fit into the shared memory of a block and into 255 registers a thread. `tests/test_kernel_targets.py`
compiles the kernels for each architecture, which needs no GPU, and holds what they take against these limits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

# Shared memory that one block may use, in KiB (CUDA C++ Programming Guide, technical specifications per compute
# capability). A capability that is not listed gets the smallest.
SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
LEAST_SHARED_MEMORY = 99  # 8.6, 8.9, 12.0 and 12.1


@dataclass(frozen=True)
class BlockConfig:
    """Block sizes and launch options of a kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, num_warps=self.num_warps, num_stages=self.num_stages)


# By the largest BLOCK_D, then by kernel. BLOCK_M of bwd_dkdv may not exceed that of fwd and bwd_dq, which write its rows.
Configs = dict[int, dict[str, BlockConfig]]

# 9.x: the fastest that were measured.
HOPPER: Configs = {
    64: {"fwd": BlockConfig(64, 64, 4, 3), "bwd_dq": BlockConfig(64, 64, 4, 3), "bwd_dkdv": BlockConfig(32, 64, 4, 3)},
    128: {"fwd": BlockConfig(64, 64, 4, 3), "bwd_dq": BlockConfig(128, 64, 8, 3), "bwd_dkdv": BlockConfig(64, 64, 4, 2)},
    256: {"fwd": BlockConfig(64, 64, 8, 2), "bwd_dq": BlockConfig(64, 64, 8, 2), "bwd_dkdv": BlockConfig(64, 64, 8, 2)},
}
# The others were compiled, not measured: large blocks that spill 16 bytes a thread at most without a softcap, with any
# number of query heads to a key-value head.
# 10.x: accumulators are in tensor memory, which leaves registers.
BLACKWELL: Configs = HOPPER | {
    128: {"fwd": BlockConfig(64, 64, 8, 2), "bwd_dq": BlockConfig(64, 64, 8, 2), "bwd_dkdv": BlockConfig(32, 64, 8, 2)},
    256: {"fwd": BlockConfig(64, 64, 8, 2), "bwd_dq": BlockConfig(64, 64, 8, 2), "bwd_dkdv": BlockConfig(32, 32, 8, 2)},
}
# Loads by pointer in 99 KiB of shared memory.
POINTERS: Configs = {
    64: {"fwd": BlockConfig(64, 64, 4, 3), "bwd_dq": BlockConfig(64, 32, 4, 2), "bwd_dkdv": BlockConfig(64, 32, 4, 2)},
    128: {"fwd": BlockConfig(128, 32, 8, 2), "bwd_dq": BlockConfig(64, 64, 8, 2), "bwd_dkdv": BlockConfig(64, 64, 8, 2)},
    256: {"fwd": BlockConfig(64, 32, 8, 2), "bwd_dq": BlockConfig(32, 32, 8, 2), "bwd_dkdv": BlockConfig(32, 32, 8, 2)},
}
# Loads by pointer in 163 KiB.
POINTERS_163: Configs = POINTERS | {
    256: {"fwd": BlockConfig(64, 64, 8, 2), "bwd_dq": BlockConfig(64, 64, 8, 2), "bwd_dkdv": BlockConfig(64, 32, 8, 2)},
}
# float32, which gives correct results but is never chosen: sizes that fit into every shared memory.
FLOAT32 = {"fwd": BlockConfig(64, 32, 4, 1), "bwd_dq": BlockConfig(64, 32, 4, 1), "bwd_dkdv": BlockConfig(32, 32, 4, 1)}


@lru_cache
def device_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU."""
    return torch.cuda.get_device_capability(device)


def shared_memory(capability: tuple[int, int]) -> int:
    """KiB of shared memory that one block may use."""
    return SHARED_MEMORY.get(capability, LEAST_SHARED_MEMORY)


def has_tma(capability: tuple[int, int]) -> bool:
    """Whether blocks are loaded by the tensor memory accelerator, through descriptors, rather than by pointers."""
    return capability[0] in (9, 10)


def block_config(name: str, packed: torch.Tensor, capability: tuple[int, int]) -> BlockConfig:
    """The configuration of a kernel.

    Args:
        name: "fwd", "bwd_dq" or "bwd_dkdv".
        packed: packed queries, keys or values, whose last dimension is BLOCK_D.
        capability: compute capability of the device.
    """
    block_d = packed.shape[3]
    if packed.element_size() == 4:
        return replace(FLOAT32[name], block_m=32) if block_d > 128 else FLOAT32[name]
    if has_tma(capability):
        configs = HOPPER if capability[0] == 9 else BLACKWELL
    else:
        configs = POINTERS_163 if shared_memory(capability) >= 163 else POINTERS
    return configs[64 if block_d <= 64 else 128 if block_d <= 128 else 256][name]


__all__ = ["BlockConfig", "block_config", "device_capability", "has_tma", "shared_memory"]
