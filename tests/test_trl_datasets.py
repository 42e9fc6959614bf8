"""Files of conversations and preferences become the data sets that TRL's trainers take."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsvl.data import load_conversations, trl_dataset
from dsvl.image_reading_dsvl import read_image

datasets = pytest.importorskip("datasets")

QUESTION = [{"role": "user", "content": [{"type": "image", "path": "images/0.png"}, {"type": "text", "text": "What?"}]}]
CUP, DOG = ([{"role": "assistant", "content": answer}] for answer in ("A cup.", "A dog."))
PREFERENCE = {"prompt": QUESTION, "chosen": CUP, "rejected": DOG}
LABELLED = {"prompt": QUESTION, "completion": CUP, "label": False}


@pytest.fixture(autouse=True)
def images(tmp_path: Path) -> list[Image.Image]:
    (tmp_path / "images").mkdir()
    made = [Image.new("RGB", (8, 6), (40 * index, 0, 0)) for index in range(4)]
    for index, image in enumerate(made):
        image.save(tmp_path / f"images/{index}.png")
    return made


@pytest.fixture
def write(tmp_path: Path):
    def write(*records: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        return path

    return write


def same_image(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_conversations_with_their_images_apart(write, images):
    part = {"type": "image", "path": "images/1.png"}
    second = [{"role": "user", "content": [{"type": "text", "text": "And?"}, part]}, *DOG]
    path = write({"messages": QUESTION + CUP + second}, {"messages": [{"role": "user", "content": "Hello."}, *CUP]})
    first, other = trl_dataset(path)
    assert first["messages"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        *CUP,
        {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "image"}]},
        *DOG,
    ]
    assert len(first["images"]) == 2 and all(map(same_image, first["images"], images))
    assert other == {"messages": [{"role": "user", "content": "Hello."}, *CUP], "images": []}


def test_images_of_every_source(write, tmp_path, images):
    encoded = base64.b64encode((tmp_path / "images/3.png").read_bytes()).decode()
    sources = [
        {"path": "images/0.png"},
        {"url": (tmp_path / "images/1.png").as_uri()},
        {"base64": encoded},
        {"url": f"data:image/png;base64,{encoded}"},
        {},
    ]
    content = [{"type": "image", **source} for source in sources]
    (row,) = trl_dataset(write({"messages": [{"role": "user", "content": content}, *CUP], "images": ["images/2.png"]}))
    expected = [images[index] for index in (0, 1, 3, 3, 2)]
    assert len(row["images"]) == 5 and all(map(same_image, row["images"], expected))


def test_other_forms_of_records(write, images):
    path = write(
        {
            "image": "images/2.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}],
        }
    )
    (row,) = trl_dataset(path)
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]
    assert same_image(row["images"][0], images[2])


def test_a_table_with_images_inside(tmp_path, images):
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    rows = {"messages": [[question, *CUP]], "images": [[images[1]]]}
    features = {"messages": datasets.List(datasets.Json()), "images": datasets.List(datasets.Image())}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(tmp_path / "data.parquet")
    (row,) = trl_dataset(tmp_path / "data.parquet")
    assert same_image(row["images"][0], images[1])


def test_more_rows_than_are_converted_at_once(write):
    path = write(*({"messages": [{"role": "user", "content": str(index)}, *CUP]} for index in range(2050)))
    data = trl_dataset(path)
    assert [row["content"] for (row, _) in data["messages"]] == [str(index) for index in range(2050)]


def test_prompts_end_before_the_last_answer(write):
    voted = [{"role": "assistant", "content": "A cup.", "references": ["A cup.", "A mug."]}]
    path = write(
        {"messages": QUESTION + CUP},
        {"messages": QUESTION + voted},
        {"messages": QUESTION + DOG + [{"role": "user", "content": "Sure?"}] + CUP},
        {"messages": QUESTION},
    )
    rows = list(trl_dataset(path, "prompt"))
    assert [len(row["prompt"]) for row in rows] == [1, 1, 3, 1]
    assert [row["references"] for row in rows] == [["A cup."], ["A cup.", "A mug."], ["A cup."], []]
    assert all(len(row["images"]) == 1 and set(row["prompt"][-1]) == {"role", "content"} for row in rows)


def test_preferences_and_labelled_answers(write, images):
    (row,) = trl_dataset(write(PREFERENCE), "preference")
    assert (row["chosen"], row["rejected"]) == (CUP, DOG)
    assert row["prompt"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert same_image(row["images"][0], images[0])
    (row,) = trl_dataset(write(LABELLED | {"id": 7}), "unpaired")
    assert (row["completion"], row["label"]) == (CUP, False)


BROKEN = {
    "weight": ("messages", {"messages": QUESTION + [CUP[0] | {"weight": 0}] + QUESTION + CUP}, "weight 0, and TRL trains"),
    "address": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "https://a.b/c.png"}]}, *CUP]},
        "is a URL",
    ),
    "no image": ("messages", {"messages": QUESTION + CUP, "images": ["images/0.png"]}, "0 image parts without a source"),
    "no file": (
        "prompt",
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "images/9.png"}]}]},
        "it is not a file",
    ),
    "no rejected": ("preference", {"prompt": QUESTION, "chosen": CUP}, "expected an object with prompt, chosen, rejected"),
    "a conversation": ("preference", {"messages": QUESTION + CUP}, "got ['messages']"),
    "another key": (
        "preference",
        PREFERENCE | {"tools": ["search"], "system": "Be brief."},
        "has the key system, tools, which would be lost; known are prompt, chosen, rejected, images, videos, id.",
    ),
    "no prompt": ("preference", PREFERENCE | {"prompt": []}, "prompt is empty; expected messages, the last of the user."),
    "a text": ("preference", PREFERENCE | {"chosen": "A cup."}, "chosen is of type str; expected a list of messages"),
    "two answers": ("preference", PREFERENCE | {"chosen": CUP + QUESTION + CUP}, "chosen has 3 messages"),
    "a missing file": (
        "preference",
        PREFERENCE | {"prompt": [{"role": "user", "content": [{"type": "image", "path": "images/9.png"}]}]},
        "does not exist",
    ),
    "answered prompt": ("unpaired", LABELLED | {"prompt": QUESTION + CUP}, "prompt ends with a message of the assistant"),
    "label": ("unpaired", LABELLED | {"label": "good"}, "label is 'good'; expected true or false"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_named_with_its_line(write, name):
    kind, record, message = BROKEN[name]
    good = {"messages": {"messages": QUESTION + CUP}, "preference": PREFERENCE, "unpaired": LABELLED}
    path = write(good.get(kind, {"messages": QUESTION + CUP}), record)
    with pytest.raises(ValueError) as caught:
        trl_dataset(path, kind)
    assert message in str(caught.value) and f"{path}, line 2" in str(caught.value)


def test_an_unknown_kind_and_an_empty_file(write):
    with pytest.raises(
        ValueError, match="kind='dpo' is not known; choose from 'messages', 'prompt', 'preference', 'unpaired'"
    ):
        trl_dataset("data.jsonl", "dpo")
    with pytest.raises(ValueError, match="holds no records; expected prompt, chosen, rejected in each"):
        trl_dataset(write(), "preference")


@pytest.mark.parametrize("name", ["rotated.jpg", "alpha.png", "palette.png", "grey16.png", "cmyk.jpg"])
def test_images_have_the_pixels_that_dsvl_train_sees(write, tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
    modes = {"rotated": "RGB", "alpha": "RGBA", "palette": "P", "grey16": "I;16", "cmyk": "CMYK"}
    mode = modes[name.partition(".")[0]]
    if mode == "I;16":
        image = Image.fromarray(np.arange(240, dtype=np.uint16).reshape(12, 20) * 270)
    else:
        image = Image.fromarray(pixels, "RGBA").convert("RGB" if mode != "RGBA" else "RGBA").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / name, **({"exif": exif} if mode == "RGB" else {}))
    (row,) = trl_dataset(write({"messages": [{"role": "user", "content": [{"type": "image", "path": name}]}, *CUP]}))
    assert same_image(read_image(row["images"][0]), read_image(tmp_path / name))


def test_broken_conversations_are_named_as_dsvl_train_names_them(write):
    path = write({"messages": QUESTION + CUP}, {"messages": CUP})
    with pytest.raises(ValueError) as ours:
        load_conversations(path)
    with pytest.raises(ValueError) as theirs:
        trl_dataset(path)
    assert str(ours.value) == f"{theirs.value} Or skip such conversations (--on-bad-sample skip)."


def test_other_keys_of_preferences_are_named_in_the_log(write, caplog):
    caplog.set_level("INFO", logger="dsvl")
    path = write(PREFERENCE | {"score": 3, "tools": []}, PREFERENCE | {"source": "me", "id": 1})
    assert len(trl_dataset(path, "preference")) == 2
    assert f"{path}: not read: score, source, tools." in caplog.messages


def test_tools_and_reasoning_reach_the_chat_template(write):
    function = {"name": "lookup", "arguments": {"word": "cup"}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    result = {"role": "tool", "content": "round", "name": "lookup"}
    answer = {"role": "assistant", "content": "It is round.", "reasoning_content": "Hm.", "weight": 1}
    question, tools = {"role": "user", "content": "Look it up."}, [{"type": "function", "function": {"name": "lookup"}}]
    (row,) = trl_dataset(write({"messages": [question, call, result, answer], "tools": tools}))
    assert row["messages"] == [question | {"tools": tools}, call, result, {k: answer[k] for k in answer if k != "weight"}]
