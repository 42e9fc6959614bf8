"""The registry of converters, and helpers to read raw files."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from ...utils.text import shortened

Sample = dict[str, Any]
VIDEO_PLACEHOLDER = "<video>"


class SkipRecord(ValueError):
    """Raised for a valid record that a rule of its data set excludes; it is counted under this reason."""


@dataclass
class RawRecord:
    """One raw record, or several that form one conversation.

    Attributes:
        id (`str`): The name of the record in its data set, for messages and as part of the random seed.
        value: The record.
        dropped (`Counter[str]`): Reason -> the number of parts that the reader dropped.
        broken (`str`, *optional*): Why the record could not be read; `value` is then None.
    """

    id: str
    value: Any
    dropped: Counter[str] = field(default_factory=Counter)
    broken: str | None = None


@dataclass(frozen=True)
class Converter:
    """Converts one data set to conversations.

    Attributes:
        name (`str`): The name, as in DeepSpeed-VisualChat.
        about (`str`): A description in one line.
        files (`tuple[str, ...]`): The raw files, relative to the data root.
        read (`Callable`): (root, folder for images that are extracted from a raw file) -> the records, in the order of the
            file.
        convert (`Callable`): (value of a record, its random generator) -> a sample whose `images` are paths relative to the
            data root, absolute paths, or bytes. Raises `SkipRecord`, or `ValueError` for a broken record.
    """

    name: str
    about: str
    files: tuple[str, ...]
    read: Callable[[Path, Path], Iterable[RawRecord]]
    convert: Callable[[Any, Random], Sample]


CONVERTERS: dict[str, Converter] = {}


def converter(
    name: str, about: str, files: tuple[str, ...], read: Callable[[Path, Path], Iterable[RawRecord]]
) -> Callable[[Callable[[Any, Random], Sample]], Callable[[Any, Random], Sample]]:
    """Register the decorated function as a converter; for the arguments see `Converter`."""

    def register(convert: Callable[[Any, Random], Sample]) -> Callable[[Any, Random], Sample]:
        CONVERTERS[name] = Converter(name, about, files, read, convert)
        return convert

    return register


def read_list(*files: str, key: str = "id", inside: str | None = None) -> Callable[[Path, Path], Iterator[RawRecord]]:
    """Make a reader of JSON files with a list of records.

    Args:
        files (`str`): The files, relative to the data root.
        key (`str`, *optional*, defaults to `"id"`): The key of a record's id.
        inside (`str`, *optional*): The key of the list, if the file contains an object.
    """

    def read(root: Path, images: Path) -> Iterator[RawRecord]:
        for file in files:
            records = read_records(root / file) if inside is None else take(read_json(root / file), inside, list, file)
            for number, record in enumerate(records):
                name = record.get(key, number) if isinstance(record, dict) else number
                yield RawRecord(f"{Path(file).name}: {name}", record)

    return read


def read_records(path: Path) -> list[Any]:
    """Read a JSON file with a list of records.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not JSON, truncated, or not a list.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path} holds {_kind(records)}; expected a list of records.")
    return records


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not JSON, or truncated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --root must be the folder that contains it.")
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, or only a part of it ({error}); fetch it again.") from error


def take(record: Any, key: str, kind: type | tuple[type, ...], where: str = "the record") -> Any:
    """Get `record[key]`, and check its type.

    Raises:
        ValueError: If the key is absent, or its value has another type.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {_kind(record)}; expected an object with {key!r}.")
    value = record.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        found = _kind(value) if key in record else "absent"
        raise ValueError(f"{key!r} of {where} is {found}; expected {names}.")
    return value


def take_texts(record: Any, key: str, where: str = "the record") -> list[str]:
    """Get `record[key]`, and check that it is a list of strings."""
    values = take(record, key, list, where)
    wrong = [value for value in values if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"{key!r} of {where} holds {_kind(wrong[0])}; expected texts.")
    return values


def user(*parts: str | None) -> dict[str, Any]:
    """A user's message. Each None becomes an image part, `VIDEO_PLACEHOLDER` a video part, each other string a text part."""
    kinds = {None: "image", VIDEO_PLACEHOLDER: "video"}
    return {"role": "user", "content": [{"type": kinds[p]} if p in kinds else {"type": "text", "text": p} for p in parts]}


def assistant(text: str) -> dict[str, Any]:
    """An assistant's message.

    Raises:
        SkipRecord: If the text is empty.
    """
    if not text.strip():
        raise SkipRecord("an empty answer")
    return {"role": "assistant", "content": [{"type": "text", "text": text.strip()}]}


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({shortened(repr(value), 60)})"
