"""Common public formats: LLaVA's `conversations`, ShareGPT with `images`, The Cauldron's and FineVision's `texts`."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from ...utils.text import shortened
from ..dataset_files import open_records
from ..sample_errors import BadSample, one_sample
from .registry import VIDEO_PLACEHOLDER, RawRecord, Sample, SkipRecord, assistant, converter, take, user

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


def to_sample(messages: list[tuple[str, str]], images: list[Any], videos: Sequence[Any] = ()) -> Sample:
    """Convert messages whose texts contain a placeholder for each image and video to a sample.

    White space around a placeholder at the beginning or end of a text is removed. Images or videos without placeholders are
    inserted before the first question. If there are videos and no images, `<image>` may stand for them, as in LLaVA-Video.

    Args:
        messages (`list[tuple[str, str]]`): (role, text); the roles are user and assistant, after at most one system message.
        images (`list`): The images, in the order of the placeholders.
        videos (`Sequence`, *optional*): The videos, in the order of the placeholders.

    Raises:
        SkipRecord: If an answer contains a placeholder.
        ValueError: If the number of placeholders is wrong, or the roles do not alternate.
    """
    held = {PLACEHOLDER: ("image", images)} | ({VIDEO_PLACEHOLDER: ("video", videos)} if videos else {})
    asked = "".join(text for role, text in messages if role == "user")
    if videos and not images and VIDEO_PLACEHOLDER not in asked:
        messages = [(r, t.replace(PLACEHOLDER, VIDEO_PLACEHOLDER) if r == "user" else t) for r, t in messages]
    for placeholder, (kind, sources) in reversed(held.items()):
        named = sum(text.count(placeholder) for role, text in messages if role == "user")
        if any(placeholder in text for role, text in messages if role != "user"):
            raise SkipRecord(f"{'an image' if kind == 'image' else 'a video'} in an answer")
        if named == 0 and sources:
            first = next((number for number, (role, _) in enumerate(messages) if role == "user"), None)
            if first is None:
                raise ValueError("no message is the user's; expected one before the first answer.")
            question = ("user", placeholder * len(sources) + messages[first][1])
            messages = [*messages[:first], question, *messages[first + 1 :]]
        elif named != len(sources):
            raise ValueError(f"the texts name {named} {kind}s ({placeholder}), but there are {len(sources)}.")
    converted: list[dict[str, Any]] = []
    for role, text in messages:
        if role == "user":
            converted.append(user(*split_at_placeholders(text, tuple(held))))
        elif role == "assistant":
            converted.append(assistant(text))
        else:
            converted.append({"role": role, "content": [{"type": "text", "text": text}]})
    check_roles([message["role"] for message in converted if message["role"] != "system"])
    return {"messages": converted, "images": images} | ({"videos": list(videos)} if videos else {})


def check_roles(roles: list[str]) -> None:
    """Check that user and assistant alternate.

    Raises:
        ValueError: If they do not.
    """
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"the roles are {', '.join(roles) or 'none'}; expected user and assistant alternately.")


def split_at_placeholders(text: str, placeholders: Sequence[str] = (PLACEHOLDER,)) -> list[str | None]:
    """Split a text into the parts of a message: None for each `<image>`, and `<video>` for each, if it is a placeholder."""
    parts: list[str | None] = []
    pieces = re.split(f"({'|'.join(map(re.escape, placeholders))})", text)
    for number, piece in enumerate(pieces):
        if number % 2:
            parts.append(None if piece == PLACEHOLDER else piece)
            continue
        # White space between words and an image belongs to the sentence; at the ends of the text it is layout.
        before = all(part is None or part in placeholders for part in parts)
        piece = piece.lstrip() if before else piece
        piece = piece.rstrip() if not "".join(pieces[number + 2 :: 2]).strip() else piece
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
    images, videos = (_listed(record.get(key)) for key in ("image", "video"))
    return to_sample(messages, images, videos)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


@converter(
    "sharegpt",
    "ShareGPT (conversations or messages) with images and videos; --root is the file, paths are relative to it",
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
    return to_sample(messages, list(record.get("images") or []), list(record.get("videos") or []))


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
