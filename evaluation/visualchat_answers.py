"""Reading the answers of DeepSpeed-VisualChat, the tables `eval/results/*/*.csv` of its repository, for `dsvl compare`.

`eval/batch_generation.py` writes a row for each question: `test_name` (the conversation), `image_path` (paths separated by
spaces, or the question again if it has no image), `question` and `answer`. Rows of a conversation are in the order of its
turns.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..utils.text import shortened
from .answer_records import AnswerRecord

COLUMNS = ["test_name", "image_path", "question", "answer"]


def read_visualchat_answers(path: str | Path) -> list[AnswerRecord]:
    """Read a table of answers.

    Image paths begin in the directory where the original was run; they are looked for in the directories above the file.

    Args:
        path: of the CSV file.

    Returns:
        The records, without references and scores; `model` is the name of the file.

    Raises:
        ValueError: naming file and line, if it is not such a table.
    """
    found: list[AnswerRecord] = []
    turns: dict[str, int] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
            if header != COLUMNS:
                raise ValueError(
                    f"{path} has the columns {shortened(', '.join(header))}; expected {', '.join(COLUMNS)}, as in "
                    "DeepSpeed-VisualChat's eval/results, or the JSON lines of dsvl evaluate."
                )
            for row in rows:
                if len(row) != len(COLUMNS):
                    raise ValueError(f"{path}, line {rows.line_num}: {len(row)} columns; expected {', '.join(COLUMNS)}.")
                name, images, question, answer = row
                turn = turns[name] = turns.get(name, -1) + 1
                paths = [] if images == question else [_find(image, Path(path)) for image in images.split()]
                found.append(AnswerRecord(name, turn, question, paths, answer, [], {}, Path(path).stem))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {rows.line_num}: not a CSV table in UTF-8 ({error}).") from error
    return found


def _find(image: str, table: Path) -> str:
    """The path of an image in a directory above the table; as it is if there is none."""
    return next((str(folder / image) for folder in table.absolute().parents if (folder / image).is_file()), image)


@dataclass(frozen=True)
class Matched:
    """Answers whose questions do not contradict those of other runs.

    Attributes:
        records: those answers.
        common: number of records whose question another run was asked.
        others: number of records whose turn no other run has.
        dropped: the other records: at the same turn another run was asked something else.
    """

    records: list[AnswerRecord]
    common: int
    others: int
    dropped: list[AnswerRecord]


def match_questions(records: Sequence[AnswerRecord], runs: Mapping[str, Sequence[AnswerRecord]]) -> Matched:
    """Match answers with the questions of other runs by conversation, turn, question and number of images.

    Args:
        records: the answers.
        runs: the other runs, label -> records.
    """
    asked = {(one.id, one.turn): one for run in runs.values() for one in run}
    kept, dropped, common = [], [], 0
    for record in records:
        other = asked.get((record.id, record.turn))
        if other is not None and (other.question, len(other.images)) != (record.question, len(record.images)):
            dropped.append(record)
            continue
        kept.append(record)
        common += other is not None
    return Matched(kept, common, len(kept) - common, dropped)
