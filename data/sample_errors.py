"""Errors of single samples: they are raised with the sample's location, or the sample is skipped and counted.

`one_sample` separates errors of a sample from errors of the machine, which the next sample would meet too. All code that
reads, decodes or renders one sample runs inside it.
"""

import errno
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..utils.text import shortened

logger = logging.getLogger(__name__)

ON_BAD_SAMPLE = ("error", "skip")
MAX_BAD_SAMPLES = 0.05  # share of the samples that may be skipped
MIN_SAMPLES = 100  # the share is taken of at least 100 samples; otherwise one bad sample of a small data set is too many
NAMED = 20  # skipped samples that get a log line each; the others are only counted
WORKERS = 256  # rows for the workers of a data loader and the main process
MAX_REASON_CHARACTERS = 300

# A full disk, too many open files: errors of the machine, not of a sample.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS}
DEVICE_ERRORS = (torch.OutOfMemoryError, *((torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()))
DEVICE_ERROR_TEXT = re.compile(r"\b(CUDA|cuDNN|cuBLAS|NCCL|HIP|XPU|MPS)\b", re.IGNORECASE)

Location = str | Callable[[], str] | None


def resolved(location: Location) -> str | None:
    """The text of a location, which may be a function that returns it."""
    return location() if callable(location) else location


class BadSample(ValueError):
    """An error of one sample.

    Args:
        reason (`str`): What is wrong, in one line.
        location (`str`, *optional*): The sample's file and line.
        remedy (`str`, *optional*, defaults to `""`): What the caller offers instead of correcting the sample.
    """

    def __init__(self, reason: str, location: str | None = None, remedy: str = "") -> None:
        super().__init__(reason, location, remedy)
        self.reason, self.location, self.remedy = reason, location, remedy

    def __str__(self) -> str:
        text = f"{self.reason} {self.remedy}" if self.remedy else self.reason
        return text if self.location is None else f"{self.location}: {text}"


class TooManyBadSamples(ValueError):
    """More samples are broken than `max_bad_samples` allows to skip."""


@contextmanager
def one_sample(location: Location = None) -> Iterator[None]:
    """Context in which one sample is read, decoded or rendered: its errors become `BadSample`.

    Errors of the machine are raised unchanged: a full disk, too many open files, errors of a device, missing packages and
    interrupts.

    Args:
        location (`str` or `Callable`, *optional*): The sample's file and line, or a function that returns them.

    Raises:
        BadSample: For any other exception inside the context.
    """
    try:
        yield
    except Exception as error:
        if stops_the_run(error):
            raise
        if isinstance(error, BadSample):
            raise BadSample(error.reason, error.location or resolved(location), error.remedy) from error
        raise BadSample(_reason(error), resolved(location)) from error


def stops_the_run(error: BaseException) -> bool:
    """Whether an exception is an error of the machine rather than of one sample."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (TooManyBadSamples, ImportError, *DEVICE_ERRORS)):
            return True
        if isinstance(cause, OSError) and cause.errno in MACHINE_ERRORS:
            return True
        if (
            isinstance(cause, RuntimeError)
            and not isinstance(cause, RecursionError)
            and DEVICE_ERROR_TEXT.search(str(cause))
        ):
            return True
        cause = cause.__cause__
    return not isinstance(error, Exception)


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, RecursionError):
        text = "is nested too deeply."
    elif not isinstance(error, ValueError) or not text:  # another package's message, to be read with its type
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = shortened(text, MAX_REASON_CHARACTERS)
    return text if text.endswith((".", "!", "?", ")")) else f"{text}."


class BadSamples:
    """Counts samples and skipped samples over all workers of a data loader.

    Args:
        on_bad_sample (`str`, *optional*, defaults to `"error"`): "error" raises for the first bad sample; "skip" counts it,
            and logs the first 20.
        max_bad_samples (`float`, *optional*, defaults to 0.05): The share of samples that may be skipped, 0 to 1. It is
            taken of `total`, or of the samples seen so far, and of at least 100: with 0.05, 5 of up to 100 samples may be
            skipped, and 50 of 1,000.
        source (`str`, *optional*): The data set's name, for messages.
        total (`int`, *optional*): The number of samples, if it is known.

    Raises:
        ValueError: If an option has an unknown value.
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
            raise ValueError(f"max_bad_samples={max_bad_samples} is not a share of the samples; pass a number from 0 to 1.")
        self.on_bad_sample, self.max_bad_samples, self.source, self.total = on_bad_sample, max_bad_samples, source, total
        # (seen, skipped) in shared memory; each worker of the data loader writes its own row.
        self._counts = torch.zeros(WORKERS, 2, dtype=torch.int64).share_memory_()

    @property
    def seen(self) -> int:
        """The number of samples, over all workers."""
        return int(self._counts[:, 0].sum())

    @property
    def count(self) -> int:
        """The number of skipped samples, over all workers."""
        return int(self._counts[:, 1].sum())

    @contextmanager
    def sample(self, location: Location = None) -> Iterator[None]:
        """Context for one sample, as `one_sample`: its error is raised with its location, or the sample is skipped.

        Code after the `with` block runs for skipped samples too; code that uses the sample belongs inside it.

        Raises:
            BadSample: With `on_bad_sample="error"`.
            TooManyBadSamples: If more samples were skipped than allowed.
        """
        self._counts[worker_row(), 0] += 1
        with self.again(location):
            yield

    @contextmanager
    def again(self, location: Location = None) -> Iterator[None]:
        """As `sample`, for a sample that `sample` has already counted."""
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
        if error.location is None and (named or self._are_too_many()):  # finding the line may require reading the file
            error = BadSample(error.reason, resolved(location))
        if self.on_bad_sample == "error":
            remedy = "Or skip such conversations (--on-bad-sample skip)."
            raise BadSample(error.reason, error.location, remedy) from error.__cause__
        if named:
            logger.warning("Skipped: %s", error)
        if self._are_too_many():
            raise TooManyBadSamples(too_many(self.source, self.count, self.total or self.seen, self.max_bad_samples, error))

    def _are_too_many(self) -> bool:
        return are_too_many(self.count, self.total or self.seen, self.max_bad_samples)


def are_too_many(skipped: int, samples: int, max_bad_samples: float) -> bool:
    """Whether more samples were skipped than allowed; see `BadSamples`."""
    return skipped > max_bad_samples * max(samples, MIN_SAMPLES)


def too_many(source: str, skipped: int, samples: int, max_bad_samples: float, last: Exception) -> str:
    """The message of `TooManyBadSamples`."""
    return (
        f"{source}: {skipped:,} of {samples:,} samples had to be skipped, more than {max_bad_samples:.3g} of them (or of "
        f"{MIN_SAMPLES}); the last one: {last} Correct the data, or raise --max-bad-samples (1 for no limit)."
    )


def worker_row() -> int:
    """The row of this process in a shared tensor of `WORKERS` rows; row 0 is the main process."""
    worker = torch.utils.data.get_worker_info()
    return 0 if worker is None else 1 + worker.id % (WORKERS - 1)
