"""The record formats in which conversations about images are stored, detected by the keys of the first records.

A format is accepted if its keys say which values are images, questions and answers; other records are refused.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ..utils.text import shortened
from ..utils.video_loading import VIDEO_SUFFIXES
from .converters import CONVERTERS
from .converters.public_formats import PLACEHOLDER, cauldron, sharegpt, split_at_placeholders
from .converters.registry import VIDEO_PLACEHOLDER
from .dataset_files import FILE_FORMATS, METADATA
from .image_paths import resolve_images
from .messages import SAMPLE_KEYS, SOURCES, is_given

CAPTION_QUESTION = "Describe this image."
VIDEO_QUESTION = "Describe this video."
IMAGE_KEYS = ("image", "images")
VIDEO_KEYS = ("video", "videos")
FILE_KEYS = ("file_name", "file_names")  # in the metadata file of an image or video folder, as in `datasets`
MEDIA_KEYS = (*IMAGE_KEYS, *VIDEO_KEYS, *FILE_KEYS)
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")  # in WebDataset
SHARD_SUFFIXES = (*IMAGE_SUFFIXES, *(suffix[1:] for suffix in VIDEO_SUFFIXES))
TEXT_SUFFIXES = ("txt", "text", "caption")
MESSAGE_KEYS = ({"from", "value"}, {"role", "content"})


@dataclass(frozen=True)
class RecordFormat:
    """Converts records of one format to samples.

    Attributes:
        about (`str`): A description, for messages.
        reads (`frozenset[str]`): The keys that are used; other keys are reported.
        convert (`Callable`): Record -> `{"messages", "images"}`, as `check_conversation` expects it.
        is_native (`bool`): Whether this is the format of `messages.py`, which is not reported.
    """

    about: str
    reads: frozenset[str]
    convert: Callable[[dict[str, Any]], dict[str, Any]]
    is_native: bool = False

    def sample(self, record: Any, root: Path | None) -> dict[str, Any]:
        """Convert a record to a sample whose images are paths, URLs or bytes.

        Args:
            record: A record of a file.
            root (`Path`, *optional*): The folder to which relative image paths refer. Without it they stay relative.

        Raises:
            ValueError: If the record does not have this format.
        """
        if not isinstance(record, dict):
            raise ValueError(f"expected an object with a list of messages, got {type(record).__name__}.")
        return resolve_images(self.convert(record), root)


def detect_format(records: Iterable[dict[str, Any]], source: str, keys: list[str] | None = None) -> RecordFormat:
    """Detect the format of records: that of the first record with a known one.

    Args:
        records (`Iterable[dict]`): The first records of the data set.
        source (`str`): The data set's name, for messages.
        keys (`list[str]`, *optional*): The columns, if the records are rows of a table.

    Raises:
        ValueError: If the format is unknown; the message names a converter, if there is one.
    """
    found: set[str] = set(keys or ())
    for record in records:
        found_format = format_of_keys(set(record), source)
        if found_format is not None:
            return found_format
        found |= set(map(str, record))
    if keys is None and not found:
        return MESSAGES
    found_format = format_of_keys(found, source) if keys is not None else None
    if found_format is not None:
        return found_format
    raise ValueError(
        f"{source} has the columns {shortened(sorted(found))}; expected messages (and images). {_remedy(source)}"
    )


def format_of_keys(keys: set[str], source: str = "") -> RecordFormat | None:
    """The format of a record with these keys; None if it is unknown or ambiguous."""
    if "messages" in keys:
        return MESSAGES if "file_name" not in keys else FOLDER_MESSAGES
    if "conversations" in keys:
        return CONVERSATIONS
    if "texts" in keys and "images" in keys:
        return CAULDRON
    if Path(source).name in METADATA:
        keys = (keys - set(FILE_KEYS)) | ({"image"} if keys & set(FILE_KEYS) else set())  # or a video
    if {"question", "answer"} <= keys:
        return QUESTION_ANSWER
    if source.endswith(".tar"):
        return _shard_format(keys)
    if "text" in keys and keys & {*IMAGE_KEYS, *VIDEO_KEYS}:
        return CAPTION
    return None


def _remedy(source: str) -> str:
    """The converter for a file of this name, or the list of accepted formats."""
    name = Path(source).name
    for one in CONVERTERS.values():
        if any(Path(file).name == name for file in one.files):
            return f"Convert it first: dsvl data convert {one.name}."
    return (
        "Accepted columns: messages; conversations (LLaVA, ShareGPT); images and texts; image, question and answer; image "
        f"and text; in {FILE_FORMATS}. Convert other data sets first (dsvl data list)."
    )


# -- formats -------------------------------------------------------------------------------------------------------------


def _messages(record: dict[str, Any]) -> dict[str, Any]:
    """The native format, and variants: `image`, `video`, parts of type image_url, placeholders, ShareGPT's messages."""
    messages = record["messages"] if isinstance(record.get("messages"), list) else None
    if messages and all(isinstance(one, dict) and {"from", "value"} <= set(one) for one in messages):
        return _conversations(record | {"conversations": messages, "messages": None})
    sample = {key: value for key, value in record.items() if key not in (*IMAGE_KEYS, *VIDEO_KEYS)}
    held = {kind: _media(record, kind) for kind in ("image", "video")}
    sample |= {f"{kind}s": sources for kind, sources in held.items() if sources is not None}
    if messages is not None:
        sample["messages"] = [_without_urls(message) for message in messages]
        if any(held.values()):
            _insert_media(sample, only=is_given(record.get("image")) or is_given(record.get("video")))
    return sample


def _conversations(record: dict[str, Any]) -> dict[str, Any]:
    """LLaVA and ShareGPT: messages from human and gpt, with a placeholder for each image."""
    entries = record.get("conversations")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and not any(_given_keys(entry) <= keys for keys in MESSAGE_KEYS):
            extra = sorted(map(str, _given_keys(entry) - set().union(*MESSAGE_KEYS)))
            raise ValueError(
                f"a message has the key {shortened(', '.join(extra) or entry)}, which would be lost; expected from, value."
            )
    held = {f"{kind}s": _media(record, kind) or [] for kind in ("image", "video")}
    sample = sharegpt({"conversations": entries, "system": record.get("system"), **held}, Random(0))
    return _others(record, CONVERSATIONS) | sample


def _texts(record: dict[str, Any]) -> dict[str, Any]:
    return _others(record, CAULDRON) | cauldron(record, Random(0))


def _question_answer(record: dict[str, Any]) -> dict[str, Any]:
    return _others(record, QUESTION_ANSWER) | _one_question(record, _text(record, "question"), _text(record, "answer"))


def _caption(record: dict[str, Any]) -> dict[str, Any]:
    if not _media(record, "image") and not _media(record, "video"):
        raise ValueError("there is no image; expected one that the text describes.")
    question = CAPTION_QUESTION if _media(record, "image") else VIDEO_QUESTION
    return _others(record, CAPTION) | _one_question(record, question, _text(record, "text"))


def _one_question(record: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    held = {kind: _media(record, kind) or [] for kind in ("image", "video")}
    content = [*({"type": kind} for kind, sources in held.items() for _ in sources), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": held["image"]} | ({"videos": held["video"]} if held["video"] else {})


def _others(record: dict[str, Any], own: RecordFormat) -> dict[str, Any]:
    """The keys that a format does not read; `check_conversation` refuses those with a meaning, others are reported."""
    return {key: value for key, value in record.items() if key not in own.reads}


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {shortened(repr(value), 60)}; expected a text.")
    return value


def _media(record: dict[str, Any], kind: str) -> Any:
    """`images`, or `image` (in the metadata of a folder `file_name`) as a list of one; the same for videos; None without."""
    keys = [key for key in (kind, f"{kind}s", *FILE_KEYS) if is_given(record.get(key))]
    given = [key for key in keys if key not in FILE_KEYS or _are_videos(record[key]) == (kind == "video")]
    if len(given) > 1:
        raise ValueError(f"the sample has {' and '.join(given)}; expected one of them.")
    if not given:
        return record.get(f"{kind}s")
    sources = record[given[0]]
    if not given[0].endswith("s") and not isinstance(sources, list):
        return [sources]
    if not isinstance(sources, list):
        raise ValueError(f"{given[0]} is of type {type(sources).__name__}; expected a list.")
    return sources


def _are_videos(names: Any) -> bool:
    """Whether the files of a folder are videos, by their names."""
    listed = names if isinstance(names, list) else [names]
    return all(isinstance(name, str) and name.lower().endswith(VIDEO_SUFFIXES) for name in listed)


def _given_keys(message: dict[str, Any]) -> set[str]:
    return {key for key, value in message.items() if is_given(value)}


def _without_urls(message: Any) -> Any:
    """Convert OpenAI's parts `{"type": "image_url", "image_url": {"url": ...}}` to parts of type image; also video_url."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return message | {"content": [_without_url(part) for part in content]}


def _without_url(part: Any) -> Any:
    key = part.get("type") if isinstance(part, dict) else None
    if key not in ("image_url", "video_url"):
        return part
    source, kind = part.get(key), key.removesuffix("_url")
    if isinstance(source, dict):
        extra = sorted(str(name) for name, value in source.items() if name != "url" and is_given(value) and value != "auto")
        if extra:
            raise ValueError(f"an {key} has the key {shortened(', '.join(extra))}, which would be lost; remove it.")
        source = source.get("url")
    if not isinstance(source, str):
        raise ValueError(f"an {key} is {shortened(repr(source), 60)}; expected an object with a url.")
    return {name: value for name, value in part.items() if name != key} | {"type": kind, "url": source}


def _insert_media(sample: dict[str, Any], only: bool) -> None:
    """Insert image and video parts at the placeholders of messages that have none; modifies `sample`.

    Args:
        sample (`dict`): A sample with images or videos.
        only (`bool`): Whether its only image is under the key `image`, or its only video under `video`. Without a
            placeholder it is inserted before the first question, as in LLaVA.
    """
    messages = sample["messages"]
    users = [message for message in messages if isinstance(message, dict) and message.get("role") == "user"]
    texts = [text for message in users for text in _texts_of(message)]
    if None in texts:  # parts without a source, or invalid parts
        return
    held = {PLACEHOLDER: sample.get("images") or [], VIDEO_PLACEHOLDER: sample.get("videos") or []}
    placeholders = tuple(placeholder for placeholder, sources in held.items() if sources)
    counts = [sum(text.count(placeholder) for text in texts if text is not None) for placeholder in placeholders]
    if counts == [len(held[placeholder]) for placeholder in placeholders]:
        sample["messages"] = [_split_message(one, placeholders) if one in users else one for one in messages]
    elif counts == [0] and only and users and len(held[placeholders[0]]) == 1:
        first = messages.index(users[0])
        content = users[0]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kind = "image" if placeholders[0] == PLACEHOLDER else "video"
        sample["messages"][first] = users[0] | {"content": [{"type": kind}, *parts]}


def _texts_of(message: dict[str, Any]) -> list[str | None]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return [None]
    texts: list[str | None] = []
    for part in content:
        named = isinstance(part, dict) and any(is_given(part.get(key)) for key in (*SOURCES, "video"))
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif not named:
            texts.append(None)
    return texts


def _split_message(message: dict[str, Any], placeholders: tuple[str, ...]) -> dict[str, Any]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    kinds = {None: "image", VIDEO_PLACEHOLDER: "video"}
    placed: list[Any] = []
    for part in parts:
        if part.get("type") == "text" and any(placeholder in part["text"] for placeholder in placeholders):
            for piece in split_at_placeholders(part["text"], placeholders):
                is_mark = piece is None or (piece == VIDEO_PLACEHOLDER and piece in placeholders)
                placed.append({"type": kinds[piece]} if is_mark else part | {"text": piece})
        else:
            placed.append(part)
    return message | {"content": placed}


def _shard_format(keys: set[str]) -> RecordFormat | None:
    """A shard of WebDataset: an image or a video with a text or JSON."""
    images = sorted(keys & set(SHARD_SUFFIXES))
    texts = [key for key in TEXT_SUFFIXES if key in keys]
    if not images or not (texts or "json" in keys):
        return None
    return SHARD


def _shard(record: dict[str, Any]) -> dict[str, Any]:
    images = [(key, value) for key, value in record.items() if key in SHARD_SUFFIXES]
    texts = [record[key] for key in TEXT_SUFFIXES if key in record]
    extra = sorted(set(record) - set(SHARD_SUFFIXES) - set(TEXT_SUFFIXES) - {"json"})
    if len(images) != 1 or len(texts) > 1 or extra:
        raise ValueError(f"has the files {shortened(sorted(record))}; expected an image or a video, and a text or JSON.")
    described = record.get("json", {})
    if not isinstance(described, dict):
        raise ValueError(f"its json holds {type(described).__name__}; expected an object.")
    # The image of the record is a file of the shard.
    inner = {key: value for key, value in described.items() if key not in MEDIA_KEYS}
    ((suffix, content),) = images
    held = {"image" if suffix in IMAGE_SUFFIXES else "video": content}
    inner_format = format_of_keys(set(inner) | set(held))
    if inner_format is None and texts:
        return CAPTION.convert(inner | held | {"text": texts[0]})
    if inner_format is None or texts:
        raise ValueError(
            f"its json has the keys {shortened(sorted(described))}; expected messages, conversations, or a question and an "
            "answer; or a text file."
        )
    return inner_format.convert(inner | held)


MESSAGES = RecordFormat("messages", SAMPLE_KEYS | {"image", "video"}, _messages, is_native=True)
FOLDER_MESSAGES = RecordFormat("an image folder with messages", SAMPLE_KEYS | set(FILE_KEYS), _messages)
CONVERSATIONS = RecordFormat(
    "conversations of LLaVA or ShareGPT (from, value; <image> marks an image, <video> a video)",
    frozenset((*MEDIA_KEYS, "conversations", "messages", "system")),
    _conversations,
)
CAULDRON = RecordFormat("images and texts of The Cauldron (user, assistant)", frozenset(("images", "texts")), _texts)
QUESTION_ANSWER = RecordFormat(
    "an image, a question and an answer", frozenset((*MEDIA_KEYS, "question", "answer")), _question_answer
)
CAPTION = RecordFormat(
    f"an image and its text, the answer to {CAPTION_QUESTION!r}", frozenset((*MEDIA_KEYS, "text")), _caption
)
SHARD = RecordFormat(
    f"shards of WebDataset: an image with a text (the answer to {CAPTION_QUESTION!r}), or with JSON that holds messages or "
    "conversations",
    frozenset(),
    _shard,
)
