"""Records by index, without holding them: lines and arrays of JSON, rows of CSV, shards of WebDataset.

`read` is the file's business and may fail as files do; `parse` is the record's.
"""

import csv
import gzip
import io
import json
import sys
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .bad_samples import shortened

CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
BOM = b"\xef\xbb\xbf"
WHITE = b" \t\r\n"


class Records:
    """Records by index.

    Attributes:
        source: what they are from, for messages.
        root: the folder at which relative paths of images start; None if there is none.
        keys: the columns, if all records have the same.
    """

    source: str
    root: Path | None
    keys: list[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def location(self, index: int) -> str:
        """Where a record is, for messages."""
        raise NotImplementedError

    def read(self, index: int) -> Any:
        """A record as the file has it. What this raises is the file's fault."""
        raise NotImplementedError

    def parse(self, raw: Any) -> Any:
        """What `read` gave as Python objects. What this raises is the record's fault."""
        raise NotImplementedError


class Spans(Records):
    """Records that are stretches of bytes of a file; a file that is compressed is held in memory, unpacked."""

    def __init__(self, path: Path) -> None:
        self.path, self.source, self.root = path, str(path), path.parent
        self.unpacked = _unpacked(path) if path.suffix == ".gz" else None
        self.starts, self.ends, self.lines = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self.starts)

    def location(self, index: int) -> str:
        return f"{self.source}, line {self.lines[index]}"

    def read(self, index: int) -> bytes:
        start, end = self.starts[index], self.ends[index]
        if self.unpacked is not None:
            return self.unpacked[start:end]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def open(self) -> Any:
        return self.path.open("rb") if self.unpacked is None else io.BytesIO(self.unpacked)

    def add(self, start: int, end: int, line: int) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.lines.append(line)


class JsonRecords(Spans):
    """A record in each line; or the elements of an array; or one object that is spread over lines."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.is_array = False
        with self.open() as file:
            first = next((line for line in file if line.strip(WHITE + BOM)), b"")
            if first.lstrip(WHITE + BOM).startswith(b"["):
                file.seek(0)
                self._find_elements(file.read())
                return
            if path.name.removesuffix(".gz").endswith(".json") and self._is_one_object(file, first):
                self.add(0, file.tell(), 1)
                return
            file.seek(0)
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip(WHITE + BOM):
                    self.add(offset, offset + len(line), number)
                offset += len(line)

    def location(self, index: int) -> str:
        where = super().location(index)
        return f"{where} (record {index})" if self.is_array else where

    def parse(self, raw: bytes) -> Any:
        return parse_json(raw)

    def _is_one_object(self, file: Any, first: bytes) -> bool:
        """Whether the file is an object of many lines; it has been read to its end then."""
        try:
            json.loads(first)
            return False
        except RecursionError:
            return False
        except ValueError:
            pass
        file.seek(0)
        try:
            return isinstance(json.loads(file.read()), dict)
        except (ValueError, RecursionError):
            return False

    def _find_elements(self, content: bytes) -> None:
        """The stretches of an array's elements. One that is broken hides all that follow, so the file is refused."""
        self.is_array = True
        offset = len(BOM) if content.startswith(BOM) else 0
        try:
            text = content[offset:].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.source} is not JSON ({error}); expected UTF-8.") from error
        decode = json.JSONDecoder().raw_decode
        place, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
        offset += len(text[:place].encode())
        try:
            while True:
                start = _after_white(text, place)
                if text[start : start + 1] == "]" and not len(self):
                    place = start
                else:
                    _, end = decode(text, start)
                    line += text.count("\n", place, start)
                    offset += len(text[place:start].encode())
                    size = len(text[start:end].encode())
                    self.add(offset, offset + size, line)
                    line += text.count("\n", start, end)
                    offset += size
                    place = _after_white(text, end)
                    offset += place - end
                    line += text.count("\n", end, place)
                if text[place : place + 1] == ",":
                    place, offset = place + 1, offset + 1
                    continue
                if text[place : place + 1] != "]" or _after_white(text, place + 1) != len(text):
                    raise ValueError("expected a comma, or the end of the array and of the file")
                return
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.source} is a JSON array that cannot be read beyond record {len(self)} (from line {line} on): "
                f"{shortened(str(error))}. Fetch or write the file again."
            ) from error


class CsvRecords(Spans):
    """Rows of a table of text; the first names the columns. Fields may hold line breaks between quotes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.delimiter = CSV_DELIMITERS[path.suffixes[-2] if self.unpacked is not None else path.suffix]
        with self.open() as file:
            counted = _CountedLines(file)
            with _long_fields():
                rows = csv.reader(counted, delimiter=self.delimiter, strict=True)
                while True:
                    start, line = counted.offset, rows.line_num + 1
                    try:
                        row = next(rows, None)
                    except csv.Error as error:
                        raise ValueError(f"{self.source}, line {line}: is not CSV ({error}).") from error
                    if row is None:
                        break
                    if self.keys is None:
                        self.keys = [name.removeprefix("\ufeff").strip() for name in row]
                    elif row:
                        self.add(start, counted.offset, line)
        if not self.keys or len(set(self.keys)) < len(self.keys):
            raise ValueError(
                f"{self.source} begins with {shortened(self.keys)}; expected a line of column names, each once."
            )

    def parse(self, raw: bytes) -> dict[str, str]:
        assert self.keys is not None
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 ({error}).") from error
        with _long_fields():
            (row,) = csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter, strict=True)
        if len(row) != len(self.keys):
            raise ValueError(
                f"has {len(row)} fields; the first line names {len(self.keys)} columns. (Quote a field's commas.)"
            )
        return dict(zip(self.keys, row, strict=True))


class TarRecords(Records):
    """A shard of WebDataset: files of the same name but for the extension are one record."""

    def __init__(self, path: Path) -> None:
        self.path, self.source, self.root = path, str(path), path.parent
        members: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as file:
                for member in file:
                    folder, _, name = member.name.rpartition("/")
                    key, _, extension = name.partition(".")
                    if member.isfile() and key and extension:
                        own = members.setdefault(f"{folder}/{key}" if folder else key, {})
                        if extension.lower() in own:
                            raise ValueError(f"{path} holds {shortened(member.name)} twice; each file may be there once.")
                        own[extension.lower()] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ValueError(f"{path} is not a tar file, or only a part of it ({error}); fetch it again.") from error
        self._names, self._members = list(members), list(members.values())

    def __len__(self) -> int:
        return len(self._names)

    def location(self, index: int) -> str:
        return f"{self.source}, {shortened(self._names[index])}"

    def read(self, index: int) -> dict[str, bytes]:
        found = {}
        with self.path.open("rb") as file:
            for extension, (offset, size) in self._members[index].items():
                file.seek(offset)
                found[extension] = file.read(size)
        return found

    def parse(self, raw: dict[str, bytes]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for extension, content in raw.items():
            kind = extension.rpartition(".")[2]
            if kind == "json":
                record[extension] = parse_json(content)
            else:
                record[extension] = _decoded(extension, content) if kind in ("txt", "text", "caption") else content
        return record


def parse_json(raw: bytes) -> Any:
    """A record of JSON.

    Raises:
        ValueError: if it is not JSON.
        RecursionError: if it is nested too deeply.
    """
    try:
        return json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON ({error}).") from error


def _unpacked(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a gzip file, or only a part of it ({error}); fetch it again.") from error


def _after_white(text: str, place: int) -> int:
    while text[place : place + 1] and text[place] in " \t\r\n":
        place += 1
    return place


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"its {shortened(name)} is not UTF-8 ({error}).") from error


class _CountedLines:
    """The lines of a file in bytes as text, and how many bytes of it were read."""

    def __init__(self, file: Any) -> None:
        self.file, self.offset = file, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.file)
        self.offset += len(line)
        return line.decode(errors="surrogateescape")


class _long_fields:
    """A data URL is longer than the csv module's 131,072 characters of a field."""

    def __enter__(self) -> None:
        self.before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))

    def __exit__(self, *error: Any) -> None:
        csv.field_size_limit(self.before)
