"""The file of answers, which an interrupted evaluation goes on from, and the summary beside it."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..utils.atomic_files import atomic_path, write_atomically
from .answer_records import Record, numbered_records

logger = logging.getLogger(__name__)


def summary_path(answers: str | Path) -> Path:
    """Where the summary of a file of answers is."""
    return Path(answers).with_suffix(".summary.json")


class AnswerFile:
    """JSON lines of `Record`s, written as they come. Opening the file of an interrupted run goes on from it.

    Args:
        path: of the file. Its summary lies beside it, and images that had no file of their own in a folder `.images`.
        header: what the answers are those of: `model`, `data`, `options` (a dict), `fingerprint` (a dict).

    Attributes:
        answers: (conversation, round) -> record.

    Raises:
        ValueError: if the file holds the answers of another model, other data or other options.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        self.path, self.header = Path(path), header
        self.summary = summary_path(path)
        self.answers: dict[tuple[str, int], Record] = {}
        self._lines: dict[tuple[str, int], int] = {}  # of those that were there
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            self._check_header()
            self._drop_half_line()
            for number, record in numbered_records(self.path):
                self.answers[record.id, record.round] = record
                self._lines[record.id, record.round] = number
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
                f"{self.path} holds answers, but {self.summary} does not say to what ({error!r}); {remedy}."
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

    def _drop_half_line(self) -> None:
        """A run that was killed may have left half a line at the end."""
        with self.path.open("rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                logger.warning("%s ends in the middle of a line, which is dropped and asked again.", self.path)
                file.truncate(whole)

    def check_conversations(self, rounds: Mapping[str, int]) -> None:
        """Refuse answers to what is not asked.

        Args:
            rounds: a conversation's name -> its number of rounds.

        Raises:
            ValueError: naming the first line of such an answer.
        """
        for (name, number), line in self._lines.items():
            if number >= rounds.get(name, 0):
                raise ValueError(
                    f"{self.path}, line {line} answers conversation {name[:80]!r}, round {number}, which is not in "
                    f"{self.header['data']}; pass another --out, or delete the line."
                )

    def __contains__(self, place: tuple[str, int]) -> bool:
        return place in self.answers

    def add(self, records: Iterable[Record]) -> None:
        """Write the answers of a batch, at once."""
        new = list(records)
        self._file.write("".join(f"{record.line()}\n" for record in new))
        self._file.flush()
        self.answers.update({(record.id, record.round): record for record in new})

    def keep_image(self, data: bytes) -> str:
        """The path of a file that holds an image's bytes, written unless it is there."""
        folder = self.path.with_suffix(".images").absolute()
        path = folder / hashlib.sha256(data).hexdigest()[:24]
        if not path.exists():
            folder.mkdir(exist_ok=True)
            with atomic_path(path) as partial:
                partial.write_bytes(data)
        return str(path)

    def finish(self, order: Iterable[str]) -> None:
        """Put the answers into the order of these conversations, each one's rounds in order, and close the file."""
        self._file.close()
        places = {name: number for number, name in enumerate(order)}
        records = sorted(self.answers.values(), key=lambda record: (places[record.id], record.round))
        self.answers = {(record.id, record.round): record for record in records}
        write_atomically(self.path, "".join(f"{record.line()}\n" for record in records))

    def scores(self) -> dict[str, tuple[float, int]]:
        """metric -> (mean, over how many rounds)."""
        found: dict[str, list[float]] = {}
        for record in self.answers.values():
            for metric, value in record.scores.items():
                found.setdefault(metric, []).append(value)
        return {metric: (sum(values) / len(values), len(values)) for metric, values in found.items()}

    def write_summary(self, counts: dict[str, int], skipped: dict[str, str]) -> dict[str, Any]:
        """Write the summary: the header, `counts`, mean `scores`, and why conversations were `skipped`."""
        scores = {metric: mean for metric, (mean, _) in self.scores().items()}
        summary = self.header | {"counts": counts, "scores": scores, "skipped": skipped}
        write_atomically(self.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        return summary


def checkpoint_fingerprint(name: str) -> str:
    """A hash of a checkpoint's files: configurations, tokenizer, template, weights (quickly read again after loading).

    Args:
        name: its directory, or its name on the Hub, from where it was loaded before.
    """
    from ..utils.transformers_names import cached_file

    # Not the cards and logs that lie beside them, nor the answers of an evaluation.
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
