"""Loading conversations: what is accepted, the errors, and the same sample from every file format."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsvl.data import complete_messages, load_conversations
from dsvl.data.messages import check_conversation, images_of
from dsvl.data.sample_errors import NAMED
from dsvl.image_reading_dsvl import read_image

QUESTION = {"role": "user", "content": "What is red?"}
ANSWER = {"role": "assistant", "content": "A cup."}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"messages": [QUESTION, ANSWER]}


def write(path, *samples):
    """Write a JSON lines file; strings are written unchanged."""
    lines = [sample if isinstance(sample, str) else json.dumps(sample) for sample in samples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def asked_with(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


@pytest.fixture
def images(photographs, tmp_path):
    """Two small photographs as files, by their relative paths."""
    (tmp_path / "images").mkdir()
    paths = [f"images/{number}.png" for number in range(2)]
    for path, photograph in zip(paths, photographs[:2], strict=True):
        photograph.resize((12, 9)).save(tmp_path / path)
    return paths


# -- JSON lines --------------------------------------------------------------------------------------------------------


def test_relative_paths_start_at_the_files_folder(tmp_path, images, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    absolute = str(tmp_path / images[1])
    parts = [{"type": "image", "path": images[0]}, {"type": "image", "image": absolute}, {"type": "image"}]
    written = asked_with(*parts, {"type": "text", "text": "?"}) | {"images": [images[1]]}
    write(tmp_path / "data.jsonl", written)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (sample,) = load_conversations("../data.jsonl")
    (message, _) = complete_messages(sample)
    sources = [part.get("path", part.get("image")) for part in message["content"][:3]]
    expected = [(tmp_path / images[0]).read_bytes(), *[(tmp_path / images[1]).read_bytes()] * 2]
    assert [Path(source).read_bytes() for source in sources] == expected


def test_urls_are_no_paths(tmp_path):
    address = "https://example.org/cat.png"
    parts = [
        {"type": "image", "url": address},
        {"type": "image", "image": address},
        {"type": "image", "base64": "iVBORw0KGgo="},
    ]
    (sample,) = load_conversations(write(tmp_path / "data.jsonl", asked_with(*parts)))
    assert complete_messages(sample)[0]["content"] == parts


def test_blank_lines_are_no_samples_but_count_as_lines(tmp_path):
    data = load_conversations(write(tmp_path / "data.jsonl", "", GOOD, "  \t", GOOD | {"id": 7}, ""))
    assert len(data) == 2 and data.skipped == 0
    assert data[0] == GOOD and data[1]["id"] == 7
    write(tmp_path / "data.jsonl", "", GOOD, "  ", "{")
    with pytest.raises(ValueError, match="line 4"):
        load_conversations(tmp_path / "data.jsonl")


def test_samples_are_read_by_index_in_any_order(tmp_path):
    texts = ["naïve", "", "鳥" * 50, "last"]
    samples = [{"messages": [{"role": "user", "content": text}, ANSWER]} for text in texts]
    path = tmp_path / "data.jsonl"
    path.write_bytes("\r\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples).encode())  # no last newline
    data = load_conversations(path)
    assert [data[index]["messages"][0]["content"] for index in (3, 0, 2, 1, -1)] == ["last", "naïve", texts[2], "", "last"]
    with pytest.raises(IndexError):
        data[4]


BROKEN_LINES = {
    '{"messages": [': "is not JSON",
    "not json": "is not JSON",
    "[1, 2]": "expected an object with a list of messages, got list",
    '{"text": "x", "id": 1}': r"expected an object with a list of messages, got \['id', 'text'\]",
    json.dumps({"messages": [QUESTION, {"role": "assistant", "content": None}]}): "message 1 has a content of type NoneType",
    json.dumps({"messages": [{"role": "user"}, ANSWER]}): "message 0 has a content of type NoneType",
    json.dumps({"messages": [{"role": "user", "content": 5}, ANSWER]}): "message 0 has a content of type int",
    json.dumps({"messages": ["hello", ANSWER]}): "message 0 has the role None",
    json.dumps(GOOD | {"images": 1}): "images is of type int; expected a list",
    json.dumps(asked_with({"type": "image", "path": "x" * 5000})): "does not exist",
}


@pytest.mark.parametrize("line", BROKEN_LINES, ids=lambda line: line[:40])
def test_a_broken_line_is_named(tmp_path, line):
    path = write(tmp_path / "data.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=BROKEN_LINES[line]) as error:
        load_conversations(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert "--on-bad-sample skip" in str(error.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"messages": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="line 1: is not JSON"):
        load_conversations(path)


def test_broken_lines_can_be_skipped_and_are_counted(tmp_path, caplog):
    path = write(tmp_path / "data.jsonl", GOOD, *BROKEN_LINES, GOOD)
    with caplog.at_level(logging.WARNING, "dsvl"):
        data = load_conversations(path, on_bad_sample="skip", max_bad_samples=1)
    assert len(data) == 2 and data.skipped == len(BROKEN_LINES)
    assert data[0] == data[1] == GOOD
    messages = [record.getMessage() for record in caplog.records]
    assert [f"Skipped: {path}, line {number}: " in text for number, text in enumerate(messages[:-1], start=2)]
    assert len(messages) == len(BROKEN_LINES) + 1
    assert messages[-1] == f"{path}: {data.skipped} of {data.skipped + 2} samples are broken and were skipped."


def test_a_file_of_broken_lines_does_not_flood_the_log(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "dsvl"):
        path = write(tmp_path / "data.jsonl", GOOD, *["{"] * (NAMED + 30))
        data = load_conversations(path, "skip", max_bad_samples=1)
    assert data.skipped == NAMED + 30 and len(caplog.records) == NAMED + 1


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_a_file_with_nothing_good_is_an_error(tmp_path, on_bad_sample):
    path = write(tmp_path / "data.jsonl", "", "")
    with pytest.raises(ValueError, match=r"holds no conversation to train on \(0 were skipped\)"):
        load_conversations(path, on_bad_sample)


def test_a_file_with_nothing_but_broken_lines_is_an_error(tmp_path):
    path = write(tmp_path / "data.jsonl", "{", "{")
    with pytest.raises(ValueError, match=r"data.jsonl holds no conversation to train on \(2 were skipped\)"):
        load_conversations(path, "skip")


def test_unknown_sources_and_options_are_refused(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    for name in ("no.jsonl", "no.json", "no.parquet", "no.arrow", "no.csv", "folder/no.txt"):
        with pytest.raises(FileNotFoundError, match=rf"{name} (is not a file|does not exist); pass"):
            load_conversations(tmp_path / name)
    with pytest.raises(ValueError, match="on_bad_sample='ignore' is not known; choose from 'error', 'skip'"):
        load_conversations(write(tmp_path / "data.jsonl", GOOD), on_bad_sample="ignore")


def test_the_old_name_of_for_training_is_deprecated(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "What?"}]}))
    with pytest.warns(DeprecationWarning, match="'to_learn' of load_conversations is deprecated; use 'for_training'"):
        assert len(load_conversations(path, to_learn=False)) == 1


# -- the rules ---------------------------------------------------------------------------------------------------------

IMAGE = {"type": "image", "url": "https://example.org/cat.png"}
RULES = {
    "no list": ({"messages": "x"}, r"expected an object with a list of messages, got \['messages'\]\."),
    "no messages": ({"messages": []}, r"expected an object with a list of messages, got \['messages'\]\."),
    "bad role": (
        {"messages": [QUESTION, {"role": "tool", "content": "x"}]},
        "message 1 \\(tool\\) follows no call; expected an assistant's message with tool_calls before it.",
    ),
    "unknown role": (
        {"messages": [QUESTION, {"role": "robot", "content": "x"}]},
        "message 1 has the role 'robot'; expected user or assistant, after at most one system message, or tool.",
    ),
    "late system message": (
        {"messages": [QUESTION, SYSTEM, ANSWER]},
        "message 1 has the role 'system'; expected user or assistant, after at most one system message.",
    ),
    "two system messages": ({"messages": [SYSTEM, SYSTEM, QUESTION, ANSWER]}, "message 1 has the role 'system'"),
    "answer first": ({"messages": [ANSWER]}, "a conversation begins with a user's message"),
    "system message alone": ({"messages": [SYSTEM]}, "a conversation begins with a user's message"),
    "no answer": (
        {"messages": [QUESTION, ANSWER, QUESTION]},
        "the last message is the user's; expected an assistant's answer to train on.",
    ),
    "unknown part": (
        asked_with({"type": "audio", "path": "x"}),
        r"message 0 \(user\) has a part \{'type': 'audio', 'path': 'x'\}; expected a text, or in a user's message an "
        "image or a video.",
    ),
    "text that is none": (asked_with({"type": "text", "text": 3}), r"message 0 \(user\) has a part"),
    "part that is no dict": (asked_with("x"), r"message 0 \(user\) has a part 'x'; expected a text"),
    "image in an answer": (
        {"messages": [QUESTION, {"role": "assistant", "content": [IMAGE]}]},
        r"message 1 \(assistant\) has a part .*; expected a text, or in a user's message an image or a video.",
    ),
    "image in a system message": ({"messages": [{"role": "system", "content": [IMAGE]}, QUESTION, ANSWER]}, r"\(system\)"),
    "too few images": (
        asked_with({"type": "image"}, {"type": "image"}) | {"images": ["https://example.org/cat.png"]},
        "hold 2 image parts without a source, but there are 1 images; expected one for each, in reading order.",
    ),
    "too many images": (GOOD | {"images": ["https://x.org/cat.png"]}, "hold 0 image parts .*, but there are 1 images"),
    "images for named parts": (
        asked_with(IMAGE) | {"images": ["https://x.org/cat.png"]},
        "hold 0 image parts .* are 1 images",
    ),
    "missing image": (asked_with({"type": "image", "path": "/no/cat.png"}), "the image /no/cat.png does not exist."),
    "missing listed image": (
        asked_with({"type": "image"}) | {"images": ["/no/cat.png"]},
        "the image /no/cat.png does not exist.",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_has_its_message(rule):
    sample, sentence = RULES[rule]
    with pytest.raises(ValueError, match=sentence):
        check_conversation(sample)


@pytest.mark.parametrize(
    "messages",
    [
        [SYSTEM, QUESTION, ANSWER],
        [QUESTION, QUESTION, ANSWER, ANSWER],
        [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
        [{"role": "user", "content": []}, ANSWER],
    ],
    ids=["system message", "several in a row", "parts", "no part"],
)
def test_valid_messages_are_accepted(processor, messages):
    check_conversation({"messages": messages})
    assert processor.apply_chat_template(complete_messages(messages))


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(ValueError) as error:
        check_conversation(asked_with({"type": "audio", "data": "x" * 10_000}))
    assert len(str(error.value)) < 300


# -- the same conversation from every format ---------------------------------------------------------------------------


def asked(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def answered(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


MESSAGES = [
    asked({"type": "image"}, "What is it?"),
    answered("A person."),
    asked("And ", {"type": "image"}, "?"),
    answered("A cup."),
]
TEXTS = [asked("One?"), answered("Two.")]


def pixels(messages):
    """Messages with their images as arrays, so that they can be compared."""

    def read(part):
        if part["type"] == "text":
            return part
        (source,) = (value for key, value in part.items() if key != "type")
        return {"type": "image", "pixels": np.asarray(read_image(source)).tolist()}

    return [message | {"content": [read(part) for part in message["content"]]} for message in messages]


@pytest.fixture
def as_lines(tmp_path, images):
    samples = [{"messages": MESSAGES, "images": images}, {"messages": TEXTS}]
    return load_conversations(write(tmp_path / "data.jsonl", *samples))


def encoded(path):
    buffer = io.BytesIO()
    Image.open(path).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("column", ["images", "bytes", "paths"])
@pytest.mark.parametrize("kind", ["parquet", "directory", "splits"])
def test_tables_hold_the_same_conversations(tmp_path, images, as_lines, kind, column):
    import datasets

    files = [str(tmp_path / path) for path in images]
    values = files if column == "paths" else [encoded(path) for path in files]
    rows = datasets.Dataset.from_list([{"messages": MESSAGES, "images": values}, {"messages": TEXTS, "images": []}])
    if column == "images":
        rows = rows.cast_column("images", datasets.List(datasets.Image()))
    source = tmp_path / ("table.parquet" if kind == "parquet" else "table")
    if kind == "parquet":
        rows.to_parquet(source)
    else:
        (rows if kind == "directory" else datasets.DatasetDict({"train": rows, "test": rows})).save_to_disk(source)
    table = load_conversations(source)
    assert len(table) == len(as_lines) == 2
    for sample, line in zip(table, as_lines, strict=True):
        assert pixels(complete_messages(sample)) == pixels(complete_messages(line))


def test_parts_in_a_table_may_contain_images(tmp_path, images, as_lines):
    import datasets

    first, second = (Image.open(tmp_path / path) for path in images)
    messages = [asked({"type": "image", "image": first}, "What is it?"), MESSAGES[1]]
    messages += [asked("And ", {"type": "image", "image": second}, "?"), MESSAGES[3]]
    datasets.Dataset.from_list([{"messages": messages}]).to_parquet(tmp_path / "table.parquet")
    (sample,) = load_conversations(tmp_path / "table.parquet")
    assert pixels(complete_messages(sample)) == pixels(complete_messages(as_lines[0]))


def test_contents_of_a_table_may_be_texts_and_parts(tmp_path):
    import datasets

    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no column of mixed types")
    samples = [{"messages": [QUESTION, ANSWER]}, {"messages": TEXTS}]
    datasets.Dataset.from_list(samples, on_mixed_types="use_json").save_to_disk(tmp_path / "table")
    assert list(load_conversations(tmp_path / "table")) == samples


@pytest.mark.parametrize("column", ["images", "bytes"])
def test_a_table_is_opened_without_decoding_images(tmp_path, column):
    """The collator decodes them, and can skip them."""
    import datasets

    rows = datasets.Dataset.from_list([{"messages": MESSAGES[:2], "images": [b"no image"]}])
    if column == "images":
        rows = rows.cast_column("images", datasets.List(datasets.Image()))
    rows.to_parquet(tmp_path / "table.parquet")
    (sample,) = load_conversations(tmp_path / "table.parquet")
    (source,) = images_of(complete_messages(sample))
    with pytest.raises(ValueError, match="The image of 8 bytes cannot be decoded: cannot identify its format"):
        read_image(source)


def test_broken_rows_are_named_or_counted(tmp_path, caplog):
    import datasets

    rows = [{"messages": TEXTS}, {"messages": TEXTS[:1]}, {"messages": TEXTS}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"table\.parquet, row 1: the last message is the user's"):
        load_conversations(tmp_path / "table.parquet")
    with caplog.at_level(logging.WARNING, "dsvl"):
        table = load_conversations(tmp_path / "table.parquet", "skip")
    assert len(table) == 2 and table.skipped == 1
    assert "row 1" in caplog.text and "1 of 3 samples are broken" in caplog.text


def test_a_table_without_messages_is_refused(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"prompt": ["?"], "reply": ["!"]}).to_parquet(tmp_path / "table.parquet")
    expected = r"has the columns \['prompt', 'reply'\]; expected messages \(and images\)\. .*dsvl data list"
    with pytest.raises(ValueError, match=expected) as error:
        load_conversations(tmp_path / "table.parquet")
    assert "--on-bad-sample" not in str(error.value)  # this is not an error of one sample


def test_an_unknown_split_is_named(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"messages": TEXTS}])
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "table")
    with pytest.raises(ValueError, match=r"table has the splits \['test'\], not 'train'"):
        load_conversations(tmp_path / "table")
    assert len(load_conversations(tmp_path / "table", split="test")) == 1


# -- images into their parts ----------------------------------------------------------------------------------------


def test_images_go_to_the_parts_without_a_source_in_reading_order(photographs):
    one, two, three = photographs[:3]
    messages = [
        asked({"type": "image"}, {"type": "image", "path": "named.png"}, "?"),
        answered("!"),
        asked({"type": "image", "image": two}, {"type": "image"}),
        answered("!"),
    ]
    sample = {"messages": messages, "images": [one, three]}
    before = json.dumps(messages, default=id)
    completed = complete_messages(sample)
    assert completed[0]["content"][0]["image"] is one
    assert completed[0]["content"][1] == {"type": "image", "path": "named.png"}
    assert completed[2]["content"][0]["image"] is two
    assert completed[2]["content"][1]["image"] is three
    assert json.dumps(messages, default=id) == before  # a sample may be used again
