"""A conversation as a directory: one line of JSON, and its images as PNG files."""

import json
import os
from pathlib import Path
from typing import Any

from ..data.messages import ROLES
from ..utils.atomic_files import partial_path, write_atomically
from ..utils.image_loading import open_image

FILE = "conversation.jsonl"


def save_messages(messages: list[dict[str, Any]], folder: Path) -> None:
    """Write messages whose images are PIL images.

    Raises:
        ValueError: if the folder holds anything but such a conversation, which is replaced.
    """
    if folder.exists():
        strange = [entry for entry in folder.iterdir() if not _is_ours(entry)] if folder.is_dir() else [folder]
        if strange:
            raise ValueError(f"{strange[0]} is no part of a saved conversation; save into a new directory.")
    folder.mkdir(parents=True, exist_ok=True)
    # Whatever is interrupted, the line of JSON names images that are there: they have names of their own until it stands.
    number, generation, stored = 0, os.urandom(4).hex(), []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = []
            for part in message["content"]:
                if part["type"] == "image":
                    number += 1
                    name = f"image-{number}-{generation}.png"
                    part["image"].save(folder / name)
                    content.append({"type": "image", "path": name})
                else:
                    content.append({"type": "text", "text": part["text"]})
        stored.append({"role": message["role"], "content": content})
    write_atomically(folder / FILE, json.dumps({"messages": stored}, ensure_ascii=False) + "\n")
    for image in folder.glob("image-*.png"):
        if not image.stem.endswith(generation):
            image.unlink()


def _is_ours(entry: Path) -> bool:
    files = (FILE, partial_path(Path(FILE)).name)
    return entry.name in files or (entry.name.startswith("image-") and entry.suffix == ".png")


def load_messages(folder: Path) -> list[dict[str, Any]]:
    """Read a conversation; only images of the directory itself are opened, whatever its JSON says.

    Raises:
        ValueError: if it is none.
    """
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {FILE}; pass a directory that was written by save().")
    try:
        messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
        return [_message(message, number, folder) for number, message in enumerate(messages)]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no saved conversation: {type(error).__name__}: {error}.") from error


def _message(message: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    role, content = message["role"], message["content"]
    if role not in ROLES or (role == "system" and number > 0):
        raise ValueError(f"Message {number} has the role {role!r}; expected user or assistant, after at most one system.")
    if isinstance(content, str):
        return {"role": role, "content": content}
    return {"role": role, "content": [_part(part, folder) for part in content]}


def _part(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    if part["type"] == "text" and isinstance(part["text"], str):
        return {"type": "text", "text": part["text"]}
    path = folder / part["path"] if part["type"] == "image" else folder
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"The part {str(part)[:200]} is neither a text nor an image in {folder}.")
    return {"type": "image", "image": open_image(path)}
