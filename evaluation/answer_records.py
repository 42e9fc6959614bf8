"""The records of an answer file: one JSON line for each answered turn."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

MAX_SHOWN = 80  # characters of a value in an error message


@dataclass(frozen=True)
class AnswerRecord:
    """A turn of a conversation with a model's answer.

    Attributes:
        id: name or number of the conversation.
        turn: index of the turn in the conversation.
        question: text of the question.
        images: paths or URLs of the images of this turn.
        answer: the model's answer.
        references: correct answers; empty if none are known.
        scores: metric -> score; empty without references.
        model: name or directory of the checkpoint.
    """

    id: str
    turn: int
    question: str
    images: list[str]
    answer: str
    references: list[str]
    scores: dict[str, float]
    model: str

    def line(self) -> str:
        """The record as JSON, without a newline."""
        return json.dumps(asdict(self), ensure_ascii=False)


def read_records(path: str | Path) -> list[AnswerRecord]:
    """Read the records of an answer file, in the order of the file.

    Raises:
        ValueError: see `numbered_records`.
    """
    return [record for _, record in numbered_records(path)]


def numbered_records(path: str | Path) -> list[tuple[int, AnswerRecord]]:
    """Read the records of an answer file with their line numbers, in the order of the file.

    Raises:
        ValueError: naming file and line, for an invalid record, or a second answer to a turn.
    """
    found: dict[tuple[str, int], tuple[int, AnswerRecord]] = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            location = f"{path}, line {number}"
            record = _record(line, location)
            before, _ = found.setdefault((record.id, record.turn), (number, record))
            if before != number:
                raise ValueError(
                    f"{location} answers conversation {_short(record.id)}, turn {record.turn}, as line {before} does; "
                    "delete one of them."
                )
    return list(found.values())


_NAMES = [field.name for field in fields(AnswerRecord)]


def _record(line: bytes, location: str) -> AnswerRecord:
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{location} is not JSON ({error}); pass what dsvl evaluate wrote.") from error
    if isinstance(value, dict) and "round" in value:  # the key of `turn` until version 0.2
        value["turn"] = value.pop("round")
    if not isinstance(value, dict) or set(value) != set(_NAMES):
        raise ValueError(
            f"{location} is not an answer record: it needs the fields {', '.join(_NAMES)}; pass what dsvl evaluate wrote."
        )
    for name, kind in (("id", str), ("question", str), ("answer", str), ("model", str), ("turn", int)):
        if type(value[name]) is not kind:
            raise ValueError(
                f"{location} is not an answer record: its {name} is {_short(value[name])}; expected {_KINDS[kind]}."
            )
    for name in ("images", "references"):
        if not isinstance(value[name], list) or not all(isinstance(one, str) for one in value[name]):
            raise ValueError(
                f"{location} is not an answer record: its {name} are {_short(value[name])}; expected a list of strings."
            )
    if value["turn"] < 0:
        raise ValueError(f"{location} is not an answer record: its turn is {value['turn']}; expected 0 or more.")
    if not isinstance(value["scores"], dict):
        raise ValueError(
            f"{location} is not an answer record: its scores are {_short(value['scores'])}; expected numbers by metric."
        )
    for metric, score in value["scores"].items():
        if type(score) not in (int, float) or not math.isfinite(score):
            raise ValueError(f"{location}: the score {_short(metric)} is {_short(score)}; expected a finite number.")
    return AnswerRecord(**value)


_KINDS = {str: "a string", int: "an integer"}


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
