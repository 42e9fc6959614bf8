"""What is asked: conversations as training reads them, or DeepSpeed-VisualChat's evaluation files.

In a conversation a user's messages up to an answer are a round, and the answer is its reference; `"references"` beside the
answer's content, a list of texts, are those that count instead (the ten of a VQA question, say). The last question may have
no answer. DeepSpeed-VisualChat's files are `{"name": [["question", "paths of images"], ["follow-up"]]}`.
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
class Round:
    """A question, as a user's messages, and what is known of its answer.

    Attributes:
        messages: as the chat template takes them; an image is `{"type": "image", "image": path, address or bytes}`.
        answer: the assistant's message of the data, which later rounds may be asked after; None if there is none.
        references: answers that count as right; may be empty.
    """

    messages: list[dict[str, Any]]
    answer: dict[str, Any] | None
    references: list[str]

    @property
    def question(self) -> str:
        """The words of the question."""
        return "\n".join(_text(message["content"]) for message in self.messages)

    @property
    def images(self) -> list[str | bytes]:
        """Paths, addresses, or the bytes of files, in reading order."""
        parts = [part for message in self.messages if isinstance(message["content"], list) for part in message["content"]]
        return [part["image"] for part in parts if part["type"] == "image"]


@dataclass(frozen=True)
class Conversation:
    """Rounds that belong together.

    Attributes:
        id: name or number, its own in a data set.
        system: its system message, in a list; or an empty list.
        rounds: in order, at least one.
    """

    id: str
    system: list[dict[str, Any]]
    rounds: list[Round]

    @property
    def images(self) -> list[str | bytes]:
        """Those of all rounds."""
        return [image for one in self.rounds for image in one.images]

    def outline(self) -> "Outline":
        """What is known of it before it is held."""
        return Outline(
            self.id,
            letters=[len(one.question) for one in self.rounds],
            images=[len(one.images) for one in self.rounds],
            answered=[one.answer is not None for one in self.rounds],
            address=next((p for p in self.images if isinstance(p, str) and is_url(p)), None),
        )

    def digest(self) -> bytes:
        """A hash of all that is asked and known, images in files by their paths."""
        asked = [self.id, self.system, [[one.messages, one.answer, one.references] for one in self.rounds]]
        text = json.dumps(asked, sort_keys=True, default=lambda data: hashlib.sha256(data).hexdigest())
        return hashlib.sha256(text.encode()).digest()


@dataclass(frozen=True)
class Outline:
    """What is known of a conversation before it is held.

    Attributes:
        id: as the conversation's.
        letters, images: of each round's question, how many.
        answered: of each round, whether the data has an answer.
        address: the first image that would have to be fetched, if there is one.
    """

    id: str
    letters: list[int]
    images: list[int]
    answered: list[bool]
    address: str | None


class Questions:
    """A data set of conversations to hold, read from the disk one at a time.

    Args:
        source: a data set as `data.load_conversations` opens it; or a `.json` file of DeepSpeed-VisualChat, whose images'
            paths start at the file's folder, or else at the working directory.
        on_bad_sample: "error", or "skip" to skip, counted, what is no conversation. Images are not opened here.
        split: of a data set that has several.
        allow_urls: whether images of conversations may be addresses.
        max_bad_samples: the share that may be skipped, see `data.sample_errors.BadSamples`.

    Attributes:
        outlines: of the conversations.
        fingerprint: of all that is asked and known, images in files by their paths.
        left_out: how many samples are no conversations.
        bad: counts them, and those that whoever asks skips.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the place of what is no conversation, or two conversations of the same name.
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
            places: list[Any] = list(range(len(self._samples)))
        else:
            places = list(self._named)
        self._places, self.outlines = [], []
        ids, whole = set(), hashlib.sha256()
        self.bad = BadSamples(on_bad_sample, max_bad_samples, self.source, total=len(places))
        for place in places:
            with self.bad.sample():
                found = self._read(place)
                if found.id in ids:
                    raise ValueError(
                        f"{self.source}: two conversations have the id {shortened(repr(found.id))}; give each its own, or "
                        "none."
                    )
                ids.add(found.id)
                whole.update(found.digest())
                self._places.append(place)
                self.outlines.append(found.outline())
        self.fingerprint = whole.hexdigest()
        self.left_out = self.bad.count + (0 if self._named is not None else self._samples.skipped)
        if not self._places:
            raise ValueError(f"{self.source} holds no question ({self.left_out} conversations were left out).")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Conversation:
        return self._read(self._places[index])

    def __iter__(self) -> Iterator[Conversation]:
        return map(self._read, self._places)

    def location(self, index: int) -> str:
        """Where a conversation is from, for messages."""
        place = self._places[index]
        if self._named is not None:
            return f"{self.source}, {shortened(repr(place))}"
        return self._samples.records.location(self._samples.good[place])

    def _read(self, place: Any) -> Conversation:
        if self._named is not None:
            return _from_pairs(place, self._named[place], self.source)
        sample = self._samples[place]
        name = sample.get("id")
        try:
            return from_messages(str(place if name is None else name), complete_messages(sample))
        except ValueError as error:
            named = shortened(str(place if name is None else name))
            raise ValueError(f"{self.source}, conversation {named}: {error}") from error


def from_messages(name: str, messages: list[dict[str, Any]]) -> Conversation:
    """The rounds of a conversation's complete messages.

    Raises:
        ValueError: for an answer to no question, or references that are no list of texts.
    """
    system = [message for message in messages if message["role"] == "system"]
    rounds: list[Round] = []
    asked: list[dict[str, Any]] = []
    for message in messages[len(system) :]:
        if message["role"] == "user":
            asked.append(_with_plain_images(message))
            continue
        if not asked:
            raise ValueError("two answers follow each other; expected a question before each.")
        answer = {"role": "assistant", "content": message["content"]}
        known = _references(message) if is_trained(message) else []  # no answer to be held against
        rounds.append(Round(asked, answer, known))
        asked = []
    if asked:
        rounds.append(Round(asked, None, []))
    return Conversation(name, system, rounds)


def _references(message: dict[str, Any]) -> list[str]:
    known = message.get("references")
    if known is None:
        return [_text(message["content"])]
    if not isinstance(known, list) or not known or not all(isinstance(text, str) for text in known):
        raise ValueError(f"references are {known!r:.100}; expected a list of texts, at least one.")
    return known


def _with_plain_images(message: dict[str, Any]) -> dict[str, Any]:
    """A user's message whose images are all under the key `image`, files by absolute paths."""
    if isinstance(message["content"], str):
        return {"role": "user", "content": message["content"]}
    parts = []
    for part in message["content"]:
        if part["type"] == "image":
            key, source = next((key, value) for key, value in part.items() if key != "type")
            part = {"type": "image", "image": _decoded(source) if key == "base64" else _absolute(source)}
        parts.append(part)
    return {"role": "user", "content": parts}


def _absolute(source: Any) -> str | bytes:
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _decoded(source)
    if isinstance(source, str) and not is_url(source):
        return os.path.abspath(source)
    if not isinstance(source, (str, bytes)):
        raise ValueError(f"an image is of type {type(source).__name__}; expected a path, an address or a file's bytes.")
    return source


def _decoded(text: Any) -> bytes:
    try:
        is_url = isinstance(text, str) and text[:5].lower() == "data:"
        return decode_data_url(text) if is_url else base64.b64decode(text, validate=True)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"an image's base64 is broken ({error}).") from error


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


# -- DeepSpeed-VisualChat's files -----------------------------------------------------------------------------------------


def _read_named(path: Path) -> dict[str, Any] | None:
    """The conversations of a file of DeepSpeed-VisualChat by their names; None if it is something else."""
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):  # JSON lines may have this suffix as well
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return value if isinstance(value, dict) and format_of_keys(set(value)) is None else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{shortened(repr(twice))} is there twice; each name may be used once.")
    return found


def _from_pairs(name: str, pairs: Any, source: str) -> Conversation:
    if not isinstance(pairs, list) or not pairs:
        raise ValueError(
            f"{source}, {name!r}: expected a list of rounds [question, images], got {pairs!r:.100}. (Or a file of "
            'conversations, each a line {"messages": [...]}.)'
        )
    rounds = []
    for number, pair in enumerate(pairs):
        texts = isinstance(pair, list) and 1 <= len(pair) <= 2 and isinstance(pair[0], str)
        paths = pair[1] if texts and len(pair) == 2 else []
        if not texts or not (isinstance(paths, str) or (isinstance(paths, list) and all(isinstance(p, str) for p in paths))):
            raise ValueError(
                f"{source}, {name!r}, round {number}: expected [question] or [question, images], images as a list or as "
                f"paths between spaces, got {pair!r:.100}."
            )
        found = [_find(path, Path(source).parent) for path in (_split(paths) if isinstance(paths, str) else paths)]
        parts = [{"type": "image", "image": path} for path in found] + [{"type": "text", "text": pair[0]}]
        rounds.append(Round([{"role": "user", "content": parts if found else pair[0]}], None, []))
    return Conversation(name, [], rounds)


def _split(paths: str) -> list[str]:
    return [paths] if os.path.isfile(paths) else paths.split()


def _find(path: str, folder: Path) -> str:
    """Beside the file; or else where the original looks, which is the working directory."""
    if is_url(path):
        return path
    beside = folder / path
    return os.path.abspath(beside if beside.is_file() else path)
