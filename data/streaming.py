"""Conversations that are read one after the other, and never held all at once."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .conversations import LeftOut, check_conversation, parse_line, without_decoding, without_nones

SHARDS = 64  # of a JSON lines file, at most; workers and processes share them out
SHARD_BYTES = 1 << 16  # at least
BUFFER = 1000  # samples among which the next is chosen


class Stream(IterableDataset):
    """The samples of a source, for ever: each time in another order, which depends on the seed.

    The order is by chance among the parts of the source, and among `BUFFER` samples that follow each other. Every worker of
    every process has a share of its own, and all of them together have each sample once, if a process never gets ahead.

    Args:
        source: a JSON lines file, a Parquet or Arrow file, a directory written by `datasets`, or a name on the Hub.
        on_bad_sample: "error", or "skip" to leave broken samples out, counted, with a message for each of the first.
        seed: of the order.
        split: of a data set that has several.
        rank, processes: which of how many processes this is.

    Attributes:
        source: as given.
        left_out: what was broken.
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
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        self.source, self.left_out = str(source), LeftOut(on_bad_sample)
        self._rows = split_dataset_by_node(_open(str(source), split).shuffle(seed, buffer_size=BUFFER), rank, processes)
        self.shards = self._rows.num_shards
        self.arrange: Callable[[Iterable[dict[str, Any]]], Iterator[Any]] = iter
        self.usable: Callable[[dict[str, Any]], Any] = bool
        self._batches = self._batch_size = 0

    @property
    def skipped(self) -> int:
        """How many samples were left out, by all workers."""
        return self.left_out.count

    def start_after(self, batches: int, batch_size: int) -> None:
        """Pass over what this process has read already, in so many batches, without decoding a picture.

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
            try:
                sample = _sample(row)
                check_conversation(sample)
                if empty:
                    self.usable(sample)
            except ValueError as error:
                self.left_out(ValueError(f"{self.source}, {_place(row)}: {error}"))
            else:
                empty = False
                yield sample
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


def _open(source: str, split: str) -> Any:
    """A `datasets.IterableDataset`."""
    import datasets

    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; pass a JSON lines file, a Parquet file or a data set's name.")
        size = path.stat().st_size
        shards = min(size // SHARD_BYTES + 1, SHARDS)
        ends = [size * number // shards for number in range(shards + 1)]
        return datasets.IterableDataset.from_generator(
            _lines, gen_kwargs={"parts": [(source, *part) for part in itertools.pairwise(ends)]}
        )
    if path.suffix in (".parquet", ".arrow"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; pass one, or a data set's name.")
        rows = datasets.load_dataset(path.suffix[1:], data_files=source, split="train", streaming=True)
    elif path.is_dir() and (path / "state.json").exists():
        saved = datasets.load_from_disk(source)
        rows = saved.to_iterable_dataset(num_shards=min(len(saved), SHARDS))
    else:
        rows = datasets.load_dataset(source, split=split, streaming=True)
    if "messages" not in (rows.column_names or ["messages"]):
        raise ValueError(f"{source} has the columns {rows.column_names}; expected messages (and images). Convert it first.")
    return rows if rows.features is None else rows.cast(without_decoding(rows.features))


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


def _sample(row: dict[str, Any]) -> Any:
    if "line" not in row:
        return without_nones({key: row[key] for key in ("messages", "images") if key in row})
    return parse_line(row["line"], Path(row["path"]).parent)


def _place(row: dict[str, Any]) -> str:
    return f"the line from byte {row['byte']}" if "line" in row else "a row"
