"""OCR-VQA: questions about the covers of books."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any
from urllib.parse import urlparse

from .registry import RawRecord, Sample, SkipRecord, assistant, converter, read_json, take, take_texts, user

DATASET = "OCR_VQA/dataset.json"
TRAIN = 1  # of splits 1 to 3; the others are evaluation data


def read(root: Path, images: Path) -> Iterator[RawRecord]:
    books = read_json(root / DATASET)
    if not isinstance(books, dict):
        raise ValueError(f"{root / DATASET} holds {type(books).__name__}; expected an object with a record for each book.")
    for key, book in books.items():
        yield RawRecord(key, (key, book))


@converter("ocr_vqa", "OCR-VQA: questions about covers of books (split 1), a turn each", (DATASET,), read)
def ocr_vqa(record: Any, random: Random) -> Sample:
    key, book = record
    if take(book, "split", int) != TRAIN:
        raise SkipRecord(f"split {book['split']}")
    questions, answers = take_texts(book, "questions"), take_texts(book, "answers")
    if len(questions) != len(answers):
        raise ValueError(f"there are {len(questions)} questions and {len(answers)} answers; expected equal numbers.")
    if not questions:
        raise SkipRecord("no question")
    messages = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        messages += [user(*[None] * (number == 0), question.strip()), assistant(answer)]
    suffix = PurePosixPath(urlparse(take(book, "imageURL", str)).path).suffix
    return {"messages": messages, "images": [f"OCR_VQA/images/{key}{suffix}"]}
