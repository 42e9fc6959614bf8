"""Small raw data sets in the published schemas, with real photographs, and the expected conversations."""

import base64
import io
import json
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_image(path: Path, photograph: Any, size: tuple[int, int] = (48, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph.resize(size).save(path)


def as_base64(photograph: Any, form: str = "JPEG") -> str:
    file = io.BytesIO()
    photograph.resize((32, 24)).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def ask(*parts: str | None) -> dict:
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


COCO = [f"{number:012d}.jpg" for number in (33471, 52846, 334872)]


def llava_record(image: str, *values: str) -> dict:
    turns = [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]
    return {"id": image.split(".")[0], "image": image, "conversations": turns}


def write_coco(root: Path, photographs: list[Any]) -> None:
    for name, photograph in zip(COCO, photographs, strict=False):
        write_image(root / "coco/train2017" / name, photograph)


def write_llava(root: Path) -> None:
    write_json(
        root / "llava/detail_23k.json",
        [
            llava_record(COCO[0], "<image>\nWhat do you see?", "An astronaut.", "And behind her?", "A flag."),
            llava_record(COCO[1], "Describe this.\n<image>", "A cup\nof coffee."),
        ],
    )
    write_json(root / "llava/complex_reasoning_77k.json", [llava_record(COCO[0], "Why is she glad?\n<image>", "She flies.")])
    write_json(
        root / "llava/conversation_58k.json",
        [llava_record(COCO[2], "<image>\nWhat animal is it?", "A cat.", "What colour?", "Ginger.")],
    )


def write_mimicit(root: Path, name: str, data: dict[str, tuple[str, str, list[str], list[str]]]) -> None:
    keys = ("instruction", "answer", "image_ids", "rel_ins_ids")
    instructions = {key: dict(zip(keys, value, strict=True)) for key, value in data.items()}
    meta = {"version": "0.0.1", "time": "2023-06", "author": "ntu"}
    write_json(root / f"MIMIC-IT/{name}_instructions.json", {"meta": meta, "data": instructions})
