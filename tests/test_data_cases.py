"""Data of users: every accepted format, the errors for others, and the effect of one bad sample."""

import base64
import csv
import errno
import gzip
import io
import json
import logging
import shutil
import tarfile
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import make_checkpoint, make_conversations

from dsvl.cli import main
from dsvl.data import complete_messages, load_conversations
from dsvl.data.convert import convert
from dsvl.data.dataset_files import open_records
from dsvl.data.messages import images_of, location_of
from dsvl.data.packing import PackedConversations
from dsvl.data.record_formats import CAPTION_QUESTION
from dsvl.data.sample_errors import NAMED, BadSample, BadSamples, TooManyBadSamples, one_sample
from dsvl.data.streaming import Stream
from dsvl.evaluation.questions import Questions
from dsvl.image_reading_dsvl import read_image
from dsvl.training import ConversationCollator
from dsvl.utils import image_loading
from dsvl.utils.text import shortened
from dsvl.utils.url_fetching import FetchError

pytestmark = pytest.mark.usefixtures("fresh_log")

CASES = Path(__file__).parent / "cases/data"
GOOD = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
ONE_BAD = ["surrogate", "brackets", "long_value", "zero_size", "unreachable"]


@pytest.fixture
def cases(tmp_path):
    """The folder of cases, with generated ones that are too large for the repository."""
    folder = tmp_path / "cases"
    shutil.copytree(CASES, folder)
    good = json.dumps(GOOD)
    (folder / "brackets.jsonl").write_text(good + '\n{"messages":' + "[" * 100_000 + "]" * 100_000 + "}\n")
    long = {"messages": [{"role": "user", "content": [{"type": "image", "path": "x" * 3_000_000}]}, GOOD["messages"][1]]}
    (folder / "long_value.jsonl").write_text(f"{good}\n{json.dumps(long)}\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("cases"))


def write(path, *samples):
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return path


def asked(*parts, **keys):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}], **keys}


def trained_on(processor, samples):
    """The number of conversations and images of a batch, and the texts that are trained on."""
    batch = ConversationCollator(processor)(samples)
    rows = [row[row != -100] for row in batch["labels"]]
    return len(rows), len(batch.get("pixel_values", [])), [processor.tokenizer.decode(row) for row in rows]


# -- accepted formats --------------------------------------------------------------------------------------------------

TAKEN = [
    *("plain.jsonl", "sharegpt.json", "image_url.jsonl", "data_url.jsonl", "dict_path.jsonl", "part_dict.jsonl"),
    *("image_beside_text.jsonl", "image_for_images.jsonl", "image_column.parquet", "relative.parquet", "columns.parquet"),
    *("table.csv", "folder", "lines.ndjson", "packed.jsonl.gz"),
]


@pytest.mark.parametrize("name", TAKEN)
def test_a_format_is_loaded_with_its_image(processor, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    data = load_conversations(CASES / name)
    assert trained_on(processor, list(data)) == (1, 1, ["A cup.</s>"])
    (source,) = images_of(complete_messages(data[0]))
    pixels = np.asarray(read_image(source))
    assert pixels.shape == (6, 8, 3) and (pixels == pixels[0, 0]).all()
    if name == "dict_path.jsonl":
        assert pixels[0, 0].argmax() == 2  # the blue one
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.5)  # of 5 seconds for each Parquet file
    assert trained_on(processor, list(Stream(CASES / name).epoch(0))) == (1, 1, ["A cup.</s>"])
    (one,) = Questions(CASES / name)[0].turns
    assert one.references == ["A cup."] and len(one.images) == 1


def test_a_json_array_is_loaded(processor):
    assert trained_on(processor, list(load_conversations(CASES / "array.json"))) == (2, 2, ["A cup.</s>"] * 2)
    assert len(list(Stream(CASES / "array.json").epoch(0))) == 2


def test_an_answer_of_weight_0_is_read_but_not_trained_on(processor, capsys):
    (sample,) = load_conversations(CASES / "weight.jsonl")
    assert trained_on(processor, [sample]) == (1, 0, ["good</s>"])
    batch = ConversationCollator(processor)([sample])
    assert "WRONG ANSWER" in processor.tokenizer.decode(batch["input_ids"][0])
    packs = PackedConversations(load_conversations(CASES / "weight.jsonl"), lambda sample: (5, 0), 400)
    packed = ConversationCollator(processor, 400)([packs[0]])
    assert processor.tokenizer.decode(packed["labels"][packed["labels"] != -100]) == "good</s>"
    assert [one.references for one in Questions(CASES / "weight.jsonl")[0].turns] == [[], ["good"]]
    assert main(["data", "show", str(CASES / "weight.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "«good</s>»" in shown and "«WRONG" not in shown and "WRONG ANSWER" in shown


def test_a_template_that_does_not_mark_each_answer_cannot_have_weights(processor):
    processor.chat_template = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    messages = [{"role": "user", "content": "a?"}, *({"role": "assistant", "content": c, "weight": c == "b"} for c in "ab")]
    with pytest.raises(ValueError, match="has weight 0, but the chat template does not mark every answer"):
        ConversationCollator(processor)([messages])


@pytest.mark.parametrize("weight", [0.5, 2, -1, "0", [0]])
def test_other_weights_are_refused(tmp_path, weight):
    answer = GOOD["messages"][1] | {"weight": weight}
    with pytest.raises(ValueError, match="has the weight .*; expected 0"):
        load_conversations(write(tmp_path / "data.jsonl", {"messages": [GOOD["messages"][0], answer]}))
    with pytest.raises(ValueError, match="every assistant's message has the weight 0"):
        load_conversations(write(tmp_path / "data.jsonl", {"messages": [GOOD["messages"][0], answer | {"weight": 0}]}))


def test_the_detected_format_is_logged(caplog, capsys):
    with caplog.at_level(logging.INFO, "dsvl"):
        load_conversations(CASES / "table.csv")
        load_conversations(CASES / "plain.jsonl")  # the native format is not logged
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("dsvl")]
    assert said == f"{CASES / 'table.csv'}: detected an image and its text, the answer to {CAPTION_QUESTION!r}."
    assert main(["data", "show", str(CASES / "table.csv")]) == 0
    assert "detected an image and its text" in capsys.readouterr().out


def test_keys_that_are_no_part_of_a_conversation_are_reported(tmp_path, caplog):
    path = write(tmp_path / "data.jsonl", GOOD | {"origin": "web", "score": 3}, GOOD | {"id": 1, "tools": []})
    with caplog.at_level(logging.INFO, "dsvl"):
        data = load_conversations(path)
    assert f"{path}: not read: origin, score." in caplog.text and set(data[0]) == {"messages"}


def png(color="red"):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, "PNG")
    return file.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_shards_of_webdataset(processor, tmp_path, caplog):
    talk = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]}
    files = {"a/0.png": png(), "a/0.txt": b"A cup.", "a/1.jpg": png(), "a/1.json": json.dumps(talk).encode()}
    files |= {"a/2.png": png(), "a/2.json": b"{", "a/3.png": png(), "a/3.json": b'{"url": "x"}', "a/3.txt": b"A cup."}
    path = write_tar(tmp_path / "0.tar", files)
    with pytest.raises(ValueError, match=r"0\.tar, a/2: is not JSON"):
        load_conversations(path)
    with caplog.at_level(logging.INFO, "dsvl"):
        data = load_conversations(path, "skip")
    assert trained_on(processor, list(data)) == (3, 3, ["A cup.</s>"] * 3)
    assert "detected shards of WebDataset" in caplog.text and "not read: url" in caplog.text
    assert len(list(Stream(path, "skip").epoch(0))) == 3
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"0\.tar is not a tar file, or only a part of it"):
        load_conversations(path)


def test_a_folder_of_images_with_lines_of_metadata(processor, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a b.png").write_bytes(png())
    row = {"file_name": "a b.png", "question": "What?", "answer": "A cup."}
    path = write(tmp_path / "train/metadata.jsonl", row, row | {"file_name": "gone.png"})
    with pytest.raises(ValueError, match=rf"{path}, line 2: the image .*gone\.png does not exist"):
        load_conversations(tmp_path)
    write(path, row, row)
    assert trained_on(processor, list(load_conversations(tmp_path))) == (2, 2, ["A cup.</s>"] * 2)
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cup."}]
    write(path, {"file_name": "a b.png", "messages": messages})
    assert trained_on(processor, list(load_conversations(tmp_path))) == (1, 1, ["A cup.</s>"])


def test_csv_values_stay_strings(processor, tmp_path):
    """Line breaks, commas, quotes, and strings that other readers take for missing values or numbers."""
    answers = ["NA", "None", "7", "007", "a, b", 'a "b"', "two\nlines", "é", "null"]
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["question", "answer", "image"], *(["What?", answer, ""] for answer in answers)])
    data = load_conversations(tmp_path / "table.csv")
    assert [sample["messages"][1]["content"] for sample in data] == answers
    assert location_of(data[7]) == f"{tmp_path / 'table.csv'}, line 10"  # after one of two lines
    (tmp_path / "table.tsv").write_text("question\tanswer\nWhat?\ta, b\nWhat?\n")
    with pytest.raises(ValueError, match=r"table\.tsv, line 3: has 1 fields; the first line names 2 columns"):
        load_conversations(tmp_path / "table.tsv")
    assert load_conversations(tmp_path / "table.tsv", "skip")[0]["messages"][1]["content"] == "a, b"
    for text, reason in (
        ("question,question\n", "expected a line of column names"),
        ('a,b\n"x', "is not CSV"),
        ("", "begins"),
    ):
        (tmp_path / "table.csv").write_text(text)
        with pytest.raises(ValueError, match=reason) as error:
            load_conversations(tmp_path / "table.csv", "skip")
        assert "--on-bad-sample" not in str(error.value)


def test_arrays_of_json_know_their_lines(tmp_path):
    samples = [asked(text) for text in ("a", "é\n", "鳥", "d")]
    samples[2]["messages"] = samples[2]["messages"][:1]
    path = tmp_path / "data.json"
    path.write_text("\ufeff" + json.dumps(samples, indent=1, ensure_ascii=False), encoding="utf-8")
    line = next(number for number, text in enumerate(path.read_text().splitlines(), start=1) if "鳥" in text) - 7
    with pytest.raises(ValueError, match=rf"data\.json, line {line} \(record 2\): the last message is the user's"):
        load_conversations(path)
    data = load_conversations(path, "skip")
    assert [sample["messages"][0]["content"][0]["text"] for sample in data] == ["a", "é\n", "d"]
    path.write_text(json.dumps(samples)[:-40])
    with pytest.raises(ValueError, match=r"JSON array that cannot be read beyond record 3 .*write the file again") as error:
        load_conversations(path, "skip")
    assert "--on-bad-sample" not in str(error.value)
    path.write_text(json.dumps(samples[0], indent=1))  # an object over many lines
    assert len(load_conversations(path)) == 1
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no conversation"):
        load_conversations(path)


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_broken_gzip_file_is_refused(tmp_path, damage):
    whole = gzip.compress(json.dumps(GOOD).encode() * 50)
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(whole[:-20] if damage == "cut" else b"no gzip")
    with pytest.raises(ValueError, match="is not a gzip file, or only a part of it"):
        load_conversations(path)


@pytest.mark.parametrize(
    "source",
    ["red one.png", "file://{folder}/red%20one.png", {"bytes": None, "path": "red one.png"}, {"path": "red one.png"}]
    + ["{folder}/red one.png", "data"],
)
@pytest.mark.parametrize("where", ["path", "image", "url", "images", "sample's image"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_every_way_to_name_an_image(tmp_path, monkeypatch, source, where, suffix):
    import datasets

    folder = tmp_path / "the data"
    folder.mkdir()
    (folder / "red one.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    if source == "data":
        source = "data:image/png;base64," + base64.b64encode(png()).decode()
    elif isinstance(source, str):
        source = source.format(folder=quote(str(folder)) if source.startswith("file") else folder)
    key = None if where in ("images", "sample's image") else where
    sample = asked({"type": "image"} | ({} if key is None else {key: source}), "What?")
    sample["messages"][1]["content"] = [{"type": "text", "text": "b"}]
    sample |= {"images": [source]} if where == "images" else {"image": source} if where == "sample's image" else {}
    path = folder / f"data{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list([sample]).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps([sample]))
    else:
        content = json.dumps(sample).encode()
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    (found,) = load_conversations(Path("the data") / path.name)
    (image,) = images_of(complete_messages(found))
    assert read_image(image).getpixel((0, 0)) == (255, 0, 0)


# -- errors with the key -----------------------------------------------------------------------------------------------


def test_a_case_that_is_refused_names_its_key():
    with pytest.raises(ValueError, match=r"name\.jsonl, line 1: message 1 \(assistant\) has the key name, which") as error:
        load_conversations(CASES / "name.jsonl")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("key", ["tools", "tool_calls", "reasoning_content"])
def test_what_a_chat_template_does_not_take_is_refused(tmp_path, processor, key):
    samples = {
        "tools": GOOD | {"tools": [{"type": "function"}]},
        "reasoning_content": {"messages": [GOOD["messages"][0], GOOD["messages"][1] | {"reasoning_content": "hm"}]},
    }
    path = write(tmp_path / "data.jsonl", samples[key]) if key in samples else CASES / "tool_calls.jsonl"
    with pytest.raises(ValueError, match=rf"jsonl, line 1: the sample has {key}, which the chat template does not take"):
        ConversationCollator(processor)([load_conversations(path)[0]])


REFUSED = {
    "a user's reasoning": (
        {"messages": [GOOD["messages"][0] | {"reasoning_content": "hm"}, GOOD["messages"][1]]},
        r"message 0 \(user\) has reasoning_content; expected them in an assistant's message only",
    ),
    "tools": (GOOD | {"tools": ["lookup"]}, r"tools is \['lookup'\]; expected a list of JSON schemas"),
    "calls": (
        {"messages": [GOOD["messages"][0], GOOD["messages"][1] | {"tool_calls": [{"function": "f"}]}]},
        "message 1 has the tool_calls .*; expected a list of objects such as",
    ),
    "a result's weight": (
        {"messages": [*GOOD["messages"], {"role": "tool", "content": "x", "weight": 0}, GOOD["messages"][1]]},
        r"message 2 \(tool\) has the key weight",
    ),
    "image and images": (asked({"type": "image"}, image="a.png", images=["a.png"]), "the sample has image and images"),
    "video": (GOOD | {"video": "a.mp4"}, "does not exist"),
    "image in a text": (asked({"type": "text", "text": "x", "image": "a.png"}), "a part of type text .* has the key image"),
    "two sources": (
        asked({"type": "image", "path": "a.png", "url": "http://x.org/a.png"}),
        "has path and url; expected one",
    ),
    "detail": (
        asked({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}),
        "image_url has the key detail",
    ),
    "no url": (asked({"type": "image_url", "image_url": {}}), "an image_url is .*; expected an object with a url"),
    "cache": (asked({"type": "text", "text": "x", "cache_control": {"a": 1}}), "has the key cache_control"),
    "number": (asked({"type": "image", "image": 5}), "an image is 5 of type int; expected a path"),
    "list": (asked({"type": "image", "image": ["a.png"]}), "an image is .* of type list; expected a path"),
    "empty dict": (asked({"type": "image"}, images=[{"bytes": None, "path": None}]), "expected its bytes or its path"),
    "broken data URL": (asked({"type": "image", "image": "data:image/png;base64,§"}), "the data URL .* is broken"),
    "two placeholders": (
        {"messages": [{"role": "user", "content": "<image><image>?"}, GOOD["messages"][1]], "image": "a.png"},
        "hold 0 image parts without a source, but there are 1 images",
    ),
    "a message's loss": (
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!", "loss": 0}]},
        "a message has the key loss, which would be lost",
    ),
    "tools of ShareGPT": (
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}], "tools": "[]x"},
        "tools is .*; expected a list of JSON schemas",
    ),
    "choices": ({"question": "?", "answer": "!", "choices": ["!", "?"]}, "the sample has the key choices"),
    "no answer": ({"question": "?", "answer": ["!"]}, "answer is .*; expected a text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_keys_with_a_meaning_are_never_dropped(tmp_path, case):
    sample, reason = REFUSED[case]
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(BadSample, match=rf"data\.jsonl, line 1: .*{reason}"):
        load_conversations(write(tmp_path / "data.jsonl", sample))


def test_empty_values_of_such_keys_are_accepted(tmp_path):
    answer = GOOD["messages"][1] | {"tool_calls": [], "name": None, "reasoning_content": ""}
    assert len(
        load_conversations(write(tmp_path / "data.jsonl", {"messages": [GOOD["messages"][0], answer], "tools": None}))
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("data.jsonl", {"prompt": "?", "reply": "!"}, r"has the columns \['prompt', 'reply'\].*dsvl data list"),
        ("aokvqa_v1p0_train.json", [{"question_id": 1, "rationales": []}], "dsvl data convert aokvqa"),
        ("data.json", {"cup": [["What?", "a.png"]]}, r"has the columns \['cup'\]"),
        ("data.jsonl", {"text": "no image"}, r"has the columns \['text'\]"),
        ("data.txt", "x", "has an unknown format; expected JSON lines"),
    ],
)
def test_the_error_for_another_format_names_its_converter(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_text(json.dumps(content))
    for on_bad_sample in ("error", "skip"):
        with pytest.raises(ValueError, match=reason) as error:
            load_conversations(path, on_bad_sample)
        assert "--on-bad-sample" not in str(error.value) and len(str(error.value)) < 800


@pytest.mark.parametrize("name", ["./missing", "/no/where", "a/b/c", "no.csv", "no.jsonl.gz", "no.tar", "~/x", "no.txt"])
def test_a_missing_path_is_not_looked_up_on_the_hub(name, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    for open_it in (load_conversations, Stream):
        with pytest.raises(FileNotFoundError, match="is not a file; pass|does not exist; pass"):
            open_it(name)


# -- one bad sample ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_BAD)
def test_a_bad_sample_is_named_with_file_and_line(processor, cases, name):
    path = cases / f"{name}.jsonl"
    for allow_urls in (False, True):
        with pytest.raises(BadSample, match=rf"{path}, line 2: .*\(--on-bad-sample skip\)") as error:
            ConversationCollator(processor, allow_urls=allow_urls)(list(load_conversations(path, allow_urls=allow_urls)))
        assert len(str(error.value)) < 500 + len(str(path))
        data = load_conversations(path, "skip", allow_urls=allow_urls)
        batch = ConversationCollator(processor, on_bad_sample="skip", allow_urls=allow_urls)(list(data))
        assert len(batch["labels"]) == 1 and (batch["labels"] != -100).any()
    with pytest.raises(BadSample, match=rf"{path}, line 2: "):
        collator = ConversationCollator(processor)
        stream = Stream(path, allow_urls=False)
        [collator([sample]) for sample in stream.epoch(0)]


@pytest.mark.parametrize("name", ONE_BAD)
def test_show_names_a_bad_sample_and_shows_the_others(cases, capfd, caplog, name):
    path = cases / f"{name}.jsonl"
    assert main(["data", "show", str(path)]) == 0
    shown = capfd.readouterr().out
    assert "-- 1 of " in shown and "-- 2 of " not in shown and "«" in shown
    (line,) = [text for text in caplog.messages if text.startswith("Skipped: ")]
    assert line.startswith(f"Skipped: {path}, line 2: ") and len(line) < 600
    assert main(["data", "show", str(path), "--html", str(cases / "page.html"), "--on-bad-sample", "error"]) == 1
    assert f"{path}, line 2: " in capfd.readouterr().err


@pytest.mark.parametrize("name", ONE_BAD)
def test_train_names_a_bad_sample_and_trains_on_the_others(cases, capfd, checkpoint, tmp_path, name):
    path = cases / f"{name}.jsonl"
    flags = ["--model", checkpoint, "--data", path, "--output", tmp_path / "out", "--max-steps", 1, "--use-cpu"]
    flags += ["--per-device-train-batch-size", 2, "--report-to", "none", "--save-strategy", "no"]
    assert main(["train", *map(str, flags)]) == 1
    said = capfd.readouterr().err
    assert f"{path}, line 2: " in said and "Traceback" not in said and len(said) < 20_000
    assert main(["train", *map(str, flags), "--on-bad-sample", "skip"]) == 0
    said = capfd.readouterr().err
    assert f"Skipped: {path}, line 2: " in said and len(said) < 20_000
    assert (tmp_path / "out/config.json").is_file()


@pytest.mark.parametrize("name", ONE_BAD)
def test_evaluate_names_a_bad_sample_and_asks_the_others(cases, capfd, caplog, checkpoint, tmp_path, name):
    path, out = cases / f"{name}.jsonl", tmp_path / "answers.jsonl"
    flags = ["evaluate", str(checkpoint), str(path), "--out", str(out), "--device", "cpu", "--max-new-tokens", "2"]
    assert main(flags) == 1
    said = capfd.readouterr().err
    assert f"{path}, line 2: " in said and "Traceback" not in said and len(said) < 20_000
    if name == "long_value":  # evaluation finds missing files when it opens them
        assert "does not exist" in said
    assert main([*flags, "--on-bad-sample", "skip"]) == 0
    assert f"Skipped: {path}, line 2: " in caplog.text
    assert len(out.read_text().splitlines()) == 1


def test_a_bad_sample_is_found_in_its_batch(processor, tmp_path):
    """An error that occurs when a batch is rendered names its sample."""

    class Fragile:
        def __init__(self, processor):
            self.processor = processor

        def __getattr__(self, name):
            return getattr(self.processor, name)

        def apply_chat_template(self, conversations, **options):
            if any("poison" in str(conversation) for conversation in conversations):
                raise KeyError("poison")
            return self.processor.apply_chat_template(conversations, **options)

    path = write(tmp_path / "data.jsonl", asked("a"), asked("poison"), asked("c"))
    samples = list(load_conversations(path))
    with pytest.raises(BadSample, match=rf"{path}, line 2: KeyError: 'poison'"):
        ConversationCollator(Fragile(processor))(samples)
    skipping = ConversationCollator(Fragile(processor), on_bad_sample="skip")
    batch, expected = skipping(samples), ConversationCollator(processor)([samples[0], samples[2]])
    assert all(torch.equal(batch[key], expected[key]) for key in expected) and skipping.counts.tolist() == [3, 1, 0]
    packed = ConversationCollator(Fragile(processor), 400, on_bad_sample="skip")
    batch, expected = packed([samples, samples[1:2]]), ConversationCollator(processor, 400)([[samples[0], samples[2]]])
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    alone = skipping(samples[1:2])
    assert (alone["labels"] == -100).all()


ERRORS = [
    (RecursionError("deep"), False),
    (MemoryError(), False),
    (TypeError("TextEncodeInput must be"), False),
    (KeyError("x"), False),
    (OSError(errno.ENOENT, "no such file"), False),
    (OSError(errno.ENAMETOOLONG, "long"), False),
    (RuntimeError("stack expects each tensor to be equal size"), False),
    (OSError(errno.ENOSPC, "No space left on device"), True),
    (OSError(errno.EMFILE, "Too many open files"), True),
    (torch.OutOfMemoryError("CUDA out of memory"), True),
    (RuntimeError("CUDA error: device-side assert triggered"), True),
    (ImportError("no Pillow"), True),
    (KeyboardInterrupt(), True),
]


@pytest.mark.parametrize(("error", "stops"), ERRORS, ids=lambda value: repr(value)[:40])
def test_errors_of_a_sample_differ_from_errors_of_the_machine(error, stops):
    bad = BadSamples("skip")
    if not stops:
        with bad.sample("data.jsonl, line 3"):
            raise error
        with pytest.raises(BadSample, match=r"^data\.jsonl, line 3: "), one_sample("data.jsonl, line 3"):
            raise error
        assert (bad.seen, bad.count) == (1, 1)
        return
    for guard in (bad.sample("x"), one_sample("x")):
        with pytest.raises(type(error)) as raised, guard:
            raise error
        assert raised.value is error
    assert bad.count == 0
    if isinstance(error, OSError):  # image decoding turns it into a ValueError
        with pytest.raises(ValueError, match="cannot be decoded"), bad.sample("x"):
            try:
                raise error
            except OSError as cause:
                raise ValueError("The image cannot be decoded") from cause
        assert bad.count == 0


def test_errors_outside_of_a_sample_stop_the_run(processor, monkeypatch):
    samples = list(load_conversations(CASES / "plain.jsonl"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dsvl.training.collator.read_image", full)
    with pytest.raises(OSError, match="No space left"):
        ConversationCollator(processor, on_bad_sample="skip")(samples)


@pytest.mark.parametrize(("samples", "bad", "share", "stops"), [
    (20, 5, 0.05, False),
    (20, 6, 0.05, True),
    (400, 20, 0.05, False),
    (400, 21, 0.05, True),
    (20, 1, 0, True),
    (20, 19, 1, False),
])  # fmt: skip
def test_more_than_a_share_of_bad_samples_stops_the_run(tmp_path, samples, bad, share, stops):
    lines = ["{"] * bad + [json.dumps(GOOD)] * (samples - bad)
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    if not stops:
        assert load_conversations(path, "skip", max_bad_samples=share).skipped == bad
        return
    with pytest.raises(TooManyBadSamples, match=r"of \d+ samples had to be skipped, more than .*raise --max-bad-samples"):
        load_conversations(path, "skip", max_bad_samples=share)


def test_the_share_holds_for_streams_batches_and_conversions(processor, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(["{", json.dumps(GOOD)] * 10))
    with pytest.raises(TooManyBadSamples):
        list(Stream(path, "skip").epoch(0))
    assert len(list(Stream(path, "skip", max_bad_samples=1).epoch(0))) == 10
    broken = asked({"type": "image", "image": b"no image"}, "?")
    collator = ConversationCollator(processor, on_bad_sample="skip")
    with pytest.raises(TooManyBadSamples):
        collator([broken] * 6)
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    path.write_text("\n".join(["{", json.dumps({"conversations": turns})] * 10))
    with pytest.raises(ValueError, match="record 0: is not JSON"):
        convert("sharegpt", path, tmp_path / "a")
    with pytest.raises(TooManyBadSamples, match="sharegpt: 6 of 11 samples"):
        convert("sharegpt", path, tmp_path / "b", on_bad_sample="skip")
    report = convert("sharegpt", path, tmp_path / "b", on_bad_sample="skip", max_bad_samples=1)
    assert (report.samples, report.skipped["broken"]) == (10, 10)
    assert main(
        ["data", "convert", "sharegpt", "--root", str(path), "--out", str(tmp_path / "c"), "--on-bad-sample", "skip"]
    )
    with pytest.raises(ValueError, match=r"max_bad_samples=1\.5 is not a share"):
        BadSamples(max_bad_samples=1.5)


def test_a_conversion_skips_every_kind_of_broken_record(tmp_path):
    good = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    half = {"conversations": [{"from": "human", "value": "\ud83d"}, {"from": "gpt", "value": "!"}]}
    lines = [json.dumps(good), json.dumps(half), '{"conversations":' + "[" * 100_000 + "]" * 100_000 + "}"]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    report = convert("sharegpt", tmp_path / "data.jsonl", tmp_path / "out", on_bad_sample="skip", workers=1)
    assert (report.samples, report.skipped) == (1, {"broken": 2})


def test_messages_of_skipped_samples_are_short(tmp_path, caplog):
    """A data URL of 3 MB, in every value that a message might repeat."""
    huge = "data:image/png;base64," + "A" * 3_000_000
    text = [{"type": "text", "text": "x"}]
    samples = [
        asked({"type": "image", "image": huge + "§"}),
        asked({"type": "image", "path": huge[22:]}),
        asked({"type": "audio", "audio": huge}),
        asked(text="x", image_url=huge),
        {"messages": [{"role": huge, "content": "x"}]},
        {"messages": [{"role": "user", "content": text, huge: 1}]},
        {huge: huge},
        {"messages": huge},
        asked({"type": "image"}, images=huge),
        asked({"type": "image"}, images=[{"bytes": huge, "path": None}]),
        asked({"type": "image_url", "image_url": {"url": "x", huge: 1}}),
        {"messages": [GOOD["messages"][0], GOOD["messages"][1] | {"weight": huge}]},
    ]
    path = write(tmp_path / "data.jsonl", GOOD, *samples)
    with caplog.at_level(logging.WARNING, "dsvl"):
        assert len(load_conversations(path, "skip", max_bad_samples=1)) == 1
    assert len(caplog.messages) == len(samples) + 1
    assert max(len(message) for message in caplog.messages) < 500 and not any("A" * 201 in m for m in caplog.messages)
    for sample in samples:
        with pytest.raises(ValueError) as error:
            load_conversations(write(tmp_path / "data.jsonl", sample))
        assert len(str(error.value)) < 1000 and "A" * 201 not in str(error.value)


def test_values_are_shortened_to_one_printable_line():
    assert shortened("a" * 200) == "a" * 200
    assert len(shortened("a" * 201)) == 200 and shortened("a" * 150 + "b" * 150).endswith("bbb")
    assert shortened("\ud83d\n\x1b[31m") == r"\ud83d\n\x1b[31m"
    assert shortened(b"x" * 5000) == "5,000 bytes"
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert len(shortened(nested)) <= 200


# -- URLs --------------------------------------------------------------------------------------------------------------


def test_training_fetches_urls_only_when_allowed(processor, checkpoint, tmp_path, monkeypatch, capfd):
    fetched = []

    def fetch(url, max_bytes):
        fetched.append(url)
        if "gone" in url:
            raise FetchError("its server answers with status 404")
        return png()

    monkeypatch.setattr(image_loading, "fetch_url", fetch)
    monkeypatch.setattr("httpx.get", lambda *args, **kwargs: pytest.fail("fetched without bounds"))
    part = {"type": "image", "url": "https://example.org/a.png"}
    path = write(tmp_path / "data.jsonl", asked(part, "?"), asked(part | {"url": "https://example.org/gone.png"}, "?"))
    flags = ["train", "--model", checkpoint, "--data", path, "--output", tmp_path / "out", "--max-steps", 1, "--use-cpu"]
    flags = [*map(str, flags), "--per-device-train-batch-size", "2", "--report-to", "none", "--save-strategy", "no"]
    assert main(flags) == 1
    assert "a.png is a URL; pass --allow-urls" in capfd.readouterr().err and not fetched
    with pytest.raises(ValueError, match="fetching is not allowed here"):
        ConversationCollator(processor)([asked(part, "?")])
    assert not fetched
    assert main([*flags, "--allow-urls"]) == 1
    assert f"{path}, line 2: The image https://example.org/gone.png was not fetched" in capfd.readouterr().err
    assert main([*flags, "--allow-urls", "--on-bad-sample", "skip"]) == 0
    assert set(fetched) == {"https://example.org/a.png", "https://example.org/gone.png"}
    cached = [*flags, "--allow-urls", "--on-bad-sample", "skip", "--cache-image-features", str(tmp_path / "features")]
    shutil.rmtree(tmp_path / "out")
    assert main(cached) == 0
    assert f"Skipped: {path}, line 2: " in capfd.readouterr().err


def test_exact_match_skips_answers_of_weight_0_and_bad_samples(processor, cases):
    from dsvl.training.evaluation import answer_indices

    (weighted,) = load_conversations(cases / "weight.jsonl")
    assert answer_indices(ConversationCollator(processor), weighted) == [3]
    _, zero = load_conversations(cases / "zero_size.jsonl")
    assert answer_indices(ConversationCollator(processor, on_bad_sample="skip"), zero) == []


def test_many_bad_samples_are_named_only_at_first(tmp_path, caplog):
    path = make_conversations(tmp_path)
    with path.open("a") as file:
        file.write("{\n" * (NAMED + 5))
    with caplog.at_level(logging.WARNING, "dsvl"):
        list(Stream(path, "skip", max_bad_samples=1).epoch(0))
    assert len(caplog.messages) == NAMED


def test_records_are_not_kept_in_memory(tmp_path):
    records = open_records(write(tmp_path / "data.jsonl", *[asked(str(number)) for number in range(1000)]))
    assert len(records) == 1000 and len(records.starts) * records.starts.itemsize == 8000
    assert records.parse(records.read(500)) == asked("500")
