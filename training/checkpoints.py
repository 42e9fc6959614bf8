"""Checkpoints that can be trusted: one counts only if all of its files were written."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..utils.atomic_files import partial_path, write_atomically
from ..utils.transformers_names import rotate_checkpoints

logger = logging.getLogger(__name__)

MARKER = "complete.json"  # written last: names every file of a checkpoint and its size


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint when every process has written its share; only then are older ones removed.

    The Trainer removes older checkpoints as soon as its first process has written its own files. Take `save_total_limit`
    from its arguments and pass it here, and there is a complete checkpoint at every moment.

    The loss is logged whenever a checkpoint is written, so that its mean never spans an interruption.

    Args:
        save_total_limit: how many to keep, the last and the best always among them; None for all.
    """

    def __init__(self, save_total_limit: int | None = None) -> None:
        self.save_total_limit = save_total_limit

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log |= control.should_save
        return control

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            rotate_checkpoints(
                args.output_dir, self.save_total_limit, best_model_checkpoint=state.best_model_checkpoint, use_mtime=False
            )


def mark_complete(checkpoint: Path) -> None:
    """Say that a checkpoint is complete, and what it consists of."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    write_atomically(checkpoint / MARKER, json.dumps(sizes, indent=1))


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint is not complete, or None if it is."""
    marker = checkpoint / MARKER
    if not marker.is_file():
        return f"it has no {MARKER}, so writing it was interrupted"
    try:
        sizes = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return f"{MARKER} is not JSON"
    if not isinstance(sizes, dict) or not sizes:
        return f"{MARKER} does not name its files and their sizes"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def has_optimizer_states(checkpoint: Path) -> bool:
    """Whether training can go on from a checkpoint as if it had not been interrupted: Trainer's files, or DeepSpeed's."""
    return any(path for pattern in ("optimizer*", "global_step*") for path in checkpoint.glob(pattern))


def last_complete_checkpoint(output: str | Path, put_aside: bool = False) -> str | None:
    """The checkpoint to resume from.

    Args:
        output: the Trainer's output directory.
        put_aside: rename an incomplete checkpoint that is newer, to `incomplete-N`, so that its files do not mix with those
            of the checkpoint that will be written in its place. One that was put aside before is replaced.

    Returns:
        The last complete checkpoint's directory, or None. Incomplete ones are passed over with a message.
    """
    found = {}
    for path in Path(output).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    for step in sorted(found, reverse=True):
        reason = what_is_missing(found[step])
        if reason is None:
            return str(found[step])
        logger.warning("%s is passed over: %s.", found[step], reason)
        if put_aside:
            aside = found[step].with_name(f"incomplete-{step}")
            shutil.rmtree(aside, ignore_errors=True)
            found[step].rename(aside)
    return None


def _files(checkpoint: Path) -> list[Path]:
    """All but the marker, which an earlier run may have left."""
    markers = (checkpoint / MARKER, partial_path(checkpoint / MARKER))
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path not in markers)
