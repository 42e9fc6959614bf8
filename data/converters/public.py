"""The common public forms: LLaVA's `conversations`, ShareGPT with `images`, The Cauldron's and FineVision's `texts`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from ..bad_samples import BadSample, one_sample, shortened
from ..files import open_records
from .registry import LeftOut, Record, Sample, assistant, converter, take, user

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_file(root: Path, images: Path) -> Iterator[Record]:
    """The records of a file that `open_records` opens, or of a folder of `datasets`; `root` is that file."""
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist; --root must be the file of this form, or a folder of datasets.")
    records = open_records(root)
    for index in range(len(records)):
        raw = records.read(index)
        try:
            with one_sample(partial(records.location, index)):
                record = records.parse(raw)
        except BadSample as error:
            yield Record(str(index), None, broken=error.reason)
            continue
        name = record.get("id", index) if isinstance(record, dict) else index
        yield Record(shortened(str(name)), record)


def rounds(turns: list[tuple[str, str]], images: list[Any]) -> Sample:
    """Turns whose texts hold a placeholder for each image, as a sample.

    White space around a placeholder at the beginning or end of a text is layout. A sample whose texts name no image but
    that has some gets them before its first question.

    Args:
        turns: (role, text), roles user and assistant after at most one system message.
    """
    named = sum(text.count(PLACEHOLDER) for role, text in turns if role == "user")
    if any(PLACEHOLDER in text for role, text in turns if role != "user"):
        raise LeftOut("an image in an answer")
    if named == 0 and images:
        first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
        if first is None:
            raise ValueError("no question is the user's; expected one before the first answer.")
        turns = [*turns[:first], ("user", PLACEHOLDER * len(images) + turns[first][1]), *turns[first + 1 :]]
    elif named != len(images):
        raise ValueError(f"the texts name {named} images ({PLACEHOLDER}), but there are {len(images)}.")
    messages: list[dict[str, Any]] = []
    for role, text in turns:
        if role == "user":
            messages.append(user(*split(text)))
        elif role == "assistant":
            messages.append(assistant(text))
        else:
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    check_turns([message["role"] for message in messages if message["role"] != "system"])
    return {"messages": messages, "images": images}


def check_turns(roles: list[str]) -> None:
    """Hold roles against questions and answers by turns.

    Raises:
        ValueError: with the roles there are.
    """
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"the roles are {', '.join(roles) or 'none'}; expected user and assistant by turns.")


def split(text: str) -> list[str | None]:
    """A text with placeholders as the parts of a message: None for an image."""
    parts: list[str | None] = []
    pieces = text.split(PLACEHOLDER)
    for number, piece in enumerate(pieces):
        if number > 0:
            parts.append(None)
        # Between words an image is a word of the sentence; at the ends of the text only layout separates it.
        before = all(part is None for part in parts)
        piece = piece.lstrip() if before else piece
        piece = piece.rstrip() if not "".join(pieces[number + 1 :]).strip() else piece
        if piece:
            parts.append(piece)
    return parts


@converter(
    "llava_conversations",
    "LLaVA-style conversations (from human/gpt, <image>); --root is the file, images lie beside it",
    ("FILE.json | FILE.jsonl",),
    read_file,
)
def llava_conversations(record: Any, random: Random) -> Sample:
    turns = [
        (_role(take(turn, "from", str, "a turn")), take(turn, "value", str, "a turn"))
        for turn in take(record, "conversations", list)
    ]
    image = record.get("image")
    images = [] if image is None else image if isinstance(image, list) else [image]
    return rounds(turns, images)


@converter(
    "sharegpt",
    "ShareGPT (conversations or messages) with a list of images; --root is the file, images lie beside it",
    ("FILE.json | FILE.jsonl",),
    read_file,
)
def sharegpt(record: Any, random: Random) -> Sample:
    turns = []
    if isinstance(record, dict) and record.get("system"):
        turns.append(("system", take(record, "system", str)))
    key = "conversations" if isinstance(record, dict) and "conversations" in record else "messages"
    for turn in take(record, key, list):
        role, text = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
        turns.append((_role(take(turn, role, str, "a turn")), take(turn, text, str, "a turn")))
    return rounds(turns, list(record.get("images") or []))


@converter(
    "cauldron",
    "The Cauldron and FineVision: images, texts (user, assistant); --root is a Parquet file, or a folder of datasets",
    ("FILE.parquet | FOLDER",),
    read_file,
)
def cauldron(record: Any, random: Random) -> Sample:
    images = [image for image in record.get("images") or [] if image is not None]
    turns = []
    for text in take(record, "texts", list):
        # A question's text is its own: "<image>" in it is no image.
        turns += [user(take(text, "user", str, "a text")), assistant(take(text, "assistant", str, "a text"))]
    if not turns:
        raise LeftOut("no question")
    turns[0]["content"] = [{"type": "image"} for _ in images] + turns[0]["content"]
    return {"messages": turns, "images": images}


def _role(name: str) -> str:
    if name not in ROLES:
        raise ValueError(f"a turn is from {shortened(repr(name))}; expected one of {', '.join(ROLES)}.")
    return ROLES[name]
