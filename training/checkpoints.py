"""Complete checkpoints: a checkpoint is marked when all of its files were written, and only then used."""

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

MARKER = "complete.json"  # written last: the files of a checkpoint and their sizes


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as complete when all processes have written their files, and only then removes older ones.

    The Trainer removes older checkpoints as soon as its first process has written its files. To have a complete checkpoint
    at any time, set `save_total_limit` of its arguments to None, and pass the limit here.

    The loss is logged whenever a checkpoint is written, so that logged means do not span an interruption.

    Args:
        save_total_limit: number of checkpoints to keep, *optional*, defaults to None: all. The last and the best are always
            kept.
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
    """Mark a checkpoint as complete: write its files and their sizes to `complete.json`."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    write_atomically(checkpoint / MARKER, json.dumps(sizes, indent=1))


def why_incomplete(checkpoint: Path) -> str | None:
    """The reason why a checkpoint is incomplete; None if it is complete."""
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
    """Whether a checkpoint has the optimizer states of the Trainer or DeepSpeed, which resuming needs."""
    return any(path for pattern in ("optimizer*", "global_step*") for path in checkpoint.glob(pattern))


def last_complete_checkpoint(output: str | Path, put_aside: bool = False) -> str | None:
    """Find the checkpoint to resume from.

    Args:
        output: output directory of the Trainer.
        put_aside: rename newer incomplete checkpoints to `incomplete-N`, so that their files do not mix with those of
            the checkpoint of the same step that is written next, *optional*, defaults to False. Earlier directories of that
            name are replaced.

    Returns:
        The directory of the last complete checkpoint, or None. A warning is logged for each newer incomplete one.
    """
    found = {}
    for path in Path(output).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    for step in sorted(found, reverse=True):
        reason = why_incomplete(found[step])
        if reason is None:
            return str(found[step])
        logger.warning("%s is skipped: %s.", found[step], reason)
        if put_aside:
            renamed = found[step].with_name(f"incomplete-{step}")
            shutil.rmtree(renamed, ignore_errors=True)
            found[step].rename(renamed)
    return None


def _files(checkpoint: Path) -> list[Path]:
    """All files except the marker, which may be from an earlier run."""
    markers = (checkpoint / MARKER, partial_path(checkpoint / MARKER))
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path not in markers)
