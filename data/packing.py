"""Packing: which conversations share a sequence."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, TypeVar

from torch.utils.data import Dataset

from .messages import location_of
from .sample_errors import MAX_BAD_SAMPLES, BadSamples

logger = logging.getLogger(__name__)

POOL_SIZE = 64  # candidates for a pack; 256 do not fill packs better, and delay conversations longer
T = TypeVar("T")


@dataclass
class Pack(Generic[T]):
    """Items that share a sequence."""

    items: list[T]
    tokens: int
    tiles: int


def pack(
    items: Iterable[tuple[T, int, int]], max_tokens: int, max_tiles: int | None = None, pool_size: int = POOL_SIZE
) -> Iterator[Pack[T]]:
    """Pack a stream. Each pack holds the largest item of the pool, and those that fill it best (a subset-sum problem).

    Args:
        items (`Iterable[tuple]`): (item, its tokens, its tiles), in random order. The packs depend on this order only. Tiles
            are inputs of the vision tower: one for each image, or several with `image_layout="tiles"`.
        max_tokens (`int`): The largest number of tokens in a pack.
        max_tiles (`int`, *optional*): The largest number of tiles in a pack, which bounds the memory of the vision tower.
            None for no limit.
        pool_size (`int`, *optional*, defaults to 64): The number of items from which a pack is chosen.

    Yields:
        `Pack`: The packs. Each item is in exactly one.

    Raises:
        ValueError: If an item exceeds the limits of a pack.
    """
    pool: list[tuple[T, int, int]] = []
    for item, tokens, tiles in items:
        if tokens > max_tokens or (max_tiles is not None and tiles > max_tiles):
            tiles_too = "" if max_tiles is None else f" and {max_tiles} tiles"
            raise ValueError(
                f"A conversation of {tokens} tokens and {tiles} tiles does not fit into a pack of {max_tokens} tokens"
                f"{tiles_too}; raise these."
            )
        pool.append((item, tokens, tiles))
        if len(pool) == pool_size:
            yield _take_pack(pool, max_tokens, max_tiles)
    while pool:
        yield _take_pack(pool, max_tokens, max_tiles)


def _take_pack(pool: list[tuple[T, int, int]], max_tokens: int, max_tiles: int | None) -> Pack[T]:
    """Remove the items of one pack from the pool."""
    first = max(range(len(pool)), key=lambda index: pool[index][1])
    _, tokens, tiles = pool[first]
    capacity = max_tokens - tokens
    mask = (1 << (capacity + 1)) - 1
    counts = 1 if max_tiles is None else max_tiles - tiles + 1
    # sums[n][c] is a bit set: bit s is set if some of the first n items have s tokens and c tiles together. Without a limit
    # for tiles c is always 0.
    sums = [[1] + [0] * (counts - 1)]
    for index, (_, own, own_tiles) in enumerate(pool):
        before = sums[-1]
        if index == first or own > capacity:
            sums.append(before)
            continue
        step = 0 if max_tiles is None else own_tiles
        sums.append([bits | (before[c - step] << own & mask if c >= step else 0) for c, bits in enumerate(before)])
        if max(sums[-1]).bit_length() == capacity + 1:  # the capacity is filled exactly
            break
    best = max(sums[-1]).bit_length() - 1
    count = next(c for c, bits in enumerate(sums[-1]) if bits >> best & 1)
    chosen = [first]
    for index in reversed(range(len(sums) - 1)):
        if not sums[index][count] >> best & 1:  # the sum is not possible without this item
            chosen.append(index)
            best -= pool[index][1]
            count -= 0 if max_tiles is None else pool[index][2]
    taken = [pool.pop(index) for index in sorted(chosen, reverse=True)][::-1]
    items, all_tokens, all_tiles = zip(*taken, strict=True)
    return Pack(list(items), sum(all_tokens), sum(all_tiles))


def measure(
    items: Iterable[tuple[T, dict[str, Any]]],
    size: Callable[[dict[str, Any]], tuple[int, int]],
    max_tiles: int | None,
    bad: BadSamples,
) -> Iterator[tuple[T, int, int]]:
    """Measure items for `pack`: (item, its conversation) -> (item, its tokens, its tiles)."""
    for item, sample in items:
        measured = None
        with bad.sample(location_of(sample)):
            tokens, tiles = size(sample)
            if max_tiles is not None and tiles > max_tiles:
                raise ValueError(
                    f"A conversation has {tiles} images or tiles of images, more than the {max_tiles} that a pack may have."
                )
            measured = item, tokens, tiles
        if measured is not None:
            yield measured


def pack_stream(
    samples: Iterable[dict[str, Any]],
    size: Callable[[dict[str, Any]], tuple[int, int]],
    max_tokens: int,
    max_tiles: int | None,
    bad: BadSamples,
) -> Iterator[list[dict[str, Any]]]:
    """Pack a stream of conversations; see `pack`."""
    items = ((sample, sample) for sample in samples)
    for one in pack(measure(items, size, max_tiles, bad), max_tokens, max_tiles):
        yield one.items


class PackedConversations(Dataset):
    """A map-style data set of packs: lists of conversations.

    Args:
        data: A map-style data set of conversations.
        size (`Callable`): Conversation -> its numbers of tokens and tiles. Raises `ValueError` if the conversation cannot be
            used.
        max_tokens, max_tiles: See `pack`.
        seed (`int`, *optional*, defaults to 0): The seed of the order in which conversations are packed.
        on_bad_sample, max_bad_samples: What to do with conversations that cannot be used; see `BadSamples`.

    Attributes:
        source, skipped: See `Conversations`.
        filled (`float`): The share of the packs' tokens that are used.
    """

    def __init__(
        self,
        data: Any,
        size: Callable[[dict[str, Any]], tuple[int, int]],
        max_tokens: int,
        max_tiles: int | None = None,
        seed: int = 0,
        on_bad_sample: str = "error",
        max_bad_samples: float = MAX_BAD_SAMPLES,
    ) -> None:
        self.data, self.source, self.skipped = data, data.source, data.skipped
        order = list(range(len(data)))
        Random(f"{seed} packs").shuffle(order)
        bad = BadSamples(on_bad_sample, max_bad_samples, self.source, total=len(data))
        items = ((index, data[index]) for index in order)
        packs = list(pack(measure(items, size, max_tiles, bad), max_tokens, max_tiles))
        self.skipped += bad.count
        if bad.count:
            logger.warning("%s: %d conversations cannot be packed and were skipped.", self.source, bad.count)
        if not packs:
            raise ValueError(f"{self.source} holds no conversation that can be packed ({self.skipped} were skipped).")
        self.packs = [one.items for one in packs]
        self.tokens = sum(one.tokens for one in packs)
        self.filled = self.tokens / (max_tokens * len(packs))

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.data[one] for one in self.packs[index]]
