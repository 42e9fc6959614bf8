"""Runs the stages of a recipe: each starts from the result of the one before, and the last one's is the finished model.

The last stage trains in the output directory, earlier ones in `stages/1-NAME`, `stages/2-NAME`, ... inside of it; each is a
run with a record of its own (`run.json`), as `dsvl train` writes it. All stages run in one process per device. What a stage
leaves in the process is removed before the next: the Trainer's arguments reset accelerate's state when they are created,
`Accelerator.free_memory` releases the model, and environment variables are restored.
"""

import gc
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..configuration_dsvl import DSVLConfig
from ..hub_card import TrainingFacts
from ..utils.console_log import log_to_console
from ..utils.transformers_names import TRAINER_STATE_NAME
from .arguments import DataArguments, DSVLTrainingArguments, ModelArguments, build_arguments
from .batch_division import BatchDivision, with_division
from .checkpoints import RECORD, checkpoints, send_checkpoint
from .distributed import on_first_process
from .fingerprint import (
    STAGE_FACTS,
    RunRecord,
    add_model,
    differences,
    file_digest,
    read_record,
    take_fingerprint,
)
from .hosts import Hosts
from .model_loading import check_model_arguments
from .recipe import Recipe, compose_arguments, naming_stage
from .resumption import (
    LAST,
    NO,
    STAGES,
    Start,
    decide_start,
    delete_runs,
    divide_batch,
    stage_directories,
)
from .run import check_model, finished_run, interruption_message, open_run_data, train_model
from .saving import StageOfRun, share_model
from .watchdog import watching
from .zero3 import without_zero3

logger = logging.getLogger(__name__)

Arguments = tuple[ModelArguments, DataArguments, DSVLTrainingArguments]

REMEDY = "Pass another --output, or --overwrite-output to delete all stages and start over"
COMPOSED = "0-composed"  # directory of the composed model, in `stages/`
# What is kept of an earlier stage when the run is complete.
KEPT = (RECORD, STAGE_FACTS, TRAINER_STATE_NAME, "emissions.csv")


class StagedRun:
    """A training of several stages.

    Args:
        recipe: the recipe.

    Raises:
        ValueError: if a stage has invalid arguments.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.names = list(recipe.stages)
        output = (recipe.shared | recipe.given).get("output_dir")
        if not output:
            raise ValueError("No output directory; pass --output DIR.")
        self.output = Path(str(output))
        count = len(self.names)
        self.directories = [
            self.output / STAGES / f"{number}-{name}" if number < count else self.output
            for number, name in enumerate(self.names, 1)
        ]
        self.composed = self.output / STAGES / COMPOSED
        self.models = [self._first_model(), *map(str, self.directories[:-1])]
        self.values = [self._values(index) for index in range(count)]
        self._check_feature_caches()

    def train(self) -> dict[str, float]:
        """Train all stages that are not finished. Every stage is checked before the first begins.

        Returns:
            The metrics of the last stage, name -> value.

        Raises:
            ValueError: if arguments or data of a stage are invalid, or the output directory belongs to another run.
        """
        data: list[Any] = []
        arguments: list[Arguments] = []
        for name, values in zip(self.names, self.values, strict=True):
            with naming_stage(name), _same_environment():
                arguments.append(build_arguments(values))
                log_to_console(logging.INFO if arguments[-1][2].process_index == 0 else logging.ERROR)
                data.append(open_run_data(*arguments[-1][1:]))
        with watching(arguments[0][2].lost_process_timeout):
            return self._train(arguments, data)

    def _train(self, arguments: list[Arguments], data: list[Any]) -> dict[str, float]:
        count = len(self.names)
        if not self.recipe.composes:
            check_model(self.models[0], self.directories[0])
            check_model(self.models[0], self.output)
        hosts = Hosts(self.output)
        if not arguments[0][2].overwrite_output:
            for directory in self.directories:
                send_checkpoint(hosts.at(directory))
        records, starts, batches = on_first_process(lambda: self._decide(arguments))
        if starts[-1].finished:
            hosts.each(self._clean_up)
            return finished_run(self.output, arguments[-1][2], REMEDY)
        if not self.recipe.composes:
            self._check_models(DSVLConfig.from_pretrained(self.models[0]))
        if arguments[0][2].overwrite_output:
            hosts.each(lambda: delete_runs(self.output))
        metrics: dict[str, float] = {}
        for index, name in enumerate(self.names):
            if starts[index].finished:
                logger.info("Stage %d of %d, %s, is finished.", index + 1, count, name)
                share_model(hosts.at(self.directories[index]))
                data[index] = None
                continue
            opened, data[index] = data[index], None
            try:
                with naming_stage(name), _same_environment():
                    metrics = self._train_stage(index, opened, records[index], starts[index], batches[index], hosts)
            except KeyboardInterrupt:
                where = f"stage {index + 1} of {count}, {name}"
                raise KeyboardInterrupt(interruption_message(self.directories[index], where)) from None
            release_memory()
        hosts.each(self._clean_up)
        return metrics

    def _first_model(self) -> str:
        if self.recipe.composes:
            compose_arguments(self.recipe.compose or {}, str(self.composed))
            return str(self.composed)
        model = self.recipe.given.get("model") or self.recipe.shared.get("model")
        if model is None:
            raise ValueError(f"{self.recipe.path} has neither `model` nor `compose`; pass --model DIR.")
        return str(model)

    def _values(self, index: int) -> dict[str, Any]:
        """The checked values of a stage."""
        made = self.models[index] if index or self.recipe.composes else None
        values = self.recipe.checked_values(self.names[index], made)
        values["output_dir"] = str(self.directories[index])
        if index < len(self.names) - 1:
            values["push_to_hub"] = False
        if values.get("resume_from_checkpoint") not in (None, NO, LAST, "false", "true"):
            raise ValueError(
                f"--resume-from {values['resume_from_checkpoint']} with stages: each stage resumes from its own "
                "checkpoints; drop it, and run the same command to resume."
            )
        return values

    def _check_feature_caches(self) -> None:
        """Refuse a cache of image features that an earlier stage filled before the tower was trained."""
        seen: dict[str, int] = {}
        for index, values in enumerate(self.values):
            cache = values.get("cache_image_features")
            if cache is not None:
                before = seen.setdefault(str(Path(cache).resolve()), index)
                for name, other in zip(self.names[before:index], self.values[before:index], strict=True):
                    if "vision" in other["train"] or other["lora_vision"]:
                        raise ValueError(
                            f"stage '{self.names[index]}': --cache-image-features {cache} has the features of the vision "
                            f"tower before stage '{name}' trains it; give the stage another directory."
                        )

    def _check_models(self, config: DSVLConfig) -> None:
        """Check what stages request of the model before the first of them is trained."""
        for name, values in zip(self.names, self.values, strict=True):
            with naming_stage(name), _same_environment():
                check_model_arguments(config, build_arguments(values)[0])

    def _decide(self, arguments: list[Arguments]) -> tuple[list[RunRecord], list[Start], list[BatchDivision]]:
        """The fingerprint of each stage without its model, how it starts, and how its batch is divided."""
        overwrite, resume = arguments[0][2].overwrite_output, arguments[0][2].resume_from_checkpoint
        if overwrite and resume not in (None, NO):
            raise ValueError(f"--overwrite-output deletes what --resume-from {resume} needs; pass one of them.")
        before = [None if overwrite else read_record(directory) for directory in self.directories]
        records, batches = [], []
        for index, (three, old) in enumerate(zip(arguments, before, strict=True)):
            record = take_fingerprint(*three, known=old.files if old is not None else None, with_model=False)
            record.settings["stage"] = self.names[index]
            records.append(record)
            with naming_stage(self.names[index]):
                batches.append(divide_batch(self.directories[index], old, record, *three[1:]))
        if self.recipe.composes:
            self._add_compose(records[0])
        else:
            add_model(records[0], self.models[0])
        if overwrite:
            return records, [Start() for _ in records], batches
        self._refuse_other_runs(before, records)
        # A later stage that is finished does not need the results of earlier ones.
        finished = [
            old is not None and old.finished and (directory / "config.json").is_file()
            for old, directory in zip(before, self.directories, strict=True)
        ]
        done = max((index for index, yes in enumerate(finished) if yes), default=-1)
        starts = [Start(finished=True) for _ in range(done + 1)]
        for index in range(done + 1, len(records)):
            with naming_stage(self.names[index]):
                starts.append(decide_start(self.directories[index], records[index]))
        anything = done >= 0 or any(start.checkpoint for start in starts)
        if resume == NO and anything:
            raise ValueError(f"{self.output} contains this run, but --resume-from is no. {REMEDY}.")
        if resume == LAST and not anything:
            raise ValueError(f"{self.output} contains no complete checkpoint to resume from; drop --resume-from to start.")
        return records, starts, batches

    def _refuse_other_runs(self, before: list[RunRecord | None], records: list[RunRecord]) -> None:
        """Refuse a directory in which a stage has results that the requested stage would not have."""
        expected = {directory.name for directory in self.directories[:-1]} | {COMPOSED}
        for directory in stage_directories(self.output).values():
            if directory.name not in expected:
                raise ValueError(
                    f"{directory} is no stage of {self.recipe.path}; pass another --output, or --overwrite-output to delete "
                    f"the stages in {self.output} and start over."
                )
        for name, directory, old, record in zip(self.names, self.directories, before, records, strict=True):
            if old is None or not (old.finished or checkpoints(directory)):
                continue
            if other := differences(old.settings, record.settings):
                raise ValueError(
                    f"stage '{name}': {directory} has another training: {'; '.join(other)}. Pass another --output, or "
                    f"--overwrite-output to delete all stages in {self.output} and start over."
                )

    def _add_compose(self, record: RunRecord) -> None:
        """Add what the model is composed from to the fingerprint of the first stage."""
        parts = compose_arguments(self.recipe.compose or {}, str(self.composed))
        for name, value in sorted(vars(parts).items()):
            if name in ("vision", "language"):
                add_model(record, value, f"compose.{name}")
            elif isinstance(value, str) and Path(value).is_file():  # a chat template
                digest = file_digest(Path(value))
                record.settings[f"compose.{name}"] = {"name": Path(value).name, "digest": digest}
            elif name not in ("out", "run", "max_shard_size"):
                record.settings[f"compose.{name}"] = value

    def _train_stage(
        self, index: int, data: Any, record: RunRecord, start: Start, batch: BatchDivision, hosts: Hosts
    ) -> dict[str, float]:
        model_arguments, data_arguments, arguments = build_arguments(self.values[index])
        arguments = with_division(arguments, batch)
        directory, model = self.directories[index], self.models[index]
        if index == 0 and self.recipe.composes:
            on_first_process(lambda: self._compose(record, arguments.seed))
            share_model(hosts.at(self.composed), overwrite=True)
            self._check_models(DSVLConfig.from_pretrained(str(self.composed)))
        if index > 0 or self.recipe.composes:
            record, start = on_first_process(lambda: _with_model(record, model, directory))
        count = len(self.names)
        logger.info("Stage %d of %d, %s: from %s to %s.", index + 1, count, self.names[index], model, directory)
        set_seed(arguments.seed)
        arguments.overwrite_output = False  # deleted already
        earlier, plots = self._earlier_facts(index)
        stage = StageOfRun(self.names[index], index + 1, count, earlier, plots)
        metrics = train_model(model_arguments, data_arguments, arguments, data, record, start, hosts.at(directory), stage)
        if index + 1 < count and not self.recipe.keep_stages:
            hosts.each(lambda: _delete_checkpoints(directory))
        return metrics

    def _earlier_facts(self, index: int) -> tuple[tuple[TrainingFacts, ...], tuple[Path, ...]]:
        """What the model card says about the stages before one, and their plots."""
        facts = [
            TrainingFacts(**json.loads((directory / STAGE_FACTS).read_text(encoding="utf-8")))
            for directory in self.directories[:index]
        ]
        plots = [
            directory / one.plot for one, directory in zip(facts, self.directories, strict=False) if one.plot is not None
        ]
        return tuple(facts), tuple(plots)

    def _compose(self, record: RunRecord, seed: int) -> None:
        """Compose the model, unless an interrupted run has done so."""
        wanted = {name: value for name, value in record.settings.items() if name.startswith("compose.")} | {"seed": seed}
        digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        made = read_record(self.composed)
        if made is not None and made.settings.get("composed") == digest and (self.composed / "config.json").is_file():
            return
        for path in [self.composed, *self.composed.parent.glob(f".{COMPOSED}.partial-*")]:  # of an interrupted run
            shutil.rmtree(path, ignore_errors=True)
        logger.info("Composing the model.")
        arguments = compose_arguments(self.recipe.compose or {}, str(self.composed))
        set_seed(seed)
        with without_zero3():
            arguments.run(arguments)
        RunRecord({"composed": digest}, finished=True).write(self.composed)

    def _clean_up(self) -> None:
        """Delete the models of earlier stages, which a complete run does not need."""
        if self.recipe.keep_stages:
            return
        freed = 0
        names = {path.name for path in self.output.iterdir()} - {STAGES, *KEPT}
        for number, directory in stage_directories(self.output).items():
            freed += _delete_checkpoints(directory)
            if number == 0:
                freed += _size(directory)
                shutil.rmtree(directory)
                continue
            (directory / "config.json").unlink(missing_ok=True)  # first: without it the directory is not a model
            for path in directory.iterdir():
                if path.is_dir() and path.name == "adapters":
                    freed += _size(path)
                    shutil.rmtree(path)
                elif path.is_file() and (path.name in names or ".safetensors" in path.name):
                    freed += path.stat().st_size
                    path.unlink()
        if freed:
            logger.info("Deleted the models of earlier stages (%.2f GiB); --keep-stages keeps them.", freed / 2**30)


def _with_model(record: RunRecord, model: str, directory: Path) -> tuple[RunRecord, Start]:
    """The fingerprint of a stage with its model, and how the stage starts."""
    add_model(record, model)
    return record, decide_start(directory, record)


def _delete_checkpoints(directory: Path) -> int:
    """Delete the checkpoints of a finished stage; returns their bytes."""
    freed = 0
    for path in [*checkpoints(directory), *directory.glob("incomplete-*"), *directory.glob("superseded-*")]:
        freed += _size(path)
        shutil.rmtree(path)
    return freed


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@contextmanager
def _same_environment() -> Iterator[None]:
    """Restore the environment variables that a stage's arguments set, such as those of accelerate."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def release_memory() -> None:
    """Release what the last stage's model occupied."""
    gc.collect()
    torch.compiler.reset()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
