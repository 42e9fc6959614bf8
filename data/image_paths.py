"""Resolves the images and videos that a record names: paths, `file://` and data URLs, and what `datasets` stores."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..utils.text import shortened
from ..utils.urls import decode_data_url, is_data_url, is_url
from .messages import is_given


def resolve_images(sample: dict[str, Any], root: Path | None) -> dict[str, Any]:
    """Resolve all images and videos of a sample; see `resolve_image`.

    Raises:
        ValueError: For a broken data URL, or a stored image without bytes and path.
    """
    for key in ("images", "videos"):
        if isinstance(sample.get(key), list):
            sample = sample | {key: [resolve_image(source, root) for source in sample[key]]}
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
            `{"bytes": ..., "path": ...}`; or a list of these, the frames of a video.
        root (`Path`, *optional*): The folder to which relative paths refer. Without it they are returned unchanged.

    Raises:
        ValueError: For a broken data URL, or a stored image without bytes and path.
    """
    if isinstance(image, list):
        return [resolve_image(one, root) for one in image]
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
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("image", "video"):
        return part
    found = {key: resolve_image(part[key], root) for key in (kind, "path", "url") if is_given(part.get(key))}
    for key, source in found.items():
        part = {name: value for name, value in part.items() if name != key}
        part[kind if not isinstance(source, str) else key] = source
    return part
