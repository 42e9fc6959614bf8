"""What a record is: the forms in which people keep conversations about images, recognised by their keys.

A form is taken where it is certain what is an image, a question and an answer; anything else is refused.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import unquote, urlsplit

from .bad_samples import shortened
from .converters import CONVERTERS
from .converters.public import PLACEHOLDER, cauldron, sharegpt, split
from .files import FORMS, METADATA
from .messages import SAMPLE_KEYS, is_address, is_given

CAPTION_QUESTION = "Describe this image."
IMAGE_KEYS = ("image", "images")
FILE_KEYS = ("file_name", "file_names")  # of a folder's metadata, as `datasets` has them
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")  # of WebDataset
TEXT_SUFFIXES = ("txt", "text", "caption")
TURN_KEYS = ({"from", "value"}, {"role", "content"})
DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Form:
    """How records of one form become samples.

    Attributes:
        about: what was recognised, for a message.
        reads: the keys that are used; others are reported.
        convert: a record -> `{"messages", "images"}`, as `check_conversation` takes it.
        plain: whether it is our own, which needs no message.
    """

    about: str
    reads: frozenset[str]
    convert: Callable[[dict[str, Any]], dict[str, Any]]
    plain: bool = False

    def sample(self, record: Any, root: Path | None) -> dict[str, Any]:
        """A record as a sample, images by paths from here, addresses or bytes.

        Args:
            record: what a file gave.
            root: the folder at which relative paths start; None leaves them as they are.

        Raises:
            ValueError: naming what is wrong.
        """
        if not isinstance(record, dict):
            raise ValueError(f"expected an object with a list of messages, got {type(record).__name__}.")
        return rooted(self.convert(record), root)


def recognised(records: Iterable[dict[str, Any]], source: str, keys: list[str] | None = None) -> Form:
    """The form of records, by the first that have one.

    Args:
        records: the first ones.
        source: for messages.
        keys: the columns, if all records have the same.

    Raises:
        ValueError: if they are of no known form, with what would convert them.
    """
    found: set[str] = set(keys or ())
    for record in records:
        form = form_of(set(record), source)
        if form is not None:
            return form
        found |= set(map(str, record))
    form = form_of(found, source) if keys is not None else MESSAGES if not found else None
    if form is not None:
        return form
    raise ValueError(
        f"{source} has the columns {shortened(sorted(found))}; expected messages (and images). {_remedy(source)}"
    )


def form_of(keys: set[str], source: str = "") -> Form | None:
    """The form of a record with these keys; None if there is none that is certain."""
    if "messages" in keys:
        return MESSAGES if "file_name" not in keys else FOLDER_MESSAGES
    if "conversations" in keys:
        return TURNS
    if "texts" in keys and "images" in keys:
        return CAULDRON
    if Path(source).name in METADATA:
        keys = (keys - set(FILE_KEYS)) | ({"image"} if keys & set(FILE_KEYS) else set())
    if {"question", "answer"} <= keys:
        return QUESTION_ANSWER
    if source.endswith(".tar"):
        return _shard_form(keys)
    if "text" in keys and keys & set(IMAGE_KEYS):
        return CAPTION
    return None


def _remedy(source: str) -> str:
    """The converter of a file of this name, or what is taken as it is."""
    name = Path(source).name
    for one in CONVERTERS.values():
        if any(Path(file).name == name for file in one.files):
            return f"Convert it first: dsvl data convert {one.name}."
    return (
        "Taken as they are: messages; conversations (LLaVA, ShareGPT); images and texts; image, question and answer; image "
        f"and text; in {FORMS}. Convert others first (dsvl data list)."
    )


# -- the forms ---------------------------------------------------------------------------------------------------------


def _messages(record: dict[str, Any]) -> dict[str, Any]:
    """Our own form, and its relatives: `image`, parts of type image_url, placeholders in the text, turns of ShareGPT."""
    messages = record["messages"] if isinstance(record.get("messages"), list) else None
    if messages and all(isinstance(turn, dict) and {"from", "value"} <= set(turn) for turn in messages):
        return _turns(record | {"conversations": messages, "messages": None})
    sample = {key: value for key, value in record.items() if key not in IMAGE_KEYS}
    images = _images(record)
    if images is not None:
        sample["images"] = images
    if messages is not None:
        sample["messages"] = [_without_image_urls(message) for message in messages]
        if images:
            _place(sample, only=is_given(record.get("image")))
    return sample


def _turns(record: dict[str, Any]) -> dict[str, Any]:
    """LLaVA's and ShareGPT's: turns of human and gpt, a placeholder for each image."""
    turns = record.get("conversations")
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and not any(_given_keys(turn) <= keys for keys in TURN_KEYS):
            extra = sorted(map(str, _given_keys(turn) - set().union(*TURN_KEYS)))
            raise ValueError(
                f"a turn has the key {shortened(', '.join(extra) or turn)}, which would be lost; expected from and value."
            )
    images = _images(record) or []
    sample = sharegpt({"conversations": turns, "images": images, "system": record.get("system")}, Random(0))
    return _others(record, TURNS) | sample


def _texts(record: dict[str, Any]) -> dict[str, Any]:
    return _others(record, CAULDRON) | cauldron(record, Random(0))


def _question_answer(record: dict[str, Any]) -> dict[str, Any]:
    return _others(record, QUESTION_ANSWER) | _one_turn(record, _text(record, "question"), _text(record, "answer"))


def _caption(record: dict[str, Any]) -> dict[str, Any]:
    if not _images(record):
        raise ValueError("there is no image; expected one that the text describes.")
    return _others(record, CAPTION) | _one_turn(record, CAPTION_QUESTION, _text(record, "text"))


def _one_turn(record: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    images = _images(record) or []
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": images}


def _others(record: dict[str, Any], form: Form) -> dict[str, Any]:
    """What a form does not read, so that keys with a meaning are refused and others reported."""
    return {key: value for key, value in record.items() if key not in form.reads}


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {shortened(repr(value), 60)}; expected a text.")
    return value


def _images(record: dict[str, Any]) -> Any:
    """`images`, or `image` as a list of one; of a folder's metadata `file_name`. None if there are none."""
    given = [key for key in (*IMAGE_KEYS, *FILE_KEYS) if is_given(record.get(key))]
    if len(given) > 1:
        raise ValueError(f"the sample has {' and '.join(given)}; expected one of them.")
    if not given:
        return record.get("images")
    images = record[given[0]]
    if not given[0].endswith("s") and not isinstance(images, list):
        return [images]
    if not isinstance(images, list):
        raise ValueError(f"{given[0]} is of type {type(images).__name__}; expected a list.")
    return images


def _given_keys(turn: dict[str, Any]) -> set[str]:
    return {key for key, value in turn.items() if is_given(value)}


def _without_image_urls(message: Any) -> Any:
    """OpenAI's parts `{"type": "image_url", "image_url": {"url": ...}}` as parts of type image."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return message | {"content": [_without_image_url(part) for part in content]}


def _without_image_url(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image_url":
        return part
    source = part.get("image_url")
    if isinstance(source, dict):
        extra = sorted(str(key) for key, value in source.items() if key != "url" and is_given(value) and value != "auto")
        if extra:
            raise ValueError(f"an image_url has the key {shortened(', '.join(extra))}, which would be lost; remove it.")
        source = source.get("url")
    if not isinstance(source, str):
        raise ValueError(f"an image_url is {shortened(repr(source), 60)}; expected an object with a url.")
    return {key: value for key, value in part.items() if key != "image_url"} | {"type": "image", "url": source}


def _place(sample: dict[str, Any], only: bool) -> None:
    """Put parts for images into messages that have none, in place: at their placeholders.

    Args:
        sample: with images.
        only: whether it has one under `image`, which without a placeholder stands before the first question, as LLaVA's.
    """
    messages = sample["messages"]
    users = [message for message in messages if isinstance(message, dict) and message.get("role") == "user"]
    texts = [text for message in users for text in _texts_of(message)]
    if None in texts:  # a part without a source, or what is no part
        return
    count = sum(text.count(PLACEHOLDER) for text in texts if text is not None)
    if count == len(sample["images"]):
        sample["messages"] = [_split_message(message) if message in users else message for message in messages]
    elif count == 0 and only and users and len(sample["images"]) == 1:
        first = messages.index(users[0])
        content = users[0]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        sample["messages"][first] = users[0] | {"content": [{"type": "image"}, *parts]}


def _texts_of(message: dict[str, Any]) -> list[str | None]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return [None]
    texts: list[str | None] = []
    for part in content:
        named = isinstance(part, dict) and any(is_given(part.get(key)) for key in ("image", "path", "url", "base64"))
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif not named:
            texts.append(None)
    return texts


def _split_message(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    placed: list[Any] = []
    for part in parts:
        if part.get("type") == "text" and PLACEHOLDER in part["text"]:
            pieces = split(part["text"])
            placed += [{"type": "image"} if piece is None else part | {"text": piece} for piece in pieces]
        else:
            placed.append(part)
    return message | {"content": placed}


def _shard_form(keys: set[str]) -> Form | None:
    """Of a shard of WebDataset: an image beside a text or beside JSON."""
    images = sorted(keys & set(IMAGE_SUFFIXES))
    texts = [key for key in TEXT_SUFFIXES if key in keys]
    if not images or not (texts or "json" in keys):
        return None
    return SHARD


def _shard(record: dict[str, Any]) -> dict[str, Any]:
    images = [value for key, value in record.items() if key in IMAGE_SUFFIXES]
    texts = [record[key] for key in TEXT_SUFFIXES if key in record]
    extra = sorted(set(record) - set(IMAGE_SUFFIXES) - set(TEXT_SUFFIXES) - {"json"})
    if len(images) != 1 or len(texts) > 1 or extra:
        raise ValueError(f"has the files {shortened(sorted(record))}; expected an image, and a text or JSON.")
    described = record.get("json", {})
    if not isinstance(described, dict):
        raise ValueError(f"its json holds {type(described).__name__}; expected an object.")
    inner = {key: value for key, value in described.items() if key not in (*IMAGE_KEYS, *FILE_KEYS)}  # the file is there
    form = form_of(set(inner) | {"image"})
    if form is None and texts:
        return CAPTION.convert(inner | {"image": images[0], "text": texts[0]})
    if form is None or texts:
        raise ValueError(
            f"its json has the keys {shortened(sorted(described))}; expected messages, conversations, or a question and an "
            "answer, or else a text beside it."
        )
    return form.convert(inner | {"image": images[0]})


MESSAGES = Form("messages", SAMPLE_KEYS | {"image"}, _messages, plain=True)
FOLDER_MESSAGES = Form("a folder of images described by messages", SAMPLE_KEYS | set(FILE_KEYS), _messages)
TURNS = Form(
    "conversations of LLaVA or ShareGPT (from, value; <image> where an image stands)",
    frozenset((*IMAGE_KEYS, *FILE_KEYS, "conversations", "messages", "system")),
    _turns,
)
CAULDRON = Form("images and texts of The Cauldron (user, assistant)", frozenset(("images", "texts")), _texts)
QUESTION_ANSWER = Form(
    "an image, a question and an answer", frozenset((*IMAGE_KEYS, *FILE_KEYS, "question", "answer")), _question_answer
)
CAPTION = Form(
    f"an image and its text, which answers {CAPTION_QUESTION!r}", frozenset((*IMAGE_KEYS, *FILE_KEYS, "text")), _caption
)
SHARD = Form(
    "shards of WebDataset: an image beside a text (which answers "
    f"{CAPTION_QUESTION!r}), or beside JSON with messages or conversations",
    frozenset(),
    _shard,
)


# -- images ------------------------------------------------------------------------------------------------------------


def rooted(sample: dict[str, Any], root: Path | None) -> dict[str, Any]:
    """A sample whose images are paths that start at `root`, addresses or bytes: data URLs are decoded.

    Raises:
        ValueError: for a broken data URL, or a stored image without bytes and path.
    """
    if isinstance(sample.get("images"), list):
        sample = sample | {"images": [image_source(image, root) for image in sample["images"]]}
    if not isinstance(sample.get("messages"), list):
        return sample
    messages = []
    for message in sample["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            message = message | {"content": [_rooted_part(part, root) for part in content]}
        messages.append(message)
    return sample | {"messages": messages}


def _rooted_part(part: Any, root: Path | None) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image":
        return part
    found = {key: image_source(part[key], root) for key in ("image", "path", "url") if is_given(part.get(key))}
    for key, source in found.items():
        part = {name: value for name, value in part.items() if name != key}
        part["image" if not isinstance(source, str) else key] = source
    return part


def image_source(image: Any, root: Path | None = None) -> Any:
    """Where an image is from: a path, an address, bytes, or what it is already.

    Args:
        image: a path, `file://` address, http(s) address, data URL, bytes, an image; or as `datasets` stores one,
            `{"bytes": ..., "path": ...}`.
        root: the folder at which a relative path starts; None leaves it as it is.
    """
    if isinstance(image, dict):
        extra = set(image) - {"bytes", "path"}
        source = image["bytes"] if is_given(image.get("bytes")) else image.get("path")
        if extra or not is_given(source) or (source is image.get("bytes") and not isinstance(source, bytes)):
            raise ValueError(f"an image is {shortened(image, 60)}; expected its bytes or its path.")
        image = source
    if not isinstance(image, str):
        return image
    if image[:5].lower() == "data:":
        return decode_data_url(image)
    if image.startswith("file://"):
        image = unquote(urlsplit(image).path)
    elif is_address(image):
        return image
    return image if root is None else str(root / image)


def decode_data_url(url: str) -> bytes:
    """The bytes in a data URL.

    Raises:
        ValueError: if it is broken.
    """
    head = DATA_URL.match(url)
    try:
        if head is None:
            raise ValueError("it has no ';base64,'")
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data URL {shortened(url, 60)} is broken: {error}.") from error
