"""MIMIC-IT: instructions about the pictures of one conversation, which lie in COCO or, as base64, in a file beside them."""

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from ..bad_samples import shortened
from .coco import LLAVA, LLAVA_DIAL, coco_name, conversations_by_picture, llava_picture
from .registry import LeftOut, Record, Sample, assistant, converter, read_json, take, take_texts, user

MAX_PICTURES = 8  # of a conversation; more are frames of a film
MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp"}


def instructions(name: str) -> str:
    return f"MIMIC-IT/{name}_instructions.json"


def read_groups(path: Path, place: Callable[[str], str | None]) -> Iterator[Record]:
    """The conversations of an instruction file.

    `rel_ins_ids` names the other rounds of an instruction's conversation; an instruction belongs to the first conversation
    that names it.

    Args:
        place: a picture's id -> its path, or None if there is no such picture.

    Yields:
        records of `{"rounds": [{"instruction", "answer", "pictures"}]}`.
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
                pictures = [picture for picture in map(place, ids) if picture is not None]
                if len(pictures) < len(ids):
                    record.dropped["a picture that is not in the picture file"] += len(ids) - len(pictures)
                texts = {key: take(data[name], key, str, name) for key in ("instruction", "answer")}
                record.value["rounds"].append(texts | {"pictures": pictures})
        yield record


def talk(rounds: list[dict[str, Any]], shown: list[str], most: int | None = None) -> list[dict[str, Any]]:
    """Rounds as messages; a picture stands before the first question about it, and is added to `shown`."""
    messages: list[dict[str, Any]] = []
    for turn in rounds:
        new = [picture for picture in turn["pictures"] if picture not in shown]
        shown += new
        messages += [user(*[None] * len(new), turn["instruction"].strip()), assistant(turn["answer"])]
    if not shown:
        raise LeftOut("no picture")
    if most is not None and len(shown) > most:
        raise LeftOut(f"more than {most} pictures")
    return messages


@converter(
    "otter_mimicit_cgd",
    "MIMIC-IT: differences of two pictures of COCO",
    (instructions("CGD"),),
    lambda root, pictures: read_groups(root / instructions("CGD"), coco_name),
)
def otter_mimicit_cgd(record: Any, random: Random) -> Sample:
    shown: list[str] = []
    return {"messages": talk(record["rounds"], shown), "images": shown}


def extracted(name: str) -> Callable[[Path, Path], Iterator[Record]]:
    """A reader of an instruction file whose pictures are written from the file beside it into a folder first."""

    def read(root: Path, pictures: Path) -> Iterator[Record]:
        paths = extract_pictures(root / f"MIMIC-IT/{name}", pictures / name)
        return read_groups(root / instructions(name), paths.get)

    return read


def extract_pictures(source: Path, folder: Path) -> dict[str, str]:
    """Write the pictures of `source`.json (id: base64), or `source`.parquet, as files; what is there is kept.

    Returns:
        A picture's id -> its absolute path. One that is no picture is absent.
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
                    f"{source}: the picture id {shortened(repr(name))} cannot be a file's name; expected letters and digits."
                )
            partial = folder / "partial"
            partial.write_bytes(content)
            partial.replace(folder / f"{name}{suffix}")
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
        raise FileNotFoundError(f"Neither {path} nor {table} exists; one of them holds the pictures.")
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


_register("SD", "differences of two similar pictures", None)
_register("SN", "walks through rooms", MAX_PICTURES)
_register("TVC", "television series", MAX_PICTURES)
_register("VST", "stories in pictures", MAX_PICTURES)


def read_blend(root: Path, pictures: Path) -> Iterator[Record]:
    by_picture = conversations_by_picture(root)
    for record in read_groups(root / instructions("CGD"), coco_name):
        named = dict.fromkeys(picture for turn in record.value["rounds"] for picture in turn["pictures"])
        record.value["conversations"] = {picture: by_picture.get(picture, []) for picture in named}
        yield record


@converter(
    "llava_otter_blend",
    "LLaVA's conversations about two pictures of COCO, and then MIMIC-IT's about their differences",
    (instructions("CGD"), *LLAVA, LLAVA_DIAL),
    read_blend,
)
def llava_otter_blend(record: Any, random: Random) -> Sample:
    messages: list[dict[str, Any]] = []
    shown: list[str] = []
    pictures = list(record["conversations"])
    for picture in pictures:
        for conversation in record["conversations"][picture]:
            rounds = llava_picture(conversation)["messages"]
            if picture in shown:
                rounds = [m | {"content": [part for part in m["content"] if part["type"] != "image"]} for m in rounds]
            shown += [picture] * (picture not in shown)
            messages += rounds
        if picture not in shown and picture != pictures[-1]:
            raise LeftOut("no LLaVA conversation about a picture before the last")  # which would then come first
    if not messages:
        raise LeftOut("no LLaVA conversation about its pictures")
    return {"messages": messages + talk(record["rounds"], shown), "images": shown}
