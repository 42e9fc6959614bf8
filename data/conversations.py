"""Map-style data sets of conversations from a file, a directory or the Hub.

Records of other formats (`record_formats.py`) are converted to the format of `messages.py` when they are read.
"""

import logging
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..utils.deprecation import renamed_argument
from .dataset_files import open_records
from .messages import (
    ROLES,
    SAMPLE_KEYS,
    SOURCES,
    Sample,
    check_conversation,
    complete_messages,
    image_source,
    images_of,
)
from .record_formats import RecordFormat, detect_format
from .record_readers import Records
from .sample_errors import (
    MAX_BAD_SAMPLES,
    NAMED,
    ON_BAD_SAMPLE,
    WORKERS,
    BadSample,
    BadSamples,
    Location,
    one_sample,
    worker_row,
)

__all__ = [
    "NAMED",
    "ON_BAD_SAMPLE",
    "ROLES",
    "SOURCES",
    "WORKERS",
    "Conversations",
    "check_conversation",
    "complete_messages",
    "load_conversations",
    "image_source",
    "images_of",
    "worker_row",
]

logger = logging.getLogger(__name__)

FORMAT_RECORDS = 20  # records from which the format is detected


@renamed_argument("to_learn", "for_training")
def load_conversations(
    source: str | Path,
    on_bad_sample: str = "error",
    split: str = "train",
    for_training: bool = True,
    allow_urls: bool = True,
    max_bad_samples: float = MAX_BAD_SAMPLES,
) -> "Conversations":
    """Open a data set of conversations. Images are not decoded.

    Args:
        source (`str` or `Path`): JSON lines or a JSON array (`.jsonl`, `.ndjson`, `.json`, also with `.gz`); CSV or TSV; a
            Parquet or Arrow file; a shard of WebDataset (`.tar`); an image folder with `metadata.jsonl` or `metadata.csv`;
            a directory written by `datasets`; or the name of a data set on the Hub. Relative image paths refer to the
            folder of the file.
        on_bad_sample (`str`, *optional*, defaults to `"error"`): "error" raises for the first bad sample; "skip" skips and
            counts bad samples, and logs the first 20.
        split (`str`, *optional*, defaults to `"train"`): The split, if the data set has several.
        for_training (`bool`, *optional*, defaults to `True`): See `check_conversation`.
        allow_urls (`bool`, *optional*, defaults to `True`): Whether images may be http(s) URLs. They are not fetched here.
        max_bad_samples (`float`, *optional*, defaults to 0.05): The share of samples that may be skipped; see `BadSamples`.

    Returns:
        `Conversations`: A map-style data set of checked samples.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a sample is broken, with its location and the reason; or if the format of the file is unknown.
    """
    return Conversations(
        open_records(source, split), on_bad_sample, for_training, allow_urls=allow_urls, max_bad_samples=max_bad_samples
    )


class Conversations(Dataset):
    """A map-style data set of samples. Each access reads the sample from the disk.

    Args:
        records (`Records`): The records of the data set.
        on_bad_sample, for_training, allow_urls, max_bad_samples: See `load_conversations`.

    Attributes:
        source (`str`): The name of the file or data set.
        format (`RecordFormat`): The detected format.
        skipped (`int`): The number of bad samples, which were skipped.
    """

    def __init__(
        self,
        records: Records,
        on_bad_sample: str = "error",
        for_training: bool = True,
        allow_urls: bool = True,
        max_bad_samples: float = MAX_BAD_SAMPLES,
    ) -> None:
        self.records, self.source = records, records.source
        bad = BadSamples(on_bad_sample, max_bad_samples, self.source, total=len(records))
        self.format = detect_records_format(records)
        self.good: list[int] = []  # the indices of the samples' records
        self.facts: list[tuple[int, bool]] = []
        unread: set[str] = set()
        for index in range(len(records)):
            raw = records.read(index)
            with bad.sample(partial(records.location, index)):
                sample = self.format.sample(records.parse(raw), records.root)
                facts = check_conversation(sample, for_training, allow_urls)
                unread |= set(sample) - SAMPLE_KEYS
                self.good.append(index)
                self.facts.append(facts)
        self.skipped = bad.count
        log_format(self.format, self.source, sorted(map(str, unread)))
        if self.skipped:
            total = self.skipped + len(self.good)
            logger.warning("%s: %d of %d samples are broken and were skipped.", self.source, self.skipped, total)
        if not self.good:
            raise ValueError(f"{self.source} holds no conversation to train on ({self.skipped} were skipped).")

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.good[index]
        sample = self.format.sample(self.records.parse(self.records.read(record)), self.records.root)
        return as_sample(sample, self.records.location(record))

    def images(self, index: int) -> int:
        """The number of images of a sample."""
        return self.facts[index][0]

    def has_system(self, index: int) -> bool:
        """Whether a sample begins with a system message."""
        return self.facts[index][1]


def as_sample(sample: dict[str, Any], location: Location) -> Sample:
    """A checked sample with its location, without the keys that are not read."""
    read = Sample({key: value for key, value in sample.items() if key in SAMPLE_KEYS})
    read.location = location
    return read


def detect_records_format(records: Records) -> RecordFormat:
    """Detect the format of a data set from its first records.

    Raises:
        ValueError: If the format is unknown.
    """
    found = []
    for index in range(min(len(records), FORMAT_RECORDS)):
        raw = records.read(index)
        try:
            with one_sample():
                record = records.parse(raw)
        except BadSample:  # reported when the sample is read
            continue
        if isinstance(record, dict):
            found.append(record)
    return detect_format(found, records.source, records.keys)


def log_format(record_format: RecordFormat, source: str, unread: Sequence[str] = ()) -> None:
    """Log the detected format, unless it is the native one, and the keys of the samples that are not read."""
    if not record_format.is_native:
        logger.info("%s: detected %s.", source, record_format.about)
    log_unread(source, unread)


def log_unread(source: str, unread: Sequence[str]) -> None:
    """Log the keys of samples that are not read."""
    if unread:
        more = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
        logger.info("%s: not read: %s%s.", source, ", ".join(islice(unread, NAMED)), more)
