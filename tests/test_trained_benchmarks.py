"""The benchmarks that train small models run, at the tiniest size, and ask and show what they say."""

import argparse
import importlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark by name, as it is run on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def results(path):
    return json.loads(path.read_text())["results"]


def test_a_training_reports_its_loss_and_ends_by_steps_or_by_minutes(load, capsys):
    fit, model = load("trained_tasks").fit, tiny_model()
    ids = torch.arange(3, 11)[None]
    batch = {"input_ids": ids, "labels": ids}
    first = float(model(**batch).loss.detach())
    training = fit(model, lambda done: batch, steps=40, learning_rate=1e-2, check=lambda: f"training: {model.training}")
    assert training["steps"] == 40 and training["loss"] < 0.5 * first and not model.training
    said = capsys.readouterr().out.splitlines()
    assert len(said) == load("trained_tasks").REPORTS and "100% step 40" in said[-1]
    assert sum("training: False" in line for line in said) == load("trained_tasks").CHECKS
    assert fit(model, lambda done: batch, steps=10**9, minutes=1e-9)["steps"] == 1


def test_a_run_that_fails_costs_its_own_row_alone(load, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "assert sys.argv[1] != 'wrong', 'this row'\n"
        "open(sys.argv[3], 'w').write(json.dumps({'results': sys.argv[1]}))\n"
    )
    results = load("trained_tasks").side_by_side(str(script), {"one": ["a"], "two": ["wrong"], "three": ["c"]})
    assert results == {"one": "a", "two": {"failed": "AssertionError: this row"}, "three": "c"}


def test_options_of_a_run_become_its_flags(load):
    tasks, parser = load("trained_tasks"), argparse.ArgumentParser()
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--small", action="store_true")
    tasks.add_training_options(parser, steps=7)
    options = parser.parse_args(["--rows", "a", "b", "--small", "--out", "file"])
    again = parser.parse_args(tasks.as_flags(options, rows=["b"]))
    assert vars(again) == vars(options) | {"rows": ["b"], "out": None}
    assert parser.parse_args(tasks.as_flags(again, small=False, minutes=0.5)).minutes == 0.5


@pytest.fixture
def small_print(load, monkeypatch):
    benchmark = load("small_print")
    parts = replace(benchmark.SMALL.parts, image_size=32, patch_size=8, tower_width=32, tower_layers=1, width=32, layers=1)
    monkeypatch.setattr(benchmark, "SMALL", replace(benchmark.SMALL, digits=2, width=96, height=64, parts=parts))
    return benchmark


def test_a_page_shows_its_number_where_it_says(small_print):
    task, lefts = small_print.PAGE, []
    for seed in range(40):
        page, digits, (left, top, right, bottom) = small_print.draw_page(task, random.Random(seed))
        assert page.size == (1000, 700) and len(digits) == 6
        rows, columns = np.where(np.asarray(page.convert("L")) < 100)
        assert left <= columns.min() < columns.max() < right and top <= rows.min() < rows.max() < bottom
        assert rows.max() - rows.min() == 8  # digits of 12 px are 9 pixels high
        lefts.append(left)
    assert min(lefts) < 150 and max(lefts) > 750


def test_labels_of_a_tile_say_which_digit_lies_where(small_print):
    task = small_print.PAGE
    for seed in range(20):
        tile, [(digits, x, y)] = small_print.draw_tile(task, random.Random(seed), cut=False)
        dark = np.asarray(tile) < 150
        tokens, cells = small_print.label_tokens(task, [(digits, x, y)]), small_print.label_cells(task, [(digits, x, y)])
        assert tokens.shape == (256, 6) and cells.shape == (256, 8)
        where, index = np.nonzero(tokens >= 0)
        assert sorted(index) == list(range(6)) and (where[index.argsort()] == np.sort(where)).all()
        assert tokens[where, index].tolist() == [int(digits[k]) for k in index]
        assert all(dark.reshape(16, 16, 16, 16)[token // 16, :, token % 16].any() for token in where)
        assert set(cells[cells >= 0]) == {10 * k + int(digit) for k, digit in enumerate(digits)}
        assert not set(np.nonzero(cells >= 0)[0]) - {token + step for token in where for step in (-1, 0, 1)}


def test_digits_that_are_cut_off_have_no_labels(small_print):
    task = small_print.PAGE
    left, right = [("123456", -23, 50)], [("123456", task.side - 23, 50)]
    assert set(small_print.label_tokens(task, left).max(0)[[0, 1, 4, 5]]) == {-1, 5, 6}
    assert small_print.label_tokens(task, right).max(0).tolist() == [1, 2, 3, -1, -1, -1]
    assert set(small_print.label_cells(task, right).flatten()) == {-1, 1, 12, 23}


def test_a_number_is_cut_if_parts_of_it_are_on_several_tiles(small_print):
    task = small_print.PAGE  # 4 x 3 tiles of 250 pixels of the page; those of 768 - 717 pixels of the height are a border
    assert not task.is_cut((200, 10, 246, 19)) and task.is_cut((205, 10, 251, 19)) and not task.is_cut((251, 10, 297, 19))
    assert task.is_cut((10, 220, 56, 229)) and not task.is_cut((10, 226, 56, 235))
    for seed in range(10):
        assert task.is_cut(small_print.draw_page(task, random.Random(seed), cut=True)[2])


@pytest.mark.parametrize("layout", ["crop", "pad", "tiles"])
def test_a_batch_of_pages_is_what_the_processor_makes(small_print, layout):
    reader = small_print.Reader(small_print.SMALL, layout, seed=0)
    page, digits, _ = small_print.draw_page(small_print.SMALL, random.Random(0))
    tiles = torch.from_numpy(small_print.grey_bytes(reader.processor, page))[None]
    batch = reader.batch(reader.prompt(page), tiles, torch.tensor([list(map(int, digits))]))
    content = [{"type": "image", "image": page}, {"type": "text", "text": small_print.QUESTION}]
    messages = [
        {"role": "system", "content": small_print.SYSTEM},
        {"role": "user", "content": content},
        {"role": "assistant", "content": digits},
    ]
    expected = reader.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=0)
    assert ("num_tiles" in batch) == (layout == "tiles") and (layout != "tiles" or batch["num_tiles"].tolist() == [7])
    answer = batch["input_ids"][batch["labels"] != -100]
    assert reader.processor.decode(answer) == digits + reader.processor.tokenizer.eos_token


@pytest.mark.parametrize("layout, image_tokens", [("crop", 4), ("tiles", 28)])
def test_small_print(small_print, tmp_path, capsys, layout, image_tokens):
    flags = [
        "--small",
        "--layouts",
        layout,
        "--workers",
        "0",
        "--tower-steps",
        "2",
        "--tile-steps",
        "2",
        "--steps",
        "2",
        "--pages",
        "3",
    ]
    flags += ["--tile-batch", "2", "--batch", "2", "--weights", str(tmp_path / "weights.pt")]
    small_print.main([*flags, "--out", str(tmp_path / "small_print.json")])
    figures = results(tmp_path / "small_print.json")
    assert (
        figures["first"]["tower"]["steps"] == figures["first"]["tiles"]["steps"] == 2
        and figures[layout]["training"]["pages"] == 4
    )
    assert figures[layout]["image_tokens"] == image_tokens
    assert 0 <= figures[layout]["exact"] <= figures[layout]["digits"] <= 1
    assert f"| {layout} | {image_tokens} | " in capsys.readouterr().out
    small_print.main([*flags, "--out", str(tmp_path / "again.json")])  # from the weights of the tiles that are there
    again = results(tmp_path / "again.json")
    assert "first" not in again and again[layout]["training"]["loss"] == figures[layout]["training"]["loss"]


def test_conversations_about_many_images_are_those_of_the_processor(load):
    distractors = load("distractors")
    parts = load("trained_tasks").Parts(tower_layers=1, layers=1)
    _, processor = load("trained_tasks").compose_parts(parts, distractors.vocabulary_texts(12), 1024)
    images = distractors.Images(processor, 30, "seed")
    batch = distractors.Conversations(processor, 0).batch(images, count=12, tokens=600)
    assert len(batch["pixel_values"]) == 12 * len(batch["input_ids"]) > 12
    for ids, labels, shown in zip(
        batch["input_ids"], batch["labels"], batch["pixel_values"].unflatten(0, (-1, 12)), strict=True
    ):
        said = [text.split(") ") for text in processor.decode(ids[labels != -100]).split("</s>")[:-1]]
        turns = []
        for name, value in said:
            number = int(name.removeprefix("(image "))
            same = [(images.pixels[k] == shown[number - 1]).all() for k in range(len(images))]
            values = images.values[same.index(True)].tolist()
            kind = next(kind for kind, names in enumerate(distractors.ATTRIBUTES.values()) if value in names)
            assert list(distractors.ATTRIBUTES.values())[kind][values[kind]] == value
            turns.append((list(distractors.ATTRIBUTES)[kind], number, values[kind]))
        assert sorted(number for _, number, _ in turns) == list(range(1, 13))
        expected = processor.apply_chat_template(distractors.messages(12, turns), tokenize=False)
        token = processor.image_token
        assert processor.decode(ids) == expected.replace(token, token * processor.image_seq_length)


def test_the_number_of_images_grows_to_the_largest_that_is_measured(load):
    drawn_count, generator = load("distractors").drawn_count, torch.Generator().manual_seed(0)
    at = {done: [drawn_count(done, 512, generator) for _ in range(400)] for done in (0.0, 0.1, 0.4, 1.0)}
    assert set(at[0.0]) == set(at[0.1]) == set(range(1, 9))
    for done in (0.4, 1.0):
        assert min(at[done]) >= 1 and 500 < max(at[done]) <= 512 and sum(count <= 16 for count in at[done]) > 30


@pytest.mark.parametrize("row", ["token/mmca", "token/causal"])
def test_distractors(load, tmp_path, capsys, row):
    flags = ["--rows", row, "--counts", "2", "4", "--steps", "2", "--tokens", "128", "--pool", "20", "--questions", "6"]
    load("distractors").main([*flags, "--out", str(tmp_path / "distractors.json")])
    figures = results(tmp_path / "distractors.json")[row]
    assert figures["training"]["steps"] == 2 and list(figures["accuracy"]) == ["2", "4"]
    assert all(0 <= accuracy <= 1 for count in figures["accuracy"].values() for accuracy in count.values())
    assert f"| {row.replace('/', ' | ')} | " in capsys.readouterr().out


def test_the_red_ball_of_a_clip_appears_in_the_second_of_the_answer(load):
    red_ball, seconds = load("red_ball"), set()
    for seed in range(40):
        frames, second = red_ball.draw_clip(str(seed), 8)
        red = [(np.asarray(frame) == red_ball.COLOURS["red"]).all(-1).any() for frame in frames]
        assert len(frames) == 8 * red_ball.RATE and red.index(True) // red_ball.RATE == second
        # Whoever looks every half second sees it within that second.
        assert red[second * red_ball.RATE + red_ball.RATE // 2 - 1]
        seconds.add(second)
    assert seconds == set(range(8))
