"""`ImageLibrary`: what a model computes for an image, kept by the image's content and used in any prompt."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from ..acceleration.decoder_run import head_size
from ..acceleration.reuse.applicability import takes_image_cache
from ..acceleration.reuse.image_cache import ImageKVCache
from ..generation_dsvl import IMAGE_INPUTS
from ..transformers_dsvl import BaseModelOutputWithPooling, gathers_weights
from .content_keys import adapter_state, code_version, is_random, numbered_key, tile_keys
from .memory_tier import Lease, Tensors
from .tiers import ImageTiers

CHUNK = 16  # tiles that are encoded in one forward call
MAX_SOURCES = 100_000  # image files whose tiles are known
DISK_FACTOR = 10  # of the memory's size, by default


@dataclass
class LibraryImage:
    """An image of a request: leases of what the library keeps of it, or else its pixels.

    Attributes:
        keys: of its tiles.
        lengths: the number of tokens of each tile.
        number: of the image in its prompt, from 1.
        inputs: the model inputs of the image, `pixel_values` among them; None if all tiles are leased.
        leases: of its tiles.
        weights: the state of the weights that the leases belong to.
    """

    keys: list[str]
    lengths: list[int]
    number: int
    inputs: dict[str, torch.Tensor] | None
    leases: list[Lease] = field(default_factory=list)
    weights: int = -1


@dataclass
class LibraryCounts:
    """What a library has done. A tile is an image, unless `image_layout` is "tiles".

    Attributes:
        hits: tiles that were used without encoding them, repeated ones of a batch included.
        misses: tiles that were encoded.
        bypassed: calls of `generate` with more images than the library can hold.
        weight_changes: how often everything was dropped because the weights had changed.
    """

    hits: int = 0
    misses: int = 0
    bypassed: int = 0
    weight_changes: int = 0


class ImageLibrary:
    """Keeps the keys and values that a decoder computes for images, and puts them into prompts in their place.

    Assign it to `model.image_library`: `generate` then asks it for images before it encodes any. Under `"mmca"` keys and
    values of an image, before rotation, depend on the image alone, and in models with `numbered_images` on its number in the
    conversation; so they are exact in every conversation and at every position (where the image has this number). Where that
    is not so (`"causal"`, say), the library keeps the projected features of the vision tower.

    Entries are found by the SHA-256 of an image's pixels as the model gets them; in models with `numbered_images`, keys and
    values also by the image's number, so an image is encoded once for each number that it gets. They hold nothing of texts.
    The least recently used are dropped first, in each tier on its own: on the GPU, in main memory, on disk. What is on the
    GPU is in main memory too. When weights change, everything in memory is dropped, and other weights' files are not read.

    Args:
        model: a `DSVLForConditionalGeneration`.
        memory_bytes: the size of main memory for images; pinned, if the model is on a GPU.
        device_bytes (*optional*): the size of GPU memory for images; a quarter of `memory_bytes` by default, and at most a
            quarter of what is free.
        directory (*optional*): where images are also written, for later processes and for several at once.
        disk_bytes (*optional*): the size of all files there; ten times `memory_bytes` by default.
        quantize (*optional*, defaults to `False`): keep keys and values in 8 bits. This halves their size and changes
            results, see `ImageKVCache.quantize`.

    Attributes:
        counts: `LibraryCounts`.
        tiers: where the entries are.
        features_because: why the library keeps features instead of keys and values; None if it does not.
        last_encoded: for each tile of the last call of `generate`, whether it was encoded.

    Raises:
        ValueError: for a size below 1, or a directory that cannot be written.
    """

    def __init__(
        self,
        model: Any,
        memory_bytes: int,
        device_bytes: int | None = None,
        directory: str | Path | None = None,
        disk_bytes: int | None = None,
        quantize: bool = False,
    ) -> None:
        for name, size in (("memory_bytes", memory_bytes), ("device_bytes", device_bytes), ("disk_bytes", disk_bytes)):
            if size is not None and size < (name != "device_bytes"):
                raise ValueError(f"{name}={size} bytes hold no image; pass more.")
        self.tiers = ImageTiers(_device(model), memory_bytes, device_bytes)
        self.quantize = quantize
        self.counts = LibraryCounts()
        self.last_encoded: list[bool] = []  # by the only thread that generates
        self.features_because = _why_not_keys(model)
        self._holds_numbers = self.features_because is None and bool(getattr(model.config, "numbered_images", 0))
        self._sources: OrderedDict[str, tuple[list[str], list[int]]] = OrderedDict()
        self._lock = RLock()  # of counts, sources and the state of the weights
        self._weights: tuple[Any, int, str] | None = None
        self._state = 0
        self._disk_weights: str | None = None  # files on disk are those of the weights at the beginning
        self._disk_weights = self._check_weights(model)
        if directory is not None:
            limit = DISK_FACTOR * memory_bytes if disk_bytes is None else disk_bytes
            self.tiers.open_directory(directory, _directory_name(self._disk_weights, model), limit)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImageLibrary":
        """A copy of a model shares its library, which notices that the model is another one."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError("An image library cannot be pickled; make one in each process. They may share a directory.")

    # -- for `generate` --------------------------------------------------------------------------------------------------

    def replace_images(self, model: Any, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """Replace pixels in the arguments of `generate` by what the library keeps of them, which it encodes if necessary.

        Nothing is replaced where images cannot come from elsewhere (assisted decoding, ZeRO-3, FSDP), where the model
        computes them differently each time (dropout in training mode), or if they are more than the library can hold.

        Args:
            model: a `DSVLForConditionalGeneration`.
            input_ids: of the prompts, and of the conversation before with a KV cache.
            kwargs: changed in place.
        """
        images = {name: kwargs[name] for name in IMAGE_INPUTS if kwargs.get(name) is not None}
        self.last_encoded = [True] * len(images["pixel_values"])
        if kwargs.get("assistant_model") is not None or gathers_weights(model) or (model.training and is_random(model)):
            return
        lengths = model.config.tile_lengths(len(images["pixel_values"]), images.get("spatial_shapes"))
        as_keys = self.features_because is None and takes_image_cache(model, input_ids, lengths, kwargs)
        keys = tile_keys(images)
        numbers: list[int] | None = None
        if as_keys and self._holds_numbers:
            numbers = kwargs["image_numbers"].tolist()
            keys = list(map(numbered_key, keys, numbers))
        unique = dict(zip(keys, lengths, strict=True))
        if sum(unique.values()) * self.token_bytes(model, as_keys) > self.tiers.memory.limit:
            with self._lock:
                self.counts.bypassed += 1
            return
        made = self._collect(model, keys, numbers, {}, images, as_keys)
        if numbers is not None:
            made["image_cache"].numbers = None  # they are those of the call: nothing to compare
            del kwargs["image_numbers"]
        for name in images:
            del kwargs[name]
        kwargs.update(made)

    # -- for servers -----------------------------------------------------------------------------------------------------

    def takes(self, model: Any, ids: list[int], lengths: Sequence[Sequence[int]]) -> bool:
        """Whether the images of a prompt fit into the library, and the prompt ends with text.

        Args:
            ids: of the prompt.
            lengths: for each image, the number of tokens of each tile.
        """
        size = sum(map(sum, lengths)) * self.token_bytes(model)
        return size <= self.tiers.memory.limit and model.config.image_token_id not in ids[-2:]

    def find(self, source: str, number: int) -> LibraryImage | None:
        """An image that `image` has seen under this name, if the library keeps all of it.

        Args:
            source: identifies the image file and how it is preprocessed, such as a hash of both.
            number: of the image in its prompt.
        """
        with self._lock:
            known = self._sources.get(source)
            if known is None:
                return None
            self._sources.move_to_end(source)
        keys, lengths = known
        return self._leased(LibraryImage(self._entries(keys, number), lengths, number, None))

    def _entries(self, keys: list[str], number: int) -> list[str]:
        """The keys under which an image's tiles are kept."""
        return [numbered_key(key, number) for key in keys] if self._holds_numbers else keys

    def image(
        self, inputs: dict[str, torch.Tensor], lengths: Sequence[int], number: int, source: str | None = None
    ) -> LibraryImage:
        """An image for `generation_inputs`, from its model inputs.

        Args:
            inputs: `pixel_values` and what comes with it, as the processor makes them of one image.
            lengths: the number of tokens of each of its tiles.
            number: of the image in its prompt.
            source (*optional*): the name by which `find` knows it from now on.
        """
        keys = tile_keys({name: inputs[name] for name in IMAGE_INPUTS if name in inputs})
        if source is not None:
            with self._lock:
                self._sources[source] = keys, list(lengths)
                while len(self._sources) > MAX_SOURCES:
                    self._sources.popitem(last=False)
        image = LibraryImage(self._entries(keys, number), list(lengths), number, inputs)
        return self._leased(image) or image

    def generation_inputs(self, model: Any, images: Sequence[LibraryImage]) -> dict[str, Any]:
        """The arguments of `generate` for these images: what the library keeps, after it has encoded what is missing.

        Args:
            model: the model.
            images: all images of a batch, in the order of their tokens. Every prompt ends with text. Those with pixels lose
                them, if the library has room.

        Raises:
            RuntimeError: if the weights have changed since an image was found.
        """
        if not images:
            return {}
        self._check_weights(model)
        leases: dict[str, Lease] = {}
        pixels: dict[str, dict[str, torch.Tensor]] = {}
        for image in images:
            if image.inputs is None and image.weights != self._state:
                raise RuntimeError("The weights have changed since an image was found in the library; send it again.")
            leases |= dict(zip(image.keys, image.leases, strict=False))
            if image.inputs is not None:
                given = image.inputs
                for number, key in enumerate(image.keys):
                    own = {name: given[name][number : number + 1] for name in IMAGE_INPUTS if name in given}
                    pixels.setdefault(key, own)
        keys = [key for image in images for key in image.keys]
        missing = [key for key in dict.fromkeys(keys) if key in pixels]
        given = {name: torch.cat([pixels[key][name] for key in missing]) for name in (pixels[missing[0]] if missing else ())}
        numbers = [image.number for image in images for _ in image.keys]
        held = numbers if self._holds_numbers else None
        made = self._collect(model, keys, held, leases, given, self.features_because is None, missing)
        for image in images:
            if image.inputs is not None and self._leased(image) is not None:
                image.inputs = None
        if "mm_encoder_outputs" in made and getattr(model.config, "numbered_images", 0) > 0:
            made["image_numbers"] = torch.tensor(numbers)
        return made

    def add(self, model: Any, inputs: dict[str, torch.Tensor], lengths: Sequence[int], source: str | None = None) -> bool:
        """Encode an image as the first of a prompt, if the library does not have it. The arguments are those of `image`.

        Returns:
            Whether the library keeps it.
        """
        image = self.image(inputs, lengths, 1, source)
        if image.inputs is None:
            return True
        self.generation_inputs(model, [image])
        return image.inputs is None

    # -- what it keeps -----------------------------------------------------------------------------------------------------

    def token_bytes(self, model: Any, as_keys: bool | None = None) -> int:
        """The memory of an image token.

        Args:
            as_keys (*optional*): whether keys and values are kept; by default, as this library does.
        """
        config, size = model.config.text_config, model.get_input_embeddings().weight.element_size()
        if not (self.features_because is None if as_keys is None else as_keys):
            return config.hidden_size * size
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = head_size(config)
        return 2 * config.num_hidden_layers * heads * (width + 4 if self.quantize else width * size)

    def statistics(self) -> dict[str, int]:
        """Counts and bytes, for monitoring."""
        with self._lock:
            return vars(self.counts) | self.tiers.statistics()

    def describe(self) -> str:
        """What is kept and where, in a line."""
        what = "keys and values" + (" in 8 bits" if self.quantize else "")
        if self.features_because is not None:
            what = f"the vision tower's features only, as {self.features_because}"
        return f"keeps {what} of images, in up to {self.tiers.describe()}"

    def clear(self) -> None:
        """Drop everything in memory."""
        with self._lock:
            self._state += 1
            self.tiers.clear()

    def _check_weights(self, model: Any) -> str:
        """Drop everything if the weights are not those of before; returns a hash of them."""
        reuse = model.model.image_reuse
        fingerprint, adapters = reuse.fingerprint(), adapter_state(model)
        weights = reuse, reuse.weight_changes, adapters
        with self._lock:
            before, self._weights = self._weights, weights
            if before is not None and (before[0] is not reuse or before[1:] != weights[1:]):
                self.counts.weight_changes += 1
                self.clear()
            name = hashlib.sha256(f"{fingerprint} {adapters}".encode()).hexdigest()
            self.tiers.uses_disk = self._disk_weights in (None, name)
        return name

    def _collect(
        self,
        model: Any,
        keys: list[str],
        numbers: list[int] | None,
        leases: dict[str, Lease],
        pixels: dict[str, torch.Tensor],
        as_keys: bool,
        pixel_keys: list[str] | None = None,
    ) -> dict[str, Any]:
        """The arguments of `generate` for these tiles.

        Args:
            keys: of all tiles, repeated ones too.
            numbers: of their images, if the entries hold them.
            leases: of some tiles.
            pixels: of the tiles `pixel_keys`; of all tiles, by default.
            as_keys: whether as keys and values.
        """
        self._check_weights(model)
        kind = "features" if not as_keys else "keys8" if self.quantize else "keys"
        indices: dict[str, int] = {}
        for number, key in enumerate(keys if pixel_keys is None else pixel_keys):
            indices.setdefault(key, number)
        found: dict[str, Tensors] = {}
        for key in dict.fromkeys(keys):
            held = leases[key].tensors if key in leases and (self.features_because is None) == as_keys else None
            kept = self.tiers.get_on_device(f"{kind}-{key}", held)
            if kept is not None:
                found[key] = kept
        missing = [key for key in indices if key not in found]
        if missing:
            chosen = torch.tensor([indices[key] for key in missing])
            own = {name: part[chosen.to(part.device)].to(_device(model)) for name, part in pixels.items()}
            own_numbers: list[int] | None = None
            if numbers is not None:
                number_of = dict(zip(keys, numbers, strict=True))
                own_numbers = [number_of[key] for key in missing]
            encoded = self._encode(model, own, as_keys, own_numbers)
            for key, tensors in zip(missing, encoded, strict=True):
                # Copies, as these are parts of larger tensors.
                found[key] = {
                    name: one.detach().clone(memory_format=torch.contiguous_format) for name, one in tensors.items()
                }
                self.tiers.keep(f"{kind}-{key}", found[key])
        with self._lock:
            self.counts.misses += len(missing)
            self.counts.hits += len(keys) - len(missing)
            first = set(missing)
            self.last_encoded = [key in first for key in keys]
        parts = [found[key] for key in keys]
        if not as_keys:
            features = [part["features"].to(_device(model)) for part in parts]
            return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}
        return {"image_cache": _joined(model, parts, numbers)}

    def _encode(
        self, model: Any, pixels: dict[str, torch.Tensor], as_keys: bool, numbers: list[int] | None
    ) -> list[Tensors]:
        """What each tile becomes, with its image's number where there are numbers. The tensors are parts of larger ones."""
        if as_keys:
            own = {} if numbers is None else {"image_numbers": numbers}  # older code does not know it
            cache = model.encode_images(**pixels, chunk_size=CHUNK, quantize=self.quantize, **own)
            return [one.tensors for one in cache]
        made: list[Tensors] = []
        with torch.no_grad():
            for start in range(0, len(pixels["pixel_values"]), CHUNK):
                chunk = {name: part[start : start + CHUNK] for name, part in pixels.items()}
                made += [{"features": one} for one in model.model.encode(**chunk).pooler_output]
        return made

    def _leased(self, image: LibraryImage) -> LibraryImage | None:
        """The image with leases instead of pixels; None if the library does not keep all of it."""
        kind = "features" if self.features_because is not None else "keys8" if self.quantize else "keys"
        with self._lock:
            state = self._state
        leases = []
        for key in image.keys:
            lease = self.tiers.lease(f"{kind}-{key}")
            if lease is None:
                return None
            leases.append(lease)
        image.inputs, image.leases, image.weights = None, leases, state
        return image


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device


def _why_not_keys(model: Any) -> str | None:
    """Why keys and values of images cannot be reused with this model; None if they can."""
    reuse = model.model.image_reuse
    try:
        reuse.rotation(_device(model))
    except ValueError as error:
        if model.config.multimodal_attention == "causal":
            return "with causal attention an image's keys and values depend on what stands before it"
        return f"its keys and values cannot be reused ({str(error).split(';')[0].split(', so')[0]})"
    return None


def _directory_name(weights: str, model: Any) -> str:
    """The directory of a model's files: its weights, its code and the type of its numbers."""
    dtype = model.get_input_embeddings().weight.dtype
    return hashlib.sha256(f"{weights} {code_version()} {dtype}".encode()).hexdigest()[:32]


def _joined(model: Any, parts: list[Tensors], numbers: list[int] | None) -> ImageKVCache:
    """One image KV cache of many tiles on the model's device and in its type."""
    device, fingerprint = _device(model), model.model.image_reuse.fingerprint()
    lengths = [part["keys"].shape[1] for part in parts]
    whole: dict[str, torch.Tensor] = {}
    for name, first in parts[0].items():
        whole[name] = torch.empty((len(first), sum(lengths), *first.shape[2:]), dtype=first.dtype, device=device)
        for part, tokens in zip(parts, whole[name].split(lengths, dim=1), strict=True):
            tokens.copy_(part[name], non_blocking=True)
    scales = whole.get("key_scales"), whole.get("value_scales")
    of_tiles = [[length] for length in lengths]
    cache = ImageKVCache(whole["keys"], whole["values"], fingerprint, of_tiles, *scales, numbers=numbers)
    return cache.to(model.get_input_embeddings().weight.dtype)


__all__ = ["ImageLibrary", "LibraryCounts", "LibraryImage"]
