"""Conversations on disk: a directory with one line of JSON, and the images as PNG files."""

import json
import os
from pathlib import Path
from typing import Any

from ..data.messages import ROLES, frame_keys
from ..utils.atomic_files import partial_path, write_atomically
from ..utils.image_loading import open_image
from ..utils.video_loading import frame_file

FILE = "conversation.jsonl"
IMAGE_PREFIXES = ("image-", "picture-")  # of PNG files; version 0.1 wrote "picture-"


def save_messages(messages: list[dict[str, Any]], folder: Path) -> None:
    """Write messages whose images are PIL images. A conversation that is already there is replaced.

    Raises:
        ValueError: if the folder holds files that do not belong to a saved conversation.
    """
    if folder.exists():
        foreign = [entry for entry in folder.iterdir() if not _belongs(entry)] if folder.is_dir() else [folder]
        if foreign:
            raise ValueError(f"{foreign[0]} is not part of a saved conversation; save into a new directory.")
    folder.mkdir(parents=True, exist_ok=True)
    # Every save uses new image names, so an interrupted save leaves the JSON and the images of the previous one intact.
    number, save_id, stored = 0, os.urandom(4).hex(), []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = []
            for part in message["content"]:
                if part["type"] == "image":
                    number += 1
                    name = f"image-{number}-{save_id}.png"
                    (folder / name).write_bytes(frame_file(part["image"]))
                    content.append({"type": "image", "path": name} | frame_keys(part))
                else:
                    content.append({"type": "text", "text": part["text"]})
        stored.append({"role": message["role"], "content": content})
    write_atomically(folder / FILE, json.dumps({"messages": stored}, ensure_ascii=False) + "\n")
    for file in folder.iterdir():
        if _is_image(file) and not file.stem.endswith(save_id):
            file.unlink()


def _belongs(entry: Path) -> bool:
    return entry.name in (FILE, partial_path(Path(FILE)).name) or _is_image(entry)


def _is_image(entry: Path) -> bool:
    return entry.name.startswith(IMAGE_PREFIXES) and entry.suffix == ".png"


def load_messages(folder: Path) -> list[dict[str, Any]]:
    """Read a saved conversation. Only images inside the directory are opened, whatever the JSON names.

    Raises:
        ValueError: if the directory holds no valid conversation.
    """
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {FILE}; pass a directory that was written by save().")
    try:
        messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
        return [_message(message, index, folder) for index, message in enumerate(messages)]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a saved conversation: {type(error).__name__}: {error}.") from error


def _message(message: dict[str, Any], index: int, folder: Path) -> dict[str, Any]:
    role, content = message["role"], message["content"]
    if role not in ROLES or (role == "system" and index > 0):
        raise ValueError(f"Message {index} has the role {role!r}; expected user or assistant, after at most one system.")
    if isinstance(content, str):
        return {"role": role, "content": content}
    return {"role": role, "content": [_part(part, folder) for part in content]}


def _part(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    if part["type"] == "text" and isinstance(part["text"], str):
        return {"type": "text", "text": part["text"]}
    path = folder / part["path"] if part["type"] == "image" else folder
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"The part {str(part)[:200]} is neither a text nor an image in {folder}.")
    return {"type": "image", "image": open_image(path)} | frame_keys(part)
