"""Raw data sets to JSON lines: in order, in several processes, resumable, with a report of what was left out."""

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
from .bad_samples import (
    MAX_BAD_SAMPLES,
    NAMED,
    ON_BAD_SAMPLE,
    BadSample,
    TooManyBadSamples,
    are_too_many,
    one_sample,
    shortened,
    too_many,
)
from .converters import CONVERTERS, LeftOut, Record
from .messages import check_conversation

logger = logging.getLogger(__name__)

CHUNK = 256  # records between two states that a conversion can be resumed from
AHEAD = 4  # chunks for each worker


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        name, root, seed, limit, on_bad_sample: what was asked for.
        records: how many were read.
        samples: how many were written.
        left_out: how many records were left out by a rule of the data set or as broken, by reason.
        dropped: how many parts of records that were kept were left out, by reason.
        examples: the first records of each reason, by their ids.
        written: bytes of the file.
    """

    name: str
    root: str
    seed: int
    limit: int | None
    on_bad_sample: str
    records: int = 0
    samples: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    written: int = 0

    def count(self, where: Counter[str], reason: str, record: str, number: int = 1) -> None:
        where[reason] += number
        named = self.examples.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(record)

    def asked(self) -> tuple:
        return self.name, self.root, self.seed, self.limit, self.on_bad_sample

    def lines(self) -> list[str]:
        """The report for a person."""
        out = [f"{self.name}: {self.samples:,} conversations of {self.records:,} records."]
        for title, counts in (("left out", self.left_out), ("dropped from those kept", self.dropped)):
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
    """Convert a data set to `out/NAME.jsonl`, images by relative paths; `out/NAME.report.json` says what was left out.

    What comes out depends on the seed, never on the number of workers. While a conversion is under way its file is
    `NAME.jsonl.partial`; the same call again continues one that was interrupted.

    Args:
        name: of a converter (`dsvl data list`).
        root: the folder that holds the raw files; the file itself for the public forms.
        limit: stop after so many conversations.
        workers: processes beside this one.
        on_bad_sample: "error" or "skip": a broken record, or one whose image is absent or cannot be opened.
        max_bad_samples: the share of records that may be skipped as broken, see `BadSamples`.

    Raises:
        ValueError: for a broken record, with its id, too many of them, or an unknown name.
        FileNotFoundError: if a raw file is absent.
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
        raise FileExistsError(f"{target} is there already; remove it to convert {name} again.")
    out.mkdir(parents=True, exist_ok=True)
    if state_file.is_file() and partial.is_file():
        report = _resumed(state_file, report)
        os.truncate(partial, report.written)  # lines behind the last state are written again
    records = iter(CONVERTERS[name].read(root, out / "images"))
    next(itertools.islice(records, report.records, report.records), None)
    folder = root if root.is_dir() else root.parent
    tasks = ((name, str(folder), str(out), seed, chunk) for chunk in _chunks(records, CHUNK))
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc=name, unit=" records", initial=report.records, disable=not progress))
        results: Iterable[list[_Converted]] = map(_convert_chunk, tasks)
        if workers > 0:
            # Ctrl-C is this process's to take; the others end with it.
            pool = stack.enter_context(ProcessPoolExecutor(workers, None, signal.signal, (signal.SIGINT, signal.SIG_IGN)))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = _in_order(pool, tasks, workers * AHEAD)
        file = stack.enter_context(partial.open("ab"))
        for converted in results:
            for one in converted:
                if limit is not None and report.samples >= limit:
                    break
                _take_up(one, report, file, max_bad_samples)
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
class _Converted:
    """What became of a record: a line, or the reason why not."""

    id: str
    line: str | None
    dropped: Counter[str]
    left_out: str | None = None
    broken: str | None = None


def _convert_chunk(task: tuple[str, str, str, int, list[Record]]) -> list[_Converted]:
    name, root, out, seed, records = task
    converted = []
    for record in records:
        # Numbers of its own: neither workers nor records before it change what is chosen.
        random = Random(f"{seed} {name} {record.id}")
        try:
            with one_sample():
                if record.broken is not None:
                    raise BadSample(record.broken)
                sample = CONVERTERS[name].convert(record.value, random)
                sample["images"] = [_placed(image, Path(root), Path(out)) for image in sample["images"]]
                check_conversation(sample | {"images": [os.path.join(out, path) for path in sample["images"]]})
                line = json.dumps(sample, ensure_ascii=False)
                line.encode()
        except BadSample as error:
            if isinstance(error.__cause__, LeftOut):
                converted.append(_Converted(record.id, None, record.dropped, left_out=str(error.__cause__)))
            else:
                converted.append(_Converted(record.id, None, record.dropped, broken=error.reason))
        else:
            converted.append(_Converted(record.id, line, record.dropped))
    return converted


def _take_up(one: _Converted, report: Report, file: Any, max_bad_samples: float) -> None:
    if one.broken is not None and report.on_bad_sample == "error":
        raise ValueError(
            f"{report.name}, record {one.id}: {one.broken} Mend it, or leave such records out (--on-bad-sample skip)."
        )
    report.records += 1
    if one.line is not None:
        file.write(one.line.encode() + b"\n")
        report.samples += 1
        for reason, number in one.dropped.items():
            report.count(report.dropped, reason, one.id, number)
    else:
        if one.broken is not None and report.left_out["broken"] < NAMED:
            logger.warning("Left out: %s, record %s: %s", report.name, one.id, one.broken)
        report.count(report.left_out, one.left_out or "broken", one.id)
        broken = report.left_out["broken"]
        if one.broken is not None and are_too_many(broken, report.records, max_bad_samples):
            last = BadSample(one.broken, f"record {one.id}")
            raise TooManyBadSamples(too_many(report.name, broken, report.records, max_bad_samples, last))


def _placed(image: Any, root: Path, out: Path) -> str:
    """An image's path from the folder of the file that will name it, with the image opened once.

    Raises:
        LeftOut: for a placeholder of one pixel.
        ValueError: if there is no such image, or it is none.
    """
    if isinstance(image, dict):  # as `datasets` has it
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
        raise LeftOut("an image of one pixel, which stands for one that is gone")
    return os.path.relpath(path, out)


def _resumed(state_file: Path, report: Report) -> Report:
    state = json.loads(state_file.read_text(encoding="utf-8"))
    before = Report(**state | {key: Counter(state[key]) for key in ("left_out", "dropped")})
    if before.asked() != report.asked():
        raise ValueError(
            f"{state_file.parent} holds an interrupted conversion of {before.name} with other arguments "
            f"({before.asked()}, now {report.asked()}); repeat those, or remove {state_file}."
        )
    logger.info("Continuing after %d records.", before.records)
    return before


def _chunks(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    while chunk := list(itertools.islice(records, size)):
        yield chunk


def _in_order(pool: ProcessPoolExecutor, tasks: Iterator[Any], ahead: int) -> Iterator[Any]:
    """The results of tasks in their order, with a bounded number of them under way."""
    running = [pool.submit(_convert_chunk, task) for task in itertools.islice(tasks, ahead)]
    while running:
        yield running.pop(0).result()
        running += [pool.submit(_convert_chunk, task) for task in itertools.islice(tasks, 1)]
