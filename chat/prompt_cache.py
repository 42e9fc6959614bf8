"""The KV cache of a conversation, and how many of its tokens the next prompt can reuse."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from transformers import Cache, DynamicCache, StaticCache

from ..utils.cache_cropping import can_crop, crop
from .prompts import Prompt


class CachedImage:
    """Identifies an image whose tokens are in the cache, by its pixels at the time it was encoded.

    Args:
        image: mark it read-only (`image.readonly = 1`). Pillow then gives the image a new pixel buffer when it is drawn
            on, so that an unchanged buffer proves unchanged pixels without hashing them.
    """

    def __init__(self, image: Image.Image) -> None:
        self._pixels, self._digest = image.im, _digest(image)

    def matches(self, image: Image.Image) -> bool:
        """Whether an image has the pixels that were encoded."""
        return (bool(image.readonly) and image.im is self._pixels) or _digest(image) == self._digest


def _digest(image: Image.Image) -> bytes:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()


@dataclass
class PromptCache:
    """A KV cache with the tokens and images it holds.

    Attributes:
        cache: the KV cache, filled by the model. It also records the modality of its tokens.
        static: whether it is a `StaticCache`.
        length: its capacity in tokens.
        ids: the ids of the tokens it holds, image tokens included.
        images: the images whose tokens it holds, in order.
    """

    cache: Cache
    static: bool
    length: int
    ids: list[int] = field(default_factory=list)
    images: list[CachedImage] = field(default_factory=list)

    def common_prefix(self, prompt: Prompt, images: list[Image.Image]) -> int:
        """The number of leading prompt tokens that the cache holds. An image counts only as a whole, with all its tiles.

        At most `len(prompt.ids) - 1`: the last prompt token has to be computed, because the cache does not hold its logits.

        Args:
            prompt: the prompt.
            images: its images, in order.
        """
        ids = prompt.ids
        limit = min(len(self.ids), len(ids) - 1)
        common = next((index for index in range(limit) if self.ids[index] != ids[index]), limit)
        for number, (where, image) in enumerate(zip(prompt.images, images, strict=True)):
            if where.start >= common:
                break
            if where.stop > common or number >= len(self.images) or not self.images[number].matches(image):
                return where.start
        return common

    def crop(self, length: int, prompt: Prompt) -> bool:
        """Keep only the first `length` tokens, which are those of the prompt.

        Returns:
            False if this kind of cache cannot be cropped; it is then unchanged.
        """
        if int(self.cache.get_seq_length()) != length and not can_crop(self.cache):
            return False
        crop(self.cache, length)
        self.ids = self.ids[:length]
        self.images = self.images[: sum(where.stop <= length for where in prompt.images)]
        return True


def new_cache(model: Any, static: bool, length: int) -> Cache:
    """An empty KV cache for a model's decoder. `length` is the capacity of a static cache, in tokens."""
    config = model.config.text_config
    return StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)
