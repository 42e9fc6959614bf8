"""`ImageKVCache`: the keys and values of images, which any prompt may use; see image_reuse.py."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "dsvl_image_cache_1"


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

    `cache[2]`, `cache[1:3]` and `cache[[2, 0, 0]]` are caches of these images in this order; `ImageKVCache.cat` joins
    several. An image takes 2 x layers x image_seq_length x key-value heads x head_dim numbers: with LLaMA-7B, CLIP
    ViT-L/14 (257 tokens) and 16 bits 128.5 MiB, with 8 key-value heads a quarter of it.

    Args:
        keys, values: (layers, images, image_seq_length, key-value heads, head_dim), in the model's dtype.
        fingerprint: of the model that they belong to (`ImageReuse.fingerprint`).
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, fingerprint: str) -> None:
        self.keys, self.values, self.fingerprint = keys, values, fingerprint

    def __len__(self) -> int:
        return self.keys.shape[1]

    def __repr__(self) -> str:
        return f"ImageKVCache({len(self)} images, {self.nbytes / 2**20:.1f} MiB, {self.dtype}, {self.device})"

    def __iter__(self) -> Iterator["ImageKVCache"]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, images: int | slice | Sequence[int] | torch.Tensor) -> "ImageKVCache":
        if isinstance(images, int):
            images = [images]
        if not isinstance(images, slice):
            images = torch.as_tensor(images, device=self.device)
        return ImageKVCache(self.keys[:, images], self.values[:, images], self.fingerprint)

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
        return ImageKVCache(self.keys.to(*args, **kwargs), self.values.to(*args, **kwargs), self.fingerprint)

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
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint}
        save_file({"keys": self.keys.contiguous(), "values": self.values.contiguous()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "ImageKVCache":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is something else.
        """
        remedy = "pass a file that ImageKVCache.save of this version wrote, or encode the images again."
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{str(path)!r} has the format {metadata.get('format')!r}, not {FORMAT!r}; {remedy}")
                if "fingerprint" not in metadata or set(file.keys()) != {"keys", "values"}:
                    raise ValueError(f"{str(path)!r} lacks its keys, its values or its model's fingerprint; {remedy}")
                keys, values = file.get_tensor("keys"), file.get_tensor("values")
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no safetensors file, or cut off ({error}); {remedy}") from error
        if keys.shape != values.shape or keys.ndim != 5 or keys.dtype != values.dtype or not keys.is_floating_point():
            raise ValueError(
                f"{str(path)!r} holds keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} "
                f"{values.dtype}, not two alike of (layers, images, tokens, heads, head_dim); {remedy}"
            )
        return cls(keys, values, metadata["fingerprint"])


__all__ = ["ImageKVCache", "reuse_is_exact"]
