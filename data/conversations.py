"""Data sets of conversations from a file, a directory or the Hub.

The format of a conversation is that of `messages`; records of other forms (`forms`) become conversations as they are read.
"""

import logging
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from .bad_samples import (
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
from .files import open_records
from .forms import Form, recognised
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
from .records import Records

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

LOOKED_AT = 20  # records, by which the form is recognised


def load_conversations(
    source: str | Path,
    on_bad_sample: str = "error",
    split: str = "train",
    to_learn: bool = True,
    allow_urls: bool = True,
    max_bad_samples: float = MAX_BAD_SAMPLES,
) -> "Conversations":
    """Open a data set of conversations; images are not decoded here.

    Args:
        source: JSON lines or a JSON array (`.jsonl`, `.ndjson`, `.json`, with `.gz` too), whose relative image paths start
            at its folder; a CSV file; a Parquet or Arrow file; a shard of WebDataset (`.tar`); a folder of images with
            `metadata.jsonl` or `metadata.csv`; a directory written by `datasets`; or a name on the Hub.
        on_bad_sample: "error", or "skip" to skip broken samples, counted, with a message for each of the first.
        split: of a data set that has several.
        to_learn: as for `check_conversation`.
        allow_urls: whether images may be addresses; nothing is fetched here.
        max_bad_samples: the share that may be skipped, see `BadSamples`.

    Returns:
        A map-style data set of samples, which have been checked.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a sample is broken, with its location and the reason; or if the file is of no known form.
    """
    return Conversations(
        open_records(source, split), on_bad_sample, to_learn, allow_urls=allow_urls, max_bad_samples=max_bad_samples
    )


class Conversations(Dataset):
    """A map-style data set of samples, read from the disk whenever one is asked for.

    Args:
        records: where they are.
        on_bad_sample, to_learn, allow_urls, max_bad_samples: as for `load_conversations`.

    Attributes:
        source: where they are from.
        form: what was recognised.
        skipped: how many broken samples were skipped.
    """

    def __init__(
        self,
        records: Records,
        on_bad_sample: str = "error",
        to_learn: bool = True,
        allow_urls: bool = True,
        max_bad_samples: float = MAX_BAD_SAMPLES,
    ) -> None:
        self.records, self.source = records, records.source
        bad = BadSamples(on_bad_sample, max_bad_samples, self.source, total=len(records))
        self.form = look_at(records)
        self.good: list[int] = []  # indices of records
        self.facts: list[tuple[int, bool]] = []
        unread: set[str] = set()
        for index in range(len(records)):
            raw = records.read(index)
            with bad.sample(partial(records.location, index)):
                sample = self.form.sample(records.parse(raw), records.root)
                facts = check_conversation(sample, to_learn, allow_urls)
                unread |= set(sample) - SAMPLE_KEYS
                self.good.append(index)
                self.facts.append(facts)
        self.skipped = bad.count
        tell(self.form, self.source, sorted(map(str, unread)))
        if self.skipped:
            total = self.skipped + len(self.good)
            logger.warning("%s: %d of %d samples are broken and left out.", self.source, self.skipped, total)
        if not self.good:
            raise ValueError(f"{self.source} holds no conversation to learn from ({self.skipped} were left out).")

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.good[index]
        sample = self.form.sample(self.records.parse(self.records.read(place)), self.records.root)
        return as_sample(sample, self.records.location(place))

    def images(self, index: int) -> int:
        """How many images a sample has."""
        return self.facts[index][0]

    def has_system(self, index: int) -> bool:
        """Whether a sample begins with a system message."""
        return self.facts[index][1]


def as_sample(sample: dict[str, Any], location: Location) -> Sample:
    """A checked sample without the keys that are not read."""
    read = Sample({key: value for key, value in sample.items() if key in SAMPLE_KEYS})
    read.location = location
    return read


def look_at(records: Records) -> Form:
    """The form of records, by the first of them; the whole file is refused if it has none."""
    found = []
    for index in range(min(len(records), LOOKED_AT)):
        raw = records.read(index)
        try:
            with one_sample():
                record = records.parse(raw)
        except BadSample:  # told when it is its turn
            continue
        if isinstance(record, dict):
            found.append(record)
    return recognised(found, records.source, records.keys)


def tell(form: Form, source: str, unread: Sequence[str] = ()) -> None:
    """Say what was recognised, if it is not our own form, and which keys of the samples are not read."""
    if not form.plain:
        logger.info("%s: recognised as %s.", source, form.about)
    if unread:
        more = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
        logger.info("%s: not read: %s%s.", source, ", ".join(islice(unread, NAMED)), more)
