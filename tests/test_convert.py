"""Conversion: independent of the number of workers, resumable, atomic, with a report of skipped records."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from raw_data import COCO, llava_record, write_coco, write_json

from dsvl.cli import main
from dsvl.data import complete_messages, load_conversations
from dsvl.data import convert as convert_module
from dsvl.data.convert import convert
from dsvl.data.converters.public_formats import PLACEHOLDER, split_at_placeholders, to_sample
from dsvl.data.show import seen_image
from dsvl.image_reading_dsvl import read_image


@pytest.fixture
def root(tmp_path, photographs):
    write_coco(tmp_path / "raw", photographs)
    return tmp_path / "raw"


def write_captions(root, number, **changes):
    for index in range(3):
        path = root / f"cc_sbu_align/image/{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((root / "coco/train2017" / COCO[index]).read_bytes())
    annotations = [{"image_id": str(index % 3), "caption": f"Caption {index}."} for index in range(number)]
    write_json(root / "cc_sbu_align/filter_cap.json", {"annotations": annotations} | changes)


def lines(folder, name="minigpt4"):
    return (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()


def test_workers_and_chunks_change_nothing(root, tmp_path, monkeypatch):
    write_captions(root, 50)
    convert("minigpt4", root, tmp_path / "a")
    monkeypatch.setattr(convert_module, "CHUNK_SIZE", 7)
    convert("minigpt4", root, tmp_path / "b", workers=2)
    convert("minigpt4", root, tmp_path / "c", seed=1)
    assert lines(tmp_path / "a") == lines(tmp_path / "b") != lines(tmp_path / "c")
    convert("minigpt4", root, tmp_path / "d", limit=9, workers=1)
    assert lines(tmp_path / "d") == lines(tmp_path / "a")[:9]


def test_a_killed_conversion_continues_and_leaves_no_half_file(root, tmp_path):
    write_captions(root, 20_000)
    command = [sys.executable, "-m", "dsvl.cli", "data", "convert", "minigpt4", "--root", root, "--out", tmp_path / "out"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    state = tmp_path / "out/minigpt4.state.json"
    end = time.time() + 60
    while not (state.is_file() and json.loads(state.read_text())["records"] > 256):
        assert process.poll() is None and time.time() < end
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = json.loads(state.read_text())["records"]
    assert 256 < done < 20_000 and not (tmp_path / "out/minigpt4.jsonl").exists()
    with (tmp_path / "out/minigpt4.jsonl.partial").open("ab") as file:
        file.write(b'{"half')
    report = convert("minigpt4", root, tmp_path / "out")
    assert report.records == report.samples == 20_000
    convert("minigpt4", root, tmp_path / "whole")
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    names = {"minigpt4.jsonl", "minigpt4.report.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_a_conversion_with_other_arguments_is_not_continued(root, tmp_path, monkeypatch):
    write_captions(root, 5, annotations=[{"image_id": "0", "caption": "A."}] * 3 + [{"image_id": "0"}])
    monkeypatch.setattr(convert_module, "CHUNK_SIZE", 1)
    with pytest.raises(ValueError, match="minigpt4, record filter_cap.json: 0: 'caption' of the record is absent"):
        convert("minigpt4", root, tmp_path / "out")
    with pytest.raises(ValueError, match="interrupted conversion of minigpt4 with other arguments"):
        convert("minigpt4", root, tmp_path / "out", seed=1)


def test_a_conversion_of_an_older_version_is_resumed(root, tmp_path, monkeypatch):
    """It called skipped records `left_out`."""
    monkeypatch.setattr(convert_module, "CHUNK_SIZE", 1)
    write_captions(root, 2, annotations=[{"image_id": "0", "caption": " "}, {"image_id": "1", "caption": 5}])
    with pytest.raises(ValueError, match="'caption' of the record is int"):
        convert("minigpt4", root, tmp_path / "out")
    path = tmp_path / "out/minigpt4.state.json"
    state = json.loads(path.read_text())
    assert state["skipped"] == {"an empty answer": 1}
    path.write_text(json.dumps({"left_out" if key == "skipped" else key: value for key, value in state.items()}))
    write_captions(root, 2, annotations=[{"image_id": "0", "caption": " "}, {"image_id": "1", "caption": "A cat."}])
    report = convert("minigpt4", root, tmp_path / "out")
    assert (report.records, report.samples, report.skipped) == (2, 1, {"an empty answer": 1})


def test_existing_files_are_not_overwritten(root, tmp_path):
    write_captions(root, 3)
    convert("minigpt4", root, tmp_path / "out")
    with pytest.raises(FileExistsError, match="remove it"):
        convert("minigpt4", root, tmp_path / "out")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"annotations": [{"image_id": "0", "capt', "only a part of it .*fetch it again"),
        ("[]", "filter_cap.json is list"),
        ('{"annotations": {}}', "'annotations' of .* is dict"),
        ('{"annotations": []}', "No record of"),
        ('{"annotations": [3]}', "record filter_cap.json: 0: the record is int"),
        ('{"annotations": [{"image_id": "0", "caption": 3}]}', "'caption' of the record is int"),
        ('{"annotations": [{"image_id": "9", "caption": "A."}]}', "9.jpg does not exist"),
        ('{"annotations": [{"image_id": true, "caption": "A."}]}', "True.jpg does not exist"),
        ('{"annotations": [{"image_id": "0", "caption": " "}]}', "No record of .*\n.*an empty answer"),
    ],
)
def test_errors_name_broken_files_and_records(root, tmp_path, text, reason):
    write_captions(root, 1)
    (root / "cc_sbu_align/filter_cap.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        convert("minigpt4", root, tmp_path / "out")
    assert not (tmp_path / "out/minigpt4.jsonl").exists()


def test_missing_files_and_unknown_names_are_errors(root, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="filter_cap.json does not exist; --root must be the folder"):
        convert("minigpt4", root, tmp_path / "out")
    assert main(["data", "convert", "minigpt5", "--root", str(root), "--out", str(tmp_path / "out")]) == 1
    assert "no converter 'minigpt5'; choose from aokvqa, " in capsys.readouterr().err


def test_skipped_records_are_counted_and_named(root, tmp_path, caplog):
    captions = [{"image_id": "0", "caption": "A."}, {"image_id": "9", "caption": "B."}, {"image_id": "1"}]
    write_captions(root, 1, annotations=captions)
    with caplog.at_level(logging.WARNING):
        report = convert("minigpt4", root, tmp_path / "out", on_bad_sample="skip")
    assert (report.records, report.samples, report.skipped) == (3, 1, {"broken": 2})
    assert "9.jpg does not exist" in caplog.text and "'caption' of the record is absent" in caplog.text
    assert json.loads((tmp_path / "out/minigpt4.report.json").read_text())["skipped"] == {"broken": 2}
    assert "2 skipped: broken (filter_cap.json: 9, filter_cap.json: 1, ...)" in "\n".join(report.lines())


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "gigantic"])
def test_the_error_for_a_broken_image_names_its_record(root, tmp_path, damage):
    write_captions(root, 2)
    path = root / "cc_sbu_align/image/1.jpg"
    if damage == "gigantic":
        path = path.with_suffix(".png")
        Image.new("1", (16_000, 12_000)).save(path)
        path.replace(path.with_suffix(".jpg"))
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:20], "text": b"not an image"}[damage])
    with pytest.raises(ValueError, match=r"record filter_cap.json: 1: the image .*1.jpg cannot be opened"):
        convert("minigpt4", root, tmp_path / "out")


# -- images ----------------------------------------------------------------------------------------------------------


def stored(photograph, kind, folder):
    """Store a small photograph in some format; returns its path."""
    small = photograph.resize((40, 30))
    path = folder / f"{kind}.png"
    if kind == "cmyk":
        path = path.with_suffix(".tif")
        small.convert("CMYK").save(path)
    elif kind == "palette":
        small.quantize(256).save(path)
    elif kind == "16 bits":
        Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257).save(path)
    elif kind == "animated":
        path = path.with_suffix(".gif")
        small.save(path, save_all=True, append_images=[Image.new("RGB", small.size)])
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees to the right
        small.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    elif kind == "transparent":
        clear = Image.new("RGBA", (50, 30))
        clear.paste(small, (0, 0))
        clear.save(path)
    return path


@pytest.mark.parametrize("kind", ["cmyk", "palette", "16 bits", "animated", "rotated", "transparent"])
def test_an_image_looks_the_same_in_every_file_format(photographs, tmp_path, kind):
    path = stored(photographs[0], kind, tmp_path)
    expected = photographs[0].resize((40, 30))
    expected = expected.convert("L").convert("RGB") if kind == "16 bits" else expected
    from_path, from_memory = read_image(str(path)), read_image(Image.open(path))
    assert from_path.mode == "RGB" and np.array_equal(from_path, from_memory)
    if kind == "transparent":
        assert np.asarray(from_path)[:, 40:].min() == 255
        from_path = from_path.crop((0, 0, 40, 30))
    assert from_path.size == (40, 30)
    difference = np.abs(np.asarray(from_path).astype(int) - np.asarray(expected))
    assert difference.mean() < (8 if kind in ("palette", "animated") else 1)


# -- properties --------------------------------------------------------------------------------------------------------

WORDS = st.text(alphabet="abc <>im\n", max_size=12).map(lambda text: text.replace(PLACEHOLDER, ""))


@given(st.lists(st.one_of(st.none(), WORDS), max_size=8))
def test_a_text_with_placeholders_loses_no_image_and_no_word(parts):
    text = "".join(PLACEHOLDER if part is None else part for part in parts)
    found = split_at_placeholders(text)
    assert [part is None for part in found].count(True) == text.count(PLACEHOLDER)
    assert "".join("".join(PLACEHOLDER if p is None else p for p in found).split()) == "".join(text.split())


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.lists(st.booleans(), max_size=4), WORDS, WORDS.filter(str.strip)), min_size=1, max_size=4))
def test_turns_keep_every_image_in_its_order(talk):
    turns, count = [], 0
    for marks, question, answer in talk:
        count += sum(marks)
        question = "".join(PLACEHOLDER if mark else f"{question}." for mark in marks) + "?"
        turns += [("user", question), ("assistant", answer)]
    images = [f"{number}.png" for number in range(count)]
    sample = to_sample(turns, images)
    messages = complete_messages(sample)
    shown = [part["image"] for m in messages for part in m["content"] if part["type"] == "image"]
    assert shown == images == sample["images"]
    assert [m["content"][0]["text"] for m in messages if m["role"] == "assistant"] == [a.strip() for _, _, a in talk]


# -- dsvl data ---------------------------------------------------------------------------------------------------------


def test_list_convert_and_show_as_commands(root, tmp_path, capsys, processor):
    record = llava_record(COCO[0], "<image>\nIs </s> or <image> a token? <b>", "No.", "Sure?", "Sure.")
    record["conversations"][0]["value"] = "<image>\nIs </s> a token? <b>"
    write_json(root / "llava/conversation_58k.json", [record])
    assert main(["data", "list"]) == 0
    assert "reads llava/conversation_58k.json" in capsys.readouterr().out
    assert main(["data", "convert", "llava_dial", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    assert "llava_dial: 1 conversations of 1 records." in capsys.readouterr().out
    file = str(tmp_path / "out/llava_dial.jsonl")
    assert main(["data", "show", file, "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1: 1 images (48 x 36)" in out
    assert "### Image 1:\n<image>\n\n### Question:\nIs </s> a token? <b>\n\n### Answer:\n«No.</s>»" in out
    assert "«Sure.</s>»" in out
    processor.save_pretrained(tmp_path / "model")
    assert main(["data", "show", file, "--model", str(tmp_path / "model")]) == 0
    text = processor.apply_chat_template(load_conversations(file)[0]["messages"], tokenize=False)
    tokens = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert f"{len(tokens) + processor.image_seq_length - 1} tokens" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["data", "show", file, "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/jpeg;base64,") == 1 and "<mark>Sure.&lt;/s&gt;</mark>" in html and "&lt;b&gt;" in html
    assert main(["data", "show", file, "--model", str(tmp_path / "model"), "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert "48 x 36" in html and "as the model sees it: 28 x 28" in html and html.count("data:image/jpeg;base64,") == 2


def test_the_seen_image_is_what_the_image_processor_keeps(processor, photographs):
    for photograph in photographs:
        (seen,) = seen_image(photograph, processor).tiles
        scale = 28 / min(photograph.size)
        size = [int(side * scale) if side != min(photograph.size) else 28 for side in photograph.size]
        left, top = ((side - 28) // 2 for side in size)
        expected = photograph.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 28, top + 28))
        difference = np.abs(np.asarray(seen, dtype=int) - np.asarray(expected, dtype=int))
        assert difference.max() <= 1
