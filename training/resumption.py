"""Whether a run starts, goes on from a checkpoint, or is finished: decided once, by what its output directory holds."""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from accelerate.utils import broadcast_object_list

from ..utils.transformers_names import TRAINER_STATE_NAME
from .checkpoints import MARKER, has_optimizer_states, last_complete_checkpoint, what_is_missing
from .fingerprint import RECORD, RunRecord, differences, read_record
from .plot import PLOT

logger = logging.getLogger(__name__)

T = TypeVar("T")

NO, LAST = "no", "last"  # of --resume-from, beside the path of a checkpoint
WAYS_ON = "Pass another --output, --overwrite-output to delete it and start over, or --resume-from CHECKPOINT to train on"


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        checkpoint: to resume from; None to start at the beginning.
        finished: whether there is nothing left to train.
    """

    checkpoint: str | None = None
    finished: bool = False


def decide_start(output: Path, asked: RunRecord, resume: str | None = None, overwrite: bool = False) -> Start:
    """Decide how a run begins; nothing but an incomplete checkpoint is touched.

    Args:
        output: the output directory, which may not exist.
        asked: the fingerprint of what is asked for now.
        resume: a checkpoint's directory, "no", "last", or None: the last complete checkpoint if there is one.
        overwrite: whether what an earlier run wrote there may be deleted (by `begin`).

    Raises:
        ValueError: if the directory holds another run, or a run that cannot be resumed as asked.
    """
    if overwrite and resume not in (None, NO):
        raise ValueError(f"--overwrite-output deletes what --resume-from {resume} needs; pass one of them.")
    if overwrite:
        return Start()
    if resume not in (None, NO, LAST):
        return Start(_chosen_checkpoint(str(resume), output, asked))
    record, has_model = read_record(output), (output / "config.json").is_file()
    finished = record is not None and record.finished and has_model
    last = last_complete_checkpoint(output)
    other = differences(record.settings, asked.settings) if record is not None else []
    if other and (finished or last is not None):
        raise ValueError(f"{output} holds another run: {'; '.join(other)}. {WAYS_ON} under the new settings.")
    if resume == NO and (finished or last is not None):
        raise ValueError(
            f"{output} holds {'this run, finished' if finished else last}, and nothing may be resumed. {WAYS_ON}."
        )
    if finished:
        return Start(finished=True)
    if last is None:
        if resume == LAST:
            raise ValueError(f"{output} holds no complete checkpoint to resume from; leave --resume-from out to start.")
        if has_model and record is None:
            raise ValueError(f"{output} holds a model that no run left there to resume, and would be replaced. {WAYS_ON}.")
    else:
        _check_optimizer(last)
        if record is None:
            logger.warning(
                "%s has no %s, so whether it is the run that is asked for now cannot be told; it is resumed as if it were.",
                output,
                RECORD,
            )
    last_complete_checkpoint(output, put_aside=True)
    return Start(last)


def begin(output: Path, asked: RunRecord, start: Start, overwrite: bool = False) -> None:
    """Write the record of a run that begins, after what does not belong to it has been deleted or put aside."""
    if overwrite:
        _delete(output)
    elif start.checkpoint is not None:
        own = _step(Path(start.checkpoint))
        for path in checkpoints(output):
            if path.resolve() != Path(start.checkpoint).resolve() and (own is None or (_step(path) or 0) >= own):
                aside = path.with_name(path.name.replace("checkpoint-", "superseded-"))
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                logger.warning("%s is later than %s and was renamed to %s.", path, start.checkpoint, aside.name)
    asked.write(output)


def finish(output: Path, asked: RunRecord) -> None:
    """Record that the trained model is complete."""
    asked.finished = True
    asked.write(output)


def on_first_process(work: Callable[[], T]) -> T:
    """Do something in the first process; all processes get its result, or its error."""
    if not dist.is_initialized():
        return work()
    result: T | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as error:
            failure = error
    result, failure = broadcast_object_list([result, failure])
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a directory, complete or not, by their steps."""
    found = [path for path in output.glob("checkpoint-*") if path.is_dir() and _step(path) is not None]
    return sorted(found, key=lambda path: _step(path) or 0)


def _step(checkpoint: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def _chosen_checkpoint(resume: str, output: Path, asked: RunRecord) -> str:
    path = Path(resume)
    if not (path / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"--resume-from {resume} is no checkpoint of a training (it has no {TRAINER_STATE_NAME}).")
    if (path / MARKER).is_file() and (missing := what_is_missing(path)):
        raise ValueError(f"--resume-from {resume} is not complete: {missing}.")
    _check_optimizer(resume)
    record = read_record(path.parent) or read_record(output)
    for difference in differences(record.settings, asked.settings) if record is not None else []:
        logger.warning("%s was written by a run of other settings: %s.", resume, difference)
    return resume


def _check_optimizer(checkpoint: str) -> None:
    if has_optimizer_states(Path(checkpoint)):
        return
    new_run = f", or train on from these weights as a new run: --model {checkpoint} and another --output"
    raise ValueError(
        f"{checkpoint} holds weights without an optimizer's states (--save-only-model), so a run cannot go on from it as if "
        "it had not been interrupted. Pass --overwrite-output to start over"
        f"{new_run if (Path(checkpoint) / 'config.json').is_file() else ''}."
    )


def _delete(output: Path) -> None:
    """Delete what runs wrote, and nothing else."""
    (output / "config.json").unlink(missing_ok=True)  # first: without it nothing is taken for a model
    folders = [*checkpoints(output), *output.glob("incomplete-*"), *output.glob("superseded-*"), output / "adapters"]
    found = [path for path in folders if path.is_dir()]
    for path in found:
        shutil.rmtree(path)
    for pattern in ("*.safetensors", "*.safetensors.index.json", RECORD, "trainer_state.json", PLOT, "README.md"):
        for path in output.glob(pattern):
            path.unlink()
            found.append(path)
    if found:
        logger.warning("Deleted what an earlier run wrote to %s (%d files and directories).", output, len(found))
