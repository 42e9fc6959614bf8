"""Data sets for the trainers of TRL, from files in the forms that `dsvl train` reads.

TRL's trainers take a `datasets.Dataset` with a column `images`, and a part `{"type": "image"}` for each in the messages.
"""

import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..image_reading_dsvl import read_image
from ..utils.image_loading import fetch_image_source
from ..utils.text import shortened
from ..utils.video_loading import frame_file, with_frames
from ..video_decoding_dsvl import VideoSampling
from .conversations import load_conversations, log_unread
from .dataset_files import import_datasets, open_records
from .image_paths import resolve_images
from .messages import (
    FRAME_KEYS,
    MEANINGFUL,
    SAMPLE_KEYS,
    check_conversation,
    complete_messages,
    images_of,
    is_given,
    location_of,
)
from .sample_errors import BadSample, one_sample

# The columns of each kind, by the names of TRL's data set types. All have `images` too.
COLUMNS = {
    "messages": ("messages",),  # language modeling: SFT
    "prompt": ("prompt", "references"),  # prompt-only: GRPO, RLOO
    "preference": ("prompt", "chosen", "rejected"),  # DPO, ORPO
    "unpaired": ("prompt", "completion", "label"),  # unpaired preference: KTO
}
OWN_KEYS = ("id", "weight", "references")  # of messages, for this package
BESIDE = ("images", "videos", "id")  # further keys of preferences that are known; id is not a column
ROWS_AT_ONCE = 1000  # rows that exist as Python objects at the same time


def trl_dataset(
    source: str | Path, kind: str = "messages", split: str = "train", sampling: VideoSampling | None = None
) -> Any:
    """Read a file into the `datasets.Dataset` that a trainer of TRL takes.

    Texts, paths of images, and frames of videos as PNG files are held in memory; images are decoded when a row is read.

    Args:
        source (`str` or `Path`): See `load_conversations`. Relative image paths refer to the folder of the file.
        kind (`str`, *optional*, defaults to `"messages"`): What the rows are.

            - `"messages"`: conversations, for `SFTTrainer`.
            - `"prompt"`: conversations up to their last answer, for `GRPOTrainer` and `RLOOTrainer`. That answer, or its
              `references`, is the column `references` (a list of texts), which reward functions receive.
            - `"preference"`: records of `prompt`, `chosen` and `rejected`, lists of messages each, for `DPOTrainer`.
            - `"unpaired"`: records of `prompt`, `completion` (lists of messages) and `label` (true if the completion is
              good), for `KTOTrainer`.
        split (`str`, *optional*, defaults to `"train"`): The split, if the data set has several.
        sampling (`VideoSampling`, *optional*): Which frames of videos are read; pass `processor.video_sampling`.

    Returns:
        `datasets.Dataset`: The columns of the kind, and `images`: a list of PIL images in reading order, empty if there is
        none. The frames of videos are images with a time in the messages.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImportError: If `datasets` is not installed.
        ValueError: If the kind is unknown, or a record is broken or would lose something, with its location.
    """
    if kind not in COLUMNS:
        raise ValueError(f"kind={kind!r} is not known; choose from {', '.join(map(repr, COLUMNS))}.")
    datasets = import_datasets()
    types = {"references": datasets.List(datasets.Value("string")), "label": datasets.Value("bool")}
    features = {name: types.get(name) or datasets.Json() for name in COLUMNS[kind]}
    features = datasets.Features(features | {"images": datasets.List(datasets.Image())})
    rows_of = _conversation_rows if kind in ("messages", "prompt") else _answer_rows
    rows = rows_of(source, kind, split, sampling)
    parts = []
    while part := list(islice(rows, ROWS_AT_ONCE)):
        parts.append(datasets.Dataset.from_list(part, features=features))
    return datasets.concatenate_datasets(parts)


def _conversation_rows(
    source: str | Path, kind: str, split: str, sampling: VideoSampling | None
) -> Iterator[dict[str, Any]]:
    try:
        conversations = load_conversations(source, split=split, for_training=kind == "messages", allow_urls=False)
    except BadSample as error:  # without the remedy: nothing is skipped here
        raise BadSample(error.reason, error.location) from error.__cause__
    for index in range(len(conversations)):
        sample = conversations[index]
        with one_sample(location_of(sample)):
            row = _conversation_row(sample, kind, sampling)
        yield row


def _conversation_row(sample: dict[str, Any], kind: str, sampling: VideoSampling | None) -> dict[str, Any]:
    """A row of kind "messages" or "prompt".

    Raises:
        ValueError: If an answer must not be trained on, which TRL does not know.
    """
    messages, images = _images_apart(with_frames(complete_messages(sample), sampling))
    if kind == "prompt":
        answer = messages.pop() if messages[-1]["role"] == "assistant" else None
        references = [] if answer is None else answer.get("references") or [_text(answer["content"])]
        return {"prompt": _for_template(messages), "references": references, "images": images}
    if any(message.get("weight") == 0 for message in messages):
        raise ValueError(
            "an answer has the weight 0, and TRL trains on every answer; remove the weight, or use dsvl train, which skips "
            "such answers."
        )
    return {"messages": _for_template(messages), "images": images}


def _answer_rows(source: str | Path, kind: str, split: str, sampling: VideoSampling | None) -> Iterator[dict[str, Any]]:
    records = open_records(source, split)
    if not len(records):
        raise ValueError(f"{records.source} holds no records; expected {', '.join(COLUMNS[kind])} in each.")
    unread: set[str] = set()
    for index in range(len(records)):
        raw = records.read(index)
        with one_sample(partial(records.location, index)):
            record = records.parse(raw)
            row = _answer_row(record, records.root, kind, sampling)
            unread |= {str(key) for key in record} - {*COLUMNS[kind], *BESIDE}
        yield row
    log_unread(records.source, sorted(unread))


def _answer_row(record: Any, root: Path | None, kind: str, sampling: VideoSampling | None) -> dict[str, Any]:
    """A row of kind "preference" or "unpaired".

    Raises:
        ValueError: If the record does not have this form.
    """
    columns = COLUMNS[kind]
    present = {key for key, value in record.items() if value is not None} if isinstance(record, dict) else set()
    if not present >= set(columns):
        what = shortened(sorted(map(str, present))) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"expected an object with {', '.join(columns)} (and images), got {what}.")
    lost = sorted(key for key in (MEANINGFUL | SAMPLE_KEYS) - {*columns, *BESIDE} if is_given(record.get(key)))
    if lost:
        raise ValueError(
            f"the record has the key {', '.join(lost)}, which would be lost; known are {', '.join((*columns, *BESIDE))}. "
            "Remove it, or convert it."
        )
    answers = [name for name in columns[1:] if name != "label"]
    for name in ("prompt", *answers):
        if not isinstance(record[name], list):
            raise ValueError(f"{name} is of type {type(record[name]).__name__}; expected a list of messages.")
    if not record["prompt"]:
        raise ValueError("prompt is empty; expected messages, the last of the user.")
    listed = {key: record.get(key) or [] for key in ("images", "videos")}
    sample = resolve_images({"messages": record["prompt"], **listed}, root)
    row: dict[str, Any] = {}
    for name in answers:
        if len(record[name]) != 1:
            raise ValueError(f"{name} has {len(record[name])} messages; expected one, of the assistant.")
        check_conversation(sample | {"messages": [*sample["messages"], *record[name]]}, allow_urls=False)
        if sample["messages"][-1]["role"] == "assistant":
            raise ValueError("prompt ends with a message of the assistant; expected one of the user.")
        row[name] = _for_template(record[name])
    messages, images = _images_apart(with_frames(complete_messages(sample), sampling))
    if "label" in columns:
        if not isinstance(record["label"], bool):
            raise ValueError(f"label is {shortened(repr(record['label']))}; expected true or false.")
        row["label"] = record["label"]
    return {"prompt": _for_template(messages)} | row | {"images": images}


def _images_apart(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Complete messages with parts `{"type": "image"}`, and the images in reading order."""
    images = [_image(source) for source in images_of(messages)]
    apart = []
    for message in messages:
        if not isinstance(message["content"], str):
            parts = [_without_source(part) if part["type"] == "image" else part for part in message["content"]]
            message = message | {"content": parts}
        apart.append(message)
    return apart, images


def _without_source(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key in ("type", *FRAME_KEYS)}


def _image(source: Any) -> Any:
    """An image as `datasets.Image` takes it."""
    if hasattr(source, "read_frame"):
        return frame_file(source)
    source = fetch_image_source(source)  # the bytes of a data URL
    return read_image(source) if isinstance(source, str) and not os.path.isfile(source) else source


def _for_template(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the keys that a chat template reads."""
    return [{key: value for key, value in message.items() if key not in OWN_KEYS} for message in messages]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
