"""What an evaluation reads: conversations of every format, and DeepSpeed-VisualChat's files."""

import base64
import json
import logging

import datasets
import numpy as np
import pytest
from PIL import Image

from dsvl.data import load_conversations
from dsvl.evaluation.questions import Questions

CUP = {"role": "assistant", "content": "A cup."}


def user(text, *paths, key="path"):
    return {"role": "user", "content": [{"type": "image", key: path} for path in paths] + [{"type": "text", "text": text}]}


def write(path, *samples):
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("one.png", "two.png", "two three.png"):
        Image.new("RGB", (12, 9), "red").save(tmp_path / "images" / name)
    return tmp_path


def test_answers_are_references_and_the_last_question_may_have_none(folder):
    system = {"role": "system", "content": "Be brief."}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "Two"}, {"type": "text", "text": " dogs"}]}
    messages = [system, user("What?", "images/one.png"), CUP, {"role": "user", "content": "And?"}, parts, user("Why?")]
    path = write(folder / "data.jsonl", {"messages": messages})
    (found,) = Questions(path)
    assert found.id == "0" and found.system == [system]
    assert [one.question for one in found.turns] == ["What?", "And?", "Why?"]
    assert [one.references for one in found.turns] == [["A cup."], ["Two dogs"], []]
    assert [one.images for one in found.turns] == [[str(folder / "images/one.png")], [], []]
    assert found.turns[0].answer == CUP and found.turns[2].answer is None
    with pytest.raises(ValueError, match="the last message is the user's"):  # there is nothing to learn
        load_conversations(path)


def test_several_references_count_instead_of_the_answer(folder):
    answer = CUP | {"references": ["cup", "mug"]}
    write(folder / "data.jsonl", {"messages": [user("What?"), answer]})
    (one,) = Questions(folder / "data.jsonl")[0].turns
    assert one.references == ["cup", "mug"] and one.answer == CUP
    for wrong in ("cup", [], [1]):
        write(folder / "data.jsonl", {"messages": [user("What?"), CUP | {"references": wrong}]})
        with pytest.raises(ValueError, match="conversation 0: references are .*; expected a list of strings"):
            Questions(folder / "data.jsonl")


def test_messages_of_a_user_in_a_row_are_one_question(folder):
    write(folder / "data.jsonl", {"messages": [user("Look.", "images/one.png"), user("What?", "images/two.png"), CUP]})
    (one,) = Questions(folder / "data.jsonl")[0].turns
    assert one.question == "Look.\nWhat?" and len(one.messages) == len(one.images) == 2
    write(folder / "data.jsonl", {"messages": [user("What?"), CUP, CUP]})
    with pytest.raises(ValueError, match="an answer follows another answer"):
        Questions(folder / "data.jsonl")


def test_images_that_are_missing_are_not_looked_for_yet(folder):
    write(folder / "data.jsonl", {"messages": [user("What?", "images/nowhere.png")]})
    assert Questions(folder / "data.jsonl")[0].images == [str(folder / "images/nowhere.png")]


def test_conversations_have_names_of_their_own(folder, caplog):
    samples = [{"id": name, "messages": [user("What?"), CUP]} for name in ("cup", 7, "cup", None)]
    path = write(folder / "data.jsonl", *samples, {"messages": [CUP]})
    with pytest.raises(ValueError, match="line 5: a conversation begins"):
        Questions(path)
    write(path, *samples)
    with pytest.raises(ValueError, match="two conversations have the id 'cup'"):
        Questions(path)
    write(path, *samples, {"messages": [CUP]})
    with caplog.at_level(logging.WARNING):
        found = Questions(path, on_bad_sample="skip")
    assert [one.id for one in found] == ["cup", "7", "3"] and found.skipped == 2 and len(found) == 3
    assert "two conversations have the id" in caplog.text


def test_every_source_of_an_image_is_a_path_an_address_or_bytes(folder):
    data = (folder / "images/one.png").read_bytes()
    parts = [
        {"type": "image", "url": "https://example.org/cup.png"},
        {"type": "image", "base64": base64.b64encode(data).decode()},
        {"type": "image", "base64": "data:image/png;base64," + base64.b64encode(data).decode()},
        {"type": "image", "url": "data:image/png;base64," + base64.b64encode(data).decode()},
        {"type": "image", "image": str(folder / "images/two.png")},
        {"type": "image"},
    ]
    sample = {"messages": [{"role": "user", "content": parts}], "images": ["images/one.png"]}
    (found,) = Questions(write(folder / "data.jsonl", sample))
    paths = [str(folder / f"images/{name}.png") for name in ("two", "one")]
    assert found.images == ["https://example.org/cup.png", data, data, data, *paths]
    broken = {"messages": [{"role": "user", "content": [{"type": "image", "base64": "§"}]}]}
    with pytest.raises(ValueError, match="is not valid base64"):
        Questions(write(folder / "data.jsonl", broken))


def test_tables_hold_names_references_and_images(folder):
    pixels = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content, "references": None},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}], "references": ["cup"] * 10},
    ]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                    "references": [datasets.Value("string")],
                }
            ],
            "images": [datasets.Image()],
        }
    )
    rows = {"id": ["cup"], "messages": [messages], "images": [[Image.fromarray(pixels)]]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(folder / "data.parquet")
    table.save_to_disk(folder / "data")
    for path in (folder / "data.parquet", folder / "data"):
        (found,) = Questions(path)
        assert found.id == "cup" and found.turns[0].references == ["cup"] * 10
        assert isinstance(found.images[0], bytes)
        assert load_conversations(path)[0]["messages"][1]["content"] == [{"type": "text", "text": "A cup."}]


def test_the_fingerprint_is_of_what_is_asked_and_known(folder):
    def fingerprint(*messages, **sample):
        return Questions(write(folder / "data.jsonl", {"messages": list(messages)} | sample)).fingerprint

    asked = user("What?", "images/one.png")
    same = fingerprint(asked, CUP)
    assert fingerprint(asked, CUP, source="elsewhere") == same
    others = [
        fingerprint(asked, CUP | {"references": ["cup"]}),
        fingerprint(asked, {"role": "assistant", "content": "A mug."}),
        fingerprint(asked),
        fingerprint(asked, CUP, id="cup"),
        fingerprint({"role": "system", "content": "Be brief."}, asked, CUP),
        fingerprint(user("What?", "images/two.png"), CUP),
        fingerprint(user("Why?", "images/one.png"), CUP),
        *(fingerprint(user("What?", base64.b64encode(data).decode(), key="base64"), CUP) for data in (b"one", b"two")),
    ]
    assert len({same, *others}) == 10


# -- DeepSpeed-VisualChat's files -----------------------------------------------------------------------------------------


def test_the_originals_files_are_read_as_they_are(folder, monkeypatch):
    (folder / "eval/eval_data").mkdir(parents=True)
    monkeypatch.chdir(folder)
    path = folder / "eval/eval_data/eval.json"
    one, two, three = (str(folder / "images" / name) for name in ("one.png", "two.png", "two three.png"))
    written = {
        "cups": [["What?", "./images/one.png ./images/two.png "], ["And now?"], ["This?", "images/one.png"]],
        "spaces": [["What?", "images/two three.png"], ["And?", ["images/two three.png", "images/one.png"]]],
        "text": [["What is a cup?"]],
        "missing": [["What?", "images/nowhere.png"]],
    }
    path.write_text(json.dumps(written, indent=2))
    cups, spaces, text, missing = Questions(path)
    assert [found.id for found in (cups, spaces, text, missing)] == list(written)
    assert [one_.question for one_ in cups.turns] == ["What?", "And now?", "This?"]
    assert [one_.images for one_ in cups.turns] == [[one, two], [], [one]]
    assert [one_.images for one_ in spaces.turns] == [[three], [three, one]]
    assert text.images == [] and missing.images == [str(folder / "images/nowhere.png")]
    assert all(one_.references == [] and one_.answer is None for one_ in cups.turns)


def test_images_beside_the_originals_file_come_first(folder, monkeypatch):
    (folder / "elsewhere/images").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(folder / "elsewhere/images/one.png")
    (folder / "eval.json").write_text('{"cup": [["What?", "images/one.png"]]}')
    monkeypatch.chdir(folder / "elsewhere")
    assert Questions("../eval.json")[0].images == [str(folder / "images/one.png")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"cup": []}', "'cup': expected a list of turns"),
        ('{"mesages": [{"role": "user", "content": "What?"}]}', "'mesages', turn 0: expected .question"),
        ('{"cup": [["What?", "a.png", "A cup."]]}', "'cup', turn 0: expected .question"),
        ('{"cup": [["What?"], [3]]}', "'cup', turn 1: expected .question"),
        ('{"cup": [["What?"]], "cup": [["Why?"]]}', "'cup' is used twice"),
    ],
)
def test_what_is_none_of_the_originals_files_is_named(tmp_path, text, message):
    path = tmp_path / "eval.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Questions(path)


def test_json_lines_may_be_called_json(folder):
    for count in (1, 2):
        write(folder / "data.json", *[{"messages": [user("What?"), CUP]}] * count)
        assert len(Questions(folder / "data.json")) == count
