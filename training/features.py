"""What a frozen vision tower gives for each image: computed once, kept on the disk, read back in every epoch."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm.auto import tqdm

from ..data import complete_messages
from ..data.messages import images_of
from ..data.sample_errors import BadSample, one_sample
from ..image_reading_dsvl import file_of, fit_thin_image, read_image
from ..utils.atomic_files import atomic_path, write_atomically
from ..utils.image_loading import fetch_image_source
from ..utils.text import shortened
from ..vision_dsvl import run_tower

logger = logging.getLogger(__name__)

OWNER = "cache.json"
BATCH = 32  # images that pass the tower together
SHARD = 256  # images of a file: 128 MiB of CLIP ViT-L/14's features in 16 bits


def image_key(source: Any) -> str:
    """A hash of an image's file, whether it is given as a path or as bytes; of its pixels, if it is given otherwise.

    Raises:
        ValueError: if it can only be hashed decoded, and cannot be decoded.
    """
    source = file_of(source)
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        source = Path(source).read_bytes()
    if not isinstance(source, bytes):
        pixels = np.asarray(read_image(source))
        source = f"{pixels.dtype} {pixels.shape} ".encode() + pixels.tobytes()
    return hashlib.blake2b(source, digest_size=16).hexdigest()


def owner_of(tower: torch.nn.Module, config: Any, image_processor: Any) -> dict[str, str]:
    """Of what a cache holds the features: hashes of the tower, with the layer that is taken, and of the image processor."""
    weights = hashlib.sha256(f"{config.vision_feature_layer} {config.vision_feature_select_strategy}".encode())
    for name, tensor in sorted(tower.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    # Its classes with and without torchvision compute the same.
    settings = {key: value for key, value in image_processor.to_dict().items() if not key.endswith(("_type", "_class"))}
    settings = {key: value for key, value in settings.items() if value is not None}
    processor = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    return {"tower": weights.hexdigest(), "image processor": processor.hexdigest()}


class FeatureCache:
    """Features by their images' keys, in safetensors files, each of which is written at once.

    Args:
        directory: is made if it does not exist.
        owner: what `owner_of` says.

    Raises:
        ValueError: if the directory holds the features of another tower or image processor.
    """

    def __init__(self, directory: str | Path, owner: dict[str, str]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / OWNER
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name in owner if found.get(name) != owner[name]]
            if other:
                raise ValueError(
                    f"{directory} holds image features of another {' and another '.join(other)} (or precision); pass an "
                    "empty directory, or delete this one."
                )
        elif any(self.directory.iterdir()):
            raise ValueError(f"{directory} holds something else than image features; pass an empty directory.")
        else:
            write_atomically(path, json.dumps(owner, indent=1), concurrent=True)
        self.refresh()

    def refresh(self) -> None:
        """Find what was added, by whichever process."""
        self.files: dict[str, Path] = {}
        for file in sorted(self.directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self.files.update(dict.fromkeys(opened.keys(), file))

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def __getitem__(self, key: str) -> torch.Tensor:
        """(tower tokens, tower width)"""
        with safe_open(self.files[key], framework="pt") as opened:
            return opened.get_tensor(key)

    def of(self, source: Any) -> torch.Tensor:
        """The features of an image: (tower tokens, tower width).

        Raises:
            ValueError: if there are none, since it cannot be decoded, or is another image by now.
        """
        key = image_key(source)
        if key not in self.files:
            read_image(source, allow_urls=False)
            name = shortened(source) if isinstance(source, str) else type(source).__name__
            raise ValueError(
                f"The image {name} is not in {self.directory}: it was another one when its features were computed; start "
                "again."
            )
        return self[key]

    def none(self) -> torch.Tensor:
        """Features of no image: (0, tower tokens, tower width)."""
        return self[next(iter(self.files))][None][:0]

    def add(self, features: dict[str, torch.Tensor]) -> None:
        """Write a file of (tower tokens, tower width) by key."""
        name = hashlib.blake2b("".join(features).encode(), digest_size=16).hexdigest()
        path = self.directory / f"{name}.safetensors"
        with atomic_path(path, concurrent=True) as partial:
            save_file({key: one.contiguous() for key, one in features.items()}, partial)
        self.files.update(dict.fromkeys(features, path))


def fill(
    cache: FeatureCache,
    data: list[Any],
    tower: Any,
    config: Any,
    image_processor: Any,
    workers: int = 0,
    rank: int = 0,
    processes: int = 1,
    allow_urls: bool = False,
) -> None:
    """Compute what the cache lacks of the images of data sets; an image that cannot be decoded is passed over.

    Args:
        data: map-style data sets of samples.
        tower: of the cache's owner, on the device that is to compute.
        workers: that read and decode.
        rank, processes: this process takes one of so many shares of the samples.
        allow_urls: whether images are fetched from addresses.
    """
    images = _NewImages(data, cache, image_processor, allow_urls)
    loader = DataLoader(images, batch_size=None, sampler=range(rank, len(images), processes), num_workers=workers)
    seen: set[str] = set()
    computed = 0
    waiting: dict[str, torch.Tensor] = {}
    done: dict[str, torch.Tensor] = {}
    with tqdm(loader, desc="Image features", unit="conversation", disable=rank > 0) as bar:
        for keys, found in bar:
            seen.update(keys)
            waiting.update((key, pixels) for key, pixels in found.items() if key not in done and key not in cache)
            while len(waiting) >= BATCH:
                done.update(_encode([(key, waiting.pop(key)) for key in list(waiting)[:BATCH]], tower, config))
            if len(done) >= SHARD:
                cache.add(done)
                computed += len(done)
                done = {}
    done.update(_encode(list(waiting.items()), tower, config))
    if done:
        cache.add(done)
    computed += len(done)
    logger.info("Image features of %d images are in %s; %d were computed now.", len(seen), cache.directory, computed)


@torch.no_grad()
def _encode(images: list[tuple[str, torch.Tensor]], tower: Any, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if images:
        keys, pixels = zip(*images, strict=True)
        features = run_tower(tower, config, torch.stack(pixels).to(tower.device)).last_hidden_state
        yield from zip(keys, features.to("cpu", tower.dtype), strict=True)


class _NewImages(Dataset):
    """Of each sample the keys of its images, and the pixels of those that the cache does not have."""

    def __init__(self, data: list[Any], cache: FeatureCache, image_processor: Any, allow_urls: bool) -> None:
        self.data: ConcatDataset = ConcatDataset(data)
        self.allow_urls = allow_urls
        self.known, self.image_processor = frozenset(cache.files), image_processor

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: int) -> tuple[list[str], dict[str, torch.Tensor]]:
        keys, pixels = [], {}
        for source in images_of(complete_messages(self.data[place])):
            with contextlib.suppress(BadSample), one_sample():  # told when its batch is made
                source = fetch_image_source(source, self.allow_urls)
                key = image_key(source)
                if key not in self.known and key not in pixels:
                    image = fit_thin_image(read_image(source, allow_urls=False), self.image_processor)
                    pixels[key] = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
                keys.append(key)
        return keys, pixels
