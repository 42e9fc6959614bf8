"""Reading the questions of an evaluation: conversations as for training, or DeepSpeed-VisualChat's evaluation files.

A turn is a user's question (one or more messages) with its answer. The answer is the reference, unless its message has a
list `"references"`, such as the ten answers to a VQA question. The last question may have no answer.
DeepSpeed-VisualChat's files are `{"name": [["question", "paths of images"], ["follow-up"]]}`.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import complete_messages, load_conversations
from ..data.messages import is_trained
from ..data.record_formats import format_of_keys
from ..data.sample_errors import MAX_BAD_SAMPLES, BadSamples
from ..utils.text import shortened
from ..utils.urls import decode_data_url, is_url


@dataclass(frozen=True)
class EvaluationTurn:
    """A question with its answer in the data.

    Attributes:
        messages: what precedes the answer, for the chat template: messages of the user, and calls of tools. An image is
            `{"type": "image", "image": path, URL or bytes}`, a video `{"type": "video", "video": ...}` with its settings.
        answer: the assistant's message in the data; None if there is none.
        references: correct answers; may be empty.
    """

    messages: list[dict[str, Any]]
    answer: dict[str, Any] | None
    references: list[str]

    @property
    def question(self) -> str:
        """The text of the question."""
        return "\n".join(_text(message["content"]) for message in self.messages if message["role"] == "user")

    @property
    def images(self) -> list[str | bytes]:
        """Paths, URLs, or bytes of image files, in reading order."""
        return [part["image"] for part in self.media if part["type"] == "image"]

    @property
    def media(self) -> list[dict[str, Any]]:
        """The parts that are images or videos, in reading order."""
        parts = [part for message in self.messages if isinstance(message["content"], list) for part in message["content"]]
        return [part for part in parts if part["type"] != "text"]


@dataclass(frozen=True)
class EvaluationConversation:
    """A conversation to evaluate.

    Attributes:
        id: name or number, unique in the data set.
        system: a list with the system message, or an empty list.
        turns: in order, at least one.
    """

    id: str
    system: list[dict[str, Any]]
    turns: list[EvaluationTurn]

    @property
    def images(self) -> list[str | bytes]:
        """The images of all turns."""
        return [image for one in self.turns for image in one.images]

    def outline(self) -> "Outline":
        """The sizes of the conversation, which are kept in memory."""
        return Outline(
            self.id,
            letters=[len(one.question) for one in self.turns],
            images=[len(one.images) for one in self.turns],
            videos=[len(one.media) - len(one.images) for one in self.turns],
            answered=[one.answer is not None for one in self.turns],
            address=next((p for one in self.turns for p in map(source_of, one.media) if is_url(p)), None),
        )

    def digest(self) -> bytes:
        """A hash of questions, answers and references; an image file counts by its path."""
        asked = [self.id, self.system, [[one.messages, one.answer, one.references] for one in self.turns]]
        text = json.dumps(asked, sort_keys=True, default=lambda data: hashlib.sha256(data).hexdigest())
        return hashlib.sha256(text.encode()).digest()


@dataclass(frozen=True)
class Outline:
    """The sizes of a conversation.

    Attributes:
        id: the conversation's.
        letters, images, videos: number of characters, of images and of videos of each turn's question.
        answered: for each turn, whether the data has an answer.
        address: URL of the first image or video that has to be fetched; None if there is none.
    """

    id: str
    letters: list[int]
    images: list[int]
    videos: list[int]
    answered: list[bool]
    address: str | None


class Questions:
    """A data set of conversations to evaluate, read from the disk one at a time.

    Args:
        source: a data set as for `data.load_conversations`, or a `.json` file of DeepSpeed-VisualChat, whose image paths are
            relative to the file's directory, or else to the working directory.
        on_bad_sample: "error" to raise for an invalid conversation, "skip" to skip it. Images are not opened here.
        split: of a data set that has several.
        allow_urls: whether images may be http(s) URLs.
        max_bad_samples: the fraction of samples that may be skipped, see `data.sample_errors.BadSamples`.

    Attributes:
        outlines: the sizes of the conversations.
        fingerprint: hash of questions, answers and references; an image file counts by its path.
        skipped: number of invalid samples that were skipped.
        bad: counts skipped samples, here and in `Evaluator`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: naming the location of an invalid conversation, or for an id that is used twice.
    """

    def __init__(
        self,
        source: str | Path,
        on_bad_sample: str = "error",
        split: str = "train",
        allow_urls: bool = True,
        max_bad_samples: float = MAX_BAD_SAMPLES,
    ) -> None:
        self.source = str(source)
        self._named = _read_named(Path(source))
        if self._named is None:
            self._samples = load_conversations(
                source, on_bad_sample, split, for_training=False, allow_urls=allow_urls, max_bad_samples=max_bad_samples
            )
            keys: list[Any] = list(range(len(self._samples)))
        else:
            keys = list(self._named)
        self._keys, self.outlines = [], []
        ids, whole = set(), hashlib.sha256()
        self.bad = BadSamples(on_bad_sample, max_bad_samples, self.source, total=len(keys))
        for key in keys:
            with self.bad.sample():
                found = self._read(key)
                if found.id in ids:
                    raise ValueError(
                        f"{self.source}: two conversations have the id {shortened(repr(found.id))}; make ids unique, or "
                        "remove them."
                    )
                ids.add(found.id)
                whole.update(found.digest())
                self._keys.append(key)
                self.outlines.append(found.outline())
        self.fingerprint = whole.hexdigest()
        self.skipped = self.bad.count + (0 if self._named is not None else self._samples.skipped)
        if not self._keys:
            raise ValueError(f"{self.source} holds no question ({self.skipped} samples were skipped).")

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> EvaluationConversation:
        return self._read(self._keys[index])

    def __iter__(self) -> Iterator[EvaluationConversation]:
        return map(self._read, self._keys)

    def location(self, index: int) -> str:
        """Where a conversation comes from, for messages."""
        key = self._keys[index]
        if self._named is not None:
            return f"{self.source}, {shortened(repr(key))}"
        return self._samples.records.location(self._samples.good[key])

    def _read(self, key: Any) -> EvaluationConversation:
        if self._named is not None:
            return _from_pairs(key, self._named[key], self.source)
        sample = self._samples[key]
        name = sample.get("id")
        try:
            return from_messages(str(key if name is None else name), complete_messages(sample))
        except ValueError as error:
            named = shortened(str(key if name is None else name))
            raise ValueError(f"{self.source}, conversation {named}: {error}") from error


def from_messages(name: str, messages: list[dict[str, Any]]) -> EvaluationConversation:
    """Split the messages of a conversation into turns.

    Args:
        name: the conversation's id.
        messages: with `images` placed in them, see `data.complete_messages`.

    Raises:
        ValueError: for an answer without a question, or references that are not a list of strings.
    """
    system = [message for message in messages if message["role"] == "system"]
    turns: list[EvaluationTurn] = []
    asked: list[dict[str, Any]] = []
    for message in messages[len(system) :]:
        if message["role"] != "assistant" or message.get("tool_calls"):
            asked.append(_with_plain_images(message))
            continue
        if not asked:
            raise ValueError("an answer follows another answer; expected a question before each.")
        answer = {"role": "assistant", "content": message["content"]}
        known = _references(message) if is_trained(message) else []  # its answer is not a reference
        turns.append(EvaluationTurn(asked, answer, known))
        asked = []
    if asked:
        turns.append(EvaluationTurn(asked, None, []))
    return EvaluationConversation(name, system, turns)


def _references(message: dict[str, Any]) -> list[str]:
    known = message.get("references")
    if known is None:
        return [_text(message["content"])]
    if not isinstance(known, list) or not known or not all(isinstance(text, str) for text in known):
        raise ValueError(f"references are {known!r:.100}; expected a list of strings, at least one.")
    return known


def _with_plain_images(message: dict[str, Any]) -> dict[str, Any]:
    """A user's message with each image under the key `image`, and paths made absolute."""
    if isinstance(message["content"], str):
        return message
    parts = []
    for part in message["content"]:
        kind = part["type"]
        if kind != "text":
            key, source = next((key, value) for key, value in part.items() if key != "type")
            settings = {name: value for name, value in part.items() if name not in ("type", key)}
            part = {"type": kind, kind: _decoded(source) if key == "base64" else _absolute(source), **settings}
        parts.append(part)
    return message | {"content": parts}


def source_of(part: dict[str, Any]) -> Any:
    """The source of an image or a video of a turn."""
    return part[part["type"]]


def _absolute(source: Any) -> Any:
    if isinstance(source, list):  # the frames of a video
        return [_absolute(one) for one in source]
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _decoded(source)
    if isinstance(source, str) and not is_url(source):
        return os.path.abspath(source)
    if not isinstance(source, (str, bytes)):
        raise ValueError(f"an image is of type {type(source).__name__}; expected a path, a URL or the bytes of a file.")
    return source


def _decoded(text: Any) -> bytes:
    try:
        is_url = isinstance(text, str) and text[:5].lower() == "data:"
        return decode_data_url(text) if is_url else base64.b64decode(text, validate=True)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"an image is not valid base64 ({error}).") from error


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


# -- DeepSpeed-VisualChat's files -----------------------------------------------------------------------------------------


def _read_named(path: Path) -> dict[str, Any] | None:
    """The conversations of a file of DeepSpeed-VisualChat by name; None for another kind of file."""
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):  # JSON lines may have this suffix as well
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return value if isinstance(value, dict) and format_of_keys(set(value)) is None else None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{shortened(repr(twice))} is used twice; each name may be used once.")
    return found


def _from_pairs(name: str, pairs: Any, source: str) -> EvaluationConversation:
    if not isinstance(pairs, list) or not pairs:
        raise ValueError(
            f"{source}, {name!r}: expected a list of turns [question, images], got {pairs!r:.100}. (A file of "
            'conversations has lines {"messages": [...]}.)'
        )
    turns = []
    for number, pair in enumerate(pairs):
        texts = isinstance(pair, list) and 1 <= len(pair) <= 2 and isinstance(pair[0], str)
        paths = pair[1] if texts and len(pair) == 2 else []
        if not texts or not (isinstance(paths, str) or (isinstance(paths, list) and all(isinstance(p, str) for p in paths))):
            raise ValueError(
                f"{source}, {name!r}, turn {number}: expected [question] or [question, images], images as a list or as "
                f"paths separated by spaces, got {pair!r:.100}."
            )
        found = [_find(path, Path(source).parent) for path in (_split(paths) if isinstance(paths, str) else paths)]
        parts = [{"type": "image", "image": path} for path in found] + [{"type": "text", "text": pair[0]}]
        turns.append(EvaluationTurn([{"role": "user", "content": parts if found else pair[0]}], None, []))
    return EvaluationConversation(name, [], turns)


def _split(paths: str) -> list[str]:
    return [paths] if os.path.isfile(paths) else paths.split()


def _find(path: str, folder: Path) -> str:
    """The path relative to the file's directory, or else to the working directory, as in the original."""
    if is_url(path):
        return path
    beside = folder / path
    return os.path.abspath(beside if beside.is_file() else path)
