"""Answers that are shown: a table, a page with images, several models side by side."""

import base64
import csv
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsvl.cli import main
from dsvl.evaluation import report
from dsvl.evaluation.answer_records import AnswerRecord, read_records
from dsvl.evaluation.compare_command import win_loss_lines
from dsvl.evaluation.comparison import WinLossTie, join, summarize, win_loss_tie
from dsvl.evaluation.report import write_csv, write_html

HOSTILE = "</p><script>alert('x')</script><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "input", "link"}


def record(name: str, number: int = 0, answer: str = "blue", score: float | None = 1.0, **fields: Any) -> AnswerRecord:
    scores = {} if score is None else {"exact_match": score}
    references = [] if score is None else ["blue"]
    known = dict(id=name, turn=number, question=f"What is {name} {number}?", images=[], model="/models/one")
    return AnswerRecord(**(known | dict(answer=answer, references=references, scores=scores) | fields))


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "a cup.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (700, 900, 3), dtype=np.uint8)).save(path)
    return str(path)


class Page(HTMLParser):
    """A page's elements (tag -> attributes of each) and its text; fails where tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: dict[str, list[dict[str, str]]] = {}
        self.text, self.open = "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.text += " "
        self.elements.setdefault(tag, []).append({name: value or "" for name, value in attrs})
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())


def page_of(path: Path, *arguments: Any, **options: Any) -> Page:
    write_html(path, *arguments, **options)
    return Page(path)


def table_of(path: Path, *arguments: Any) -> list[dict[str, str]]:
    write_csv(path, *arguments)
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


# -- records -----------------------------------------------------------------------------------------------------------


def test_records_are_read_as_they_were_written(tmp_path):
    records = [record("a", images=["/x.png"]), record("ä\n", 1, "\u2028=1", None)]
    (tmp_path / "answers.jsonl").write_text("".join(f"{one.line()}\n" for one in records), encoding="utf-8")
    assert read_records(tmp_path / "answers.jsonl") == records
    for line in ("[1]", '{"id": "a"}', '{"id": '):
        (tmp_path / "broken.jsonl").write_text(f"{records[0].line()}\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"broken.jsonl, line 2 is no"):
            read_records(tmp_path / "broken.jsonl")


# -- joining -----------------------------------------------------------------------------------------------------------


def test_runs_are_joined_on_conversation_and_turn():
    one = [record("b", 1), record("b", 0), record("a", 0, "red", 0.0)]
    two = [record("a", 0), record("c", 0)]
    conversations = join({"one": one, "two": two})
    assert [(name, [r.asked.turn for r in turns]) for name, turns in conversations.items()] == [
        ("b", [0, 1]),
        ("a", [0]),
        ("c", [0]),
    ]
    assert conversations["a"][0].answers == {"one": one[2], "two": two[0]} and conversations["a"][0].differs
    assert conversations["c"][0].answers == {"one": None, "two": two[1]} and conversations["c"][0].differs
    whole, common = summarize(conversations), summarize(conversations, common=True)
    assert (whole["one"].answered, whole["one"].missing, whole["one"].means["exact_match"]) == (3, 1, (2 / 3, 3))
    assert (whole["two"].answered, whole["two"].missing, whole["two"].means["exact_match"]) == (2, 2, (1.0, 2))
    assert common["one"].means["exact_match"] == (0.0, 1) and common["two"].means["exact_match"] == (1.0, 1)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ({"one": [record("a")], "two": []}, "two has no answers"),
        ({"one": [record("a"), record("a")]}, "answers conversation 'a', turn 0 twice"),
        ({"one": [record("a")], "two": [record("a", question="Who?")]}, "question 'What is a 0.' and 'Who.'"),
        ({"one": [record("a")], "two": [record("a", images=["x"])]}, "number of images 0 and 1"),
        ({"one": [record("a")], "two": [record("a", references=["red"])]}, "references"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, runs, words):
    for write in (write_csv, write_html):
        with pytest.raises(ValueError, match=words):
            write(tmp_path / "out", runs)
    assert not (tmp_path / "out").exists()


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_turn_and_model(tmp_path, image):
    one = [record("a", images=[image]), record("a", 1, 'two\nlines, and a "quote"', None)]
    two = [record("a", 0, "red", 0.25, images=[image])]
    rows = table_of(tmp_path / "t.csv", {"one": one, "two": two})
    assert [(row["id"], row["turn"], row["model"], row["answered"], row["answer"], row["exact_match"]) for row in rows] == [
        ("a", "0", "one", "yes", "blue", "1.0"),
        ("a", "0", "two", "yes", "red", "0.25"),
        ("a", "1", "one", "yes", 'two\nlines, and a "quote"', ""),
        ("a", "1", "two", "no", "", ""),
    ]
    assert json.loads(rows[0]["images"]) == [image] and json.loads(rows[0]["references"]) == ["blue"]


def test_a_spreadsheet_computes_nothing_of_the_table(tmp_path):
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "＝1"]
    runs = {"=one": [record(text, 0, text, question=text) for text in texts]}
    for row, text in zip(table_of(tmp_path / "t.csv", runs), texts, strict=True):
        assert row["id"] == row["question"] == row["answer"] == f"'{text}" and row["model"] == "'=one"
    assert (tmp_path / "t.csv").read_bytes().startswith(b"\xef\xbb\xbf")  # else Excel takes it for Latin letters


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_shows_images_questions_answers_scores_and_references(tmp_path, image):
    one = [record("a", images=[image]), record("a", 1, "It is red.", 0.25, references=["blue", "navy", "blue"])]
    page = page_of(tmp_path / "p.html", {"one": one}, title="Cups & saucers")
    words = page.words()
    shown = ["Cups & saucers", "0.625 of 2", "1 conversation, 2 turns, 1 image", "What is a 0?", "blue", "exact match 1"]
    shown += ["Reference: blue", "What is a 1?", "It is red.", "exact match 0.250", "References: blue × 2, navy"]
    places = [words.find(text) for text in shown]
    assert -1 not in places and places == sorted(places), list(zip(shown, places, strict=True))
    (element,) = page.elements["img"]
    head, data = element["src"].split(",")
    assert head == "data:image/jpeg;base64" and element["alt"] == "a cup.png"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (480, 373)


def test_models_stand_side_by_side_and_missing_answers_are_shown(tmp_path):
    one = [record("a", 0, "red", 0.0), record("a", 1), record("b", 0, "same")]
    two = [record("a", 0, "blue"), record("b", 0, " same\n")]
    page = page_of(tmp_path / "p.html", {"one": one, "two": two})
    words = page.words()
    assert "one red exact match 0 two blue exact match 1" in words
    assert "What is a 1? one blue exact match 1 two no answer" in words
    assert "the models differ (2)" in words and "Over the 2 turns that all models answered" in words
    kinds = [[kind for kind in ("differs", "imperfect") if kind in one["class"].split()] for one in page.elements["article"]]
    assert kinds == [["differs", "imperfect"], ["differs"], []]
    assert {one["id"] for one in page.elements["input"]} == {"all", "differs", "imperfect"}
    disjoint = page_of(tmp_path / "p.html", {"one": one, "two": [record("c")]})
    assert "No turn was answered by all models." in disjoint.words()


def test_the_title_says_what_is_compared(tmp_path):
    one = [record("a")]
    for runs, title in (
        ({"one": one}, "Answers of one"),
        ({"one": one, "two": one}, "one compared with two"),
        ({"one": one, "two": one, "three": one}, "one compared with two and three"),
    ):
        assert page_of(tmp_path / "p.html", runs).words().startswith(f"{title} ")


def test_wins_losses_and_ties_of_the_turns_that_both_have(tmp_path):
    scores = {"one": [1.0, 0.5, 0.0, 1.0, None, 0.5], "two": [0.0, 0.5, 1.0, 0.5, 1.0], "three": [1.0]}
    runs = {
        label: [record("a", number, "x", value) for number, value in enumerate(values)] for label, values in scores.items()
    }
    found = win_loss_tie(join(runs))
    assert found == {"two": {"exact_match": WinLossTie(2, 1, 1)}, "three": {"exact_match": WinLossTie(0, 0, 1)}}
    assert win_loss_lines("one", found) == [
        "one against two    exact_match  2 wins  1 losses  1 ties",
        "one against three  exact_match  0 wins  0 losses  1 ties",
    ]
    words = page_of(tmp_path / "p.html", runs).words()
    assert "one against by wins losses ties two exact match 2 1 1 three exact match 0 0 1" in words
    assert "wins" not in page_of(tmp_path / "p.html", {"one": runs["one"]}).words()


def test_long_answers_are_folded_and_whole(tmp_path):
    long, lines = "word " * 400 + "end", "\n".join(map(str, range(40)))
    one = [record("a", 0, "short"), record("a", 1, long), record("a", 2, lines)]
    page = page_of(tmp_path / "p.html", {"one": one})
    assert len(page.elements["details"]) == 2 and len(page.elements["summary"]) == 2
    assert page.text.count(long) == 1 and page.text.count(lines) == 1
    assert "2,003 characters" in page.words() and page.words().count("short") == 1


def test_nothing_on_the_page_is_run_or_fetched(tmp_path):
    fields = dict(question=HOSTILE, references=[HOSTILE], images=[f"/x/{HOSTILE}.png", f"https://x.org/{HOSTILE}"])
    one = [record(HOSTILE, 0, HOSTILE, scores={HOSTILE: 0.5}, **fields)]
    page = page_of(tmp_path / "p.html", {HOSTILE: one, "two": one}, title=HOSTILE)
    assert "script" not in page.elements and "img" not in page.elements and "link" not in page.elements
    attributes = [name for several in page.elements.values() for element in several for name in element]
    assert not [name for name in attributes if name.startswith("on") or name in ("href", "action", "srcset")]
    assert page.text.count(HOSTILE) >= 8
    policy = next(element["content"] for element in page.elements["meta"] if "http-equiv" in element)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not re.search(r"url\(|@import", (tmp_path / "p.html").read_text(encoding="utf-8"))


def test_an_image_that_cannot_be_opened_shows_its_name_and_why(tmp_path, image, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"no image")
    sources = [str(tmp_path / "gone.png"), str(tmp_path / "broken.png"), "http://example.org/far.png", image]
    monkeypatch.setattr(report, "open_image", wrapped := Opened(report.open_image))
    page = page_of(tmp_path / "p.html", {"one": [record("a", images=sources)]})
    words = page.words()
    assert "gone.png does not exist" in words and "broken.png cannot be read" in words
    assert "far.png is a URL, and fetching is not allowed" in words
    assert "4 images, 3 of them not shown" in words and len(page.elements["img"]) == 1
    assert str(tmp_path) not in (tmp_path / "p.html").read_text(encoding="utf-8")
    page_of(tmp_path / "p.html", {"one": [record("a")]}, allow_urls=True)
    assert wrapped.allowed == [False] * 4


class Opened:
    """`open_image`, and what it was allowed."""

    def __init__(self, open_image: Any) -> None:
        self.open_image, self.allowed = open_image, []

    def __call__(self, source: Any, allow_urls: bool) -> Any:
        self.allowed.append(allow_urls)
        return self.open_image(source, allow_urls)


def test_pages_of_many_images_stay_small_enough_to_be_sent(tmp_path, image, monkeypatch):
    runs = {"one": [record(str(number), images=[image]) for number in range(7)]}
    monkeypatch.setattr(report, "WIDTHS", {480: 5, 64: None})
    page_of(tmp_path / "p.html", {"one": runs["one"][:5]})
    large = (tmp_path / "p.html").stat().st_size / 5
    page = page_of(tmp_path / "p.html", runs)
    assert (tmp_path / "p.html").stat().st_size / 7 < large / 4
    monkeypatch.setattr(report, "PAGE_BYTES", 2 * len(page.elements["img"][0]["src"]) + 1)
    page = page_of(tmp_path / "p.html", runs)
    assert len(page.elements["img"]) == 3  # the one that crosses the bound is the last
    assert page.words().count("a cup.png is not shown") == 4 and "7 images, 4 of them not shown" in page.words()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
def test_a_browser_filters_the_page_and_runs_and_fetches_nothing(tmp_path, image):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    one = [record("a", images=[image]), record("a", 1, "red", 0.0), record("b"), record("c", 0, HOSTILE, None)]
    two = [record("a", images=[image]), record("a", 1), record("b"), record("c", 0, "fine", None)]
    write_html(tmp_path / "p.html", {"one": one, "two": two})
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
        requests, dialogs = [], []
        page.on("request", lambda request: requests.append(request.url.partition(":")[0]))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto((tmp_path / "p.html").as_uri())

        def seen(selector: str) -> list[str]:
            return [element.inner_text() for element in page.query_selector_all(selector) if element.is_visible()]

        assert seen("h2") == ["a", "b", "c"] and len(seen(".answer")) == 8 and len(seen("img")) == 1
        page.check("#differs")  # the turns before one that differs keep their questions and images
        assert seen("h2") == ["a", "c"] and len(seen(".question")) == 3 and len(seen(".answer")) == 4
        page.check("#imperfect")
        assert seen("h2") == ["a"] and len(seen(".question")) == 2 and len(seen(".answer")) == 2
        assert page.locator("img").is_visible() and page.locator("img").bounding_box()["width"] > 200
        page.check("#all")
        assert seen("h2") == ["a", "b", "c"]
        page.screenshot(path=tmp_path / "p.png", full_page=True)
        assert Image.open(tmp_path / "p.png").width == 390  # nothing is wider than a phone
        browser.close()
    assert set(requests) <= {"file", "data"} and len(requests) - requests.count("data") == 1 and not dialogs


# -- the command -------------------------------------------------------------------------------------------------------


def write(path: Path, records: list[AnswerRecord]) -> str:
    path.write_text("".join(f"{one.line()}\n" for one in records), encoding="utf-8")
    return str(path)


def test_the_command_prints_means_and_writes_table_and_page(tmp_path, capsys):
    first = write(tmp_path / "first.jsonl", [record("a"), record("b", 0, "red", 0.0), record("c", 0, "x", None)])
    second = write(tmp_path / "second.jsonl", [replace(record("a"), model="me/two")])
    out = [str(tmp_path / "t.csv"), str(tmp_path / "p.html")]
    assert main(["compare", first, second, "--csv", out[0], "--html", out[1]]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "     turns  missing  exact_match",
        "one      3        0    0.500 (2)",
        "two      1        2        1 (1)",
        "",
        "Over the 1 turn that all runs answered:",
        "     turns  missing  exact_match",
        "one      1        0        1 (1)",
        "two      1        0        1 (1)",
        "",
        "one against two  exact_match  0 wins  0 losses  1 ties",
        *out,
    ]
    assert "one blue exact match 1 two blue exact match 1" in Page(tmp_path / "p.html").words()


def test_runs_of_one_model_are_told_apart_by_their_files(tmp_path, capsys):
    paths = [write(tmp_path / name, [record("a")]) for name in ("greedy.jsonl", "beams.jsonl")]
    assert main(["compare", *paths]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["greedy", "beams"]
    assert main(["compare", str(tmp_path / "none.jsonl")]) == 1


def test_an_answer_file_of_version_0_1_is_read(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text(record("a", 1).line().replace('"turn": 1', '"round": 1') + "\n")
    assert read_records(path) == [record("a", 1)]


@pytest.mark.parametrize("flag", ["--csv", "--html"])
def test_answers_are_not_overwritten_by_their_comparison(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    Path("ours.jsonl").write_text("kept")
    Path("link.jsonl").symlink_to("ours.jsonl")
    for same in ("ours.jsonl", "../" + tmp_path.name + "/ours.jsonl", "link.jsonl"):
        assert main(["compare", "ours.jsonl", flag, same]) == 1
        assert f"{flag} {same} is a file that this command reads, and would be overwritten; pass" in capsys.readouterr().err
    assert Path("ours.jsonl").read_text() == "kept"


def test_two_reports_are_two_files(tmp_path, capsys):
    assert main(["compare", "ours.jsonl", "--csv", f"{tmp_path}/x", "--html", f"{tmp_path}/./x"]) == 1
    assert "--csv and --html are the same file" in capsys.readouterr().err
