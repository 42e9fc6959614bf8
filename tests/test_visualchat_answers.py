"""Answers in the form of DeepSpeed-VisualChat's `eval/results/*.csv` are compared with ours."""

import csv
import json
import re

import pytest
from PIL import Image
from test_report import Page
from training_runs import make_checkpoint

from dsvl.cli import main
from dsvl.evaluation.answer_records import AnswerRecord
from dsvl.evaluation.visualchat_answers import read_visualchat_answers

# As eval/batch_generation.py writes it: the question stands for the paths of a turn without images.
QUESTIONS = {
    "garden1": [
        ["What grows here?", "./eval/eval_data/images/one.png"],
        ["And here, in the second one?", "./eval/eval_data/images/two.png"],
        ["Which one is larger, and why? "],
    ],
    "garden2": [["Tell a story.", "./eval/eval_data/images/one.png ./eval/eval_data/images/two.png"], ["How does it end?"]],
}
ANSWER = 'A "rose", red;\nand a tree.'


@pytest.fixture
def repository(tmp_path):
    """A folder with the layout of the original, and its answers to `QUESTIONS`."""
    root = tmp_path / "DeepSpeed-VisualChat"
    (root / "eval/eval_data/images").mkdir(parents=True)
    (root / "eval/results/eval_garden").mkdir(parents=True)
    for name in ("one", "two"):
        Image.new("RGB", (40, 30), "red").save(root / f"eval/eval_data/images/{name}.png")
    (root / "eval/eval_data/eval_garden.json").write_text(json.dumps(QUESTIONS))
    write_table(root / "eval/results/eval_garden/set1.csv", QUESTIONS)
    return root


def write_table(path, questions):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["test_name", "image_path", "question", "answer"])
        for name, pairs in questions.items():
            writer.writerows([name, pair[-1], pair[0], ANSWER] for pair in pairs)


def ours(path, questions, root):
    records = [
        AnswerRecord(
            name, turn, pair[0], [str(root / image) for image in pair[1].split()] if len(pair) > 1 else [], "no", [], {}, "m"
        )
        for name, pairs in questions.items()
        for turn, pair in enumerate(pairs)
    ]
    path.write_text("".join(f"{one.line()}\n" for one in records))
    return path


def test_rows_become_turns_in_order(repository):
    table = repository / "eval/results/eval_garden/set1.csv"
    records = read_visualchat_answers(table)
    images = [str(repository / "eval/eval_data/images" / name) for name in ("one.png", "two.png")]
    assert [(one.id, one.turn, one.question, one.images) for one in records] == [
        ("garden1", 0, "What grows here?", images[:1]),
        ("garden1", 1, "And here, in the second one?", images[1:]),
        ("garden1", 2, "Which one is larger, and why? ", []),
        ("garden2", 0, "Tell a story.", images),
        ("garden2", 1, "How does it end?", []),
    ]
    assert {(one.answer, one.model, len(one.references), len(one.scores)) for one in records} == {(ANSWER, "set1", 0, 0)}


def test_images_that_are_not_there_keep_their_paths(tmp_path):
    write_table(tmp_path / "set1.csv", QUESTIONS)
    assert read_visualchat_answers(tmp_path / "set1.csv")[0].images == ["./eval/eval_data/images/one.png"]


def test_a_model_is_compared_with_the_original(repository, tmp_path, capsys, monkeypatch):
    """From the original's questions to a page with both models' answers and the images."""
    make_checkpoint(tmp_path, max_position_embeddings=512)
    monkeypatch.chdir(repository)  # where its image paths begin
    argv = ["evaluate", str(tmp_path / "model"), "eval/eval_data/eval_garden.json", "--out", str(tmp_path / "own.jsonl")]
    assert main([*argv, "--device", "cpu", "--max-new-tokens", "3"]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    table, page = str(repository / "eval/results/eval_garden/set1.csv"), tmp_path / "page.html"
    assert main(["compare", "own.jsonl", table, "--html", str(page)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{table}: 5 of 5 questions are those of the other files",
        "",
        "       turns  missing",
        "model      5        0",
        "set1       5        0",
        str(page),
    ]
    shown = Page(page)
    assert shown.words().count('A "rose", red; and a tree.') == 5
    assert sum(one["src"].startswith("data:image/") for one in shown.elements["img"]) == 4


def test_questions_that_do_not_match_are_counted_and_said(repository, tmp_path, capsys):
    changed = {name: [list(pair) for pair in pairs] for name, pairs in QUESTIONS.items()}
    changed["garden1"][1][0] = "And in the second one?"  # another question
    changed["garden2"][0] = ["Tell a story."]  # another number of images
    del changed["garden2"][1]
    own = ours(tmp_path / "own.jsonl", changed, repository)
    table = str(repository / "eval/results/eval_garden/set1.csv")
    assert main(["compare", table, str(own)]) == 0
    assert capsys.readouterr().out.splitlines()[:7] == [
        f"{table}: 2 of 5 questions are those of the other files",
        "  1 at turns that the other files do not have",
        "  2 left out: another question at the same turn (first: conversation 'garden1', turn 1)",
        "",
        "      turns  missing",
        "set1      3        2",
        "m         4        1",
    ]


def test_a_table_of_other_questions_is_refused(repository, tmp_path, capsys):
    own = ours(tmp_path / "own.jsonl", {"other": [["Who?"]]}, repository)
    assert main(["compare", str(own), str(repository / "eval/results/eval_garden/set1.csv")]) == 1
    assert re.search(r"no question of .*set1.csv is in .*own.jsonl; evaluate the file that", capsys.readouterr().err)


def test_two_tables_of_the_original_are_compared(repository, capsys):
    folder = repository / "eval/results/eval_garden"
    write_table(folder / "set2.csv", QUESTIONS)
    assert main(["compare", str(folder / "set1.csv"), str(folder / "set2.csv")]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:3]] == [["set1", "5", "0"], ["set2", "5", "0"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has the columns ; expected test_name, image_path, question, answer"),
        (b"id,turn,model\na,0,m\n", "has the columns id, turn, model; expected test_name, image_path, question, answer"),
        (b"test_name,image_path,question,answer\na,b,c,d\na,b,c\n", "line 3: 3 columns; expected test_name"),
        (b'test_name,image_path,question,answer\na,b,c,"d\n', "line 2: not a CSV table in UTF-8"),
        (b"test_name,image_path,question,answer\na,b,c,\xff\n", "not a CSV table in UTF-8"),
    ],
)
def test_another_table_is_refused(tmp_path, content, message):
    (tmp_path / "set1.csv").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_visualchat_answers(tmp_path / "set1.csv")
