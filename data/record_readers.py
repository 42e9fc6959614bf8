"""Readers of records by index: JSON lines, JSON arrays, CSV and shards of WebDataset. Records are not kept in memory.

`read` accesses the file, so its errors are errors of the file; errors of `parse` are errors of a single record.
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

from ..utils.text import shortened

CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
BOM = b"\xef\xbb\xbf"
WHITESPACE = b" \t\r\n"


class Records:
    """Records by index.

    Attributes:
        source (`str`): The name of the file or data set, for messages.
        root (`Path`, *optional*): The folder to which relative image paths refer.
        keys (`list[str]`, *optional*): The columns of a table.
    """

    source: str
    root: Path | None
    keys: list[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def location(self, index: int) -> str:
        """The file and line of a record, for messages."""
        raise NotImplementedError

    def read(self, index: int) -> Any:
        """Read a record without parsing it. An error is an error of the file."""
        raise NotImplementedError

    def parse(self, raw: Any) -> Any:
        """Parse what `read` returned. An error is an error of this record."""
        raise NotImplementedError


class ByteRangeRecords(Records):
    """Records that are byte ranges of a file. A compressed file is decompressed in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.source, self.root = path, str(path), path.parent
        self.decompressed = _decompress(path) if path.suffix == ".gz" else None
        self.starts, self.ends, self.lines = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self.starts)

    def location(self, index: int) -> str:
        return f"{self.source}, line {self.lines[index]}"

    def read(self, index: int) -> bytes:
        start, end = self.starts[index], self.ends[index]
        if self.decompressed is not None:
            return self.decompressed[start:end]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def open(self) -> Any:
        return self.path.open("rb") if self.decompressed is None else io.BytesIO(self.decompressed)

    def add(self, start: int, end: int, line: int) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.lines.append(line)


class JsonRecords(ByteRangeRecords):
    """JSON lines; a JSON array of records; or one JSON object over several lines."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.is_array = False
        with self.open() as file:
            first = next((line for line in file if line.strip(WHITESPACE + BOM)), b"")
            if first.lstrip(WHITESPACE + BOM).startswith(b"["):
                file.seek(0)
                self._find_elements(file.read())
                return
            if path.name.removesuffix(".gz").endswith(".json") and self._is_one_object(file, first):
                self.add(0, file.tell(), 1)
                return
            file.seek(0)
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip(WHITESPACE + BOM):
                    self.add(offset, offset + len(line), number)
                offset += len(line)

    def location(self, index: int) -> str:
        where = super().location(index)
        return f"{where} (record {index})" if self.is_array else where

    def parse(self, raw: bytes) -> Any:
        return parse_json(raw)

    def _is_one_object(self, file: Any, first: bytes) -> bool:
        """Whether the file is one JSON object over several lines; it is then read to its end."""
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
        """Find the byte ranges of an array's elements. The file is refused if one is broken, as the next cannot be found."""
        self.is_array = True
        offset = len(BOM) if content.startswith(BOM) else 0
        try:
            text = content[offset:].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.source} is not JSON ({error}); expected UTF-8.") from error
        decode = json.JSONDecoder().raw_decode
        position, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
        offset += len(text[:position].encode())
        try:
            while True:
                start = _skip_whitespace(text, position)
                if text[start : start + 1] == "]" and not len(self):
                    position = start
                else:
                    _, end = decode(text, start)
                    line += text.count("\n", position, start)
                    offset += len(text[position:start].encode())
                    size = len(text[start:end].encode())
                    self.add(offset, offset + size, line)
                    line += text.count("\n", start, end)
                    offset += size
                    position = _skip_whitespace(text, end)
                    offset += position - end
                    line += text.count("\n", end, position)
                if text[position : position + 1] == ",":
                    position, offset = position + 1, offset + 1
                    continue
                if text[position : position + 1] != "]" or _skip_whitespace(text, position + 1) != len(text):
                    raise ValueError("expected a comma, or the end of the array and of the file")
                return
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.source} is a JSON array that cannot be read beyond record {len(self)} (from line {line} on): "
                f"{shortened(str(error))}. Fetch or write the file again."
            ) from error


class CsvRecords(ByteRangeRecords):
    """Rows of CSV or TSV; the first line names the columns. Quoted fields may contain line breaks."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.delimiter = CSV_DELIMITERS[path.suffixes[-2] if self.decompressed is not None else path.suffix]
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
    """A shard of WebDataset: files whose names differ only in the extension form one record."""

    def __init__(self, path: Path) -> None:
        self.path, self.source, self.root = path, str(path), path.parent
        members: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as file:
                for member in file:
                    folder, _, name = member.name.rpartition("/")
                    key, _, extension = name.partition(".")
                    if member.isfile() and key and extension:
                        files = members.setdefault(f"{folder}/{key}" if folder else key, {})
                        if extension.lower() in files:
                            raise ValueError(f"{path} holds {shortened(member.name)} twice; expected each file once.")
                        files[extension.lower()] = (member.offset_data, member.size)
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
    """Parse a JSON record.

    Raises:
        ValueError: If it is not valid JSON.
        RecursionError: If it is nested too deeply.
    """
    try:
        return json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON ({error}).") from error


def _decompress(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a gzip file, or only a part of it ({error}); fetch it again.") from error


def _skip_whitespace(text: str, position: int) -> int:
    while text[position : position + 1] and text[position] in " \t\r\n":
        position += 1
    return position


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"its {shortened(name)} is not UTF-8 ({error}).") from error


class _CountedLines:
    """Decodes the lines of a binary file, and counts the bytes read."""

    def __init__(self, file: Any) -> None:
        self.file, self.offset = file, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.file)
        self.offset += len(line)
        return line.decode(errors="surrogateescape")


class _long_fields:
    """Raises the csv module's limit of 131,072 characters in a field, which a data URL exceeds."""

    def __enter__(self) -> None:
        self.before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))

    def __exit__(self, *error: Any) -> None:
        csv.field_size_limit(self.before)
