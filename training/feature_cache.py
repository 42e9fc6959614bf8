"""A disk cache of the features that a frozen vision tower computes for each image."""

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
from ..utils.video_loading import with_frames
from ..video_decoding_dsvl import VideoSampling
from ..video_reading_dsvl import VideoFrame
from ..vision_dsvl import run_tower

logger = logging.getLogger(__name__)

FINGERPRINT = "cache.json"  # what `feature_fingerprint` returned
BATCH = 32  # images per forward pass of the tower
SHARD = 256  # images per file: 128 MiB of CLIP ViT-L/14's features in 16 bits


def image_key(source: Any) -> str:
    """The key of an image in the cache: a hash of its file if it is given as a path or bytes, else of its pixels.

    Args:
        source: path, bytes, or a decoded image; or a frame of a video, whose key follows from the video's file, from which
            frames of it are read, and which of them it is.

    Raises:
        ValueError: if its pixels are needed and it cannot be decoded.
    """
    if hasattr(source, "read_frame"):
        if (digest := source.digest()) is None:
            pixels = np.asarray(read_image(source))
            digest = f"frame {pixels.dtype} {pixels.shape} ".encode() + pixels.tobytes()
        source = digest
    source = file_of(source)
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        source = Path(source).read_bytes()
    if not isinstance(source, bytes):
        pixels = np.asarray(read_image(source))
        source = f"{pixels.dtype} {pixels.shape} ".encode() + pixels.tobytes()
    return hashlib.blake2b(source, digest_size=16).hexdigest()


def feature_fingerprint(tower: torch.nn.Module, config: Any, image_processor: Any) -> dict[str, str]:
    """What the features depend on: hashes of the tower (weights and feature layer) and of the image processor."""
    weights = hashlib.sha256(f"{config.vision_feature_layer} {config.vision_feature_select_strategy}".encode())
    for name, tensor in sorted(tower.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    # Class names are not included: the classes with and without torchvision are equivalent.
    settings = {key: value for key, value in image_processor.to_dict().items() if not key.endswith(("_type", "_class"))}
    settings = {key: value for key, value in settings.items() if value is not None}
    processor = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    return {"tower": weights.hexdigest(), "image processor": processor.hexdigest()}


class FeatureCache:
    """Image features in safetensors files, by image key. Files are written atomically.

    Args:
        directory: directory of the cache; created if it does not exist.
        fingerprint: result of `feature_fingerprint`.

    Raises:
        ValueError: if the directory contains features of another tower or image processor, or other files.
    """

    def __init__(self, directory: str | Path, fingerprint: dict[str, str]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / FINGERPRINT
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name in fingerprint if found.get(name) != fingerprint[name]]
            if other:
                raise ValueError(
                    f"{directory} contains image features of another {' and another '.join(other)} (or precision); pass an "
                    "empty directory, or delete this one."
                )
        elif any(self.directory.iterdir()):
            raise ValueError(f"{directory} contains files that are not image features; pass an empty directory.")
        else:
            write_atomically(path, json.dumps(fingerprint, indent=1), concurrent=True)
        self.refresh()

    def refresh(self) -> None:
        """Read the keys of all files, including those that other processes added."""
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

    def get(self, source: Any) -> torch.Tensor:
        """The features of an image: (tower tokens, tower width).

        Args:
            source: path, bytes, or a decoded image.

        Raises:
            ValueError: if the image cannot be decoded, or has changed since the features were computed.
        """
        key = image_key(source)
        if key not in self.files:
            read_image(source, allow_urls=False)
            name = shortened(str(source)) if isinstance(source, (str, VideoFrame)) else type(source).__name__
            raise ValueError(
                f"The image {name} is not in {self.directory}: it has changed since its features were computed; start the "
                "training again."
            )
        return self[key]

    def empty(self) -> torch.Tensor:
        """Features of zero images: (0, tower tokens, tower width)."""
        return self[next(iter(self.files))][None][:0]

    def add(self, features: dict[str, torch.Tensor]) -> None:
        """Write a file of features: key -> (tower tokens, tower width)."""
        name = hashlib.blake2b("".join(features).encode(), digest_size=16).hexdigest()
        path = self.directory / f"{name}.safetensors"
        with atomic_path(path, concurrent=True) as partial:
            save_file({key: one.contiguous() for key, one in features.items()}, partial)
        self.files.update(dict.fromkeys(features, path))


def fill_cache(
    cache: FeatureCache,
    data: list[Any],
    tower: Any,
    config: Any,
    image_processor: Any,
    workers: int = 0,
    rank: int = 0,
    processes: int = 1,
    allow_urls: bool = False,
    sampling: VideoSampling | None = None,
) -> None:
    """Compute the features of images that are missing in the cache. Images that cannot be decoded are ignored.

    Args:
        cache: the cache.
        data: map-style data sets of samples.
        tower: the vision tower of the cache's fingerprint, on the device that computes.
        config: configuration of the model.
        image_processor: image processor of the model.
        workers: number of processes that read and decode images, *optional*, defaults to 0: this process.
        rank, processes: this process handles the samples `rank`, `rank + processes`, ..., *optional*, default to 0 and 1.
        allow_urls: whether images may be URLs, *optional*, defaults to False.
        sampling: which frames of videos are used, *optional*.
    """
    images = MissingImages(data, cache, image_processor, allow_urls, sampling)
    loader = DataLoader(images, batch_size=None, sampler=range(rank, len(images), processes), num_workers=workers)
    seen: set[str] = set()
    computed = 0
    pending: dict[str, torch.Tensor] = {}
    done: dict[str, torch.Tensor] = {}
    with tqdm(loader, desc="Image features", unit="conversation", disable=rank > 0) as bar:
        for keys, found in bar:
            seen.update(keys)
            pending.update((key, pixels) for key, pixels in found.items() if key not in done and key not in cache)
            while len(pending) >= BATCH:
                done.update(_encode([(key, pending.pop(key)) for key in list(pending)[:BATCH]], tower, config))
            if len(done) >= SHARD:
                cache.add(done)
                computed += len(done)
                done = {}
    done.update(_encode(list(pending.items()), tower, config))
    if done:
        cache.add(done)
    computed += len(done)
    logger.info("Image features of %d images are in %s; %d of them are new.", len(seen), cache.directory, computed)


@torch.no_grad()
def _encode(images: list[tuple[str, torch.Tensor]], tower: Any, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if images:
        keys, pixels = zip(*images, strict=True)
        features = run_tower(tower, config, torch.stack(pixels).to(tower.device)).last_hidden_state
        yield from zip(keys, features.to("cpu", tower.dtype), strict=True)


class MissingImages(Dataset):
    """For each sample, the keys of its images and the pixels of those that are missing in the cache.

    Args:
        data: map-style data sets of samples.
        cache: the cache.
        image_processor: image processor of the model.
        allow_urls: whether images may be URLs, *optional*, defaults to False.
        sampling: which frames of videos are used, *optional*.
    """

    def __init__(
        self,
        data: list[Any],
        cache: FeatureCache,
        image_processor: Any,
        allow_urls: bool = False,
        sampling: VideoSampling | None = None,
    ) -> None:
        self.data: ConcatDataset = ConcatDataset(data)
        self.allow_urls, self.sampling = allow_urls, sampling
        self.known, self.image_processor = frozenset(cache.files), image_processor

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[list[str], dict[str, torch.Tensor]]:
        keys, pixels = [], {}
        messages: list[dict[str, Any]] = []
        with contextlib.suppress(BadSample), one_sample():  # the collator reports or skips it
            messages = with_frames(complete_messages(self.data[index]), self.sampling, self.allow_urls)
        for source in images_of(messages):
            with contextlib.suppress(BadSample), one_sample():  # the collator reports or skips it
                source = fetch_image_source(source, self.allow_urls)
                key = image_key(source)
                if key not in self.known and key not in pixels:
                    image = fit_thin_image(read_image(source, allow_urls=False), self.image_processor)
                    pixels[key] = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
                keys.append(key)
        return keys, pixels
