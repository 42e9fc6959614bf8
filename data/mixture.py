"""Several data sets as one: how much of each, and how many of its conversations make one."""

import logging
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any

import yaml
from torch.utils.data import Dataset

from .bad_samples import MAX_BAD_SAMPLES, SHOWN, resolved, shortened
from .conversations import Conversations, load_conversations
from .messages import Sample, complete_messages, location_of

logger = logging.getLogger(__name__)

MAX_WEIGHT = 1000.0  # each time a conversation comes in an epoch is an entry of the index


@dataclass(frozen=True)
class Part:
    """One data set of a mixture.

    Attributes:
        path: what `load_conversations` takes.
        name: for messages; the file's own by default.
        samples: how many of its conversations, chosen by the seed; None for all. Not beside a weight.
        weight: how often each of them comes in an epoch: 2 for twice, 0.5 for half of them, chosen by the seed.
        concatenate: up to so many of them become one conversation (random groups of 1 to so many).
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
    """A map-style data set of the conversations of its parts; which, and in what groups, depends on the seed alone.

    Neighbours are of one part: the Trainer's sampler shuffles, and so interleaves the parts by their sizes.

    Args:
        parts: (part, its conversations).
        seed: of every choice.
        max_images: a conversation with more is left out, counted; groups are closed before they would have more.

    Attributes:
        source, skipped: as of `Conversations`; what is left out here is counted too.
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
        self.index: list[tuple[int, tuple[int, ...]]] = []  # (which part, places of the conversations that make one)
        for number, (part, data) in enumerate(parts):
            random = Random(f"{seed} {part.name}")
            fitting = [place for place in range(len(data)) if max_images is None or data.images(place) <= max_images]
            if len(fitting) < len(data):
                left_out = len(data) - len(fitting)
                self.skipped += left_out
                logger.warning("%s: %d conversations have more than %d images.", part.name, left_out, max_images)
            chosen = _chosen(part, fitting, random)
            groups = _groups(part, data, chosen, random, max_images)
            logger.info("%s: %d conversations in %d.", part.name, len(chosen), len(groups))
            self.index += [(number, group) for group in groups]
        if not self.index:
            raise ValueError(f"{source} holds no conversation to learn from ({self.skipped} were left out).")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> dict[str, Any]:
        number, places = self.index[place]
        return concatenated([self.parts[number][1][one] for one in places])

    def images(self, place: int) -> int:
        """How many images a conversation has."""
        number, places = self.index[place]
        return sum(self.parts[number][1].images(one) for one in places)


def concatenated(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One conversation of several: their rounds one after the other; a system message may begin the first alone."""
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


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema for numbers and truth values; PyYAML has that of 1.1."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"(?:[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, by the rules of YAML 1.2: `1e-5` is a number, and `no`, `off`, `yes`, `on` are texts.

    Raises:
        FileNotFoundError, ValueError: if there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; pass a YAML file.")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error}).") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise ValueError(f"{path} is not YAML: {shortened(str(error), 2 * SHOWN)}") from error


def load_mixture(
    path: str | Path,
    on_bad_sample: str = "error",
    allow_urls: bool = True,
    max_bad_samples: float = MAX_BAD_SAMPLES,
) -> Mixture:
    """Open the mixture that a YAML file describes; paths start at its folder.

    The file: `datasets`, a list of the fields of `Part` (`samples: all` for all), and perhaps `seed` and
    `max_num_image_per_sample`.

    Args:
        path: of the file.
        on_bad_sample, allow_urls, max_bad_samples: as for `load_conversations`.

    Raises:
        FileNotFoundError, ValueError: naming what is wrong.
    """
    path = Path(path)
    content = read_yaml(path)
    known = {"datasets", "seed", "max_num_image_per_sample"}
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) - known:
        raise ValueError(f"{path} holds {shortened(content)}; expected a list `datasets`, and perhaps {', '.join(known)}.")
    parts = []
    for number, entry in enumerate(entries):
        allowed = {field.name for field in fields(Part)}
        if not isinstance(entry, dict) or "path" not in entry or set(entry) - allowed:
            raise ValueError(
                f"{path}: datasets[{number}] is {shortened(entry)}; expected path, and some of {sorted(allowed)}."
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
    """A mixture of parts that are not open yet."""
    if max_images is not None and (not _is_number(max_images, int) or max_images < 1):
        raise ValueError(f"max_num_image_per_sample is {shortened(repr(max_images))}; expected a number of at least 1.")
    names = [part.name for part in parts]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} stands for several data sets; give each a name of its own.")
    options: dict[str, Any] = {"allow_urls": allow_urls, "max_bad_samples": max_bad_samples}
    opened = [(part, load_conversations(part.path, on_bad_sample, **options)) for part in parts]
    return Mixture(opened, seed, max_images, source)


class Subset(Dataset):
    """Some conversations of a data set."""

    def __init__(self, data: Any, places: list[int]) -> None:
        self.data, self.places = data, places
        self.source, self.skipped = data.source, data.skipped

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.data[self.places[place]]

    def images(self, place: int) -> int:
        """How many images a conversation has."""
        return self.data.images(self.places[place])


def split(data: Any, share: float, seed: int = 0) -> tuple[Subset, Subset]:
    """Hold a share of a data set out, chosen by the seed: (to train on, to evaluate on), each in its old order.

    Raises:
        ValueError: if one of the two would be empty.
    """
    held_out = round(len(data) * share)
    if not 0 < held_out < len(data):
        raise ValueError(f"A share of {share} of {len(data)} conversations is {held_out}; some must be left on both sides.")
    out = set(Random(f"{seed} held out").sample(range(len(data)), held_out))
    kept = [place for place in range(len(data)) if place not in out]
    return Subset(data, kept), Subset(data, sorted(out))


def _chosen(part: Part, places: list[int], random: Random) -> list[int]:
    """The places that a part's samples or weight ask for."""
    if part.samples is not None:
        if part.samples > len(places):
            raise ValueError(f"{part.name} has {len(places)} conversations, not the {part.samples} asked for; pass fewer.")
        return sorted(random.sample(places, part.samples))
    whole, share = divmod(part.weight, 1)
    return sorted(places * int(whole) + random.sample(places, round(share * len(places))))


def _groups(
    part: Part, data: Conversations, places: list[int], random: Random, max_images: int | None
) -> list[tuple[int, ...]]:
    """Every place in exactly one group of up to `concatenate`, at random."""
    if part.concatenate == 1:
        return [(place,) for place in places]
    random.shuffle(places)
    groups: list[tuple[int, ...]] = []
    group: list[int] = []
    size, count = random.randint(1, part.concatenate), 0
    for place in places:
        images = data.images(place)
        too_many = max_images is not None and count + images > max_images
        if group and (len(group) == size or too_many or data.has_system(place)):
            groups.append(tuple(group))
            group, count, size = [], 0, random.randint(1, part.concatenate)
        group.append(place)
        count += images
    return [*groups, tuple(group)] if group else groups


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
