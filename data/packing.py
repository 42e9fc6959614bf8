"""Several conversations in one sequence: which of them share one."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset, IterableDataset

from .conversations import NAMED

logger = logging.getLogger(__name__)

POOL = 64  # conversations that wait for their pack; 256 fill packs no better, and are held back longer
T = TypeVar("T")


@dataclass
class Pack(Generic[T]):
    """Items that share a sequence."""

    items: list[T]
    tokens: int
    pictures: int


def pack(
    items: Iterable[tuple[T, int, int]], max_tokens: int, max_pictures: int | None = None, pool: int = POOL
) -> Iterator[Pack[T]]:
    """Pack a stream: the largest of the waiting items, with those of the others that fill its pack best (a subset sum).

    Args:
        items: (item, its tokens, its pictures), in an order by chance; what comes out depends on it alone.
        max_tokens: of a pack.
        max_pictures: of a pack, which bounds the memory of the vision tower; None for what fits into the tokens.
        pool: how many items wait at a time.

    Yields:
        packs; every item is in exactly one.

    Raises:
        ValueError: for an item that no pack can hold.
    """
    waiting: list[tuple[T, int, int]] = []
    for item, tokens, pictures in items:
        if tokens > max_tokens or (max_pictures is not None and pictures > max_pictures):
            pictures_too = "" if max_pictures is None else f" and {max_pictures} pictures"
            raise ValueError(
                f"A conversation of {tokens} tokens and {pictures} pictures does not fit into a pack of {max_tokens} tokens"
                f"{pictures_too}; raise these."
            )
        waiting.append((item, tokens, pictures))
        if len(waiting) == pool:
            yield _filled(waiting, max_tokens, max_pictures)
    while waiting:
        yield _filled(waiting, max_tokens, max_pictures)


def _filled(waiting: list[tuple[T, int, int]], max_tokens: int, max_pictures: int | None) -> Pack[T]:
    """Take the items of one pack out of those that wait."""
    first = max(range(len(waiting)), key=lambda place: waiting[place][1])
    _, tokens, pictures = waiting[first]
    room = max_tokens - tokens
    most = (1 << (room + 1)) - 1
    counts = 1 if max_pictures is None else max_pictures - pictures + 1
    # sums[n][c]: a number whose bits are the sums of tokens that some of the first n items reach with c pictures (with any
    # number of them, if that is not bounded).
    sums = [[1] + [0] * (counts - 1)]
    for place, (_, own, own_pictures) in enumerate(waiting):
        before = sums[-1]
        if place == first or own > room:
            sums.append(before)
            continue
        step = 0 if max_pictures is None else own_pictures
        sums.append([bits | (before[c - step] << own & most if c >= step else 0) for c, bits in enumerate(before)])
        if max(sums[-1]).bit_length() == room + 1:  # full to the token
            break
    best = max(sums[-1]).bit_length() - 1
    count = next(c for c, bits in enumerate(sums[-1]) if bits >> best & 1)
    chosen = [first]
    for place in reversed(range(len(sums) - 1)):
        if not sums[place][count] >> best & 1:  # only this item reaches the sum
            chosen.append(place)
            best -= waiting[place][1]
            count -= 0 if max_pictures is None else waiting[place][2]
    taken = [waiting.pop(place) for place in sorted(chosen, reverse=True)][::-1]
    items, all_tokens, all_pictures = zip(*taken, strict=True)
    return Pack(list(items), sum(all_tokens), sum(all_pictures))


class PackedConversations(Dataset):
    """A map-style data set of packs: lists of conversations.

    Args:
        data: conversations, with `pictures(place)`.
        length: a conversation -> its tokens; raises ValueError if it cannot be used.
        max_tokens, max_pictures: of a pack.
        seed: of the order in which conversations are packed.
        skip: leave what cannot be used out, counted, instead of raising.

    Attributes:
        source, skipped: as of `Conversations`.
        filled: the share of the packs' tokens that are conversations.
    """

    def __init__(
        self,
        data: Any,
        length: Callable[[dict[str, Any]], int],
        max_tokens: int,
        max_pictures: int | None = None,
        seed: int = 0,
        skip: bool = False,
    ) -> None:
        self.data, self.source, self.skipped = data, data.source, data.skipped
        order = list(range(len(data)))
        Random(f"{seed} packs").shuffle(order)
        packs = list(pack(self._measured(order, length, max_tokens, max_pictures, skip), max_tokens, max_pictures))
        if not packs:
            raise ValueError(f"{self.source} holds no conversation that can be packed ({self.skipped} were left out).")
        self.packs = [one.items for one in packs]
        self.tokens = sum(one.tokens for one in packs)
        self.filled = self.tokens / (max_tokens * len(packs))

    def _measured(
        self, order: list[int], length: Callable, max_tokens: int, max_pictures: int | None, skip: bool
    ) -> Iterator[tuple[int, int, int]]:
        left_out = 0
        for place in order:
            try:
                tokens, pictures = length(self.data[place]), self.data.pictures(place)
                if max_pictures is not None and pictures > max_pictures:
                    raise ValueError(f"A conversation has {pictures} pictures, more than the {max_pictures} of a pack.")
            except ValueError as error:
                if not skip:
                    raise ValueError(f"{error} Or leave such conversations out (--on-bad-sample skip).") from error
                left_out += 1
                if left_out <= NAMED:
                    logger.warning("Left out: %s", error)
            else:
                yield place, tokens, pictures
        if left_out:
            self.skipped += left_out
            logger.warning("%s: %d conversations cannot be packed and are left out.", self.source, left_out)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, place: int) -> list[dict[str, Any]]:
        return [self.data[one] for one in self.packs[place]]


class StreamedPacks(IterableDataset):
    """Packs of a stream of conversations, for a data loader with workers in each of several processes.

    Every worker reads the whole stream and packs a share of its own, so that all of them together hold each conversation
    once, and each gives the same packs every time.

    Args:
        samples: an iterable of conversations that can be iterated again.
        measure: a conversation -> (tokens, pictures).
        rank, processes: which of how many processes this is.
    """

    def __init__(
        self,
        samples: Iterable[dict[str, Any]],
        measure: Callable[[dict[str, Any]], tuple[int, int]],
        max_tokens: int,
        max_pictures: int | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.samples, self.measure = samples, measure
        self.max_tokens, self.max_pictures = max_tokens, max_pictures
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share, shares = self.rank * workers + number, self.processes * workers
        own = (sample for place, sample in enumerate(self.samples) if place % shares == share)
        for one in pack(((sample, *self.measure(sample)) for sample in own), self.max_tokens, self.max_pictures):
            yield one.items
