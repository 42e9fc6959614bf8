"""Resuming a DeepSpeed run on another number of processes: its partitions become a universal checkpoint, which any can load.

The conversion is DeepSpeed's own (`deepspeed.checkpoint.ds_to_universal`). Its result is only needed until it is loaded.
"""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .batch_division import count_processes
from .distributed import on_first_process

logger = logging.getLogger(__name__)

UNIVERSAL = "universal"  # directory of the converted states in a checkpoint, until they are loaded
LATEST_UNIVERSAL = "latest_universal"  # DeepSpeed's name of the file that names it
CONVERTER = "deepspeed.checkpoint.ds_to_universal"


def partitions(checkpoint: Path) -> list[Path]:
    """The files in which ZeRO's processes saved their partitions of the optimizer states; empty without ZeRO."""
    return sorted(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))


def check_states(checkpoint: Path, stage: int | None, fsdp: bool = False) -> None:
    """Check that the optimizer states of a checkpoint are those of the requested setup.

    Args:
        checkpoint: the checkpoint to resume from.
        stage: the requested ZeRO stage; None without DeepSpeed.
        fsdp: whether FSDP is requested, *optional*, defaults to False.

    Raises:
        ValueError: if they are not, as they would not be loaded.
    """
    requested = "--fsdp" if fsdp else "neither --deepspeed nor --fsdp" if stage is None else f"ZeRO-{stage}"
    if any(checkpoint.glob("global_step*")):
        fits = stage is not None and not (partitions(checkpoint) and (stage == 3) != (_stage_of(checkpoint) == "zero3"))
        flags = f"--deepspeed {_stage_of(checkpoint)}"
    elif any(checkpoint.glob("optimizer_*/")):  # of torch.distributed.checkpoint
        fits, flags = fsdp, "--fsdp"
    else:
        fits, flags = stage is None and not fsdp, "neither --deepspeed nor --fsdp"
    if not fits:
        launcher = " (by torchrun, also in a single process: --nproc-per-node 1)" if flags == "--fsdp" else ""
        raise ValueError(
            f"{checkpoint} has the optimizer states of a run with {flags}, but this run has {requested}; pass "
            f"{flags}{launcher}, as before, or start a new run from its weights: --model {checkpoint} and another --output."
        )


def _stage_of(checkpoint: Path) -> str:
    """The configuration that wrote a checkpoint, of those of the package; stages 1 and 2 have the same files."""
    return "zero3" if any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt")) else "zero2"


def needs_conversion(checkpoint: Path, processes: int) -> bool:
    """Whether a checkpoint was partitioned for another number of processes."""
    return len(partitions(checkpoint)) not in (0, processes)


def convert(checkpoint: Path) -> None:
    """Write the universal form of a checkpoint into it, in place of what an interrupted call left.

    Raises:
        ValueError: if DeepSpeed cannot convert it.
    """
    files = partitions(checkpoint)
    logger.info("Converting the optimizer states of %s in %s.", count_processes(len(files)), checkpoint)
    remove(checkpoint)
    inputs = [sys.executable, "-m", CONVERTER, "--input_folder", str(files[0].parent)]
    outputs = ["--output_folder", str(checkpoint / UNIVERSAL), "--inject_missing_state"]
    # A process of its own, as the converter forks; without the launcher's variables, and without a device.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*inputs, *outputs], env=environment, capture_output=True, text=True)
    if done.returncode or not (checkpoint / LATEST_UNIVERSAL).is_file():
        remove(checkpoint)
        raise ValueError(
            f"DeepSpeed cannot convert {checkpoint} for another number of processes; start {count_processes(len(files))} "
            f"instead. {CONVERTER} ended with:\n{done.stderr.strip()[-2000:]}"
        )


def remove(checkpoint: Path) -> None:
    """Remove what `convert` has written."""
    (checkpoint / LATEST_UNIVERSAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)


@contextlib.contextmanager
def loadable(trainer: Any, checkpoint: str | None) -> Iterator[None]:
    """Within this context, DeepSpeed can load a checkpoint of any number of processes.

    Args:
        trainer: a trainer with DeepSpeed, before or after it has made its engine.
        checkpoint: the checkpoint to load, *optional*.
    """
    if checkpoint is None or not needs_conversion(path := Path(checkpoint), dist.get_world_size()):
        yield
        return
    each = on_first_process if trainer.hosts is None else trainer.hosts.each
    each(lambda: convert(path))
    _expect_universal(trainer, True)
    yield
    _expect_universal(trainer, False)  # other checkpoints are partitioned
    _separate_steps(trainer.deepspeed.optimizer.optimizer)
    dist.barrier()
    each(lambda: remove(path))


def _expect_universal(trainer: Any, expected: bool) -> None:
    """Set which form of a checkpoint DeepSpeed loads, in the configuration of its engine and of the next one."""
    trainer.accelerator.state.deepspeed_plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = expected
    if trainer.deepspeed is not None:
        trainer.deepspeed._config.load_universal_checkpoint = expected


def _separate_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give each state of an optimizer its own number of steps: ZeRO-3 loads one tensor, which each group would increase."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
