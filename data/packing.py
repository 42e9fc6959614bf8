"""Several conversations in one sequence: which of them share one."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, TypeVar

from torch.utils.data import Dataset

from .bad_samples import MAX_BAD_SAMPLES, BadSamples
from .messages import complete_messages, images_of, location_of

logger = logging.getLogger(__name__)

POOL = 64  # conversations that wait for their pack; 256 fill packs no better, and are held back longer
T = TypeVar("T")


@dataclass
class Pack(Generic[T]):
    """Items that share a sequence."""

    items: list[T]
    tokens: int
    images: int


def pack(
    items: Iterable[tuple[T, int, int]], max_tokens: int, max_images: int | None = None, pool: int = POOL
) -> Iterator[Pack[T]]:
    """Pack a stream: the largest of the waiting items, with those of the others that fill its pack best (a subset sum).

    Args:
        items: (item, its tokens, its images), in an order by chance; what comes out depends on it alone.
        max_tokens: of a pack.
        max_images: of a pack, which bounds the memory of the vision tower; None for what fits into the tokens.
        pool: how many items wait at a time.

    Yields:
        packs; every item is in exactly one.

    Raises:
        ValueError: for an item that no pack can hold.
    """
    waiting: list[tuple[T, int, int]] = []
    for item, tokens, images in items:
        if tokens > max_tokens or (max_images is not None and images > max_images):
            images_too = "" if max_images is None else f" and {max_images} images"
            raise ValueError(
                f"A conversation of {tokens} tokens and {images} images does not fit into a pack of {max_tokens} tokens"
                f"{images_too}; raise these."
            )
        waiting.append((item, tokens, images))
        if len(waiting) == pool:
            yield _filled(waiting, max_tokens, max_images)
    while waiting:
        yield _filled(waiting, max_tokens, max_images)


def _filled(waiting: list[tuple[T, int, int]], max_tokens: int, max_images: int | None) -> Pack[T]:
    """Take the items of one pack out of those that wait."""
    first = max(range(len(waiting)), key=lambda place: waiting[place][1])
    _, tokens, images = waiting[first]
    room = max_tokens - tokens
    most = (1 << (room + 1)) - 1
    counts = 1 if max_images is None else max_images - images + 1
    # sums[n][c]: a number whose bits are the sums of tokens that some of the first n items reach with c images (with any
    # number of them, if that is not bounded).
    sums = [[1] + [0] * (counts - 1)]
    for place, (_, own, own_images) in enumerate(waiting):
        before = sums[-1]
        if place == first or own > room:
            sums.append(before)
            continue
        step = 0 if max_images is None else own_images
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
            count -= 0 if max_images is None else waiting[place][2]
    taken = [waiting.pop(place) for place in sorted(chosen, reverse=True)][::-1]
    items, all_tokens, all_images = zip(*taken, strict=True)
    return Pack(list(items), sum(all_tokens), sum(all_images))


def measured(
    items: Iterable[tuple[T, dict[str, Any], int]],
    length: Callable[[dict[str, Any]], int],
    max_images: int | None,
    bad: BadSamples,
) -> Iterator[tuple[T, int, int]]:
    """What `pack` takes: (item, its conversation, its images) -> (item, its tokens, its images)."""
    for item, sample, images in items:
        tokens = None
        with bad.sample(location_of(sample)):
            if max_images is not None and images > max_images:
                raise ValueError(f"A conversation has {images} images, more than the {max_images} of a pack.")
            tokens = length(sample)
        if tokens is not None:
            yield item, tokens, images


def pack_stream(
    samples: Iterable[dict[str, Any]],
    length: Callable[[dict[str, Any]], int],
    max_tokens: int,
    max_images: int | None,
    bad: BadSamples,
) -> Iterator[list[dict[str, Any]]]:
    """Packs of conversations that come one after the other; see `pack`."""
    items = ((sample, sample, len(images_of(complete_messages(sample)))) for sample in samples)
    for one in pack(measured(items, length, max_images, bad), max_tokens, max_images):
        yield one.items


class PackedConversations(Dataset):
    """A map-style data set of packs: lists of conversations.

    Args:
        data: conversations, with `images(place)`.
        length: a conversation -> its tokens; raises ValueError if it cannot be used.
        max_tokens, max_images: of a pack.
        seed: of the order in which conversations are packed.
        on_bad_sample, max_bad_samples: "error", or "skip" to skip, counted, what cannot be used; see `BadSamples`.

    Attributes:
        source, skipped: as of `Conversations`.
        filled: the share of the packs' tokens that are conversations.
    """

    def __init__(
        self,
        data: Any,
        length: Callable[[dict[str, Any]], int],
        max_tokens: int,
        max_images: int | None = None,
        seed: int = 0,
        on_bad_sample: str = "error",
        max_bad_samples: float = MAX_BAD_SAMPLES,
    ) -> None:
        self.data, self.source, self.skipped = data, data.source, data.skipped
        order = list(range(len(data)))
        Random(f"{seed} packs").shuffle(order)
        bad = BadSamples(on_bad_sample, max_bad_samples, self.source, total=len(data))
        items = ((place, data[place], data.images(place)) for place in order)
        packs = list(pack(measured(items, length, max_images, bad), max_tokens, max_images))
        self.skipped += bad.count
        if bad.count:
            logger.warning("%s: %d conversations cannot be packed and are left out.", self.source, bad.count)
        if not packs:
            raise ValueError(f"{self.source} holds no conversation that can be packed ({self.skipped} were left out).")
        self.packs = [one.items for one in packs]
        self.tokens = sum(one.tokens for one in packs)
        self.filled = self.tokens / (max_tokens * len(packs))

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, place: int) -> list[dict[str, Any]]:
        return [self.data[one] for one in self.packs[place]]
