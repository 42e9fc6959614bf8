"""Conversations that are read one after the other, and never held all at once."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .bad_samples import MAX_BAD_SAMPLES, BadSample, BadSamples, Location, one_sample
from .conversations import LOOKED_AT, as_sample, look_at, tell
from .files import (
    TABLE_SUFFIXES,
    check_is_no_path,
    check_is_there,
    import_datasets,
    load_table,
    metadata_of,
    reader_of,
    without_decoding,
    without_nones,
)
from .forms import Form, recognised
from .messages import SAMPLE_KEYS, check_conversation
from .records import JsonRecords, Records, parse_json

SHARDS = 64  # of a JSON lines file, at most; workers and processes share them out
SHARD_BYTES = 1 << 16  # at least
BUFFER = 1000  # samples among which the next is chosen


class Stream(IterableDataset):
    """The samples of a source, for ever: each time in another order, which depends on the seed.

    The order is by chance among the parts of the source, and among `BUFFER` samples that follow each other. Every worker of
    every process has a share of its own, and all of them together have each sample once, if a process never gets ahead.

    Args:
        source: as for `load_conversations`. JSON lines, Parquet, Arrow and the Hub are read as they come; other forms are
            opened first, and a compressed file is held in memory.
        on_bad_sample: "error", or "skip" to skip broken samples, counted, with a message for each of the first.
        seed: of the order.
        split: of a data set that has several.
        rank, processes: which of how many processes this is.
        allow_urls: whether images may be addresses; nothing is fetched here.
        max_bad_samples: the share that may be skipped, see `BadSamples`.

    Attributes:
        source: as given.
        form: what was recognised.
        bad: what was broken.
        shards: how many workers of this process can share it.
        arrange: what makes of samples the items of this data set, packs for example.
        usable: raises ValueError for a sample that a batch would have to skip. It is asked until one can be used, so that a
            stream without any ends in an error.
    """

    def __init__(
        self,
        source: str | Path,
        on_bad_sample: str = "error",
        seed: int = 0,
        split: str = "train",
        rank: int = 0,
        processes: int = 1,
        allow_urls: bool = True,
        max_bad_samples: float = MAX_BAD_SAMPLES,
    ) -> None:
        import_datasets()
        from datasets.distributed import split_dataset_by_node

        self.source, self.allow_urls = str(source), allow_urls
        self.bad = BadSamples(on_bad_sample, max_bad_samples, self.source)
        rows, self._reader, self.form = _open(str(source), split)
        self._rows = split_dataset_by_node(rows.shuffle(seed, buffer_size=BUFFER), rank, processes)
        self.shards = self._rows.num_shards
        self.arrange: Callable[[Iterable[dict[str, Any]]], Iterator[Any]] = iter
        self.usable: Callable[[dict[str, Any]], Any] = bool
        self._batches = self._batch_size = 0

    @property
    def skipped(self) -> int:
        """How many samples were left out, by all workers."""
        return self.bad.count

    def start_after(self, batches: int, batch_size: int) -> None:
        """Pass over what this process has read already, in so many batches, without decoding an image.

        Exactly so only by way of `StreamLoader`, with the same number of workers.
        """
        self._batches, self._batch_size = batches, batch_size

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        rounds = self._batches // (1 if worker is None else worker.num_workers)  # workers make batches in turn
        return itertools.islice(self.arrange(self._samples()), rounds * self._batch_size, None)

    def batches_ahead(self, workers: int) -> int:
        """How many batches there are to drop: workers pass over whole rounds alone."""
        return self._batches % max(workers, 1)

    def _samples(self) -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(map(self.epoch, itertools.count()))

    def epoch(self, number: int) -> Iterator[dict[str, Any]]:
        """The share of this process, or of this worker, once, in the order of the so-manieth time.

        Raises:
            ValueError: for a broken sample, if those are not left out; if nothing is left.
        """
        # A copy: a data set's epoch lies in memory that workers share, and one that is ahead would set it for the others.
        rows = copy.deepcopy(self._rows)
        rows.set_epoch(number)
        empty = True
        for row in rows:
            raw, location = self._reader.read(row), self._reader.location(row)
            good = None
            with self.bad.sample(location):
                sample = self.form.sample(self._reader.parse(raw), self._reader.root)
                check_conversation(sample, allow_urls=self.allow_urls)
                sample = as_sample(sample, location)
                if empty:
                    self.usable(sample)
                good = sample
            if good is not None:
                empty = False
                yield good
        if empty:
            raise ValueError(f"{self.source} holds no conversation to learn from ({self.skipped} were left out).")


class StreamLoader(DataLoader):
    """A data loader of a `Stream`, with as many workers as have something to read, whose batches come on `device`."""

    def __init__(self, stream: Stream, num_workers: int = 0, device: Any = "cpu", **kwargs: Any) -> None:
        self.stream, self.device = stream, device
        super().__init__(stream, num_workers=min(num_workers, stream.shards), **kwargs)

    def __iter__(self) -> Any:
        ahead = self.stream.batches_ahead(self.num_workers)
        for batch in itertools.islice(super().__iter__(), ahead, None):
            yield send_to_device(batch, self.device, non_blocking=self.pin_memory)


class _Reader:
    """What rows stand for: the rows of a table themselves.

    Attributes:
        source, root: as of `Records`.
    """

    def __init__(self, source: str, root: Path | None) -> None:
        self.source, self.root = source, root

    def read(self, row: Any) -> Any:
        return row

    def parse(self, raw: Any) -> Any:
        return without_nones(raw)

    def location(self, row: Any) -> Location:
        return f"{self.source}, a row"


class _Lines(_Reader):
    """Lines of a file by their first bytes."""

    def parse(self, raw: Any) -> Any:
        return parse_json(raw["line"])

    def location(self, row: Any) -> Location:
        return partial(_line_from, self.source, row["byte"])


class _Indices(_Reader):
    """Records by their indices."""

    def __init__(self, records: Records) -> None:
        super().__init__(records.source, records.root)
        self.records = records

    def read(self, row: Any) -> Any:
        return self.records.read(row["index"])

    def parse(self, raw: Any) -> Any:
        return self.records.parse(raw)

    def location(self, row: Any) -> Location:
        return self.records.location(row["index"])


def _open(source: str, split: str) -> tuple[Any, _Reader, Form]:
    """A `datasets.IterableDataset`, what reads its rows, and their form."""
    datasets = import_datasets()
    path = metadata_of(Path(source), split) or Path(source)
    opener = reader_of(path)
    if opener is not None:
        check_is_there(path)
        if opener is JsonRecords and path.suffix != ".gz" and (first := _first_lines(path)):
            size = path.stat().st_size
            parts = [(str(path), *part) for part in _parts(size, min(size // SHARD_BYTES + 1, SHARDS))]
            rows = datasets.IterableDataset.from_generator(_lines, gen_kwargs={"parts": parts})
            return rows, _Lines(str(path), path.parent), _looked_at(first, str(path), None, path.parent)
        records = opener(path)
        form = look_at(records)
        tell(form, str(path))
        spans = _parts(len(records), min(max(len(records), 1), SHARDS))
        rows = datasets.IterableDataset.from_generator(_indices, gen_kwargs={"parts": spans})
        return rows, _Indices(records), form
    root = path if path.is_dir() else path.parent
    if path.suffix in TABLE_SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; pass one, or a data set's name.")
        rows = load_table(source, path.suffix[1:], data_files=str(path), split="train", streaming=True)
    elif path.is_dir() and (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path))
        rows = saved.to_iterable_dataset(num_shards=min(len(saved), SHARDS))
    else:
        check_is_no_path(source)
        rows = load_table(source, source, split=split, streaming=True)
    if rows.features is not None:
        rows = rows.cast(without_decoding(rows.features))
    reader = _Reader(source, root if path.exists() else None)
    return rows, reader, _looked_at([without_nones(row) for row in rows.take(1)], source, rows.column_names, reader.root)


def _looked_at(records: list[Any], source: str, keys: list[str] | None, root: Path | None) -> Form:
    """The form of the first records, and a message if it is not our own, or they have keys that are not read."""
    form = recognised(records, source, keys)
    unread: set[str] = set()
    for record in records:
        with contextlib.suppress(BadSample), one_sample():  # told when it is its turn
            unread |= set(map(str, form.sample(record, root))) - SAMPLE_KEYS
    tell(form, source, sorted(unread))
    return form


def _first_lines(path: Path) -> list[Any]:
    """The first records of a file of JSON lines; none if its first line is no object, as in an array or a broken file."""
    found: list[Any] = []
    with path.open("rb") as file:
        for line in itertools.islice((line for line in file if line.strip()), LOOKED_AT):
            try:
                with one_sample():
                    record = parse_json(line)
            except BadSample:
                record = None
            if isinstance(record, dict):
                found.append(record)
            elif not found:
                break
    return found


def _line_from(path: str, byte: int) -> str:
    """The number of the line that begins at a byte, which takes reading the file up to there."""
    number = 1
    with open(path, "rb") as file:
        while byte > 0 and (block := file.read(min(byte, 1 << 20))):
            number += block.count(b"\n")
            byte -= len(block)
    return f"{path}, line {number}"


def _parts(size: int, shards: int) -> list[tuple[int, int]]:
    """(from, to) of equal parts."""
    return list(itertools.pairwise(size * number // shards for number in range(shards + 1)))


def _lines(parts: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """The lines that begin in parts (path, from, to) of files, in bytes."""
    for path, start, end in parts:
        with open(path, "rb") as file:
            if start > 0:  # to the first line that begins here
                file.seek(start - 1)
                file.readline()
            while (place := file.tell()) < end:
                line = file.readline()
                if line.strip():
                    yield {"path": path, "byte": place, "line": line}


def _indices(parts: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The indices of records in parts (from, to)."""
    for start, end in parts:
        for index in range(start, end):
            yield {"index": index}
