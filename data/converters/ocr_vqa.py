"""OCR-VQA: questions about the covers of books."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any
from urllib.parse import urlparse

from .registry import LeftOut, Record, Sample, assistant, converter, read_json, take, take_texts, user

DATASET = "OCR_VQA/dataset.json"
TRAIN = 1  # of 1 to 3; the others are what is measured on


def read(root: Path, images: Path) -> Iterator[Record]:
    books = read_json(root / DATASET)
    if not isinstance(books, dict):
        raise ValueError(f"{root / DATASET} holds {type(books).__name__}; expected an object with a record for each book.")
    for key, book in books.items():
        yield Record(key, (key, book))


@converter("ocr_vqa", "OCR-VQA: questions about covers of books (split 1), a round each", (DATASET,), read)
def ocr_vqa(record: Any, random: Random) -> Sample:
    key, book = record
    if take(book, "split", int) != TRAIN:
        raise LeftOut(f"split {book['split']}")
    questions, answers = take_texts(book, "questions"), take_texts(book, "answers")
    if len(questions) != len(answers):
        raise ValueError(f"there are {len(questions)} questions and {len(answers)} answers; expected as many.")
    if not questions:
        raise LeftOut("no question")
    messages = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        messages += [user(*[None] * (number == 0), question.strip()), assistant(answer)]
    suffix = PurePosixPath(urlparse(take(book, "imageURL", str)).path).suffix
    return {"messages": messages, "images": [f"OCR_VQA/images/{key}{suffix}"]}
