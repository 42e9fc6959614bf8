"""The keys and values of images, spread over the processes of a group, for `generate`; see image_parallelism.py.

Every process encodes its own images into an `ImageKVCache`, and runs the text of a prompt over them. The KV cache of the
prompt holds the text and its own images (see reuse/shared_images.py); the results over the images of all processes are
merged in the prefill and in each step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import distributed

from ...inputs_dsvl import check_image_counts
from ...masks_dsvl import Visibility
from ...transformers_dsvl import BaseModelOutputWithPooling
from ..attention.gathered_mask import Slots
from ..attention.split_attention import BlockedBranch, merge
from ..reuse.image_cache import ImageKVCache
from ..reuse.text_prefill import TextPrefillMask


def assign_images(rows: Sequence[Sequence[int]], size: int) -> list[int]:
    """The process of each image, so that the tokens of every row are balanced.

    Args:
        rows: for each row, the number of tokens of each of its images.
        size: the number of processes.

    Returns:
        For each image of all rows, in order, the index of its process.
    """
    total = [0] * size
    owners: list[int] = []
    for row in rows:
        load, of_row = [0] * size, [0] * len(row)
        for image in sorted(range(len(row)), key=lambda image: -row[image]):  # the largest first
            owner = min(range(size), key=lambda rank: (load[rank], total[rank], rank))
            load[owner] += row[image]
            total[owner] += row[image]
            of_row[image] = owner
        owners += of_row
    return owners


def tiles_of_images(tile_lengths: Sequence[Sequence[int]], images: Sequence[int]) -> list[int]:
    """The indices of the tiles of some images, among those of all images.

    Args:
        tile_lengths: for each image, the number of tokens of each of its tiles.
        images: indices of images.
    """
    ends = list(accumulate(map(len, tile_lengths), initial=0))
    return [tile for image in images for tile in range(ends[image], ends[image + 1])]


class SplitImageKVCache:
    """The keys and values of images, of which each process of a group holds some.

    `encode_images` makes it inside of `image_parallel`. `cache[2]`, `cache[1:3]` and `cache[[2, 0, 0]]` are caches of these
    images, wherever they are.

    Args:
        own: the images of this process, in order; None if it has none.
        tile_lengths: for each image of all processes, the number of tokens of each of its tiles.
        owners: the process of each image.
        group: the process group.
        numbers (*optional*): of all images, see `ImageKVCache`.
    """

    def __init__(
        self,
        own: ImageKVCache | None,
        tile_lengths: Sequence[Sequence[int]],
        owners: Sequence[int],
        group: Any,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.own, self.group = own, group
        self.numbers = None if numbers is None else tuple(numbers)
        self.tile_lengths, self.owners = tuple(map(tuple, tile_lengths)), tuple(owners)

    def __len__(self) -> int:
        return len(self.tile_lengths)

    def __repr__(self) -> str:
        rank = distributed.get_rank(self.group)
        return f"SplitImageKVCache({len(self)} images, of which process {rank} holds {self.own})"

    def __getitem__(self, images: int | slice | Sequence[int]) -> "SplitImageKVCache":
        numbers = range(len(self))
        chosen = [numbers[images]] if isinstance(images, int) else numbers[images] if isinstance(images, slice) else images
        rank = distributed.get_rank(self.group)
        place = dict(zip((n for n in numbers if self.owners[n] == rank), range(len(self)), strict=False))
        kept = [place[number] for number in chosen if number in place]
        own = self.own[kept] if self.own is not None and kept else None
        lengths, owners = [self.tile_lengths[number] for number in chosen], [self.owners[number] for number in chosen]
        held = self.numbers and [self.numbers[number] for number in chosen]
        return SplitImageKVCache(own, lengths, owners, self.group, held)

    def _changed(self, change: Callable[[ImageKVCache], ImageKVCache]) -> "SplitImageKVCache":
        own = None if self.own is None else change(self.own)
        return SplitImageKVCache(own, self.tile_lengths, self.owners, self.group, self.numbers)

    def to(self, *args: Any, **kwargs: Any) -> "SplitImageKVCache":
        """See `ImageKVCache.to`."""
        return self._changed(lambda own: own.to(*args, **kwargs))

    def quantize(self) -> "SplitImageKVCache":
        """See `ImageKVCache.quantize`."""
        return self._changed(ImageKVCache.quantize)

    def offload(self) -> "SplitImageKVCache":
        """See `ImageKVCache.offload`."""
        return self._changed(ImageKVCache.offload)

    @property
    def nbytes(self) -> int:
        """Bytes in this process."""
        return 0 if self.own is None else self.own.nbytes

    def tile_ranges(self) -> BaseModelOutputWithPooling:
        """See `ImageKVCache.tile_ranges`; of all images."""
        return BaseModelOutputWithPooling(pooler_output=[range(length) for tiles in self.tile_lengths for length in tiles])

    def own_tokens(self, is_image: torch.Tensor, copies: int, tokens_per_image: int) -> torch.Tensor:
        """Which tokens are of images of this process: (batch, tokens).

        Args:
            is_image: (batch, tokens), the image tokens of all.
            copies: the number of consecutive rows with the same images.
            tokens_per_image: of the configuration.

        Raises:
            ValueError: if image tokens and images do not match.
        """
        rows = is_image[::copies]
        lengths = list(map(sum, self.tile_lengths))
        check_image_counts(rows.sum(-1).tolist(), tokens_per_image, lengths, whole_images=True)
        rank = distributed.get_rank(self.group)
        owned = torch.tensor([owner == rank for owner in self.owners]).repeat_interleave(torch.tensor(lengths))
        own = torch.zeros_like(rows).masked_scatter_(rows, owned.to(rows.device))
        return own.repeat_interleave(copies, 0)


@dataclass
class SplitPrefillMask(TextPrefillMask):
    """The mask of a prompt's text over images of all processes.

    Attributes:
        branch: over the images of this process.
        group: the process group.
    """

    branch: BlockedBranch | None = None
    group: Any = None

    @classmethod
    def over(
        cls, visibility: Visibility, text: Slots, image: Slots, images: Any, backend: str, softcapped: bool, group: Any
    ) -> "SplitPrefillMask":
        """As `TextPrefillMask.build`, for a group."""
        made = TextPrefillMask.build(visibility, text, image, images, backend, softcapped)
        filled = torch.ones_like(image.index, dtype=torch.bool) if image.filled is None else image.filled
        if visibility.padding is not None:
            filled = filled & visibility.padding.gather(1, image.index)
        branch = BlockedBranch(visibility, text.index, image.index, filled)
        return cls(images, made.text_mask, None, None, None, branch, group)

    def attend_images(
        self, backend: str, module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The merged result over the images, (batch, queries, heads, head_dim)."""
        assert self.branch is not None
        output, lse, _ = self.branch.forward(query, keys, values, kwargs["scaling"], kwargs.get("softcap"))
        return merge(output, lse, self.group)[0].to(query.dtype)


__all__ = ["SplitImageKVCache", "SplitPrefillMask", "assign_images", "tiles_of_images"]
