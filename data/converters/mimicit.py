"""MIMIC-IT: instructions about the images of one conversation, which lie in COCO or, as base64, in a file beside them."""

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from ...utils.atomic_files import atomic_path
from ..bad_samples import shortened
from .coco import LLAVA, LLAVA_DIAL, coco_name, conversations_by_image, llava_image
from .registry import LeftOut, Record, Sample, assistant, converter, read_json, take, take_texts, user

MAX_IMAGES = 8  # of a conversation; more are frames of a film
MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp"}


def instructions(name: str) -> str:
    return f"MIMIC-IT/{name}_instructions.json"


def read_groups(path: Path, place: Callable[[str], str | None]) -> Iterator[Record]:
    """The conversations of an instruction file.

    `rel_ins_ids` names the other rounds of an instruction's conversation; an instruction belongs to the first conversation
    that names it.

    Args:
        place: an image's id -> its path, or None if there is no such image.

    Yields:
        records of `{"rounds": [{"instruction", "answer", "images"}]}`.
    """
    data = take(read_json(path), "data", dict, path.name)
    used: set[str] = set()
    for first in data:
        if first in used:
            continue
        record = Record(first, {"rounds": []})
        related = take_texts(data[first], "rel_ins_ids", first)
        for name in dict.fromkeys([first, *related]):
            if name not in data:
                record.dropped["a related instruction that is not in the file"] += 1
            elif name not in used:
                used.add(name)
                ids = take_texts(data[name], "image_ids", name)
                images = [image for image in map(place, ids) if image is not None]
                if len(images) < len(ids):
                    record.dropped["an image that is not in the image file"] += len(ids) - len(images)
                texts = {key: take(data[name], key, str, name) for key in ("instruction", "answer")}
                record.value["rounds"].append(texts | {"images": images})
        yield record


def talk(rounds: list[dict[str, Any]], shown: list[str], most: int | None = None) -> list[dict[str, Any]]:
    """Rounds as messages; an image stands before the first question about it, and is added to `shown`."""
    messages: list[dict[str, Any]] = []
    for turn in rounds:
        new = [image for image in turn["images"] if image not in shown]
        shown += new
        messages += [user(*[None] * len(new), turn["instruction"].strip()), assistant(turn["answer"])]
    if not shown:
        raise LeftOut("no image")
    if most is not None and len(shown) > most:
        raise LeftOut(f"more than {most} images")
    return messages


@converter(
    "otter_mimicit_cgd",
    "MIMIC-IT: differences of two images of COCO",
    (instructions("CGD"),),
    lambda root, images: read_groups(root / instructions("CGD"), coco_name),
)
def otter_mimicit_cgd(record: Any, random: Random) -> Sample:
    shown: list[str] = []
    return {"messages": talk(record["rounds"], shown), "images": shown}


def extracted(name: str) -> Callable[[Path, Path], Iterator[Record]]:
    """A reader of an instruction file whose images are written from the file beside it into a folder first."""

    def read(root: Path, images: Path) -> Iterator[Record]:
        paths = extract_images(root / f"MIMIC-IT/{name}", images / name)
        return read_groups(root / instructions(name), paths.get)

    return read


def extract_images(source: Path, folder: Path) -> dict[str, str]:
    """Write the images of `source`.json (id: base64), or `source`.parquet, as files; what is there is kept.

    Returns:
        An image's id -> its absolute path. One that is no image is absent.
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
                    f"{source}: the image id {shortened(repr(name))} cannot be a file's name; expected letters and digits."
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
        raise FileNotFoundError(f"Neither {path} nor {table} exists; one of them holds the images.")
    import ijson  # such a file can be larger than the memory

    with path.open("rb") as file:
        try:
            for name, text in ijson.kvitems(file, ""):
                yield name, text if isinstance(text, str) else ""
        except ijson.JSONError as error:
            raise ValueError(f"{path} is not JSON, or only a part of it ({error}); fetch it again.") from error


def _register(name: str, about: str, most: int | None) -> None:
    def convert(record: Any, random: Random) -> Sample:
        shown: list[str] = []
        return {"messages": talk(record["rounds"], shown, most), "images": shown}

    files = (instructions(name), f"MIMIC-IT/{name}.json | .parquet")
    converter(f"otter_mimicit_{name.lower()}", f"MIMIC-IT: {about}", files, extracted(name))(convert)


_register("SD", "differences of two similar images", None)
_register("SN", "walks through rooms", MAX_IMAGES)
_register("TVC", "television series", MAX_IMAGES)
_register("VST", "stories in images", MAX_IMAGES)


def read_blend(root: Path, images: Path) -> Iterator[Record]:
    by_image = conversations_by_image(root)
    for record in read_groups(root / instructions("CGD"), coco_name):
        named = dict.fromkeys(image for turn in record.value["rounds"] for image in turn["images"])
        record.value["conversations"] = {image: by_image.get(image, []) for image in named}
        yield record


@converter(
    "llava_otter_blend",
    "LLaVA's conversations about two images of COCO, and then MIMIC-IT's about their differences",
    (instructions("CGD"), *LLAVA, LLAVA_DIAL),
    read_blend,
)
def llava_otter_blend(record: Any, random: Random) -> Sample:
    messages: list[dict[str, Any]] = []
    shown: list[str] = []
    images = list(record["conversations"])
    for image in images:
        for conversation in record["conversations"][image]:
            rounds = llava_image(conversation)["messages"]
            if image in shown:
                rounds = [m | {"content": [part for part in m["content"] if part["type"] != "image"]} for m in rounds]
            shown += [image] * (image not in shown)
            messages += rounds
        if image not in shown and image != images[-1]:
            raise LeftOut("no LLaVA conversation about an image before the last")  # which would then come first
    if not messages:
        raise LeftOut("no LLaVA conversation about its images")
    return {"messages": messages + talk(record["rounds"], shown), "images": shown}
