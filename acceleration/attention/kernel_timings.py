"""Times of the fused kernels and of gathered attention on a device, kept on disk: `dsvl env --tune`."""

import hashlib
import json
import logging
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from ...masks_dsvl import visibilities
from ...utils.atomic_files import write_atomically
from ...utils.compiled_code import cache_directory
from ...utils.installed_packages import installed_version
from .gathered_mask import GatheredMask
from .kernels import fused_attention
from .token_lists import TokenLists

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)  # the kernels have a configuration for each; smaller heads use the next larger one
WIDTH = 4096  # channels of all heads
SHAPES = ((2048, 512), (8192, 4096))  # tokens, of which image tokens
IMAGE_TOKENS = 256
REPEATS = 20


@dataclass(frozen=True)
class Shape:
    """Milliseconds of one layer's attention, forward and backward, in bfloat16."""

    tokens: int
    image_tokens: int
    fused_ms: float
    gathered_ms: float


@dataclass(frozen=True)
class Times:
    """Times for heads of up to `head_dim` channels."""

    head_dim: int
    shapes: tuple[Shape, ...]

    @property
    def faster(self) -> bool:
        """Whether the fused kernels take less time over all shapes."""
        return sum(one.fused_ms for one in self.shapes) < sum(one.gathered_ms for one in self.shapes)

    def __str__(self) -> str:
        pairs = [f"{one.fused_ms:.2f} against {one.gathered_ms:.2f} ms at {one.tokens} tokens" for one in self.shapes]
        return f"tuned, fused against gathered sdpa: {', '.join(pairs)}"


def tune(device: torch.device, head_dims: tuple[int, ...] = HEAD_DIMS) -> list[Times]:
    """Time both on a device, and keep the result on disk for the processes that start later.

    Args:
        device: an NVIDIA GPU on which the kernels were found right for these heads.
        head_dims: the heads to time; what was measured for others is replaced, too.
    """
    measured = [time_heads(device, head_dim, SHAPES) for head_dim in head_dims]
    content = {"identity": identity(device), "times": [asdict(one) for one in measured]}
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n", concurrent=True)
    saved.cache_clear()
    return measured


def tuned(device: torch.device, head_dim: int) -> Times | None:
    """What `tune` measured on a device for a head size; None if it did not run, or if card or versions have changed."""
    return next((one for one in saved(device) if one.head_dim >= head_dim), None)


@lru_cache
def saved(device: torch.device) -> tuple[Times, ...]:
    """The times of a device on disk; read once."""
    path = cache_file(device)
    if not path.is_file():
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["identity"] != identity(device):
            return ()
        return tuple(Times(one["head_dim"], tuple(Shape(**shape) for shape in one["shapes"])) for one in content["times"])
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is ignored, as it cannot be read (%r); run dsvl env --tune to write it again.", path, error)
        return ()


def cache_file(device: torch.device) -> Path:
    """Where the times of a device are kept: in `$XDG_CACHE_HOME/dsvl` or `~/.cache/dsvl`, one file for each identity."""
    digest = hashlib.sha256(json.dumps(identity(device), sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / f"kernel-times-{digest}.json"


def identity(device: torch.device) -> dict[str, Any]:
    """What the times of a device depend on."""
    return {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed_version("triton"),
        "dsvl": installed_version("dsvl"),
    }


@lru_cache
def driver_version() -> str | None:
    """Version of NVIDIA's driver; None if it cannot be found."""
    module = Path("/proc/driver/nvidia/version")
    if module.is_file() and (found := re.search(r"Kernel Module\D*([\d.]+)", module.read_text(errors="replace"))):
        return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


class _Layer(nn.Module):
    """The attributes that attention functions read from their module."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.num_key_value_groups = config, 0, True, 1


def time_heads(device: torch.device, head_dim: int, shapes: tuple[tuple[int, int], ...]) -> Times:
    """Time both for one head size; masks and lists are built before, as the layers of a model share them."""
    dtype, heads, scaling = torch.bfloat16, WIDTH // head_dim, head_dim**-0.5
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        attn_implementation="sdpa",
    )
    layer, results = _Layer(config), []
    for tokens, image_tokens in shapes:
        generator = torch.Generator(device).manual_seed(0)
        gradient, *states = (
            torch.randn(1, tokens, heads, head_dim, generator=generator, device=device, dtype=dtype) for _ in range(4)
        )
        states = [x.transpose(1, 2).requires_grad_() for x in states]
        images = image_tokens // IMAGE_TOKENS
        token = torch.arange(tokens, device=device)
        types = (token % (tokens // images) < IMAGE_TOKENS).long()[None]  # images at equal distances
        embeds = torch.empty(1, tokens, 0, device=device, dtype=dtype)
        gathered = GatheredMask.build(visibilities(config, embeds, None, None, None)[None], types, config, dtype)
        lists = TokenLists.build(types == 0, types == 0, types == 1, token, rows=tokens - image_tokens)

        attentions = (
            partial(fused_attention, states[0], states[1], states[2], lists, scaling),
            partial(_gathered_attention, gathered, layer, states, scaling),
        )
        steps = [partial(_forward_and_backward, attention, states, gradient) for attention in attentions]
        fused_ms, gathered_ms = interleaved_ms(steps, device)
        results.append(Shape(tokens, image_tokens, round(fused_ms, 4), round(gathered_ms, 4)))
    return Times(head_dim, tuple(results))


def _gathered_attention(mask: GatheredMask, layer: nn.Module, states: list[torch.Tensor], scaling: float) -> torch.Tensor:
    return mask.attend("sdpa", layer, *states, scaling=scaling)[0]


def _forward_and_backward(attention: Callable[[], torch.Tensor], states: list[torch.Tensor], gradient: torch.Tensor) -> None:
    torch.autograd.grad(attention(), states, gradient)


def interleaved_ms(steps: Sequence[Callable[[], None]], device: torch.device, repeats: int = REPEATS) -> list[float]:
    """Median milliseconds of each step; the steps take turns, so that a clock that changes changes all of them."""
    times: list[list[float]] = [[] for _ in steps]
    for repeat in range(repeats + 2):
        for step, taken in zip(steps, times, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            if repeat >= 2:  # the first ones compile and warm up
                taken.append((time.perf_counter() - start) * 1000)
    return [statistics.median(taken) for taken in times]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["Shape", "Times", "cache_file", "driver_version", "identity", "saved", "tune", "tuned"]
