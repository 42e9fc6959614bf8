"""Common public formats: LLaVA's `conversations`, ShareGPT with `images`, The Cauldron's and FineVision's `texts`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from ...utils.text import shortened
from ..dataset_files import open_records
from ..sample_errors import BadSample, one_sample
from .registry import RawRecord, Sample, SkipRecord, assistant, converter, take, user

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_file(root: Path, images: Path) -> Iterator[RawRecord]:
    """Read the records of `root`: a file for `open_records`, or a folder written by `datasets`."""
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist; --root must be such a file, or a folder written by datasets.")
    records = open_records(root)
    for index in range(len(records)):
        raw = records.read(index)
        try:
            with one_sample(partial(records.location, index)):
                record = records.parse(raw)
        except BadSample as error:
            yield RawRecord(str(index), None, broken=error.reason)
            continue
        name = record.get("id", index) if isinstance(record, dict) else index
        yield RawRecord(shortened(str(name)), record)


def to_sample(messages: list[tuple[str, str]], images: list[Any]) -> Sample:
    """Convert messages whose texts contain a placeholder for each image to a sample.

    White space around a placeholder at the beginning or end of a text is removed. Images without placeholders are inserted
    before the first question.

    Args:
        messages (`list[tuple[str, str]]`): (role, text); the roles are user and assistant, after at most one system message.
        images (`list`): The images, in the order of the placeholders.

    Raises:
        SkipRecord: If an answer contains a placeholder.
        ValueError: If the number of placeholders is wrong, or the roles do not alternate.
    """
    named = sum(text.count(PLACEHOLDER) for role, text in messages if role == "user")
    if any(PLACEHOLDER in text for role, text in messages if role != "user"):
        raise SkipRecord("an image in an answer")
    if named == 0 and images:
        first = next((number for number, (role, _) in enumerate(messages) if role == "user"), None)
        if first is None:
            raise ValueError("no message is the user's; expected one before the first answer.")
        question = ("user", PLACEHOLDER * len(images) + messages[first][1])
        messages = [*messages[:first], question, *messages[first + 1 :]]
    elif named != len(images):
        raise ValueError(f"the texts name {named} images ({PLACEHOLDER}), but there are {len(images)}.")
    converted: list[dict[str, Any]] = []
    for role, text in messages:
        if role == "user":
            converted.append(user(*split_at_placeholders(text)))
        elif role == "assistant":
            converted.append(assistant(text))
        else:
            converted.append({"role": role, "content": [{"type": "text", "text": text}]})
    check_roles([message["role"] for message in converted if message["role"] != "system"])
    return {"messages": converted, "images": images}


def check_roles(roles: list[str]) -> None:
    """Check that user and assistant alternate.

    Raises:
        ValueError: If they do not.
    """
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"the roles are {', '.join(roles) or 'none'}; expected user and assistant alternately.")


def split_at_placeholders(text: str) -> list[str | None]:
    """Split a text into the parts of a message: None for each placeholder."""
    parts: list[str | None] = []
    pieces = text.split(PLACEHOLDER)
    for number, piece in enumerate(pieces):
        if number > 0:
            parts.append(None)
        # White space between words and an image belongs to the sentence; at the ends of the text it is layout.
        before = all(part is None for part in parts)
        piece = piece.lstrip() if before else piece
        piece = piece.rstrip() if not "".join(pieces[number + 1 :]).strip() else piece
        if piece:
            parts.append(piece)
    return parts


@converter(
    "llava_conversations",
    "LLaVA-style conversations (from human/gpt, <image>); --root is the file, image paths are relative to it",
    ("FILE.json | FILE.jsonl",),
    read_file,
)
def llava_conversations(record: Any, random: Random) -> Sample:
    messages = [
        (_role(take(message, "from", str, "a message")), take(message, "value", str, "a message"))
        for message in take(record, "conversations", list)
    ]
    image = record.get("image")
    images = [] if image is None else image if isinstance(image, list) else [image]
    return to_sample(messages, images)


@converter(
    "sharegpt",
    "ShareGPT (conversations or messages) with a list of images; --root is the file, image paths are relative to it",
    ("FILE.json | FILE.jsonl",),
    read_file,
)
def sharegpt(record: Any, random: Random) -> Sample:
    messages = []
    if isinstance(record, dict) and record.get("system"):
        messages.append(("system", take(record, "system", str)))
    key = "conversations" if isinstance(record, dict) and "conversations" in record else "messages"
    for message in take(record, key, list):
        role, text = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
        messages.append((_role(take(message, role, str, "a message")), take(message, text, str, "a message")))
    return to_sample(messages, list(record.get("images") or []))


@converter(
    "cauldron",
    "The Cauldron and FineVision: images, texts (user, assistant); --root is a Parquet file, or a folder of datasets",
    ("FILE.parquet | FOLDER",),
    read_file,
)
def cauldron(record: Any, random: Random) -> Sample:
    images = [image for image in record.get("images") or [] if image is not None]
    messages = []
    for text in take(record, "texts", list):
        # "<image>" in a question is not a placeholder in this format.
        messages += [user(take(text, "user", str, "a text")), assistant(take(text, "assistant", str, "a text"))]
    if not messages:
        raise SkipRecord("no question")
    messages[0]["content"] = [{"type": "image"} for _ in images] + messages[0]["content"]
    return {"messages": messages, "images": images}


def _role(name: str) -> str:
    if name not in ROLES:
        raise ValueError(f"a message is from {shortened(repr(name))}; expected one of {', '.join(ROLES)}.")
    return ROLES[name]
