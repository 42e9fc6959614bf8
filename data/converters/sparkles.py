"""SparklesDialogue: dialogues with images inside sentences."""

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from ...utils.text import shortened
from .mimicit import MAX_IMAGES
from .public_formats import check_roles
from .registry import RawRecord, Sample, SkipRecord, assistant, converter, read_records, take, user

PARTS = ("SparklesDialogueCC", "SparklesDialogueVG")
FILES = tuple(f"{part}/annotations/{part}.json" for part in PARTS)
# All digits: IMAGE#14 must not match the beginning of IMAGE#1417.
NAME = re.compile(r"IMAGE#(\d+)(\s*<Img><ImageHere></Img>)?")


def read(root: Path, images: Path) -> Iterator[RawRecord]:
    for part, file in zip(PARTS, FILES, strict=True):
        for number, record in enumerate(read_records(root / file)):
            yield RawRecord(f"{part}: {number}", (f"{part}/images", record))


@converter("sparkles_dialogue", "SparklesDialogue, both parts: several images inside a question's sentences", FILES, read)
def sparkles_dialogue(record: Any, random: Random) -> Sample:
    folder, dialogue = record
    numbers: dict[str, int] = {}  # image id -> its number in the conversation
    messages = []
    entries = take(dialogue, "dialogue", list)
    check_roles([take(entry, "role", str, "a message") for entry in entries])
    for entry in entries:
        text = take(entry, "content", str, "a message")
        if entry["role"] == "assistant":
            messages.append(assistant(NAME.sub(lambda name: _called(name[1], numbers), text)))
            continue
        own = [str(take(image, "image_id", (str, int), "an image")) for image in entry.get("images") or []]
        placed = [name[1] for name in NAME.finditer(text) if name[2]]
        if sorted(own) != sorted(set(placed)):
            raise ValueError(f"a message has the images {shortened(own)}, but its text places {shortened(placed)}.")
        new = [image for image in dict.fromkeys(placed) if image not in numbers]
        for image in new:
            numbers[image] = len(numbers) + 1
        messages.append(user(*_parts(text.strip(), numbers, set(new))))
    if not numbers:
        raise SkipRecord("no image")
    if len(numbers) > MAX_IMAGES:
        raise SkipRecord(f"more than {MAX_IMAGES} images")
    return {"messages": messages, "images": [f"{folder}/{image}.jpg" for image in numbers]}


def _parts(text: str, numbers: dict[str, int], new: set[str]) -> list[str | None]:
    """Split a question into its texts and images.

    The chat template writes the names of images between words, but not at the ends of a text; there they are written out.
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
        raise SkipRecord("an image that is named but not shown")
    return f"Image {numbers[image]}"
