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
from ..utils.transformers_names import TRAINER_STATE_NAME, rotate_checkpoints
from .hosts import Hosts

logger = logging.getLogger(__name__)

RECORD = "run.json"  # in the output directory
MARKER = "complete.json"  # written last: the files of a checkpoint and their sizes


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as complete when all processes have written their files, and only then removes older ones.

    The Trainer removes older checkpoints as soon as its first process has written its files. To have a complete checkpoint
    at any time, set `save_total_limit` of its arguments to None, and pass the limit here.

    The loss is logged whenever a checkpoint is written, so that logged means do not span an interruption.

    Args:
        save_total_limit: number of checkpoints to keep, *optional*, defaults to None: all. The last and the best are always
            kept.
        hosts: which hosts have directories of their own, *optional*, defaults to one directory.
    """

    def __init__(self, save_total_limit: int | None = None, hosts: Hosts | None = None) -> None:
        self.save_total_limit, self.hosts = save_total_limit, hosts

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log |= control.should_save
        return control

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if dist.is_initialized():
            dist.barrier()
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        hosts = self.hosts
        sizes: dict[str, int] | None = None
        if hosts is not None and hosts.separate:
            sizes = {name: size for files in hosts.gather(lambda: file_sizes(checkpoint)) for name, size in files.items()}
            if hosts.leads and not state.is_world_process_zero:
                mark_complete(checkpoint, sizes)
                self._rotate(args, state)
            dist.barrier()
        if state.is_world_process_zero:
            mark_complete(checkpoint, sizes)
            self._rotate(args, state)

    def _rotate(self, args: TrainingArguments, state: TrainerState) -> None:
        rotate_checkpoints(
            args.output_dir, self.save_total_limit, best_model_checkpoint=state.best_model_checkpoint, use_mtime=False
        )


def mark_complete(checkpoint: Path, sizes: dict[str, int] | None = None) -> None:
    """Mark a checkpoint as complete: write its files and their sizes to `complete.json`.

    Args:
        checkpoint: the checkpoint.
        sizes: its files on all hosts, name -> bytes, *optional*, defaults to those in the directory.
    """
    write_atomically(checkpoint / MARKER, json.dumps(file_sizes(checkpoint) if sizes is None else sizes, indent=1))


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """The files of a checkpoint and their bytes, without the marker, which may be from an earlier run."""
    markers = (checkpoint / MARKER, partial_path(checkpoint / MARKER))
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path not in markers)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}


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


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a directory, complete or not, sorted by step."""
    found = [path for path in output.glob("checkpoint-*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint, by its name; None if it is not the name of one."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


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
    for path in reversed(checkpoints(Path(output))):
        reason = why_incomplete(path)
        if reason is None:
            return str(path)
        logger.warning("%s is skipped: %s.", path, reason)
        if put_aside:
            renamed = path.with_name(f"incomplete-{step_of(path)}")
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
    return None


def send_checkpoint(hosts: Hosts, chosen: str | None = None) -> None:
    """Send the checkpoint to resume from, the best one, and the record of the run to the hosts that lack their files.

    All processes must call it. Afterwards the last checkpoint that is complete on all hosts together is complete on each.

    Args:
        hosts: the hosts with the output directory.
        chosen: name of the checkpoint, *optional*, defaults to the last.
    """
    if not hosts.separate:
        return
    complete = [chosen] if chosen is not None else _complete_together(hosts)
    if complete:
        last = hosts.directory / complete[-1]
        hosts.share(lambda: _all_files(last))
        best = hosts.gather(lambda: _best_checkpoint(last))[0]
        if best is not None and best != last.name:
            hosts.share(lambda: _all_files(hosts.directory / best))
    hosts.share(lambda: hosts.directory.glob(RECORD))


def _all_files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def _complete_together(hosts: Hosts) -> list[str]:
    """The checkpoints whose files are all on some host, sorted by step."""

    def collect() -> dict[str, tuple[dict[str, int] | None, dict[str, int]]]:
        return {path.name: (_read_marker(path), file_sizes(path)) for path in checkpoints(hosts.directory)}

    everywhere = hosts.gather(collect)
    complete = []
    for name in sorted(set().union(*everywhere), key=lambda name: step_of(Path(name)) or 0):
        parts = [found[name] for found in everywhere if name in found]
        marker = next((marker for marker, _ in parts if marker is not None), None)
        if marker and all(any(files.get(one) == size for _, files in parts) for one, size in marker.items()):
            complete.append(name)
    return complete


def _read_marker(checkpoint: Path) -> dict[str, int] | None:
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # as `why_incomplete` reports
        return None
    return sizes if isinstance(sizes, dict) else None


def _best_checkpoint(checkpoint: Path) -> str | None:
    """The name of the best checkpoint until this one; None if there is none."""
    best = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).best_model_checkpoint
    return Path(best).name if best else None
