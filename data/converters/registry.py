"""What a converter is, and what the raw files of all of them need."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from ..bad_samples import shortened

Sample = dict[str, Any]


class LeftOut(ValueError):
    """A sound record that is no sample, by a rule of its data set; it is counted under its reason."""


@dataclass
class Record:
    """One raw record, or what several of them have become that belong together.

    Attributes:
        id: what the data set calls it, for messages and as the seed of what is chosen at random.
        value: the record.
        dropped: parts of it that are left out already, by reason.
        broken: why there is no value, if it could not be read.
    """

    id: str
    value: Any
    dropped: Counter[str] = field(default_factory=Counter)
    broken: str | None = None


@dataclass(frozen=True)
class Converter:
    """How one data set becomes conversations.

    Attributes:
        name: as in DeepSpeed-VisualChat.
        about: a line about it.
        files: what it reads, below the data root.
        read: (root, folder for images that lie inside a raw file) -> the records, in the order of the file.
        convert: (a record's value, random numbers of its own) -> a sample, whose `images` are paths below the data root,
            absolute paths, or bytes. Raises LeftOut, or ValueError for a broken record.
    """

    name: str
    about: str
    files: tuple[str, ...]
    read: Callable[[Path, Path], Iterable[Record]]
    convert: Callable[[Any, Random], Sample]


CONVERTERS: dict[str, Converter] = {}


def converter(
    name: str, about: str, files: tuple[str, ...], read: Callable[[Path, Path], Iterable[Record]]
) -> Callable[[Callable[[Any, Random], Sample]], Callable[[Any, Random], Sample]]:
    """Register the decorated function under a name; the arguments are those of `Converter`."""

    def register(convert: Callable[[Any, Random], Sample]) -> Callable[[Any, Random], Sample]:
        CONVERTERS[name] = Converter(name, about, files, read, convert)
        return convert

    return register


def read_list(*files: str, key: str = "id", inside: str | None = None) -> Callable[[Path, Path], Iterator[Record]]:
    """A reader of JSON files that hold a list of records.

    Args:
        files: below the data root.
        key: under which a record has its id.
        inside: the key of the list, if the file holds an object.
    """

    def read(root: Path, images: Path) -> Iterator[Record]:
        for file in files:
            records = read_records(root / file) if inside is None else take(read_json(root / file), inside, list, file)
            for number, record in enumerate(records):
                name = record.get(key, number) if isinstance(record, dict) else number
                yield Record(f"{Path(file).name}: {name}", record)

    return read


def read_records(path: Path) -> list[Any]:
    """A whole JSON file that holds a list of records.

    Raises:
        FileNotFoundError, ValueError: if it is absent, not whole or no list.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path} holds {_kind(records)}; expected a list of records.")
    return records


def read_json(path: Path) -> Any:
    """A whole JSON file.

    Raises:
        FileNotFoundError, ValueError: if it is absent or not whole.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --root must be the folder that holds it.")
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, or only a part of it ({error}); fetch it again.") from error


def take(record: Any, key: str, kind: type | tuple[type, ...], where: str = "the record") -> Any:
    """`record[key]`, held against its type.

    Raises:
        ValueError: naming the key, what is there and what was expected.
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
    """`record[key]`, a list of texts."""
    values = take(record, key, list, where)
    wrong = [value for value in values if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"{key!r} of {where} holds {_kind(wrong[0])}; expected texts.")
    return values


def user(*parts: str | None) -> dict[str, Any]:
    """A user's message: a text for each text, an image for each None."""
    return {"role": "user", "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]}


def assistant(text: str) -> dict[str, Any]:
    """An answer; one of white space alone has nothing to learn."""
    if not text.strip():
        raise LeftOut("an empty answer")
    return {"role": "assistant", "content": [{"type": "text", "text": text.strip()}]}


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({shortened(repr(value), 60)})"
