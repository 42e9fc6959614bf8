"""The format of a conversation, and data sets of them from a file, a directory or the Hub.

A sample is `{"messages": [...]}`, or `{"messages": [...], "images": [...]}`. A message is `{"role", "content"}` with roles
user and assistant after at most one system message; content is a text, or a list of parts in reading order:
`{"type": "text", "text": ...}` and `{"type": "image", "path" | "url" | "base64" | "image": ...}`. A part `{"type": "image"}`
without a source takes the next of `images`, whose elements are paths, bytes or PIL pictures.
"""

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
SOURCES = ("image", "path", "url", "base64")  # the keys under which transformers looks for a part's picture
ON_BAD_SAMPLE = ("error", "skip")
NAMED = 20  # samples that are left out and named one by one; the rest is counted
WORKERS = 256  # of a data loader, and the process itself


def load_conversations(
    source: str | Path, on_bad_sample: str = "error", split: str = "train", to_learn: bool = True
) -> "Conversations":
    """Open a data set of conversations; pictures are not decoded here.

    Args:
        source: a JSON lines file (`.jsonl`, `.json`), whose relative picture paths start at its folder; a Parquet or Arrow
            file; a directory written by `datasets`; or a name on the Hub.
        on_bad_sample: "error", or "skip" to leave broken samples out, counted, with a message for each of the first.
        split: of a data set that has several.
        to_learn: as for `check_conversation`.

    Returns:
        A map-style data set of samples, which have been checked.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a sample is broken, with its place and the reason.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        return JsonLines(path, on_bad_sample, to_learn)
    return Table(str(source), on_bad_sample, split, to_learn)


class LeftOut:
    """What happens to samples that cannot be used: the error is raised, or they are counted, and the first of them named.

    Args:
        on_bad_sample: "error" or "skip".
    """

    def __init__(self, on_bad_sample: str) -> None:
        if on_bad_sample not in ON_BAD_SAMPLE:
            raise ValueError(
                f"on_bad_sample={on_bad_sample!r} is not known; choose from {', '.join(map(repr, ON_BAD_SAMPLE))}."
            )
        self.on_bad_sample = on_bad_sample
        self._counts = torch.zeros(WORKERS, dtype=torch.int64).share_memory_()

    @property
    def count(self) -> int:
        """How many there were, in all workers of a data loader."""
        return int(self._counts.sum())

    def __call__(self, error: ValueError) -> None:
        """Deal with the error of one sample."""
        if self.on_bad_sample == "error":
            raise ValueError(f"{error} Or leave such conversations out (--on-bad-sample skip).") from error
        own = worker_row()
        self._counts[own] += 1
        if self._counts[own] <= NAMED:
            logger.warning("Left out: %s", error)


def worker_row() -> int:
    """A row of a shared tensor of `WORKERS` rows that this process, a data loader's worker or not, has for itself."""
    worker = torch.utils.data.get_worker_info()
    return 0 if worker is None else 1 + worker.id % (WORKERS - 1)


class Conversations(Dataset):
    """A map-style data set of samples.

    Attributes:
        source: where they are from.
        skipped: how many broken samples were left out.
    """

    source: str
    skipped: int = 0
    good: list[int]
    facts: list[tuple[int, bool]]

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(self.good[index])

    def pictures(self, index: int) -> int:
        """How many pictures a sample has."""
        return self.facts[index][0]

    def has_system(self, index: int) -> bool:
        """Whether a sample begins with a system message."""
        return self.facts[index][1]

    def read(self, place: int) -> dict[str, Any]:
        """One sample, which is known to be good."""
        raise NotImplementedError

    def keep_good(self, places: list[int], check: Callable[[int], tuple[int, bool]], on_bad_sample: str) -> None:
        """Remember the places whose check passes; otherwise raise, or count and name what is left out."""
        self.good, self.facts = [], []
        left_out = LeftOut(on_bad_sample)
        for place in places:
            try:
                facts = check(place)
            except ValueError as error:
                left_out(error)
            else:
                self.good.append(place)
                self.facts.append(facts)
        self.skipped = left_out.count
        if self.skipped:
            total = self.skipped + len(self.good)
            logger.warning("%s: %d of %d samples are broken and left out.", self.source, self.skipped, total)
        if not self.good:
            raise ValueError(f"{self.source} holds no conversation to learn from ({self.skipped} were left out).")


class JsonLines(Conversations):
    """A file with a sample in each line, read from the disk whenever one is asked for."""

    def __init__(self, path: Path, on_bad_sample: str, to_learn: bool = True) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; pass a JSON lines file, a Parquet file or a data set's name.")
        self.path, self.source, self.to_learn = path, str(path), to_learn
        self.lines: dict[int, int] = {}  # the place of a line in bytes -> its number, for messages
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.lines[offset] = number
                offset += len(line)
        self.keep_good(list(self.lines), self._check, on_bad_sample)

    def read(self, place: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(place)
            return parse_line(file.readline(), self.path.parent)

    def _check(self, place: int) -> tuple[int, bool]:
        try:
            return check_conversation(self.read(place), self.to_learn)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {self.lines[place]}: {error}") from error


class Table(Conversations):
    """A data set of the `datasets` library, of rows with a column `messages` and perhaps `images`."""

    def __init__(self, source: str, on_bad_sample: str, split: str, to_learn: bool = True) -> None:
        self.source, self.to_learn = source, to_learn
        rows = open_table(source, split)
        if "messages" not in rows.column_names:
            raise ValueError(
                f"{source} has the columns {rows.column_names}; expected messages (and images). Convert it first."
            )
        # Pictures stay the bytes or paths they are; one that cannot be decoded is found by the collator.
        columns = [name for name in ("id", "messages", "images") if name in rows.column_names]
        self._row = encoded(rows.select_columns(columns))
        self.keep_good(list(range(len(rows))), self._check, on_bad_sample)

    def read(self, place: int) -> dict[str, Any]:
        return self._row(place)

    def _check(self, place: int) -> tuple[int, bool]:
        try:
            return check_conversation(self.read(place), self.to_learn)
        except ValueError as error:
            raise ValueError(f"{self.source}, row {place}: {error}") from error


def open_table(source: str, split: str = "train") -> Any:
    """A `datasets.Dataset` from a Parquet or Arrow file, a directory written by `datasets`, or a name on the Hub."""
    import datasets

    path = Path(source)
    if path.suffix in (".parquet", ".arrow"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; pass one, or a data set's name.")
        return datasets.load_dataset(path.suffix[1:], data_files=source, split="train")
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        loaded = datasets.load_from_disk(source)
        return loaded if isinstance(loaded, datasets.Dataset) else _split(loaded, split, source)
    if path.suffix and not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass a file, a directory or a data set's name on the Hub.")
    return _split(datasets.load_dataset(source), split, source)


def encoded(rows: Any) -> Callable[[int], dict[str, Any]]:
    """A reader of the rows of a `datasets.Dataset` by their places, which leaves pictures encoded."""
    rows = rows.with_format("arrow")
    return partial(_read_row, rows, without_decoding(rows.features))  # a partial goes to a loader's workers, a closure not


def _read_row(rows: Any, features: Any, place: int) -> dict[str, Any]:
    (row,) = rows[place].to_pylist()
    return without_nones(features.decode_example(row))


def check_conversation(sample: Any, to_learn: bool = True) -> tuple[int, bool]:
    """Check one sample, without decoding a picture.

    Args:
        sample: what a data set gave.
        to_learn: whether it must end with an answer, and its pictures' files be there. Otherwise a question may end it, and
            whoever opens the pictures finds out.

    Returns:
        how many pictures it has, and whether it begins with a system message.

    Raises:
        ValueError: naming what is wrong.
    """
    if not isinstance(sample, dict) or not isinstance(sample.get("messages"), list) or not sample["messages"]:
        what = sorted(sample) if isinstance(sample, dict) else type(sample).__name__
        raise ValueError(f"expected an object with a list of messages, got {what}.")
    messages = sample["messages"]
    unnamed = pictures = 0
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES or (role == "system" and number > 0):
            raise ValueError(
                f"message {number} has the role {role!r}; expected user or assistant, after at most one system message."
            )
        own, own_unnamed = _check_content(message, number, files=to_learn)
        pictures, unnamed = pictures + own, unnamed + own_unnamed
    if messages[0]["role"] == "assistant" or (messages[0]["role"] == "system" and messages[1:2] == []):
        raise ValueError("a conversation begins with a user's message (after at most one system message).")
    if to_learn and messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is the {messages[-1]['role']}'s; expected an assistant's answer to learn.")
    images = sample.get("images") or []
    if not isinstance(images, list):
        raise ValueError(f"images is of type {type(images).__name__}; expected a list.")
    if unnamed != len(images):
        raise ValueError(
            f"the messages hold {unnamed} image parts without a source, but there are {len(images)} images; expected one "
            "for each, in reading order."
        )
    for image in images if to_learn else ():
        _check_file(image.get("path") if isinstance(image, dict) and not image.get("bytes") else image)
    return pictures, messages[0]["role"] == "system"


def _check_content(message: dict, number: int, files: bool) -> tuple[int, int]:
    """Check a message's content; returns how many image parts there are, and how many of them without a source."""
    content = message.get("content")
    if isinstance(content, str):
        return 0, 0
    if not isinstance(content, list):
        raise ValueError(f"message {number} has a content of type {type(content).__name__}; expected a text or parts.")
    pictures = unnamed = 0
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            continue
        if kind != "image" or message["role"] != "user":
            raise ValueError(
                f"message {number} ({message['role']}) has a part {_short(part)}; expected a text, or in a user's message "
                "an image."
            )
        pictures += 1
        sources = [key for key in SOURCES if part.get(key) is not None]
        if not sources:
            unnamed += 1
        elif files and "url" not in sources and "base64" not in sources:
            _check_file(part[sources[0]])
    return pictures, unnamed


def _check_file(image: Any) -> None:
    if isinstance(image, str) and "://" not in image and not os.path.isfile(image):
        raise ValueError(f"the picture {image} does not exist.")


def complete_messages(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages with every picture in its place: `images` go where the parts without a source are.

    Args:
        sample: as `check_conversation` accepts it; or a list of messages as it is.

    Returns:
        Messages that a chat template and `DSVLProcessor.apply_chat_template` take.
    """
    if isinstance(sample, list):
        sample = {"messages": sample}
    images = iter(sample.get("images") or [])
    messages = []
    for message in sample["messages"]:
        if not isinstance(message["content"], str):
            parts = [_with_source(part, images) for part in message["content"]]
            message = message | {"content": parts}
        messages.append(message)
    return messages


def _with_source(part: dict[str, Any], images: Any) -> dict[str, Any]:
    if part["type"] != "image":
        return {"type": "text", "text": part["text"]}
    for key in SOURCES:
        if part.get(key) is not None:
            return {"type": "image", key: _stored(part[key])}
    return {"type": "image", "image": _stored(next(images))}


def _stored(image: Any) -> Any:
    """A picture as `datasets` stores it, as its bytes or its path."""
    if isinstance(image, dict):
        return image["bytes"] if image.get("bytes") else image["path"]
    return image


def picture_source(part: dict[str, Any]) -> Any:
    """Where the picture of a part `{"type": "image", ...}` of complete messages is from."""
    (source,) = (value for key, value in part.items() if key != "type")
    return source


def pictures_of(messages: list[dict[str, Any]]) -> list[Any]:
    """The sources of the pictures of complete messages, in reading order."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [picture_source(part) for part in parts if part["type"] == "image"]


def parse_line(line: bytes, root: Path) -> Any:
    """A line of a JSON lines file, with the paths of its pictures, which are relative to the file's folder, made whole.

    Raises:
        ValueError: if it is not JSON.
    """
    try:
        sample = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON ({error}).") from error
    return _rooted(sample, root) if isinstance(sample, dict) else sample


def _rooted(sample: dict[str, Any], root: Path) -> dict[str, Any]:

    def from_root(path: Any) -> Any:
        return str(root / path) if isinstance(path, str) and "://" not in path else path

    if isinstance(sample.get("images"), list):
        sample["images"] = [from_root(image) for image in sample["images"]]
    for message in sample["messages"] if isinstance(sample.get("messages"), list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict):
                part.update({key: from_root(part[key]) for key in ("path", "image") if key in part})
    return sample


def without_decoding(feature: Any) -> Any:
    """A feature of `datasets`, or a dict of them, that leaves pictures encoded."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return type(feature)({key: without_decoding(inner) for key, inner in feature.items()})
    inner = getattr(feature, "feature", None)  # of a list
    return feature if inner is None else type(feature)(without_decoding(inner))


def without_nones(value: Any) -> Any:
    """Arrow gives every part every key."""
    if isinstance(value, dict):
        return {key: without_nones(element) for key, element in value.items() if element is not None}
    return [without_nones(element) for element in value] if isinstance(value, list) else value


def _split(loaded: Any, split: str, source: str) -> Any:
    if split not in loaded:
        raise ValueError(f"{source} has the splits {list(loaded)}, not {split!r}.")
    return loaded[split]


def _short(part: Any) -> str:
    text = repr(part)
    return text if len(text) < 100 else text[:100] + "..."
