"""Mixtures of data sets: how much of each, and how many conversations are concatenated to one."""

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any

from torch.utils.data import Dataset

from ..utils.text import shortened
from ..utils.yaml_files import read_yaml
from .conversations import Conversations, load_conversations
from .messages import Sample, complete_messages, location_of
from .sample_errors import MAX_BAD_SAMPLES, resolved

logger = logging.getLogger(__name__)

MAX_WEIGHT = 1000.0  # each repetition of a conversation is an entry of the index


@dataclass(frozen=True)
class Part:
    """One data set of a mixture.

    Attributes:
        path (`str`): A data set, as for `load_conversations`.
        name (`str`, *optional*, defaults to the file's name): Its name in messages, and part of the seed.
        samples (`int`, *optional*): The number of its conversations, chosen at random; None for all. Cannot be combined with
            `weight`.
        weight (`float`, *optional*, defaults to 1.0): The number of times each conversation occurs in an epoch: 2 for twice,
            0.5 for a random half of them.
        concatenate (`int`, *optional*, defaults to 1): The largest number of conversations that are concatenated to one. The
            sizes of the groups are random.
    """

    path: str
    name: str = ""
    samples: int | None = None
    weight: float = 1.0
    concatenate: int = 1

    def __post_init__(self) -> None:
        for field, value in (("path", self.path), ("name", self.name)):
            if not isinstance(value, str) or (field == "path" and not value):
                raise ValueError(f"{field} is {shortened(repr(value))}; expected a text.")
        object.__setattr__(self, "name", self.name or Path(self.path).stem)
        if self.samples is not None and (not _is_number(self.samples, int) or self.samples < 1):
            raise ValueError(
                f"{self.name}: samples is {shortened(self.samples)}; expected a number of conversations, or 'all'."
            )
        if not _is_number(self.weight, (int, float)) or not 0 < self.weight <= MAX_WEIGHT:
            raise ValueError(
                f"{self.name}: weight is {shortened(self.weight)}; expected a number above 0, and at most {MAX_WEIGHT:,.0f}."
            )
        if self.samples is not None and self.weight != 1:
            raise ValueError(f"{self.name} has samples and a weight; pass one of them.")
        if not _is_number(self.concatenate, int) or self.concatenate < 1:
            raise ValueError(f"{self.name}: concatenate is {shortened(self.concatenate)}; expected a number of at least 1.")


class Mixture(Dataset):
    """A map-style data set of the conversations of several parts. All random choices depend on the seed only.

    The parts follow each other; the sampler of the Trainer shuffles, and so interleaves them in proportion to their sizes.

    Args:
        parts (`list[tuple[Part, Conversations]]`): The parts with their conversations.
        seed (`int`, *optional*, defaults to 0): The seed of all random choices.
        max_images (`int`, *optional*): The largest number of images. A conversation with more is skipped and counted; a
            group is closed before it has more.
        source (`str`, *optional*): The mixture's name, for messages.

    Attributes:
        source, skipped: See `Conversations`. `skipped` includes conversations with too many images.
    """

    def __init__(
        self,
        parts: list[tuple[Part, Conversations]],
        seed: int = 0,
        max_images: int | None = None,
        source: str = "mixture",
    ) -> None:
        self.parts, self.source = parts, source
        self.skipped = sum(data.skipped for _, data in parts)
        self.index: list[tuple[int, tuple[int, ...]]] = []  # (part, conversations to concatenate)
        for number, (part, data) in enumerate(parts):
            random = Random(f"{seed} {part.name}")
            fitting = [index for index in range(len(data)) if max_images is None or data.images(index) <= max_images]
            if len(fitting) < len(data):
                skipped = len(data) - len(fitting)
                self.skipped += skipped
                logger.warning("%s: skipped %d conversations with more than %d images.", part.name, skipped, max_images)
            chosen = _chosen(part, fitting, random)
            groups = _groups(part, data, chosen, random, max_images)
            logger.info("%s: %d conversations in %d.", part.name, len(chosen), len(groups))
            self.index += [(number, group) for group in groups]
        if not self.index:
            raise ValueError(f"{source} holds no conversation to train on ({self.skipped} were skipped).")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, group = self.index[index]
        return concatenated([self.parts[number][1][one] for one in group])

    def images(self, index: int) -> int:
        """The number of images of a conversation."""
        number, group = self.index[index]
        return sum(self.parts[number][1].images(one) for one in group)


def concatenated(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate the turns of several conversations. Only the first may have a system message.

    Raises:
        ValueError: If a later conversation has a system message.
    """
    if len(samples) == 1:
        return samples[0]
    messages: list[dict[str, Any]] = []
    for sample in samples:
        own = complete_messages(sample)
        if messages and own[0]["role"] == "system":
            raise ValueError("a conversation with a system message of its own cannot follow another.")
        messages += own
    whole = Sample(messages=messages)
    locations = [location for sample in samples if (location := resolved(location_of(sample))) is not None]
    whole.location = shortened("; ".join(locations)) if locations else None
    return whole


def load_mixture(
    path: str | Path,
    on_bad_sample: str = "error",
    allow_urls: bool = True,
    max_bad_samples: float = MAX_BAD_SAMPLES,
) -> Mixture:
    """Open the mixture that a YAML file describes.

    The file has the key `datasets`, a list whose elements have the fields of `Part` (`samples: all` stands for None), and
    optionally `seed` and `max_num_image_per_sample`. Relative paths refer to the folder of the file.

    Args:
        path (`str` or `Path`): The YAML file.
        on_bad_sample, allow_urls, max_bad_samples: See `load_conversations`.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the file does not describe a mixture, or a data set is broken.
    """
    path = Path(path)
    content = read_yaml(path)
    optional = "seed, max_num_image_per_sample"
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) - {"datasets", *optional.split(", ")}:
        raise ValueError(f"{path} holds {shortened(content)}; expected a list `datasets`, and optionally {optional}.")
    parts = []
    for number, entry in enumerate(entries):
        allowed = {field.name for field in fields(Part)}
        if not isinstance(entry, dict) or "path" not in entry or set(entry) - allowed:
            raise ValueError(
                f"{path}: datasets[{number}] is {shortened(entry)}; expected path, and optionally some of {sorted(allowed)}."
            )
        entry = {key: value for key, value in entry.items() if not (key == "samples" and value == "all")}
        try:
            part = Part(**entry)
        except ValueError as error:
            raise ValueError(f"{path}: datasets[{number}]: {error}") from error
        local = path.parent / part.path
        parts.append(replace(part, path=str(local)) if local.exists() else part)
    seed = content.get("seed", 0)
    if not _is_number(seed, int):
        raise ValueError(f"{path}: seed is {shortened(repr(seed))}; expected a whole number.")
    return open_parts(
        parts,
        on_bad_sample,
        seed,
        content.get("max_num_image_per_sample"),
        source=str(path),
        allow_urls=allow_urls,
        max_bad_samples=max_bad_samples,
    )


def open_parts(
    parts: list[Part],
    on_bad_sample: str,
    seed: int = 0,
    max_images: int | None = None,
    source: str = "mixture",
    allow_urls: bool = True,
    max_bad_samples: float = MAX_BAD_SAMPLES,
) -> Mixture:
    """Open the data sets of parts, and mix them; the arguments are those of `Mixture` and `load_conversations`."""
    if max_images is not None and (not _is_number(max_images, int) or max_images < 1):
        raise ValueError(f"max_num_image_per_sample is {shortened(repr(max_images))}; expected a number of at least 1.")
    names = [part.name for part in parts]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} is the name of several data sets; give each a different name.")
    options: dict[str, Any] = {"allow_urls": allow_urls, "max_bad_samples": max_bad_samples}
    opened = [(part, load_conversations(part.path, on_bad_sample, **options)) for part in parts]
    return Mixture(opened, seed, max_images, source)


class Subset(Dataset):
    """The conversations of a data set at the given indices."""

    def __init__(self, data: Any, indices: list[int]) -> None:
        self.data, self.indices = data, indices
        self.source, self.skipped = data.source, data.skipped

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[self.indices[index]]

    def images(self, index: int) -> int:
        """The number of images of a conversation."""
        return self.data.images(self.indices[index])


def split(data: Any, share: float, seed: int = 0) -> tuple[Subset, Subset]:
    """Split a data set at random into a training part and an evaluation part. Both keep the order of the data set.

    Args:
        data: A map-style data set of conversations.
        share (`float`): The share of conversations to evaluate on, 0 to 1.
        seed (`int`, *optional*, defaults to 0): The seed of the choice.

    Returns:
        `tuple[Subset, Subset]`: The training part and the evaluation part.

    Raises:
        ValueError: If one of the two would be empty.
    """
    held_out = round(len(data) * share)
    if not 0 < held_out < len(data):
        raise ValueError(f"A share of {share} of {len(data)} conversations is {held_out}; both parts need at least one.")
    out = set(Random(f"{seed} held out").sample(range(len(data)), held_out))
    kept = [index for index in range(len(data)) if index not in out]
    return Subset(data, kept), Subset(data, sorted(out))


def _chosen(part: Part, indices: list[int], random: Random) -> list[int]:
    """The indices that `samples` or `weight` of a part selects."""
    if part.samples is not None:
        if part.samples > len(indices):
            raise ValueError(f"{part.name} has {len(indices)} conversations, not the {part.samples} asked for; pass fewer.")
        return sorted(random.sample(indices, part.samples))
    whole, share = divmod(part.weight, 1)
    return sorted(indices * int(whole) + random.sample(indices, round(share * len(indices))))


def _groups(
    part: Part, data: Conversations, indices: list[int], random: Random, max_images: int | None
) -> list[tuple[int, ...]]:
    """Divide indices into random groups of up to `concatenate`."""
    if part.concatenate == 1:
        return [(index,) for index in indices]
    random.shuffle(indices)
    groups: list[tuple[int, ...]] = []
    group: list[int] = []
    size, count = random.randint(1, part.concatenate), 0
    for index in indices:
        images = data.images(index)
        too_many = max_images is not None and count + images > max_images
        if group and (len(group) == size or too_many or data.has_system(index)):
            groups.append(tuple(group))
            group, count, size = [], 0, random.randint(1, part.concatenate)
        group.append(index)
        count += images
    return [*groups, tuple(group)] if group else groups


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
