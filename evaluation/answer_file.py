"""The file of answers, from which an interrupted evaluation resumes, and its summary."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..utils.atomic_files import atomic_path, write_atomically
from .answer_records import AnswerRecord, numbered_records

logger = logging.getLogger(__name__)


def summary_path(answers: str | Path) -> Path:
    """The path of the summary of an answer file."""
    return Path(answers).with_suffix(".summary.json")


class AnswerFile:
    """JSON lines of `AnswerRecord`s, appended as they are generated. An existing file is resumed.

    Args:
        path: of the file. The summary is written to `NAME.summary.json`, and images that are not files to the directory
            `NAME.images`.
        header: identifies the run: `model`, `data`, `options` (a dict) and `fingerprint` (a dict).

    Attributes:
        answers: (conversation id, index of the turn) -> record.

    Raises:
        ValueError: if the file holds answers of another model, other data or other options.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        self.path, self.header = Path(path), header
        self.summary = summary_path(path)
        self.answers: dict[tuple[str, int], AnswerRecord] = {}
        self._lines: dict[tuple[str, int], int] = {}  # line numbers in an existing file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            self._check_header()
            self._drop_incomplete_line()
            for number, record in numbered_records(self.path):
                self.answers[record.id, record.turn] = record
                self._lines[record.id, record.turn] = number
        self.write_summary({}, {})
        self._file = self.path.open("a", encoding="utf-8")

    def _check_header(self) -> None:
        remedy = "pass another --out, or delete it"
        try:
            before = json.loads(self.summary.read_text(encoding="utf-8"))
            options, fingerprint = dict(before["options"]), dict(before["fingerprint"])
            before["model"], before["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} holds answers, but {self.summary} does not say of which run ({error!r}); {remedy}."
            ) from error
        other = [
            f"{what} ({before[what]}, not {self.header[what]})" if before[what] != self.header[what] else f"{what} (changed)"
            for what in ("model", "data")
            if fingerprint.get(what) != self.header["fingerprint"][what]
        ]
        now = self.header["options"]
        other += [
            f"{name} ({options.get(name)!r}, not {now.get(name)!r})"
            for name in sorted(set(options) | set(now))
            if options.get(name) != now.get(name)
        ]
        if other:
            raise ValueError(f"{self.path} holds answers of another {', '.join(other)}; {remedy}.")

    def _drop_incomplete_line(self) -> None:
        """Truncate an incomplete last line, which a killed run leaves."""
        with self.path.open("rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                logger.warning("%s ends in an incomplete line; it is removed, and its question is asked again.", self.path)
                file.truncate(whole)

    def check_conversations(self, turns: Mapping[str, int]) -> None:
        """Check that each answer in the file belongs to a turn of the data.

        Args:
            turns: conversation id -> number of turns.

        Raises:
            ValueError: naming the line of the first answer that does not.
        """
        for (name, number), line in self._lines.items():
            if number >= turns.get(name, 0):
                raise ValueError(
                    f"{self.path}, line {line} answers conversation {name[:80]!r}, turn {number}, which is not in "
                    f"{self.header['data']}; pass another --out, or delete the line."
                )

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self.answers

    def add(self, records: Iterable[AnswerRecord]) -> None:
        """Append the answers of a batch."""
        new = list(records)
        self._file.write("".join(f"{record.line()}\n" for record in new))
        self._file.flush()
        self.answers.update({(record.id, record.turn): record for record in new})

    def keep_image(self, data: bytes) -> str:
        """Write the bytes of an image to the images directory, and return the path."""
        folder = self.path.with_suffix(".images").absolute()
        path = folder / hashlib.sha256(data).hexdigest()[:24]
        if not path.exists():
            folder.mkdir(exist_ok=True)
            with atomic_path(path) as partial:
                partial.write_bytes(data)
        return str(path)

    def finish(self, order: Iterable[str]) -> None:
        """Sort the answers by conversation, in this order of ids, and by turn, and close the file."""
        self._file.close()
        position = {name: index for index, name in enumerate(order)}
        records = sorted(self.answers.values(), key=lambda record: (position[record.id], record.turn))
        self.answers = {(record.id, record.turn): record for record in records}
        write_atomically(self.path, "".join(f"{record.line()}\n" for record in records))

    def scores(self) -> dict[str, tuple[float, int]]:
        """metric -> (mean, number of turns)."""
        found: dict[str, list[float]] = {}
        for record in self.answers.values():
            for metric, value in record.scores.items():
                found.setdefault(metric, []).append(value)
        return {metric: (sum(values) / len(values), len(values)) for metric, values in found.items()}

    def write_summary(self, counts: dict[str, int], skipped: dict[str, str]) -> dict[str, Any]:
        """Write and return the summary: the header, `counts`, mean `scores`, and `skipped` (conversation id -> reason)."""
        scores = {metric: mean for metric, (mean, _) in self.scores().items()}
        summary = self.header | {"counts": counts, "scores": scores, "skipped": skipped}
        write_atomically(self.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        return summary


def checkpoint_fingerprint(name: str) -> str:
    """A hash of a checkpoint's files: configurations, tokenizer, chat template and weights.

    Args:
        name: its directory, or its name on the Hub; its files are then in the cache, as it was loaded before.
    """
    from ..utils.transformers_names import cached_file

    # Model cards, logs and answers in the same directory do not count.
    patterns = ("*config.json", "tokenizer.json", "*.jinja", "*.safetensors")
    directory = Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent
    whole = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in directory.glob(pattern)}):
        with path.open("rb") as file:
            whole.update(f"{path.name} {_sha256(file)}\n".encode())
    return whole.hexdigest()


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()
