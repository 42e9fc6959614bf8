"""Whether the fused kernels compute a decoder's attention on a device, and why.

What they support is known without running anything (`refusal`). On a GPU for which they were not measured they are checked
at first use, in seconds; what `dsvl env --tune` measured on this device decides which is faster. The environment variable
`DSVL_FUSED_KERNELS` overrides both: `off` never uses the kernels, `on` uses them unchecked.

The decision of a process does not change. Checks of equal devices and packages have equal results; `agree` also lets the
processes of a training decide together, as all of them reach it.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from ..decoder_run import head_size
from .kernel_check import check_kernels
from .kernel_timings import tuned
from .kernels import DTYPES, MAX_HEAD_DIM, triton
from .launch_configs import device_capability

logger = logging.getLogger(__name__)

VARIABLE, SETTINGS = "DSVL_FUSED_KERNELS", ("auto", "on", "off")
# Major compute capabilities. Below the least, GPUs lack asynchronous copies and bfloat16; one generation was measured.
LEAST, MEASURED = 8, 9


def read_setting() -> str:
    """The value of the environment variable.

    Raises:
        ValueError: if it is none of `SETTINGS`.
    """
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in SETTINGS:
        raise ValueError(f"{VARIABLE}={setting!r} is not known; set it to one of {', '.join(SETTINGS)}.")
    return setting


SETTING = read_setting()  # once: compiled graphs cannot read the environment


@dataclass(frozen=True)
class Heads:
    """What the kernels are compiled for, beside a dtype.

    Attributes:
        head_dim: channels of a head.
        group_size: query heads for each key-value head.
        softcap: of the scores; 0 is none.
    """

    head_dim: int
    group_size: int = 1
    softcap: float = 0.0

    @classmethod
    def of(cls, text_config: Any) -> "Heads":
        """Of a decoder's configuration."""
        heads = text_config.num_attention_heads
        group_size = heads // (getattr(text_config, "num_key_value_heads", None) or heads)
        return cls(head_size(text_config), group_size, float(getattr(text_config, "attn_logit_softcapping", None) or 0))


@dataclass(frozen=True)
class Decision:
    """Whether the kernels are used, and why."""

    use: bool
    reason: str


DECISIONS: dict[tuple[torch.device, torch.dtype, Heads], Decision] = {}


def unsupported(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None if they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "not an NVIDIA GPU"
    if triton is None:
        return "Triton is not installed"
    if device_capability(device)[0] < LEAST:
        return f"compute capability {'.'.join(map(str, device_capability(device)))} is below 8.0"
    return None


def refusal(text_config: Any, dtype: torch.dtype, device: torch.device, training: bool = False) -> str | None:
    """Why the kernels cannot compute a decoder's attention on a device, whatever a check says; None if they can.

    Args:
        text_config: configuration of the decoder.
        dtype: dtype of queries, keys and values; bfloat16 or float16.
        device: device of queries, keys and values.
        training (*optional*, defaults to `False`): whether the decoder trains. The kernels have no attention dropout.
    """
    refused = unsupported(device)
    if refused is not None:
        return refused
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not bfloat16 or float16"
    if head_size(text_config) > MAX_HEAD_DIM:
        return f"heads of {head_size(text_config)} channels exceed {MAX_HEAD_DIM}"
    if training and (getattr(text_config, "attention_dropout", None) or 0) > 0:
        return f"attention_dropout={text_config.attention_dropout} in training"
    return None


def has_step_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether decode steps, and compiled prompts of text over a KV cache, have kernels for their attention and linear layers
    on a device: on a GPU of the generation that was measured, or where fused kernels are switched on.

    Args:
        device: device of the decoder.
        dtype: dtype of its activations.
    """
    if unsupported(device) is not None or dtype not in DTYPES or SETTING == "off":
        return False
    capability = device_capability(device)
    return capability[0] == MEASURED or (SETTING == "on" and capability >= (8, 9))  # those before have no E4M3


def can_fuse(text_config: Any, dtype: torch.dtype, device: torch.device, training: bool = False) -> bool:
    """Whether the kernels compute a decoder's attention on a device; for the arguments see `refusal`.

    The first call for a GPU that was not measured takes seconds. While the whole model is compiled nothing can be checked,
    and the kernels are used on a GPU that was measured; while a graph is captured, also where they are checked already.
    """
    if refusal(text_config, dtype, device, training) is not None:
        return False
    unchecked = SETTING == "on" or (SETTING == "auto" and device_capability(device)[0] == MEASURED)
    if torch.compiler.is_compiling():
        return unchecked
    key = device, dtype, Heads.of(text_config)
    if key not in DECISIONS:
        if torch.cuda.is_current_stream_capturing():
            return unchecked
        _record(key, decide(*key))
    return DECISIONS[key].use


def decide(device: torch.device, dtype: torch.dtype, heads: Heads) -> Decision:
    """Decide for heads that the kernels support: by the setting, measured times, and a check."""
    if SETTING != "auto":
        return Decision(SETTING == "on", f"{VARIABLE}={SETTING}")
    times = tuned(device, heads.head_dim)
    if times is not None and not times.faster:
        return Decision(False, f"slower on this device: {times}")
    speed = f"; {times}" if times is not None else ""
    if device_capability(device)[0] == MEASURED:
        return Decision(True, f"measured on Hopper GPUs{speed}")
    right, found = check_kernels(device, dtype, heads.head_dim, heads.group_size, heads.softcap)
    return Decision(right, found + speed)


def decision(text_config: Any, dtype: torch.dtype, device: torch.device, training: bool = False) -> Decision:
    """As `can_fuse`, with the reason."""
    refused = refusal(text_config, dtype, device, training)
    if refused is not None:
        return Decision(False, refused)
    can_fuse(text_config, dtype, device, training)
    return DECISIONS[device, dtype, Heads.of(text_config)]


def agree(text_config: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Decide in all processes of a job together: if the kernels fail in one, none uses them.

    A collective if `torch.distributed` is initialized, which every process must call. Processes whose device cannot run the
    kernels take part.
    """
    own = decision(text_config, dtype, device)
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    decisions: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(decisions, (own.use, own.reason))
    failed = next((rank for rank, (use, _) in enumerate(decisions) if not use), None)
    if own.use and failed is not None:
        _record((device, dtype, Heads.of(text_config)), Decision(False, f"process {failed}: {decisions[failed][1]}"))


def _record(key: tuple[torch.device, torch.dtype, Heads], decided: Decision) -> None:
    """Keep a decision, and log it once."""
    device, dtype, heads = key
    DECISIONS[key] = decided
    logger.log(
        logging.INFO if decided.use or SETTING == "off" else logging.WARNING,
        "Fused kernels %s on %s for heads of %d in %s: %s.",
        "are used" if decided.use else "are not used",
        device,
        heads.head_dim,
        str(dtype).removeprefix("torch."),
        decided.reason,
    )


__all__ = [
    "DECISIONS",
    "SETTING",
    "VARIABLE",
    "Decision",
    "Heads",
    "agree",
    "can_fuse",
    "decide",
    "decision",
    "has_step_kernels",
    "refusal",
    "unsupported",
]
