"""An answered round: one line of the file that an evaluation writes."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """A question of a conversation, and a model's answer.

    Attributes:
        id: the conversation's name or number.
        round: of the conversation, from 0.
        question: as it was asked.
        images: paths or addresses of this round's own pictures.
        answer: the model's.
        references: answers that count as right; none if there are none.
        scores: metric -> score, without references none.
        model: name or directory of the checkpoint.
    """

    id: str
    round: int
    question: str
    images: list[str]
    answer: str
    references: list[str]
    scores: dict[str, float]
    model: str

    def line(self) -> str:
        """The record as JSON, without a line's end."""
        return json.dumps(asdict(self), ensure_ascii=False)


def read_records(path: str | Path) -> list[Record]:
    """The records of a file of JSON lines, in its order.

    Raises:
        ValueError: naming file and line, for a line that is no record.
    """
    records = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                records.append(_record(line, f"{path}, line {number}"))
    return records


_NAMES = [field.name for field in fields(Record)]


def _record(line: str, place: str) -> Record:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON ({error}); pass what dsvl evaluate wrote.") from error
    if not isinstance(value, dict) or set(value) != set(_NAMES):
        raise ValueError(f"{place} is no answer: it needs the fields {', '.join(_NAMES)}; pass what dsvl evaluate wrote.")
    return Record(**value)
