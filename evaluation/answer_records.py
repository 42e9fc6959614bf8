"""An answered round: one line of the file that an evaluation writes."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SHOWN = 80  # characters of a value that a message repeats


@dataclass(frozen=True)
class Record:
    """A question of a conversation, and a model's answer.

    Attributes:
        id: the conversation's name or number.
        round: of the conversation, from 0.
        question: as it was asked.
        images: paths or addresses of this round's own images.
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
        ValueError: see `numbered_records`.
    """
    return [record for _, record in numbered_records(path)]


def numbered_records(path: str | Path) -> list[tuple[int, Record]]:
    """The records of a file of JSON lines, in its order, and the numbers of their lines.

    Raises:
        ValueError: naming file and line, for a line that is no record, and for a second answer to a round.
    """
    found: dict[tuple[str, int], tuple[int, Record]] = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            record = _record(line, place)
            before, _ = found.setdefault((record.id, record.round), (number, record))
            if before != number:
                raise ValueError(
                    f"{place} answers conversation {_short(record.id)}, round {record.round}, as line {before} does; "
                    "delete one of them."
                )
    return list(found.values())


_NAMES = [field.name for field in fields(Record)]


def _record(line: bytes, place: str) -> Record:
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON ({error}); pass what dsvl evaluate wrote.") from error
    if not isinstance(value, dict) or set(value) != set(_NAMES):
        raise ValueError(f"{place} is no answer: it needs the fields {', '.join(_NAMES)}; pass what dsvl evaluate wrote.")
    for name, kind in (("id", str), ("question", str), ("answer", str), ("model", str), ("round", int)):
        if type(value[name]) is not kind:
            raise ValueError(f"{place} is no answer: its {name} is {_short(value[name])}; expected {_KINDS[kind]}.")
    for name in ("images", "references"):
        if not isinstance(value[name], list) or not all(isinstance(one, str) for one in value[name]):
            raise ValueError(f"{place} is no answer: its {name} are {_short(value[name])}; expected a list of texts.")
    if value["round"] < 0:
        raise ValueError(f"{place} is no answer: its round is {value['round']}; expected 0 or more.")
    if not isinstance(value["scores"], dict):
        raise ValueError(f"{place} is no answer: its scores are {_short(value['scores'])}; expected metrics and numbers.")
    for metric, score in value["scores"].items():
        if type(score) not in (int, float) or not math.isfinite(score):
            raise ValueError(f"{place}: the score {_short(metric)} is {_short(score)}; expected a finite number.")
    return Record(**value)


_KINDS = {str: "a text", int: "a number"}


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
