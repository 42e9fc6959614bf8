"""What becomes of an exception that a sample causes: it is told with the sample's location, or the sample is skipped.

`one_sample` is the one place that tells what a sample caused from what would meet any other sample as well. It stands around
the reading, decoding and rendering of one sample: everywhere that happens, and nowhere else.
"""

import errno
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

logger = logging.getLogger(__name__)

ON_BAD_SAMPLE = ("error", "skip")
MAX_BAD_SAMPLES = 0.05  # share of the samples that may be skipped
FEW = 100  # the share is taken of at least so many samples, or one in a small data set would be too many
NAMED = 20  # skipped samples that are named one by one; the rest is counted
WORKERS = 256  # of a data loader, and the process itself
SHOWN = 200  # characters of a value in a message
REASON = 300  # characters of a reason, which may hold a value

# A full disk, too many open files: whichever sample comes next will meet them too.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS}
DEVICE = (torch.OutOfMemoryError, *((torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()))
DEVICE_TEXT = re.compile(r"\b(CUDA|cuDNN|cuBLAS|NCCL|HIP|XPU|MPS)\b", re.IGNORECASE)

Location = str | Callable[[], str] | None


def resolved(location: Location) -> str | None:
    """A location as text."""
    return location() if callable(location) else location


class BadSample(ValueError):
    """An error of one sample.

    Args:
        reason: what is wrong, one line.
        location: where the sample is from, file and line.
    """

    def __init__(self, reason: str, location: str | None = None) -> None:
        super().__init__(reason, location)
        self.reason, self.location = reason, location

    def __str__(self) -> str:
        return self.reason if self.location is None else f"{self.location}: {self.reason}"


class TooManyBadSamples(ValueError):
    """More samples are broken than a run may skip."""


def shortened(value: Any, limit: int = SHOWN) -> str:
    """A value for a message: one line of at most `limit` characters, the middle of a longer one replaced by dots.

    Args:
        value: a text, which is shown as it is, but for characters that cannot be printed; of anything else its `repr`.
        limit: in characters.
    """
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value):,} bytes"
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception as error:  # nested too deeply, say
        text = f"{type(value).__name__} ({type(error).__name__})"
    if len(text) > limit:
        tail = limit // 3
        text = f"{text[: limit - tail - 3]}...{text[-tail:]}"
    if not text.isprintable():  # half of a surrogate pair cannot be written, an escape sequence changes the terminal
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@contextmanager
def one_sample(location: Location = None) -> Iterator[None]:
    """Around the reading, decoding and rendering of one sample: what it raises becomes a `BadSample`.

    A full disk, too many open files, a device's error, a missing package and an interruption pass: they are not the
    sample's.

    Args:
        location: of the sample, or what finds it out.
    """
    try:
        yield
    except Exception as error:
        if stops_the_run(error):
            raise
        if isinstance(error, BadSample):
            raise BadSample(error.reason, error.location or resolved(location)) from error
        raise BadSample(_reason(error), resolved(location)) from error


def stops_the_run(error: BaseException) -> bool:
    """Whether an exception would meet any other sample as well."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, (TooManyBadSamples, ImportError, *DEVICE)):
            return True
        if isinstance(one, OSError) and one.errno in MACHINE:
            return True
        if isinstance(one, RuntimeError) and not isinstance(one, RecursionError) and DEVICE_TEXT.search(str(one)):
            return True
        one = one.__cause__
    return not isinstance(error, Exception)


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, RecursionError):
        text = "is nested too deeply."
    elif not isinstance(error, ValueError) or not text:  # written by somebody who did not know what a sample is
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = shortened(text, REASON)
    return text if text.endswith((".", "!", "?", ")")) else f"{text}."


class BadSamples:
    """Counts samples and those that cannot be used, over all workers of a data loader.

    Args:
        on_bad_sample: "error" raises for the first bad sample; "skip" counts it, and names the first `NAMED`.
        max_bad_samples: the share of samples that may be skipped, 0 to 1. It is taken of `total`, or of the samples seen so
            far, and of at least `FEW`: with 0.05, 5 of up to 100 samples may be skipped, and 50 of 1,000.
        source: what the samples are from, for messages.
        total: how many samples there are, if that is known.

    Raises:
        ValueError: for an option that is not known.
    """

    def __init__(
        self,
        on_bad_sample: str = "error",
        max_bad_samples: float = MAX_BAD_SAMPLES,
        source: str = "the data",
        total: int | None = None,
    ) -> None:
        if on_bad_sample not in ON_BAD_SAMPLE:
            raise ValueError(
                f"on_bad_sample={on_bad_sample!r} is not known; choose from {', '.join(map(repr, ON_BAD_SAMPLE))}."
            )
        if not 0 <= max_bad_samples <= 1:
            raise ValueError(f"max_bad_samples={max_bad_samples} is no share of the samples; pass a number from 0 to 1.")
        self.on_bad_sample, self.max_bad_samples, self.source, self.total = on_bad_sample, max_bad_samples, source, total
        # Shared with the data loader's workers, a row for each, as they count at the same time: seen, skipped.
        self._counts = torch.zeros(WORKERS, 2, dtype=torch.int64).share_memory_()

    @property
    def seen(self) -> int:
        """How many samples there were, in all workers of a data loader."""
        return int(self._counts[:, 0].sum())

    @property
    def count(self) -> int:
        """How many of them were skipped."""
        return int(self._counts[:, 1].sum())

    @contextmanager
    def sample(self, location: Location = None) -> Iterator[None]:
        """Around one sample, see `one_sample`: whatever it causes is raised with its location, or counted.

        What follows the `with` statement runs for skipped samples too; what uses the sample stands inside.

        Raises:
            BadSample: if bad samples are errors.
            TooManyBadSamples: if more were skipped than may be.
        """
        self._counts[worker_row(), 0] += 1
        with self.again(location):
            yield

    @contextmanager
    def again(self, location: Location = None) -> Iterator[None]:
        """As `sample`, for one that has been counted."""
        try:
            with one_sample():
                yield
        except BadSample as error:
            self._skip(error, location)

    def _skip(self, error: BadSample, location: Location) -> None:
        own = worker_row()
        if self.on_bad_sample == "skip":
            self._counts[own, 1] += 1
        named = self.on_bad_sample == "error" or int(self._counts[own, 1]) <= NAMED
        if error.location is None and (named or self._are_too_many()):  # to find it out may take reading the file
            error = BadSample(error.reason, resolved(location))
        if self.on_bad_sample == "error":
            remedy = "Or leave such conversations out (--on-bad-sample skip)."
            raise BadSample(f"{error.reason} {remedy}", error.location) from error.__cause__
        if named:
            logger.warning("Left out: %s", error)
        if self._are_too_many():
            raise TooManyBadSamples(too_many(self.source, self.count, self.total or self.seen, self.max_bad_samples, error))

    def _are_too_many(self) -> bool:
        return are_too_many(self.count, self.total or self.seen, self.max_bad_samples)


def are_too_many(skipped: int, samples: int, max_bad_samples: float) -> bool:
    """Whether so many of the samples may not be skipped; see `BadSamples`."""
    return skipped > max_bad_samples * max(samples, FEW)


def too_many(source: str, skipped: int, samples: int, max_bad_samples: float, last: Exception) -> str:
    """The message that says so."""
    return (
        f"{source}: {skipped:,} of {samples:,} samples had to be skipped, more than {max_bad_samples:.3g} of them (or of "
        f"{FEW}); the last one: {last} Mend the data, or raise --max-bad-samples (1 for no limit)."
    )


def worker_row() -> int:
    """A row of a shared tensor of `WORKERS` rows that this process, a data loader's worker or not, has for itself."""
    worker = torch.utils.data.get_worker_info()
    return 0 if worker is None else 1 + worker.id % (WORKERS - 1)
