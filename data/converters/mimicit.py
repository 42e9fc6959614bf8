"""MIMIC-IT: instructions about images of COCO, or about images that a second file contains as base64."""

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from ...utils.atomic_files import atomic_path
from ...utils.text import shortened
from .coco import LLAVA, LLAVA_DIAL, coco_name, conversations_by_image, llava_image
from .registry import RawRecord, Sample, SkipRecord, assistant, converter, read_json, take, take_texts, user

MAX_IMAGES = 8  # in a conversation; conversations with more are about video frames
MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp"}


def instructions(name: str) -> str:
    return f"MIMIC-IT/{name}_instructions.json"


def read_groups(path: Path, image_path: Callable[[str], str | None]) -> Iterator[RawRecord]:
    """Read the conversations of an instruction file.

    `rel_ins_ids` of an instruction names the other turns of its conversation. An instruction belongs to the first
    conversation that names it.

    Args:
        path (`Path`): The instruction file.
        image_path (`Callable`): Image id -> its path, or None if the image does not exist.

    Yields:
        `RawRecord`: Records whose value is `{"turns": [{"instruction", "answer", "images"}]}`.
    """
    data = take(read_json(path), "data", dict, path.name)
    used: set[str] = set()
    for first in data:
        if first in used:
            continue
        record = RawRecord(first, {"turns": []})
        related = take_texts(data[first], "rel_ins_ids", first)
        for name in dict.fromkeys([first, *related]):
            if name not in data:
                record.dropped["a related instruction that is not in the file"] += 1
            elif name not in used:
                used.add(name)
                ids = take_texts(data[name], "image_ids", name)
                images = [image for image in map(image_path, ids) if image is not None]
                if len(images) < len(ids):
                    record.dropped["an image that is not in the image file"] += len(ids) - len(images)
                texts = {key: take(data[name], key, str, name) for key in ("instruction", "answer")}
                record.value["turns"].append(texts | {"images": images})
        yield record


def turns_to_messages(turns: list[dict[str, Any]], shown: list[str], max_images: int | None = None) -> list[dict[str, Any]]:
    """Convert turns to messages. An image is inserted before the first question about it, and appended to `shown`.

    Raises:
        SkipRecord: If there is no image, or more than `max_images`.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns:
        new = [image for image in turn["images"] if image not in shown]
        shown += new
        messages += [user(*[None] * len(new), turn["instruction"].strip()), assistant(turn["answer"])]
    if not shown:
        raise SkipRecord("no image")
    if max_images is not None and len(shown) > max_images:
        raise SkipRecord(f"more than {max_images} images")
    return messages


@converter(
    "otter_mimicit_cgd",
    "MIMIC-IT: differences of two images of COCO",
    (instructions("CGD"),),
    lambda root, images: read_groups(root / instructions("CGD"), coco_name),
)
def otter_mimicit_cgd(record: Any, random: Random) -> Sample:
    shown: list[str] = []
    return {"messages": turns_to_messages(record["turns"], shown), "images": shown}


def extracted(name: str) -> Callable[[Path, Path], Iterator[RawRecord]]:
    """Make a reader of an instruction file that first extracts the images from the image file."""

    def read(root: Path, images: Path) -> Iterator[RawRecord]:
        paths = extract_images(root / f"MIMIC-IT/{name}", images / name)
        return read_groups(root / instructions(name), paths.get)

    return read


def extract_images(source: Path, folder: Path) -> dict[str, str]:
    """Extract the images of `source`.json (id -> base64) or `source`.parquet to files, unless this was done before.

    Returns:
        `dict[str, str]`: Image id -> its absolute path. Entries that are not images are missing.
    """
    complete = folder / "complete"
    if not complete.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in _base64_of(source):
            try:
                content = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                continue
            suffix = next((suffix for magic, suffix in MAGIC.items() if content.startswith(magic)), None)
            if suffix is None:
                continue
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"{source}: the image id {shortened(repr(name))} cannot be a file name; expected letters and digits."
                )
            with atomic_path(folder / f"{name}{suffix}") as partial:
                partial.write_bytes(content)
        complete.touch()
    return {path.stem: str(path.absolute()) for path in folder.iterdir() if path.suffix in MAGIC.values()}


def _base64_of(source: Path) -> Iterator[tuple[str, str]]:
    table = source.with_name(f"{source.name}.parquet")
    if table.is_file():
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(table)
        names = [column for column in file.schema_arrow.names if column != "base64"]
        for batch in file.iter_batches(batch_size=256):
            rows = batch.to_pydict()
            yield from zip(map(str, rows[names[-1]]), rows["base64"], strict=True)
        return
    path = source.with_name(f"{source.name}.json")
    if not path.is_file():
        raise FileNotFoundError(f"Neither {path} nor {table} exists; one of them must contain the images.")
    import ijson  # the file may be larger than the memory

    with path.open("rb") as file:
        try:
            for name, text in ijson.kvitems(file, ""):
                yield name, text if isinstance(text, str) else ""
        except ijson.JSONError as error:
            raise ValueError(f"{path} is not JSON, or only a part of it ({error}); fetch it again.") from error


def _register(name: str, about: str, max_images: int | None) -> None:
    def convert(record: Any, random: Random) -> Sample:
        shown: list[str] = []
        return {"messages": turns_to_messages(record["turns"], shown, max_images), "images": shown}

    files = (instructions(name), f"MIMIC-IT/{name}.json | .parquet")
    converter(f"otter_mimicit_{name.lower()}", f"MIMIC-IT: {about}", files, extracted(name))(convert)


_register("SD", "differences of two similar images", None)
_register("SN", "walks through rooms", MAX_IMAGES)
_register("TVC", "television series", MAX_IMAGES)
_register("VST", "stories in images", MAX_IMAGES)


def read_blend(root: Path, images: Path) -> Iterator[RawRecord]:
    by_image = conversations_by_image(root)
    for record in read_groups(root / instructions("CGD"), coco_name):
        named = dict.fromkeys(image for turn in record.value["turns"] for image in turn["images"])
        record.value["conversations"] = {image: by_image.get(image, []) for image in named}
        yield record


@converter(
    "llava_otter_blend",
    "LLaVA's conversations about two images of COCO, followed by MIMIC-IT's about their differences",
    (instructions("CGD"), *LLAVA, LLAVA_DIAL),
    read_blend,
)
def llava_otter_blend(record: Any, random: Random) -> Sample:
    messages: list[dict[str, Any]] = []
    shown: list[str] = []
    images = list(record["conversations"])
    for image in images:
        for conversation in record["conversations"][image]:
            own = llava_image(conversation)["messages"]
            if image in shown:
                own = [m | {"content": [part for part in m["content"] if part["type"] != "image"]} for m in own]
            shown += [image] * (image not in shown)
            messages += own
        if image not in shown and image != images[-1]:
            # Without it, the last image would come first.
            raise SkipRecord("no LLaVA conversation about an image before the last")
    if not messages:
        raise SkipRecord("no LLaVA conversation about its images")
    return {"messages": messages + turns_to_messages(record["turns"], shown), "images": shown}
