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
from ..image_reading_dsvl import file_of, read_image
from ..utils.atomic_files import atomic_path, write_atomically
from ..utils.image_loading import fetch_image_source
from ..utils.text import shortened
from ..utils.video_loading import with_frames
from ..video_decoding_dsvl import VideoSampling
from ..video_reading_dsvl import VideoFrame
from ..vision_dsvl import run_tower

logger = logging.getLogger(__name__)

FINGERPRINT = "cache.json"  # what `feature_fingerprint` returned
SIZES = "image_sizes"  # key of a file's metadata
BATCH = 32  # images or tiles per forward pass of the tower
SHARD = 256  # images or tiles per file, about: 128 MiB of CLIP ViT-L/14's features in 16 bits


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


def feature_fingerprint(tower: torch.nn.Module, config: Any, processor: Any) -> dict[str, str]:
    """What the features depend on: hashes of the tower (weights and feature layer) and of the image processor, and what an
    image layout other than "crop" makes of images.

    Args:
        tower: the vision tower.
        config: configuration of the model.
        processor: `DSVLProcessor` of the model.
    """
    weights = hashlib.sha256(f"{config.vision_feature_layer} {config.vision_feature_select_strategy}".encode())
    for name, tensor in sorted(tower.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    # Class names are not included: the classes with and without torchvision are equivalent.
    settings = {
        key: value for key, value in processor.image_processor.to_dict().items() if not key.endswith(("_type", "_class"))
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    settings_hash = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    layout = {} if processor.layout is None else {"image layout": str(processor.layout)}
    return {"tower": weights.hexdigest(), "image processor": settings_hash} | layout


class FeatureCache:
    """Image features in safetensors files, by image key. Files are written atomically.

    The features of an image are (tower tokens, tower width); with `image_layout="tiles"` (tiles, tower tokens, tower width),
    with "native" (patches, tower width). The sizes of images with one of these layouts are in the file's metadata.

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
            other = [name for name in fingerprint | found if found.get(name) != fingerprint.get(name)]
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
        self.sizes: dict[str, tuple[int, int]] = {}  # (height, width)
        for file in sorted(self.directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self.files.update(dict.fromkeys(opened.keys(), file))
                self.sizes |= _read_sizes(opened.metadata())

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def __getitem__(self, key: str) -> torch.Tensor:
        """The features of an image; see `FeatureCache`."""
        with safe_open(self.files[key], framework="pt") as opened:
            return opened.get_tensor(key)

    def part(self, source: Any) -> dict[str, Any]:
        """The keys `image_features` and, where it is known, `image_size` of an image part for `DSVLProcessor`.

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
        size = {"image_size": self.sizes[key]} if key in self.sizes else {}
        return {"image_features": self[key]} | size

    def empty(self) -> dict[str, torch.Tensor]:
        """The model inputs of zero images: `image_features`, (0, tower tokens, tower width), and what comes with them."""
        features = self[next(iter(self.files))]
        if features.ndim == 3:  # of tiles
            return {"image_features": features[:0], "num_tiles": torch.zeros(0, dtype=torch.int64)}
        shapes = {"spatial_shapes": torch.zeros(0, 2, dtype=torch.int64)} if self.sizes else {}
        return {"image_features": features[None][:0]} | shapes

    def add(self, features: dict[str, torch.Tensor], sizes: dict[str, tuple[int, int]] | None = None) -> None:
        """Write a file of features.

        Args:
            features: key -> features, see `FeatureCache`.
            sizes: key -> (height, width) of the image, *optional*; others are ignored.
        """
        sizes = {key: size for key, size in (sizes or {}).items() if key in features}
        metadata = {SIZES: json.dumps(sizes)} if sizes else None
        name = hashlib.blake2b("".join(features).encode(), digest_size=16).hexdigest()
        path = self.directory / f"{name}.safetensors"
        with atomic_path(path, concurrent=True) as partial:
            save_file({key: one.contiguous() for key, one in features.items()}, partial, metadata)
        self.files.update(dict.fromkeys(features, path))
        self.sizes |= sizes


def _read_sizes(metadata: dict[str, str] | None) -> dict[str, tuple[int, int]]:
    return {key: (height, width) for key, (height, width) in json.loads((metadata or {}).get(SIZES, "{}")).items()}


def fill_cache(
    cache: FeatureCache,
    data: list[Any],
    tower: Any,
    config: Any,
    processor: Any,
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
        processor: `DSVLProcessor` of the model.
        workers: number of processes that read and decode images, *optional*, defaults to 0: this process.
        rank, processes: this process handles the samples `rank`, `rank + processes`, ..., *optional*, default to 0 and 1.
        allow_urls: whether images may be URLs, *optional*, defaults to False.
        sampling: which frames of videos are used, *optional*.
    """
    images = MissingImages(data, cache, processor, allow_urls, sampling)
    loader = DataLoader(images, batch_size=None, sampler=range(rank, len(images), processes), num_workers=workers)
    seen: set[str] = set()
    computed = 0
    pending: dict[str, dict[str, torch.Tensor]] = {}
    done: dict[str, torch.Tensor] = {}
    sizes: dict[str, tuple[int, int]] = {}

    def write() -> int:
        cache.add(done, sizes)
        number = len(done)
        done.clear()
        sizes.clear()
        return number

    with tqdm(loader, desc="Image features", unit="conversation", disable=rank > 0) as bar:
        for keys, found, found_sizes in bar:
            seen.update(keys)
            new = [key for key in found if key not in done and key not in cache]
            pending.update((key, found[key]) for key in new)
            sizes.update((key, found_sizes[key]) for key in new if key in found_sizes)
            if _tiles(pending) >= BATCH:
                done.update(_encode(pending, tower, config))
                pending = {}
            if sum(len(one) if one.ndim == 3 else 1 for one in done.values()) >= SHARD:
                computed += write()
    done.update(_encode(pending, tower, config))
    if done:
        computed += write()
    logger.info("Image features of %d images are in %s; %d of them are new.", len(seen), cache.directory, computed)


def _tiles(images: dict[str, dict[str, torch.Tensor]]) -> int:
    return sum(len(inputs["pixel_values"]) for inputs in images.values())


@torch.no_grad()
def _encode(images: dict[str, dict[str, torch.Tensor]], tower: Any, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The features of images.

    Args:
        images: key -> the tower's inputs for an image, of one or several tiles.
    """
    if not images:
        return
    counts = [len(inputs["pixel_values"]) for inputs in images.values()]
    names = [name for name in next(iter(images.values())) if name != "num_tiles"]
    inputs = {name: torch.cat([one[name] for one in images.values()]) for name in names}
    encoded = []
    for start in range(0, sum(counts), BATCH):
        some: dict[str, Any] = {name: one[start : start + BATCH].to(tower.device) for name, one in inputs.items()}
        encoded += run_tower(tower, config, **some).last_hidden_state.to("cpu", tower.dtype)
    tiles = iter(encoded)
    for (key, inputs), count in zip(images.items(), counts, strict=True):
        features = torch.stack([next(tiles) for _ in range(count)])
        if "spatial_shapes" in inputs:
            features = features[:, : int(inputs["spatial_shapes"].prod())]
        yield key, features if config.image_layout == "tiles" else features[0]


class MissingImages(Dataset):
    """For each sample, the keys of its images; and of those that are missing in the cache the tower's inputs, and their
    sizes with a layout that keeps the whole image.

    Args:
        data: map-style data sets of samples.
        cache: the cache.
        processor: `DSVLProcessor` of the model.
        allow_urls: whether images may be URLs, *optional*, defaults to False.
        sampling: which frames of videos are used, *optional*.
    """

    def __init__(
        self,
        data: list[Any],
        cache: FeatureCache,
        processor: Any,
        allow_urls: bool = False,
        sampling: VideoSampling | None = None,
    ) -> None:
        self.data: ConcatDataset = ConcatDataset(data)
        self.allow_urls, self.sampling = allow_urls, sampling
        self.known, self.processor = frozenset(cache.files), processor

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[list[str], dict[str, dict[str, torch.Tensor]], dict[str, tuple[int, int]]]:
        keys, inputs, sizes = [], {}, {}
        messages: list[dict[str, Any]] = []
        with contextlib.suppress(BadSample), one_sample():  # the collator reports or skips it
            messages = with_frames(complete_messages(self.data[index]), self.sampling, self.allow_urls)
        for source in images_of(messages):
            with contextlib.suppress(BadSample), one_sample():  # the collator reports or skips it
                source = fetch_image_source(source, self.allow_urls)
                key = image_key(source)
                if key not in self.known and key not in inputs:
                    image = read_image(source, allow_urls=False)
                    inputs[key] = dict(self.processor(images=[image], return_tensors="pt"))
                    if self.processor.image_layout in ("tiles", "native"):
                        sizes[key] = (image.height, image.width)
                keys.append(key)
        return keys, inputs, sizes
