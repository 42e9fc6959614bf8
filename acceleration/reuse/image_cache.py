"""`ImageKVCache`: the keys and values of images, which any prompt may use (under their numbers); see image_reuse.py."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...inputs_dsvl import check_num_tiles
from ...transformers_dsvl import BaseModelOutputWithPooling
from ..int8 import dequantize, quantize

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


def lengths_by_image(lengths: Sequence[int], num_tiles: Sequence[int] | None) -> list[list[int]]:
    """The number of tokens of each tile, for each image.

    Args:
        lengths: of all tiles.
        num_tiles: how many tiles each image has; None for one.

    Raises:
        ValueError: if these are not as many tiles.
    """
    counts = [1] * len(lengths) if num_tiles is None else num_tiles
    check_num_tiles(sum(counts), len(lengths))
    return [list(lengths[start:end]) for start, end in pairwise(accumulate(counts, initial=0))]


class ImageKVCache:
    """The keys and values of images in every layer of one model's decoder, before rotation.

    `cache[2]`, `cache[1:3]` and `cache[[2, 0, 0]]` are caches of these images in this order, each with all its tiles;
    `ImageKVCache.cat` joins several. Images keep the `numbers` that they were encoded with.

    An image token takes 2 x layers x key-value heads x head_dim numbers: with LLaMA-7B and 16 bits 512 KiB (128.5 MiB for
    the 257 tokens of CLIP ViT-L/14), with 8 key-value heads a quarter of it. `quantize` halves it, and `offload` keeps it in
    the main memory of the host.

    Args:
        keys, values: (layers, image tokens, key-value heads, head_dim), in the model's dtype: the tokens of all tiles of all
            images, one after another. Also (layers, images, tokens of each, key-value heads, head_dim). int8 with scales.
        fingerprint: of the model that they belong to (`ImageReuse.fingerprint`).
        tile_lengths (*optional*): for each image, the number of tokens of each of its tiles. Needed unless all images are of
            one tile and length, and keys and values have five dimensions.
        key_scales, value_scales (*optional*): (layers, image tokens, key-value heads), of 8-bit keys and values.
        is_offloaded (*optional*, defaults to `False`): whether they stay on the host while the model is on another device.
        numbers (*optional*): for each image of a model with `numbered_images`, the number in its conversation that its keys
            and values hold.

    Raises:
        ValueError: if the lengths do not sum to the tokens, or there are not as many numbers as images.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        fingerprint: str,
        tile_lengths: Sequence[Sequence[int]] | None = None,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
        is_offloaded: bool = False,
        numbers: Sequence[int] | None = None,
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
        self.key_scales, self.value_scales, self.is_offloaded = key_scales, value_scales, is_offloaded
        self.numbers = None if numbers is None else tuple(map(int, numbers))
        if self.numbers is not None and len(self.numbers) != len(lengths):
            raise ValueError(f"{len(self.numbers)} numbers for {len(lengths)} images; pass one for each.")

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name: `keys`, `values`, and in 8 bits `key_scales` and `value_scales`."""
        if self.key_scales is None or self.value_scales is None:
            return {"keys": self.keys, "values": self.values}
        return {
            "keys": self.keys,
            "values": self.values,
            "key_scales": self.key_scales,
            "value_scales": self.value_scales,
        }

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor], **others: Any) -> "ImageKVCache":
        """The same change of all tensors, and of other arguments."""
        arguments: dict[str, Any] = {
            "tile_lengths": self.tile_lengths,
            "is_offloaded": self.is_offloaded,
            "numbers": self.numbers,
        }
        arguments |= {name: change(tensor) for name, tensor in self.tensors.items()} | others
        return ImageKVCache(fingerprint=self.fingerprint, **arguments)

    def __len__(self) -> int:
        return len(self.tile_lengths)

    def __repr__(self) -> str:
        tiles = sum(self.num_tiles)
        shown = f"{len(self)} images, " + (f"{tiles} tiles, " if tiles != len(self) else "")
        where = f"{self.device}{', offloaded' if self.is_offloaded else ''}"
        return f"ImageKVCache({shown}{self.keys.shape[1]} tokens, {self.nbytes / 2**20:.1f} MiB, {self.dtype}, {where})"

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
        others = {"tile_lengths": lengths, "numbers": self.numbers and [self.numbers[number] for number in chosen]}
        first = chosen[0] if chosen else 0
        if list(chosen) == list(range(first, first + len(chosen))):  # neighbours: a view
            tokens = slice(ends[first], ends[first + len(chosen)])
            return self._changed(lambda tensor: tensor[:, tokens], **others)
        index = torch.cat([torch.arange(ends[number], ends[number + 1]) for number in chosen]).to(self.device)
        return self._changed(lambda tensor: tensor[:, index], **others)

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
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values have 8 bits."""
        return self.key_scales is not None

    def to(self, *args: Any, **kwargs: Any) -> "ImageKVCache":
        """Move or convert; the arguments are those of `torch.Tensor.to`. `torch.int8` quantizes, and a floating point dtype
        dequantizes.

        Raises:
            ValueError: for other dtypes.
        """
        wanted = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if wanted.dtype != torch.int8 and not wanted.is_floating_point():
            raise ValueError(f"Keys and values of images cannot be {wanted.dtype}; pass a float dtype or torch.int8.")
        if wanted.device == self.device and wanted.dtype == self.dtype:
            return self
        moved = self._changed(
            lambda tensor: tensor.to(wanted.device), is_offloaded=self.is_offloaded and wanted.device == self.device
        )
        if wanted.dtype == self.dtype:
            return moved
        if wanted.dtype == torch.int8:
            return moved.quantize()
        keys, values = (
            dequantize(moved.tensors[name], moved.tensors.get(scales), wanted.dtype)
            for name, scales in (("keys", "key_scales"), ("values", "value_scales"))
        )
        others: dict[str, Any] = {"is_offloaded": moved.is_offloaded, "numbers": self.numbers}
        return ImageKVCache(keys, values, self.fingerprint, self.tile_lengths, **others)

    def quantize(self) -> "ImageKVCache":
        """The same images in 8 bits: integers, with a scale for each token and key-value head.

        A KV cache that is generated over them holds them in 8 bits, too; see `SharedImagesCache`.

        Raises:
            ValueError: if keys or values are not finite.
        """
        if self.is_quantized:
            return self
        (keys, key_scales), (values, value_scales) = quantize(self.keys), quantize(self.values)
        for name, scales in (("keys", key_scales), ("values", value_scales)):
            if not bool(scales.isfinite().all()):
                raise ValueError(
                    f"The {name} of the images hold infinities or NaN, which 8 bits cannot; check the model's dtype "
                    "(float16 overflows where bfloat16 does not) and its weights."
                )
        arguments = keys, values, self.fingerprint, self.tile_lengths, key_scales, value_scales
        changed = ImageKVCache(*arguments, numbers=self.numbers)
        return changed.offload() if self.is_offloaded else changed

    def offload(self) -> "ImageKVCache":
        """The same images in the main memory of the host, pinned where there is a GPU.

        `generate` and `prefill` take them as they are: the images of a layer are copied to the device while the layer before
        it runs. A KV cache that is generated over them leaves them on the host, too; see `SharedImagesCache`.
        """
        return self._changed(pinned, is_offloaded=True)

    @classmethod
    def cat(cls, caches: Sequence["ImageKVCache"]) -> "ImageKVCache":
        """One cache of all images of several, in this order. It is offloaded if all of them are.

        Raises:
            ValueError: if there are none, they belong to different models, or have several dtypes.
        """
        if len({cache.fingerprint for cache in caches}) != 1:
            raise ValueError(
                f"{len(caches)} image KV caches of {len({c.fingerprint for c in caches})} different models cannot be "
                "joined; pass at least one, all encoded by the same model."
            )
        dtypes = sorted({str(cache.dtype) for cache in caches})
        if len(dtypes) > 1:
            raise ValueError(f"Image KV caches of {' and '.join(dtypes)} cannot be joined; convert them by `to` first.")
        joined: dict[str, Any] = {
            name: torch.cat([cache.tensors[name] for cache in caches], 1) for name in caches[0].tensors
        }
        lengths = [image for cache in caches for image in cache.tile_lengths]
        numbers = [number for cache in caches for number in cache.numbers or ()] or None
        made = cls(fingerprint=caches[0].fingerprint, tile_lengths=lengths, numbers=numbers, **joined)
        return made.offload() if all(cache.is_offloaded for cache in caches) else made

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint, "tile_lengths": json.dumps(self.tile_lengths)}
        if self.numbers is not None:
            metadata["numbers"] = json.dumps(self.numbers)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path, metadata)

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
                if "fingerprint" not in metadata or set(file.keys()) not in (_PLAIN, _PLAIN | _SCALES):
                    raise ValueError(f"{str(path)!r} lacks its keys, its values or its model's fingerprint; {remedy}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no safetensors file, or cut off ({error}); {remedy}") from error
        axes = "layers, tokens, heads, head_dim" if kind == FORMAT else "layers, images, tokens, heads, head_dim"
        keys, values, scales = tensors["keys"], tensors["values"], [tensors[name] for name in _SCALES & set(tensors)]
        is_whole = keys.shape == values.shape and keys.dtype == values.dtype
        is_whole = is_whole and (keys.dtype == torch.int8 if scales else keys.is_floating_point())
        is_whole = is_whole and all(one.shape == keys.shape[:-1] and one.is_floating_point() for one in scales)
        if not is_whole or keys.ndim != axes.count(",") + 1:
            raise ValueError(
                f"{str(path)!r} holds keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} "
                f"{values.dtype}, not two alike of ({axes}), in 8 bits with scales; {remedy}"
            )
        lengths = None
        if kind == FORMAT:
            lengths = _read_lengths(metadata.get("tile_lengths"), keys.shape[1])
            if lengths is None:
                raise ValueError(f"{str(path)!r} does not tell its images' tokens apart; {remedy}")
        numbers = json.loads(metadata["numbers"]) if "numbers" in metadata else None
        return cls(fingerprint=metadata["fingerprint"], tile_lengths=lengths, numbers=numbers, **tensors)


_PLAIN, _SCALES = {"keys", "values"}, {"key_scales", "value_scales"}


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """On the host, where a GPU can read it."""
    if not torch.cuda.is_available():
        return tensor.cpu()
    if tensor.is_pinned():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


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


__all__ = ["ImageKVCache", "changing_ropes", "lengths_by_image", "pinned", "reuse_is_exact"]
