"""The format of a conversation.

A sample is `{"messages": [...]}`, or `{"messages": [...], "images": [...]}`. A message is `{"role", "content"}`. Roles are
user and assistant, after at most one system message; and tool, for the result of a call. The content is a text, or a list of
parts in reading order: `{"type": "text", "text": ...}` and `{"type": "image", "path" | "url" | "base64" | "image": ...}`. A
part `{"type": "image"}` without a source takes the next of `images`, whose elements are paths, URLs, bytes or PIL images. An
assistant's message with a `weight` of 0 is part of the context but not trained on. `references` are accepted answers, for
evaluation. Where the chat template takes them, a sample has `tools` (JSON schemas), and an assistant's message `tool_calls`
and `reasoning_content`.
"""

import os
from collections.abc import Set as AbstractSet
from typing import Any

from ..utils.deprecation import renamed_argument
from ..utils.text import check_complete_characters, shortened
from ..utils.urls import is_url
from .sample_errors import Location

ROLES = ("system", "user", "assistant", "tool")
SOURCES = ("image", "path", "url", "base64")  # the keys of an image part that transformers reads
MESSAGE_KEYS = frozenset(("role", "content", "weight", "references", "id", "tool_calls", "reasoning_content"))
RESULT_KEYS = frozenset(("role", "content", "id", "name", "tool_call_id"))  # of a tool's message
PART_KEYS = frozenset(("type", "text", *SOURCES))
SAMPLE_KEYS = frozenset(("messages", "images", "id", "tools"))
# Keys that change the meaning of a sample, and are refused. Other unknown keys (its origin, a score) are ignored.
MEANINGFUL = frozenset(
    ("image", "image_url", "image_urls", "image_path", "image_paths", "picture", "pictures", "video", "videos", "audio")
    + ("audios", "functions", "documents", "system", "system_prompt", "prompt", "completion", "chosen", "rejected")
    + ("conversations", "texts", "question", "answer", "answers", "weight", "chat_template_kwargs")
    + ("choices", "options", "context", "hint")
)


class Sample(dict):
    """A checked sample with its location.

    Attributes:
        location (`str` or `Callable`, *optional*): Its file and line, or a function that returns them.
    """

    location: Location = None


def location_of(sample: Any) -> Location:
    """The location of a sample; None if it is unknown."""
    return getattr(sample, "location", None)


@renamed_argument("to_learn", "for_training")
def check_conversation(sample: Any, for_training: bool = True, allow_urls: bool = True) -> tuple[int, bool]:
    """Check one sample, without decoding images.

    Args:
        sample: The sample.
        for_training (`bool`, *optional*, defaults to `True`): Whether the last message must be an answer, and the files of
            the images must exist.
        allow_urls (`bool`, *optional*, defaults to `True`): Whether images may be http(s) URLs.

    Returns:
        `tuple[int, bool]`: The number of images, and whether the sample cannot continue another one: it begins with a
        system message, or has tools.

    Raises:
        ValueError: If the sample does not have the format of this module.
    """
    if not isinstance(sample, dict) or not isinstance(sample.get("messages"), list) or not sample["messages"]:
        what = sorted(map(str, sample)) if isinstance(sample, dict) else type(sample).__name__
        raise ValueError(f"expected an object with a list of messages, got {shortened(what)}.")
    _refuse_keys(sample, MEANINGFUL & set(sample), "the sample", SAMPLE_KEYS)
    messages = sample["messages"]
    sources: list[Any] = []
    unnamed = images_of_parts = 0
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES or (role == "system" and number > 0):
            raise ValueError(
                f"message {number} has the role {shortened(repr(role))}; expected user or assistant, after at most one "
                "system message, or tool."
            )
        known = RESULT_KEYS if role == "tool" else MESSAGE_KEYS
        _refuse_keys(message, set(message) - known, f"message {number} ({role})", known)
        _check_weight(message, number)
        _check_calls(messages, number)
        own, own_unnamed = _check_content(message, number, sources)
        images_of_parts, unnamed = images_of_parts + own, unnamed + own_unnamed
    if messages[0]["role"] == "assistant" or (messages[0]["role"] == "system" and messages[1:2] == []):
        raise ValueError("a conversation begins with a user's message (after at most one system message).")
    if for_training and messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is the {messages[-1]['role']}'s; expected an assistant's answer to train on.")
    if for_training and not any(is_trained(message) for message in messages):
        raise ValueError("every assistant's message has the weight 0; expected one to train on.")
    images = [] if sample.get("images") is None else sample["images"]
    if not isinstance(images, list):
        raise ValueError(f"images is of type {type(images).__name__}; expected a list.")
    if unnamed != len(images):
        raise ValueError(
            f"the messages hold {unnamed} image parts without a source, but there are {len(images)} images; expected one "
            "for each, in reading order."
        )
    for source in [*sources, *images]:
        _check_source(source, for_training, allow_urls)
    tools = sample.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools is {shortened(repr(tools), 60)}; expected a list of JSON schemas.")
    return images_of_parts, messages[0]["role"] == "system" or bool(tools)


def is_trained(message: dict[str, Any]) -> bool:
    """Whether a message is an answer that is trained on."""
    return message["role"] == "assistant" and message.get("weight") != 0


def is_given(value: Any) -> bool:
    """Whether a value is neither None nor empty."""
    return value is not None and not (isinstance(value, (str, list, tuple, dict)) and not value)


def _refuse_keys(where: dict[str, Any], keys: AbstractSet[Any], name: str, known: frozenset[str]) -> None:
    given = sorted(str(key) for key in keys if is_given(where[key]))
    if given:
        raise ValueError(
            f"{name} has the key {shortened(', '.join(given))}, which would be lost; known are {', '.join(sorted(known))}. "
            "Remove it, or convert it."
        )


def _check_weight(message: dict[str, Any], number: int) -> None:
    weight = message.get("weight")
    if weight is not None and (message["role"] != "assistant" or weight not in (0, 1)):
        raise ValueError(
            f"message {number} ({message['role']}) has the weight {shortened(repr(weight))}; expected 0 (not trained on) or "
            "1, of an assistant's message."
        )


def _check_calls(messages: list[dict[str, Any]], number: int) -> None:
    """Check a message's calls of tools, and that a tool's result follows a call."""
    message = messages[number]
    calls = message.get("tool_calls")
    for key in ("tool_calls", "reasoning_content"):
        if is_given(message.get(key)) and message["role"] != "assistant":
            raise ValueError(
                f"message {number} ({message['role']}) has {key}; expected them in an assistant's message only."
            )
    if is_given(calls) and not (isinstance(calls, list) and all(_is_call(call) for call in calls)):
        raise ValueError(
            f"message {number} has the tool_calls {shortened(repr(calls), 100)}; expected a list of objects such as "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}.'
        )
    if is_given(message.get("reasoning_content")) and not isinstance(message["reasoning_content"], str):
        raise ValueError(
            f"message {number} has a reasoning_content of type {type(message['reasoning_content']).__name__}; "
            "expected a text."
        )
    if message["role"] == "tool" and not (
        number > 0 and (messages[number - 1]["role"] == "tool" or is_given(messages[number - 1].get("tool_calls")))
    ):
        raise ValueError(
            f"message {number} (tool) follows no call; expected an assistant's message with tool_calls before it."
        )


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _check_content(message: dict, number: int, sources: list[Any]) -> tuple[int, int]:
    """Check a message's content; returns the number of image parts, and the number of those without a source."""
    content = message.get("content")
    if content is None and is_given(message.get("tool_calls")):
        return 0, 0
    if isinstance(content, str):
        check_complete_characters(content, f"message {number}")
        return 0, 0
    if not isinstance(content, list):
        raise ValueError(f"message {number} has a content of type {type(content).__name__}; expected a text or parts.")
    images = unnamed = 0
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        is_text = kind == "text" and isinstance(part.get("text"), str)
        if not is_text and (kind != "image" or message["role"] != "user"):
            raise ValueError(
                f"message {number} ({message['role']}) has a part {shortened(repr(part), 100)}; expected a text, or in a "
                "user's message an image."
            )
        known = PART_KEYS - (set(SOURCES) if is_text else {"text"})
        _refuse_keys(part, set(part) - known, f"a part of type {kind} of message {number}", known)
        if is_text:
            check_complete_characters(part["text"], f"message {number}")
            continue
        images += 1
        named = [key for key in SOURCES if part.get(key) is not None]
        if len(named) > 1:
            raise ValueError(f"an image of message {number} has {' and '.join(named)}; expected one of them.")
        if not named:
            unnamed += 1
        elif named[0] != "base64":
            sources.append(part[named[0]])
    return images, unnamed


def _check_source(source: Any, files: bool, allow_urls: bool) -> None:
    if is_url(source) and not allow_urls and not source.startswith("file://"):
        raise ValueError(f"the image {shortened(source)} is a URL; pass --allow-urls to fetch such images.")
    if not files:
        return
    if isinstance(source, dict):  # as `datasets` stores it
        source = source["bytes"] if source.get("bytes") else source.get("path")
    if isinstance(source, str):
        if not is_url(source) and not source.startswith("data:") and not os.path.isfile(source):
            raise ValueError(f"the image {shortened(source)} does not exist.")
    elif source is None or isinstance(source, (bool, int, float, list, dict)):
        raise ValueError(
            f"an image is {shortened(source, 60)} of type {type(source).__name__}; expected a path, a URL or the bytes of a "
            "file."
        )


def complete_messages(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Move the `images` and `tools` of a sample into its messages.

    Each image part without a source gets the next image. The first message gets the tools, under the key `tools`, which
    prepared chat templates (`dsvl.prepare_chat_template`) read.

    Args:
        sample (`dict` or `list`): A sample that `check_conversation` accepts, or its list of messages.

    Returns:
        `list[dict]`: Messages for a chat template or `DSVLProcessor.apply_chat_template`.
    """
    if isinstance(sample, list):
        sample = {"messages": sample}
    images = iter(sample.get("images") or [])
    messages = []
    for message in sample["messages"]:
        content = message.get("content") or ""  # None in an answer that is a call
        if not isinstance(content, str):
            content = [_with_source(part, images) for part in content]
        messages.append(message | {"content": content})
    if is_given(sample.get("tools")):
        messages[0]["tools"] = sample["tools"]
    return messages


def _with_source(part: dict[str, Any], images: Any) -> dict[str, Any]:
    if part["type"] != "image":
        return {"type": "text", "text": part["text"]}
    for key in SOURCES:
        if part.get(key) is not None:
            return {"type": "image", key: _stored(part[key])}
    return {"type": "image", "image": _stored(next(images))}


def _stored(image: Any) -> Any:
    """The bytes or the path of an image that `datasets` stored."""
    if isinstance(image, dict):
        return image["bytes"] if image.get("bytes") else image["path"]
    return image


def image_source(part: dict[str, Any]) -> Any:
    """The source in an image part of messages from `complete_messages`."""
    (source,) = (value for key, value in part.items() if key != "type")
    return source


def images_of(messages: list[dict[str, Any]]) -> list[Any]:
    """The sources of all images of messages from `complete_messages`, in reading order."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [image_source(part) for part in parts if part["type"] == "image"]
