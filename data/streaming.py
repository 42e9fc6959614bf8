"""Streaming: conversations are read sequentially, with a shuffle buffer."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .conversations import FORMAT_RECORDS, as_sample, detect_records_format, log_format
from .dataset_files import (
    TABLE_SUFFIXES,
    check_is_file,
    check_is_hub_name,
    import_datasets,
    load_table,
    metadata_of,
    reader_of,
    without_decoding,
    without_nones,
)
from .messages import SAMPLE_KEYS, check_conversation
from .record_formats import RecordFormat, detect_format
from .record_readers import JsonRecords, Records, parse_json
from .sample_errors import MAX_BAD_SAMPLES, BadSample, BadSamples, Location, one_sample

MAX_SHARDS = 64  # of a file; they are divided among processes and workers
MIN_SHARD_BYTES = 1 << 16
SHUFFLE_BUFFER = 1000  # samples


class Stream(IterableDataset):
    """An endless stream of the samples of a data set, shuffled again in each epoch.

    The order of shards is shuffled, and samples are shuffled with a buffer of 1,000; both depend on the seed. Shards are
    divided among all workers of all processes, which together read each sample once per epoch if all processes read at the
    same rate.

    Args:
        source (`str` or `Path`): A data set, as for `load_conversations`. JSON lines, Parquet, Arrow and data sets on the
            Hub are streamed. Other files are indexed first, and compressed files are held in memory.
        on_bad_sample (`str`, *optional*, defaults to `"error"`): "error" or "skip"; see `load_conversations`.
        seed (`int`, *optional*, defaults to 0): The seed of the shuffle order.
        split (`str`, *optional*, defaults to `"train"`): The split, if the data set has several.
        rank (`int`, *optional*, defaults to 0): The index of this process.
        processes (`int`, *optional*, defaults to 1): The number of processes.
        allow_urls (`bool`, *optional*, defaults to `True`): Whether images may be http(s) URLs. They are not fetched here.
        max_bad_samples (`float`, *optional*, defaults to 0.05): The share of samples that may be skipped; see `BadSamples`.

    Attributes:
        source (`str`): The data set.
        rows (`datasets.IterableDataset`): The share of this process.
        format (`RecordFormat`): The detected format.
        bad (`BadSamples`): The counts of samples and skipped samples.
        shards (`int`): The largest number of workers that can share the data of this process.
        arrange (`Callable`): Iterable of samples -> iterator over the items of this data set, packs for example.
        usable (`Callable`): Raises `ValueError` for a sample that a batch would have to skip. It is called until one sample
            of an epoch passes, so that a data set without usable samples ends in an error.
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
        rows, self._reader, self.format = _open(str(source), split)
        self.rows = split_dataset_by_node(rows.shuffle(seed, buffer_size=SHUFFLE_BUFFER), rank, processes)
        self.shards = self.rows.num_shards
        self.arrange: Callable[[Iterable[dict[str, Any]]], Iterator[Any]] = iter
        self.usable: Callable[[dict[str, Any]], Any] = bool
        self._batches = self._batch_size = 0

    @property
    def skipped(self) -> int:
        """The number of skipped samples, over all workers."""
        return self.bad.count

    def start_after(self, batches: int, batch_size: int) -> None:
        """Skip the batches that this process has read already, without decoding images, to resume a run.

        This is exact only with `StreamLoader` and the same number of workers.

        Args:
            batches (`int`): The number of batches.
            batch_size (`int`): The number of items in a batch.
        """
        self._batches, self._batch_size = batches, batch_size

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        batches = self._batches // (1 if worker is None else worker.num_workers)  # workers alternate
        return itertools.islice(self.arrange(self._samples()), batches * self._batch_size, None)

    def batches_ahead(self, workers: int) -> int:
        """The number of batches that `StreamLoader` must drop: each worker skips the same number of batches."""
        return self._batches % max(workers, 1)

    def _samples(self) -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(map(self.epoch, itertools.count()))

    def epoch(self, number: int) -> Iterator[dict[str, Any]]:
        """Iterate over the share of this process, or of this worker, in the shuffle order of epoch `number`.

        Raises:
            ValueError: If a sample is broken, unless bad samples are skipped; if no sample can be used.
        """
        # A copy, because the workers share the epoch of a data set: a fast worker would change it for the others.
        rows = copy.deepcopy(self.rows)
        rows.set_epoch(number)
        empty = True
        for row in rows:
            raw, location = self._reader.read(row), self._reader.location(row)
            good = None
            with self.bad.sample(location):
                sample = self.format.sample(self._reader.parse(raw), self._reader.root)
                check_conversation(sample, allow_urls=self.allow_urls)
                sample = as_sample(sample, location)
                if empty:
                    self.usable(sample)
                good = sample
            if good is not None:
                empty = False
                yield good
        if empty:
            raise ValueError(f"{self.source} holds no conversation to train on ({self.skipped} were skipped).")


class StreamLoader(DataLoader):
    """A data loader of a `Stream`. It moves batches to `device`, and starts no more workers than there are shards."""

    def __init__(self, stream: Stream, num_workers: int = 0, device: Any = "cpu", **kwargs: Any) -> None:
        self.stream, self.device = stream, device
        super().__init__(stream, num_workers=min(num_workers, stream.shards), **kwargs)

    def __iter__(self) -> Any:
        ahead = self.stream.batches_ahead(self.num_workers)
        for batch in itertools.islice(super().__iter__(), ahead, None):
            yield send_to_device(batch, self.device, non_blocking=self.pin_memory)


class _Reader:
    """Turns rows of a `datasets.IterableDataset` into records. Here the rows are the records.

    Attributes:
        source, root: See `Records`.
    """

    def __init__(self, source: str, root: Path | None) -> None:
        self.source, self.root = source, root

    def read(self, row: Any) -> Any:
        return row

    def parse(self, raw: Any) -> Any:
        return without_nones(raw)

    def location(self, row: Any) -> Location:
        return f"{self.source}, a row"


class _LineReader(_Reader):
    """For rows that hold a line of JSON and its offset in the file."""

    def parse(self, raw: Any) -> Any:
        return parse_json(raw["line"])

    def location(self, row: Any) -> Location:
        return partial(_line_at, self.source, row["byte"])


class _IndexReader(_Reader):
    """For rows that hold the index of a record."""

    def __init__(self, records: Records) -> None:
        super().__init__(records.source, records.root)
        self.records = records

    def read(self, row: Any) -> Any:
        return self.records.read(row["index"])

    def parse(self, raw: Any) -> Any:
        return self.records.parse(raw)

    def location(self, row: Any) -> Location:
        return self.records.location(row["index"])


def _open(source: str, split: str) -> tuple[Any, _Reader, RecordFormat]:
    """Open a data set: a `datasets.IterableDataset`, the reader of its rows, and their format."""
    datasets = import_datasets()
    path = metadata_of(Path(source), split) or Path(source)
    opener = reader_of(path)
    if opener is not None:
        check_is_file(path)
        if opener is JsonRecords and path.suffix != ".gz" and (first := _first_lines(path)):
            size = path.stat().st_size
            parts = [(str(path), *part) for part in _parts(size, min(size // MIN_SHARD_BYTES + 1, MAX_SHARDS))]
            rows = datasets.IterableDataset.from_generator(read_lines, gen_kwargs={"parts": parts})
            return rows, _LineReader(str(path), path.parent), _detect_format(first, str(path), None, path.parent)
        records = opener(path)
        record_format = detect_records_format(records)
        log_format(record_format, str(path))
        spans = _parts(len(records), min(max(len(records), 1), MAX_SHARDS))
        rows = datasets.IterableDataset.from_generator(_read_indices, gen_kwargs={"parts": spans})
        return rows, _IndexReader(records), record_format
    root = path if path.is_dir() else path.parent
    if path.suffix in TABLE_SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; pass one, or a data set's name.")
        rows = load_table(source, path.suffix[1:], data_files=str(path), split="train", streaming=True)
    elif path.is_dir() and (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path))
        rows = saved.to_iterable_dataset(num_shards=min(len(saved), MAX_SHARDS))
    else:
        check_is_hub_name(source)
        rows = load_table(source, source, split=split, streaming=True)
    if rows.features is not None:
        rows = rows.cast(without_decoding(rows.features))
    reader = _Reader(source, root if path.exists() else None)
    return rows, reader, _detect_format([without_nones(row) for row in rows.take(1)], source, rows.column_names, reader.root)


def _detect_format(records: list[Any], source: str, keys: list[str] | None, root: Path | None) -> RecordFormat:
    """Detect the format of the first records, and log it with the keys that are not read."""
    record_format = detect_format(records, source, keys)
    unread: set[str] = set()
    for record in records:
        with contextlib.suppress(BadSample), one_sample():  # reported when the sample is read
            unread |= set(map(str, record_format.sample(record, root))) - SAMPLE_KEYS
    log_format(record_format, source, sorted(unread))
    return record_format


def _first_lines(path: Path) -> list[Any]:
    """The first records of a JSON lines file; empty if its first line is not an object, as in a JSON array."""
    found: list[Any] = []
    with path.open("rb") as file:
        for line in itertools.islice((line for line in file if line.strip()), FORMAT_RECORDS):
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


def _line_at(path: str, byte: int) -> str:
    """The file and line number at an offset in bytes; the file is read up to there."""
    number = 1
    with open(path, "rb") as file:
        while byte > 0 and (block := file.read(min(byte, 1 << 20))):
            number += block.count(b"\n")
            byte -= len(block)
    return f"{path}, line {number}"


def _parts(size: int, shards: int) -> list[tuple[int, int]]:
    """Divide a range into equal parts (start, end)."""
    return list(itertools.pairwise(size * number // shards for number in range(shards + 1)))


def read_lines(parts: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """The lines that begin in the byte ranges (path, start, end) of files."""
    for path, start, end in parts:
        with open(path, "rb") as file:
            if start > 0:  # skip to the first line that begins in this range
                file.seek(start - 1)
                file.readline()
            while (offset := file.tell()) < end:
                line = file.readline()
                if line.strip():
                    yield {"path": path, "byte": offset, "line": line}


def _read_indices(parts: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The indices in ranges (start, end)."""
    for start, end in parts:
        for index in range(start, end):
            yield {"index": index}
