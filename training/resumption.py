"""Decides from the output directory whether a run starts, resumes from a checkpoint, or is already finished."""

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..utils.transformers_names import TRAINER_STATE_NAME
from .arguments import DataArguments, DSVLTrainingArguments
from .batch_division import BatchDivision, keep_batch_size
from .checkpoints import (
    MARKER,
    RECORD,
    checkpoints,
    has_optimizer_states,
    last_complete_checkpoint,
    step_of,
    why_incomplete,
)
from .fingerprint import RunRecord, differences, read_record
from .frozen_errors import REPORT
from .plot import PLOT

logger = logging.getLogger(__name__)

NO, LAST = "no", "last"  # values of --resume-from, besides the path of a checkpoint
STAGES = "stages"  # directory of the earlier stages of a recipe, in the output directory
REMEDY = "Pass another --output, --overwrite-output to delete it and start over, or --resume-from CHECKPOINT to continue"


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        checkpoint: directory of the checkpoint to resume from; None to start at the first step.
        finished: whether the trained model already exists.
    """

    checkpoint: str | None = None
    finished: bool = False


def divide_batch(
    output: Path,
    before: RunRecord | None,
    requested: RunRecord,
    data_arguments: DataArguments,
    arguments: DSVLTrainingArguments,
) -> BatchDivision:
    """How a run divides its batch among the processes; a run that continues keeps its effective batch size.

    Args:
        output: the output directory.
        before: record of the run that is continued; None if there is none.
        requested: fingerprint of the requested run; its batch size becomes the one that is kept.
        data_arguments, arguments: what is requested.

    Raises:
        ValueError: if the run cannot continue on this number of processes; see `keep_batch_size`.
    """
    asked = BatchDivision.of(arguments)
    if before is None or before.batch is None:
        return asked
    chosen = arguments.resume_from_checkpoint not in (None, NO, LAST)
    if not (before.finished or chosen or any(why_incomplete(path) is None for path in checkpoints(output))):
        return asked
    kept = keep_batch_size(before.batch, data_arguments, arguments, before.finished)
    requested.settings["batch_size"] = kept.batch_size
    if (before.batch.per_device, before.batch.accumulation) == (asked.per_device, asked.accumulation):
        requested.batch = before.batch  # the number of processes for which the flags were chosen
    return kept


def record_to_continue(output: Path, resume: str | None) -> RunRecord | None:
    """The record of the run that `--resume-from` continues; None if there is none."""
    if resume in (None, NO, LAST):
        return read_record(output)
    return read_record(Path(str(resume)).parent) or read_record(output)


def decide_start(output: Path, requested: RunRecord, resume: str | None = None, overwrite: bool = False) -> Start:
    """Decide how a run begins. Only an incomplete checkpoint is modified: it is renamed.

    Args:
        output: the output directory; it may not exist.
        requested: fingerprint of the requested run.
        resume: directory of a checkpoint, "no" or "last", *optional*, defaults to None: the last complete checkpoint, if
            there is one.
        overwrite: whether `begin` may delete the files of an earlier run, *optional*, defaults to False.

    Raises:
        ValueError: if the directory belongs to another run, or the run cannot be resumed as requested.
    """
    if overwrite and resume not in (None, NO):
        raise ValueError(f"--overwrite-output deletes what --resume-from {resume} needs; pass one of them.")
    if overwrite:
        return Start()
    if resume not in (None, NO, LAST):
        return Start(_chosen_checkpoint(str(resume), output, requested))
    record, has_model = read_record(output), (output / "config.json").is_file()
    finished = record is not None and record.finished and has_model
    last = last_complete_checkpoint(output)
    other = differences(record.settings, requested.settings) if record is not None else []
    if other and (finished or last is not None):
        raise ValueError(
            f"{output} belongs to another run: {'; '.join(other)}. {REMEDY} under the new settings."
            f"{_flags_of_batch(record, requested)}"
        )
    if resume == NO and (finished or last is not None):
        raise ValueError(
            f"{output} contains {'this run, finished' if finished else last}, but --resume-from is no. {REMEDY}."
        )
    if finished:
        return Start(finished=True)
    if last is None:
        if resume == LAST:
            raise ValueError(f"{output} contains no complete checkpoint to resume from; drop --resume-from to start.")
        if has_model and record is None:
            raise ValueError(f"{output} contains a model without the record of a run; training would replace it. {REMEDY}.")
    else:
        _check_optimizer(last)
        if record is None:
            logger.warning(
                "%s has no %s, so its settings are unknown; it is resumed as if it were the requested run.",
                output,
                RECORD,
            )
    last_complete_checkpoint(output, put_aside=True)
    return Start(last)


def begin(output: Path, requested: RunRecord, start: Start, overwrite: bool = False) -> None:
    """Write the record of a run that begins, after files of other runs were deleted or renamed."""
    if overwrite:
        delete_runs(output)
    elif start.checkpoint is not None:
        own = step_of(Path(start.checkpoint))
        for path in checkpoints(output):
            if path.resolve() != Path(start.checkpoint).resolve() and (own is None or (step_of(path) or 0) >= own):
                renamed = path.with_name(path.name.replace("checkpoint-", "superseded-"))
                shutil.rmtree(renamed, ignore_errors=True)
                path.rename(renamed)
                logger.warning("%s is newer than %s and was renamed to %s.", path, start.checkpoint, renamed.name)
    requested.write(output)


def finish(output: Path, requested: RunRecord) -> None:
    """Record that the trained model is complete."""
    requested.finished = True
    requested.write(output)


def _chosen_checkpoint(resume: str, output: Path, requested: RunRecord) -> str:
    path = Path(resume)
    if not (path / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"--resume-from {resume} is not a checkpoint (it has no {TRAINER_STATE_NAME}); pass a checkpoint-N directory."
        )
    if (path / MARKER).is_file() and (missing := why_incomplete(path)):
        raise ValueError(f"--resume-from {resume} is not complete: {missing}.")
    _check_optimizer(resume)
    record = record_to_continue(output, resume)
    for difference in differences(record.settings, requested.settings) if record is not None else []:
        logger.warning("%s was written by a run with other settings: %s.", resume, difference)
        if difference.startswith("batch_size "):
            logger.warning(
                "The data continues after %s batches of the new size, so that samples are read twice or skipped.",
                step_of(path),
            )
    return resume


def _flags_of_batch(before: RunRecord | None, requested: RunRecord) -> str:
    """The flags that keep the batch size of a run; empty if it is the same, or unknown."""
    if before is None or before.batch is None or requested.batch is None:
        return ""
    if before.settings.get("batch_size") == requested.settings.get("batch_size"):
        return ""
    return f" The batch size is kept with {before.batch.among(requested.batch.processes, requested.batch.sharing).flags}."


def _check_optimizer(checkpoint: str) -> None:
    if has_optimizer_states(Path(checkpoint)):
        return
    new_run = f", or start a new run from these weights: --model {checkpoint} and another --output"
    raise ValueError(
        f"{checkpoint} has no optimizer states (--save-only-model), so the run cannot be resumed from it. Pass "
        "--overwrite-output to start over"
        f"{new_run if (Path(checkpoint) / 'config.json').is_file() else ''}."
    )


def stage_directories(output: Path) -> dict[int, Path]:
    """The directories of earlier stages in an output directory, number -> directory; 0 is the composed model."""
    found = [(re.fullmatch(r"(\d+)-[\w-]+", path.name), path) for path in (output / STAGES).glob("*") if path.is_dir()]
    return {int(match[1]): path for match, path in sorted(found, key=lambda one: one[1]) if match}


def delete_runs(output: Path) -> None:
    """Delete the files of runs, and nothing else."""
    (output / "config.json").unlink(missing_ok=True)  # first: without it the directory is not a model
    folders = [*checkpoints(output), *output.glob("incomplete-*"), *output.glob("superseded-*"), output / "adapters"]
    folders += stage_directories(output).values()
    found = [path for path in folders if path.is_dir()]
    for path in found:
        shutil.rmtree(path)
    for pattern in ("*.safetensors", "*.safetensors.index.json", RECORD, REPORT, "trainer_state.json", PLOT, "README.md"):
        for path in output.glob(pattern):
            path.unlink()
            found.append(path)
    if found:
        logger.warning("Deleted %d files and directories of an earlier run in %s.", len(found), output)
