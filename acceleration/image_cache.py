"""`ImageKVCache`: the keys and values of images, which any prompt may use; see image_reuse.py."""

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..transformers_dsvl import BaseModelOutputWithPooling

FORMAT = "dsvl_image_cache_2"
EQUAL_IMAGES_FORMAT = "dsvl_image_cache_1"  # until 0.3: (layers, images, tokens, heads, head_dim)


def reuse_is_exact(config: Any) -> bool:
    """Whether the KV cache of a prefix stays valid when the conversation continues.

    Not under "mmca_reference", where text sees later images; nor with `reversed_images`, where every new image moves the
    others; nor where the frequencies of the positions depend on the length of the sequence.
    """
    return not (
        config.multimodal_attention == "mmca_reference" or config.reversed_images or changing_ropes(config.text_config)
    )


def changing_ropes(text_config: Any) -> list[str]:
    rope = getattr(text_config, "rope_parameters", None) or {}
    kinds = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    return [kind for kind in kinds if kind in ("dynamic", "longrope")]


class ImageKVCache:
    """The keys and values of images in every layer of one model's decoder, before rotation.

    `cache[2]`, `cache[1:3]` and `cache[[2, 0, 0]]` are caches of these images in this order, each with all its tiles;
    `ImageKVCache.cat` joins several. An image token takes 2 x layers x key-value heads x head_dim numbers: with LLaMA-7B and
    16 bits 512 KiB (128.5 MiB for the 257 tokens of CLIP ViT-L/14), with 8 key-value heads a quarter of it.

    Args:
        keys, values: (layers, image tokens, key-value heads, head_dim), in the model's dtype: the tokens of all tiles of all
            images, one after another. Also (layers, images, tokens of each, key-value heads, head_dim).
        fingerprint: of the model that they belong to (`ImageReuse.fingerprint`).
        tile_lengths (*optional*): for each image, the number of tokens of each of its tiles. Needed unless all images are of
            one tile and length, and keys and values have five dimensions.

    Raises:
        ValueError: if the lengths do not sum to the tokens.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        fingerprint: str,
        tile_lengths: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if keys.ndim == 5:
            tile_lengths = [[keys.shape[2]]] * keys.shape[1]
            keys, values = keys.flatten(1, 2), values.flatten(1, 2)
        lengths = tuple(tuple(map(int, image)) for image in tile_lengths or ())
        if sum(map(sum, lengths)) != keys.shape[1]:
            raise ValueError(
                f"tile_lengths sum to {sum(map(sum, lengths))} tokens, but the keys hold {keys.shape[1]}; pass for each "
                "image the number of tokens of each of its tiles."
            )
        self.keys, self.values, self.fingerprint, self.tile_lengths = keys, values, fingerprint, lengths

    def __len__(self) -> int:
        return len(self.tile_lengths)

    def __repr__(self) -> str:
        tiles = sum(self.num_tiles)
        shown = f"{len(self)} images, " + (f"{tiles} tiles, " if tiles != len(self) else "")
        return (
            f"ImageKVCache({shown}{self.keys.shape[1]} tokens, {self.nbytes / 2**20:.1f} MiB, {self.dtype}, {self.device})"
        )

    def __iter__(self) -> Iterator["ImageKVCache"]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, images: int | slice | Sequence[int] | torch.Tensor) -> "ImageKVCache":
        numbers = range(len(self))
        if isinstance(images, int):
            chosen: Sequence[int] = [numbers[images]]
        elif isinstance(images, slice):
            chosen = numbers[images]
        else:
            chosen = [numbers[int(number)] for number in images]
        ends = list(accumulate(map(sum, self.tile_lengths), initial=0))
        lengths = [self.tile_lengths[number] for number in chosen]
        first = chosen[0] if chosen else 0
        if list(chosen) == list(range(first, first + len(chosen))):  # neighbours: a view
            tokens = slice(ends[first], ends[first + len(chosen)])
            return ImageKVCache(self.keys[:, tokens], self.values[:, tokens], self.fingerprint, lengths)
        index = torch.cat([torch.arange(ends[number], ends[number + 1]) for number in chosen]).to(self.device)
        return ImageKVCache(self.keys[:, index], self.values[:, index], self.fingerprint, lengths)

    @property
    def num_tiles(self) -> list[int]:
        """How many tiles each image has."""
        return list(map(len, self.tile_lengths))

    def tile_ranges(self) -> BaseModelOutputWithPooling:
        """In the place of `get_image_features(...)`: as `pooler_output` a range for each tile, as long as its tokens, for
        what asks for lengths alone."""
        return BaseModelOutputWithPooling(pooler_output=[range(length) for tiles in self.tile_lengths for length in tiles])

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def to(self, *args: Any, **kwargs: Any) -> "ImageKVCache":
        """Move or convert; the arguments are those of `torch.Tensor.to`."""
        keys, values = self.keys.to(*args, **kwargs), self.values.to(*args, **kwargs)
        return ImageKVCache(keys, values, self.fingerprint, self.tile_lengths)

    @classmethod
    def cat(cls, caches: Sequence["ImageKVCache"]) -> "ImageKVCache":
        """One cache of all images of several, in this order.

        Raises:
            ValueError: if there are none, or they belong to different models.
        """
        if len({cache.fingerprint for cache in caches}) != 1:
            raise ValueError(
                f"{len(caches)} image KV caches of {len({c.fingerprint for c in caches})} different models cannot be "
                "joined; pass at least one, all encoded by the same model."
            )
        return cls(
            torch.cat([cache.keys for cache in caches], 1),
            torch.cat([cache.values for cache in caches], 1),
            caches[0].fingerprint,
            [image for cache in caches for image in cache.tile_lengths],
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint, "tile_lengths": json.dumps(self.tile_lengths)}
        save_file({"keys": self.keys.contiguous(), "values": self.values.contiguous()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "ImageKVCache":
        """Read what `save` wrote, of earlier versions too.

        Raises:
            ValueError: if the file is something else.
        """
        remedy = "pass a file that ImageKVCache.save of this version or an earlier one wrote, or encode the images again."
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                kind = metadata.get("format")
                if kind not in (FORMAT, EQUAL_IMAGES_FORMAT):
                    raise ValueError(f"{str(path)!r} has the format {kind!r}, not {FORMAT!r}; {remedy}")
                if "fingerprint" not in metadata or set(file.keys()) != {"keys", "values"}:
                    raise ValueError(f"{str(path)!r} lacks its keys, its values or its model's fingerprint; {remedy}")
                keys, values = file.get_tensor("keys"), file.get_tensor("values")
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no safetensors file, or cut off ({error}); {remedy}") from error
        axes = "layers, tokens, heads, head_dim" if kind == FORMAT else "layers, images, tokens, heads, head_dim"
        is_whole = keys.shape == values.shape and keys.dtype == values.dtype and keys.is_floating_point()
        if not is_whole or keys.ndim != axes.count(",") + 1:
            raise ValueError(
                f"{str(path)!r} holds keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} "
                f"{values.dtype}, not two alike of ({axes}); {remedy}"
            )
        lengths = None
        if kind == FORMAT:
            lengths = _read_lengths(metadata.get("tile_lengths"), keys.shape[1])
            if lengths is None:
                raise ValueError(f"{str(path)!r} does not tell its images' tokens apart; {remedy}")
        return cls(keys, values, metadata["fingerprint"], lengths)


def _read_lengths(text: str | None, tokens: int) -> list[list[int]] | None:
    """The lengths of each image's tiles, of so many tokens in all; None for anything else."""
    try:
        lengths = json.loads(text or "")
    except ValueError:
        return None
    if not isinstance(lengths, list) or not all(isinstance(image, list) and image for image in lengths):
        return None
    flat = [length for image in lengths for length in image]
    return lengths if all(type(length) is int and length > 0 for length in flat) and sum(flat) == tokens else None


__all__ = ["ImageKVCache", "reuse_is_exact"]
