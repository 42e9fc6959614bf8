"""The format of a conversation.

A sample is `{"messages": [...]}`, or `{"messages": [...], "images": [...]}`. A message is `{"role", "content"}`. Roles are
user and assistant, after at most one system message; and tool, for the result of a call. The content is a text, or a list of
parts in reading order: `{"type": "text", "text": ...}`, `{"type": "image", "path" | "url" | "base64" | "image": ...}` and
`{"type": "video", "path" | "url" | "base64" | "video": ...}`, which may have its own `fps` and `max_frames`, and a
`frame_rate` if its source is a list of frames. A part `{"type": "image"}` without a source takes the next of `images`, whose
elements are paths, URLs, bytes or PIL images, and a part `{"type": "video"}` the next of `videos`. Frames that are stored as
images have a `time` (a text such as "0.5 s"), and which `frame` of how many `frames` they are. An
assistant's message with a `weight` of 0 is part of the context but not trained on. `references` are accepted answers, for
evaluation. Where the chat template takes them, a sample has `tools` (JSON schemas), and an assistant's message `tool_calls`
and `reasoning_content`.
"""

import os
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

from ..utils.deprecation import renamed_argument
from ..utils.text import check_complete_characters, shortened
from ..utils.urls import is_url
from ..video_decoding_dsvl import VideoSampling
from ..video_reading_dsvl import IMAGE_SOURCES as SOURCES
from ..video_reading_dsvl import SETTINGS as VIDEO_SETTINGS
from ..video_reading_dsvl import SOURCES as VIDEO_SOURCES
from .sample_errors import Location

ROLES = ("system", "user", "assistant", "tool")
MAX_TIME = 32  # characters of the time of a frame
FRAME_KEYS = ("time", "frame", "frames")  # of an image that is a frame of a video
MESSAGE_KEYS = frozenset(("role", "content", "weight", "references", "id", "tool_calls", "reasoning_content"))
RESULT_KEYS = frozenset(("role", "content", "id", "name", "tool_call_id"))  # of a tool's message
PART_KEYS = {
    "text": frozenset(("type", "text")),
    "image": frozenset(("type", *SOURCES, *FRAME_KEYS)),
    "video": frozenset(("type", *VIDEO_SOURCES, *VIDEO_SETTINGS)),
}
SAMPLE_KEYS = frozenset(("messages", "images", "videos", "id", "tools"))
# Keys that change the meaning of a sample, and are refused. Other unknown keys (its origin, a score) are ignored.
MEANINGFUL = frozenset(
    ("image", "image_url", "image_urls", "image_path", "image_paths", "picture", "pictures", "video", "audio")
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
    """Check one sample, without decoding images and videos.

    Args:
        sample: The sample.
        for_training (`bool`, *optional*, defaults to `True`): Whether the last message must be an answer, and the files of
            the images must exist.
        allow_urls (`bool`, *optional*, defaults to `True`): Whether images may be http(s) URLs.

    Returns:
        `tuple[int, bool]`: The number of images, where a video counts as one; and whether the sample cannot continue
        another one: it begins with a system message, or has tools.

    Raises:
        ValueError: If the sample does not have the format of this module.
    """
    if not isinstance(sample, dict) or not isinstance(sample.get("messages"), list) or not sample["messages"]:
        what = sorted(map(str, sample)) if isinstance(sample, dict) else type(sample).__name__
        raise ValueError(f"expected an object with a list of messages, got {shortened(what)}.")
    _refuse_keys(sample, MEANINGFUL & set(sample), "the sample", SAMPLE_KEYS)
    messages = sample["messages"]
    parts: list[dict[str, Any]] = []
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
        parts += _check_content(message, number)
    if messages[0]["role"] == "assistant" or (messages[0]["role"] == "system" and messages[1:2] == []):
        raise ValueError("a conversation begins with a user's message (after at most one system message).")
    if for_training and messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is the {messages[-1]['role']}'s; expected an assistant's answer to train on.")
    if for_training and not any(is_trained(message) for message in messages):
        raise ValueError("every assistant's message has the weight 0; expected one to train on.")
    for kind in ("image", "video"):
        listed = [] if sample.get(f"{kind}s") is None else sample[f"{kind}s"]
        if not isinstance(listed, list):
            raise ValueError(f"{kind}s is of type {type(listed).__name__}; expected a list.")
        own = [part for part in parts if part["type"] == kind]
        unnamed = sum(source_key(part) is None for part in own)
        if unnamed != len(listed):
            raise ValueError(
                f"the messages hold {unnamed} {kind} parts without a source, but there are {len(listed)} {kind}s; expected "
                "one for each, in reading order."
            )
        for source in [part[key] for part in own if (key := source_key(part)) not in (None, "base64")] + listed:
            # The frames of a video that is given as a list are images.
            for one in source if kind == "video" and isinstance(source, list) else [source]:
                _check_source(one, for_training, allow_urls, "image" if one is not source else kind)
    tools = sample.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools is {shortened(repr(tools), 60)}; expected a list of JSON schemas.")
    return len(parts), messages[0]["role"] == "system" or bool(tools)


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


def _check_content(message: dict, number: int) -> list[dict[str, Any]]:
    """Check a message's content; returns its parts that are images or videos."""
    content = message.get("content")
    if content is None and is_given(message.get("tool_calls")):
        return []
    if isinstance(content, str):
        check_complete_characters(content, f"message {number}")
        return []
    if not isinstance(content, list):
        raise ValueError(f"message {number} has a content of type {type(content).__name__}; expected a text or parts.")
    shown = []
    for part in content:
        kind = str(part.get("type")) if isinstance(part, dict) else ""
        is_text = kind == "text" and isinstance(part.get("text"), str)
        if not is_text and (kind not in ("image", "video") or message["role"] != "user"):
            raise ValueError(
                f"message {number} ({message['role']}) has a part {shortened(repr(part), 100)}; expected a text, or in a "
                "user's message an image or a video."
            )
        known = PART_KEYS[kind]
        _refuse_keys(part, set(part) - known, f"a part of type {kind} of message {number}", known)
        if is_text:
            check_complete_characters(part["text"], f"message {number}")
            continue
        named = [key for key in source_keys(kind) if part.get(key) is not None]
        if len(named) > 1:
            article = "an image" if kind == "image" else "a video"
            raise ValueError(f"{article} of message {number} has {' and '.join(named)}; expected one of them.")
        _check_frame(part, number)
        shown.append(part)
    return shown


def _check_frame(part: dict[str, Any], number: int) -> None:
    """Check what tells when frames are shown."""
    if part["type"] == "video":
        VideoSampling(**{key: part[key] for key in ("fps", "max_frames") if part.get(key) is not None})
        return
    given = {key: part[key] for key in FRAME_KEYS if part.get(key) is not None}
    if not given:
        return
    whole = all(type(given.get(key)) is int for key in ("frame", "frames")) and 1 <= given["frame"] <= given["frames"]
    if not whole or not isinstance(given.get("time"), str) or not 0 < len(given["time"]) <= MAX_TIME:
        raise ValueError(
            f"a frame of message {number} has {shortened(repr(given), 100)}; expected a time such as '0.5 s', and frame and "
            "frames as 'frame 1 of 8'."
        )


def frame_keys(part: dict[str, Any]) -> dict[str, Any]:
    """What tells of an image part that it is a frame of a video, and when it is shown; empty for other images."""
    return {key: part[key] for key in FRAME_KEYS if key in part}


def source_keys(kind: str) -> tuple[str, ...]:
    """The keys under which a part of this type names its source."""
    return SOURCES if kind == "image" else VIDEO_SOURCES


def source_key(part: dict[str, Any]) -> str | None:
    """The key under which an image or video part names its source; None if it takes the next of `images` or `videos`."""
    return next((key for key in source_keys(part["type"]) if part.get(key) is not None), None)


def _check_source(source: Any, files: bool, allow_urls: bool, kind: str) -> None:
    if is_url(source) and not allow_urls and not source.startswith("file://"):
        raise ValueError(f"the {kind} {shortened(source)} is a URL; pass --allow-urls to fetch such {kind}s.")
    if not files:
        return
    if isinstance(source, dict):  # as `datasets` stores it
        source = source["bytes"] if source.get("bytes") else source.get("path")
    if isinstance(source, str):
        if not is_url(source) and not source.startswith("data:") and not os.path.isfile(source):
            raise ValueError(f"the {kind} {shortened(source)} does not exist.")
    elif source is None or isinstance(source, (bool, int, float, list, dict)):
        raise ValueError(
            f"{'an image' if kind == 'image' else 'a video'} is {shortened(source, 60)} of type {type(source).__name__}; "
            "expected a path, a URL or the bytes of a file."
        )


def complete_messages(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Move the `images`, `videos` and `tools` of a sample into its messages.

    Each image part without a source gets the next image, and each video part the next video. The first message gets the
    tools, under the key `tools`, which prepared chat templates (`dsvl.prepare_chat_template`) read.

    Args:
        sample (`dict` or `list`): A sample that `check_conversation` accepts, or its list of messages.

    Returns:
        `list[dict]`: Messages for a chat template or `DSVLProcessor.apply_chat_template`.
    """
    if isinstance(sample, list):
        sample = {"messages": sample}
    listed = {kind: iter(sample.get(f"{kind}s") or []) for kind in ("image", "video")}
    messages = []
    for message in sample["messages"]:
        content = message.get("content") or ""  # None in an answer that is a call
        if not isinstance(content, str):
            content = [_with_source(part, listed) for part in content]
        messages.append(message | {"content": content})
    if is_given(sample.get("tools")):
        messages[0]["tools"] = sample["tools"]
    return messages


def _with_source(part: dict[str, Any], listed: dict[str, Iterator[Any]]) -> dict[str, Any]:
    kind = part["type"]
    if kind not in listed:
        return {"type": "text", "text": part["text"]}
    key = source_key(part)
    others = {name: part[name] for name in (*FRAME_KEYS, *VIDEO_SETTINGS) if part.get(name) is not None}
    return {"type": kind, key or kind: _stored(part[key] if key else next(listed[kind])), **others}


def _stored(image: Any) -> Any:
    """The bytes or the path of an image that `datasets` stored."""
    if isinstance(image, dict):
        return image["bytes"] if image.get("bytes") else image["path"]
    return image


def image_source(part: dict[str, Any]) -> Any:
    """The source in an image or video part of messages from `complete_messages`."""
    return part[source_key(part) or part["type"]]


def images_of(messages: list[dict[str, Any]]) -> list[Any]:
    """The sources of all images of messages from `complete_messages`, in reading order."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [image_source(part) for part in parts if part["type"] == "image"]
