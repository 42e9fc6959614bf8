"""What a KV cache holds of a conversation, and how much of it the next round may use."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from transformers import Cache, DynamicCache, StaticCache

from ..utils.cache_cropping import can_crop, crop


class SeenImage:
    """An image as it was when it was encoded.

    Args:
        image: best marked read-only: then Pillow gives it new pixels where somebody draws on it, and need not be asked for
            them to know that it is the same.
    """

    def __init__(self, image: Image.Image) -> None:
        self._pixels, self._digest = image.im, _digest(image)

    def is_still(self, image: Image.Image) -> bool:
        """Whether this is the same image: the very same pixels in memory, or equal ones."""
        return (bool(image.readonly) and image.im is self._pixels) or _digest(image) == self._digest


def _digest(image: Image.Image) -> bytes:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()


@dataclass
class Memory:
    """A cache and what is in it.

    Attributes:
        cache: filled by the model; `mm_token_type_ids` on it is the modality of its tokens.
        static: whether it is a static one.
        length: how many tokens it may come to hold.
        ids: the tokens it holds, those of images included.
        images: those whose tokens it holds, in order.
    """

    cache: Cache
    static: bool
    length: int
    ids: list[int] = field(default_factory=list)
    images: list[SeenImage] = field(default_factory=list)

    def common_prefix(self, ids: list[int], images: list[Image.Image], image_token_id: int, per_image: int) -> int:
        """How many of these tokens the cache holds, whole images only.

        At least one is left to compute: what follows the last token is not in a cache.
        """
        limit = min(len(self.ids), len(ids) - 1)
        common = next((place for place in range(limit) if self.ids[place] != ids[place]), limit)
        starts = [place for place in range(common) if ids[place] == image_token_id][::per_image]
        for start, seen, image in zip(starts, self.images, images, strict=False):
            if start + per_image > common or not seen.is_still(image):
                return start
        return common

    def crop(self, length: int, image_token_id: int, per_image: int) -> bool:
        """Forget all but the first `length` tokens; False, with nothing done, if this cache cannot."""
        if int(self.cache.get_seq_length()) != length and not can_crop(self.cache):
            return False
        crop(self.cache, length)
        self.ids = self.ids[:length]
        self.images = self.images[: self.ids.count(image_token_id) // per_image]
        return True


def new_cache(model: Any, static: bool, length: int) -> Cache:
    """An empty cache for a model's decoder; a static one has room for `length` tokens."""
    config = model.config.text_config
    return StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)
