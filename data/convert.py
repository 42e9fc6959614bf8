"""Converts raw data sets to JSON lines: resumable, in several processes, with a report of skipped records."""

import itertools
import json
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from ..image_reading_dsvl import image_size
from ..utils.atomic_files import atomic_path, partial_path, write_atomically
from ..utils.text import shortened
from .converters import CONVERTERS, RawRecord, SkipRecord
from .messages import check_conversation
from .sample_errors import (
    MAX_BAD_SAMPLES,
    NAMED,
    ON_BAD_SAMPLE,
    BadSample,
    TooManyBadSamples,
    are_too_many,
    one_sample,
    too_many,
)

logger = logging.getLogger(__name__)

CHUNK_SIZE = 256  # records; the state is saved after each chunk
CHUNKS_PER_WORKER = 4  # submitted in advance


@dataclass
class Report:
    """The result of a conversion.

    Attributes:
        name, root, seed, limit, on_bad_sample: The arguments of `convert`.
        records (`int`): The number of records read.
        samples (`int`): The number of conversations written.
        skipped (`Counter[str]`): Reason -> the number of records that are broken or skipped by a rule of the data set.
        dropped (`Counter[str]`): Reason -> the number of dropped parts of converted records.
        examples (`dict[str, list[str]]`): Reason -> the ids of the first records.
        written (`int`): The size of the file in bytes.
    """

    name: str
    root: str
    seed: int
    limit: int | None
    on_bad_sample: str
    records: int = 0
    samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    written: int = 0

    def count(self, where: Counter[str], reason: str, record: str, number: int = 1) -> None:
        """Add to `skipped` or `dropped`."""
        where[reason] += number
        named = self.examples.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(record)

    def arguments(self) -> tuple:
        """The arguments that a resumed conversion must repeat."""
        return self.name, self.root, self.seed, self.limit, self.on_bad_sample

    def lines(self) -> list[str]:
        """The report as text."""
        out = [f"{self.name}: {self.samples:,} conversations of {self.records:,} records."]
        for title, counts in (("skipped", self.skipped), ("dropped from converted records", self.dropped)):
            for reason, number in counts.most_common():
                out.append(f"  {number:,} {title}: {reason} ({', '.join(self.examples[reason][:3])}, ...)")
        return out


def convert(
    name: str,
    root: str | Path,
    out: str | Path,
    limit: int | None = None,
    seed: int = 0,
    workers: int = 0,
    on_bad_sample: str = "error",
    progress: bool = False,
    max_bad_samples: float = MAX_BAD_SAMPLES,
) -> Report:
    """Convert a data set to `out/NAME.jsonl`, with relative image paths, and write `out/NAME.report.json`.

    The result depends on the seed, not on the number of workers. An unfinished file is called `NAME.jsonl.partial`; the same
    call resumes an interrupted conversion.

    Args:
        name (`str`): The name of a converter (`dsvl data list`).
        root (`str` or `Path`): The folder of the raw files; for the public formats, the file itself.
        out (`str` or `Path`): The output folder.
        limit (`int`, *optional*): The number of conversations to write; None for all.
        seed (`int`, *optional*, defaults to 0): The seed of random choices.
        workers (`int`, *optional*, defaults to 0): The number of additional processes.
        on_bad_sample (`str`, *optional*, defaults to `"error"`): "error" or "skip", for a broken record, or one whose image
            does not exist or cannot be opened.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.
        max_bad_samples (`float`, *optional*, defaults to 0.05): The share of broken records that may be skipped; see
            `BadSamples`.

    Returns:
        `Report`: The counts of records, and the reasons for which records were skipped.

    Raises:
        FileExistsError: If the file exists.
        FileNotFoundError: If a raw file does not exist.
        ValueError: If a record is broken, with its id; if too many are; or if the name is unknown.
    """
    if name not in CONVERTERS:
        raise ValueError(f"There is no converter {name!r}; choose from {', '.join(sorted(CONVERTERS))}.")
    if on_bad_sample not in ON_BAD_SAMPLE:
        raise ValueError(f"on_bad_sample={on_bad_sample!r} is not known; choose from {', '.join(map(repr, ON_BAD_SAMPLE))}.")
    root, out = Path(root).absolute(), Path(out).absolute()
    target, report_file = out / f"{name}.jsonl", out / f"{name}.report.json"
    partial, state_file = partial_path(target), out / f"{name}.state.json"
    report = Report(name, str(root), seed, limit, on_bad_sample)
    if target.is_file() and report_file.is_file():
        raise FileExistsError(f"{target} exists; remove it to convert {name} again.")
    out.mkdir(parents=True, exist_ok=True)
    if state_file.is_file() and partial.is_file():
        report = _resumed(state_file, report)
        os.truncate(partial, report.written)  # lines after the last state are written again
    records = iter(CONVERTERS[name].read(root, out / "images"))
    next(itertools.islice(records, report.records, report.records), None)
    folder = root if root.is_dir() else root.parent
    tasks = ((name, str(folder), str(out), seed, chunk) for chunk in _chunks(records, CHUNK_SIZE))
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc=name, unit=" records", initial=report.records, disable=not progress))
        results: Iterable[list[_Result]] = map(_convert_chunk, tasks)
        if workers > 0:
            # Only the main process handles Ctrl-C; the workers end with it.
            pool = stack.enter_context(ProcessPoolExecutor(workers, None, signal.signal, (signal.SIGINT, signal.SIG_IGN)))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = _in_order(pool, tasks, workers * CHUNKS_PER_WORKER)
        file = stack.enter_context(partial.open("ab"))
        for converted in results:
            for one in converted:
                if limit is not None and report.samples >= limit:
                    break
                _write_result(one, report, file, max_bad_samples)
            file.flush()
            os.fsync(file.fileno())
            report.written = file.tell()
            write_atomically(state_file, json.dumps(vars(report), indent=1, ensure_ascii=False))
            bar.update(report.records - bar.n)
            if limit is not None and report.samples >= limit:
                break
    if report.samples == 0:
        raise ValueError("\n".join([f"No record of {root} is a conversation.", *report.lines()[1:]]))
    write_atomically(report_file, json.dumps(vars(report), indent=1, ensure_ascii=False))
    partial.replace(target)
    state_file.unlink(missing_ok=True)
    return report


@dataclass
class _Result:
    """The result of one record: a line, or the reason why there is none."""

    id: str
    line: str | None
    dropped: Counter[str]
    skipped: str | None = None
    broken: str | None = None


def _convert_chunk(task: tuple[str, str, str, int, list[RawRecord]]) -> list[_Result]:
    name, root, out, seed, records = task
    converted = []
    for record in records:
        # One generator per record, so that choices depend neither on the workers nor on other records.
        random = Random(f"{seed} {name} {record.id}")
        try:
            with one_sample():
                if record.broken is not None:
                    raise BadSample(record.broken)
                sample = CONVERTERS[name].convert(record.value, random)
                sample["images"] = [_image_path(image, Path(root), Path(out)) for image in sample["images"]]
                check_conversation(sample | {"images": [os.path.join(out, path) for path in sample["images"]]})
                line = json.dumps(sample, ensure_ascii=False)
                line.encode()
        except BadSample as error:
            if isinstance(error.__cause__, SkipRecord):
                converted.append(_Result(record.id, None, record.dropped, skipped=str(error.__cause__)))
            else:
                converted.append(_Result(record.id, None, record.dropped, broken=error.reason))
        else:
            converted.append(_Result(record.id, line, record.dropped))
    return converted


def _write_result(one: _Result, report: Report, file: Any, max_bad_samples: float) -> None:
    if one.broken is not None and report.on_bad_sample == "error":
        raise ValueError(
            f"{report.name}, record {one.id}: {one.broken} Correct it, or skip such records (--on-bad-sample skip)."
        )
    report.records += 1
    if one.line is not None:
        file.write(one.line.encode() + b"\n")
        report.samples += 1
        for reason, number in one.dropped.items():
            report.count(report.dropped, reason, one.id, number)
    else:
        if one.broken is not None and report.skipped["broken"] < NAMED:
            logger.warning("Skipped: %s, record %s: %s", report.name, one.id, one.broken)
        report.count(report.skipped, one.skipped or "broken", one.id)
        broken = report.skipped["broken"]
        if one.broken is not None and are_too_many(broken, report.records, max_bad_samples):
            last = BadSample(one.broken, f"record {one.id}")
            raise TooManyBadSamples(too_many(report.name, broken, report.records, max_bad_samples, last))


def _image_path(image: Any, root: Path, out: Path) -> str:
    """The path of an image relative to `out`. Bytes are written to a file, and the image's header is checked.

    Raises:
        SkipRecord: If the image has one pixel; data sets replace missing images by such placeholders.
        ValueError: If the image does not exist or cannot be opened.
    """
    if isinstance(image, dict):  # as `datasets` stores images
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        path = out / "images" / sha256(image).hexdigest()[:32]
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            with atomic_path(path, concurrent=True) as partial:
                partial.write_bytes(image)
    elif isinstance(image, str):
        path = root / image
    else:
        raise ValueError(f"an image is {type(image).__name__}; expected a path or bytes.")
    if not path.is_file():
        raise ValueError(f"the image {shortened(str(path))} does not exist.")
    try:
        width, height = image_size(path)
    except ValueError as error:
        raise ValueError(f"the image {shortened(str(path))} cannot be opened: {shortened(str(error))}") from error
    if width <= 1 or height <= 1:
        raise SkipRecord("an image of one pixel, a placeholder for a missing image")
    return os.path.relpath(path, out)


def _resumed(state_file: Path, report: Report) -> Report:
    state = json.loads(state_file.read_text(encoding="utf-8"))
    if "left_out" in state:  # its name before version 0.2
        state["skipped"] = state.pop("left_out")
    before = Report(**state | {key: Counter(state[key]) for key in ("skipped", "dropped")})
    if before.arguments() != report.arguments():
        raise ValueError(
            f"{state_file.parent} holds an interrupted conversion of {before.name} with other arguments "
            f"({before.arguments()}, now {report.arguments()}); repeat these, or remove {state_file}."
        )
    logger.info("Resuming after %d records.", before.records)
    return before


def _chunks(records: Iterator[RawRecord], size: int) -> Iterator[list[RawRecord]]:
    while chunk := list(itertools.islice(records, size)):
        yield chunk


def _in_order(pool: ProcessPoolExecutor, tasks: Iterator[Any], ahead: int) -> Iterator[Any]:
    """The results of tasks in order, with a bounded number of submitted tasks."""
    running = [pool.submit(_convert_chunk, task) for task in itertools.islice(tasks, ahead)]
    while running:
        yield running.pop(0).result()
        running += [pool.submit(_convert_chunk, task) for task in itertools.islice(tasks, 1)]
