"""SparklesDialogue: dialogues in which images are words of a sentence."""

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from ..bad_samples import shortened
from .mimicit import MAX_IMAGES
from .public import check_turns
from .registry import LeftOut, Record, Sample, assistant, converter, read_records, take, user

PARTS = ("SparklesDialogueCC", "SparklesDialogueVG")
FILES = tuple(f"{part}/annotations/{part}.json" for part in PARTS)
# The whole number: IMAGE#14 is no part of IMAGE#1417.
NAME = re.compile(r"IMAGE#(\d+)(\s*<Img><ImageHere></Img>)?")


def read(root: Path, images: Path) -> Iterator[Record]:
    for part, file in zip(PARTS, FILES, strict=True):
        for number, record in enumerate(read_records(root / file)):
            yield Record(f"{part}: {number}", (f"{part}/images", record))


@converter("sparkles_dialogue", "SparklesDialogue, both parts: several images in the words of a question", FILES, read)
def sparkles_dialogue(record: Any, random: Random) -> Sample:
    folder, dialogue = record
    numbers: dict[str, int] = {}  # an image's id -> its number in the conversation
    messages = []
    turns = take(dialogue, "dialogue", list)
    check_turns([take(turn, "role", str, "a message") for turn in turns])
    for turn in turns:
        text = take(turn, "content", str, "a message")
        if turn["role"] == "assistant":
            messages.append(assistant(NAME.sub(lambda name: _called(name[1], numbers), text)))
            continue
        own = [str(take(image, "image_id", (str, int), "an image")) for image in turn.get("images") or []]
        placed = [name[1] for name in NAME.finditer(text) if name[2]]
        if sorted(own) != sorted(set(placed)):
            raise ValueError(f"a message has the images {shortened(own)}, but its text places {shortened(placed)}.")
        new = [image for image in dict.fromkeys(placed) if image not in numbers]
        for image in new:
            numbers[image] = len(numbers) + 1
        messages.append(user(*_parts(text.strip(), numbers, set(new))))
    if not numbers:
        raise LeftOut("no image")
    if len(numbers) > MAX_IMAGES:
        raise LeftOut(f"more than {MAX_IMAGES} images")
    return {"messages": messages, "images": [f"{folder}/{image}.jpg" for image in numbers]}


def _parts(text: str, numbers: dict[str, int], new: set[str]) -> list[str | None]:
    """A question with its images where they are among the words.

    The chat template leaves an image's name between words; at the ends of the text, where it would not, it is written out.
    """
    parts: list[str | None] = []
    words, end = "", 0
    for name in NAME.finditer(text):
        words += text[end : name.start()]
        end = name.end()
        if not name[2] or name[1] not in new:
            words += _called(name[1], numbers)
            continue
        new.remove(name[1])
        first, last = not words and not parts, end == len(text)
        if last:
            words += _called(name[1], numbers)
        parts += [words, None] if words else [None]
        words = _called(name[1], numbers) if first and not last else ""
    return [part for part in [*parts, words + text[end:]] if part != ""]


def _called(image: str, numbers: dict[str, int]) -> str:
    if image not in numbers:
        raise LeftOut("an image that is named but not shown")
    return f"Image {numbers[image]}"
