"""Resolves the images that a record names: relative paths, `file://` URLs, data URLs, and images stored by `datasets`."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..utils.text import shortened
from ..utils.urls import decode_data_url, is_data_url, is_url
from .messages import is_given


def resolve_images(sample: dict[str, Any], root: Path | None) -> dict[str, Any]:
    """Resolve all images of a sample; see `resolve_image`.

    Raises:
        ValueError: For a broken data URL, or a stored image without bytes and path.
    """
    if isinstance(sample.get("images"), list):
        sample = sample | {"images": [resolve_image(image, root) for image in sample["images"]]}
    if not isinstance(sample.get("messages"), list):
        return sample
    messages = []
    for message in sample["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            message = message | {"content": [_resolve_part(part, root) for part in content]}
        messages.append(message)
    return sample | {"messages": messages}


def resolve_image(image: Any, root: Path | None = None) -> Any:
    """Turn the source of an image into a path, an http(s) URL or bytes; other objects are returned unchanged.

    Args:
        image: A path, `file://` URL, http(s) URL, data URL, bytes, PIL image, or an image as `datasets` stores it:
            `{"bytes": ..., "path": ...}`.
        root (`Path`, *optional*): The folder to which relative paths refer. Without it they are returned unchanged.

    Raises:
        ValueError: For a broken data URL, or a stored image without bytes and path.
    """
    if isinstance(image, dict):
        extra = set(image) - {"bytes", "path"}
        source = image["bytes"] if is_given(image.get("bytes")) else image.get("path")
        if extra or not is_given(source) or (source is image.get("bytes") and not isinstance(source, bytes)):
            raise ValueError(f"an image is {shortened(image, 60)}; expected its bytes or its path.")
        image = source
    if not isinstance(image, str):
        return image
    if is_data_url(image):
        return decode_data_url(image)
    if image.startswith("file://"):
        image = unquote(urlsplit(image).path)
    elif is_url(image):
        return image
    return image if root is None else str(root / image)


def _resolve_part(part: Any, root: Path | None) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image":
        return part
    found = {key: resolve_image(part[key], root) for key in ("image", "path", "url") if is_given(part.get(key))}
    for key, source in found.items():
        part = {name: value for name, value in part.items() if name != key}
        part["image" if not isinstance(source, str) else key] = source
    return part
