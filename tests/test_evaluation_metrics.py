"""Scores, against values worked out by hand from their definitions."""

import pytest

from dsvl.evaluation.metrics import anls, exact_match, score, token_f1, vqa_accuracy, vqa_normalize


def test_exact_match_is_to_the_letter_but_for_white_space():
    assert exact_match(" blue\n", ["red", "blue "]) == 1
    for answer in ("Blue", "blue.", "", "light blue"):
        assert exact_match(answer, ["red", "blue"]) == 0


@pytest.mark.parametrize(("agree", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_is_the_mean_over_nine_of_ten_humans(agree, accuracy):
    # With 3 of 10 that agree: leave out one of them, 2/3; leave out one of the 7 others, 3/3: (3 x 2/3 + 7 x 1) / 10.
    assert vqa_accuracy("Blue.", ["blue"] * agree + ["red"] * (10 - agree)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two dogs.", "2 dogs"),
        ("none of  them\n", "0 of them"),
        ("an apple, a pear", "apple pear"),
        ("red/blue", "red blue"),
        ("black-and-white", "black and white"),
        ("yes - no", "yes no"),
        ("1,000 men-at-arms", "1000 menatarms"),
        ("$3.50", "$3.50"),
        ("at 5 p.m.", "at 5 pm"),
        ("i dont know, its his", "i don't know its his"),
        ("he couldnt've", "he couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("well, were ill", "well were ill"),
        ("ten o'clock", "10 o'clock"),
    ],
)
def test_answers_are_normalized_as_the_vqa_benchmark_does(text, normal):
    assert vqa_normalize(text) == normal
    assert vqa_normalize(normal) == normal


def test_normalization_counts_on_both_sides_even_if_all_agree():
    assert vqa_accuracy("Two", ["2"] * 10) == vqa_accuracy("2", ["two."] * 10) == 1


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("Room  B12 ", ["room b12"], 1),
        ("ab", ["ac"], 0.5),
        ("abc", ["ade"], 0),  # a third, below one half
        ("", ["cup"], 0),
        ("kitten", ["dog", "mitten", "sitting"], 1 - 1 / 6),
    ],
)
def test_anls(answer, references, expected):
    assert anls(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The red cup.", ["a cup"], 2 / 3),
        ("CUP!", ["cup"], 1),
        ("cup cup", ["cup"], 2 / 3),
        ("a red and blue cup", ["green", "the blue cup"], 2 * 2 / (4 + 2)),
        ("anthem", ["the"], 0),
        ("the", ["a"], 1),  # no words on either side
        ("", ["cup"], 0),
    ],
)
def test_token_f1(answer, references, expected):
    assert token_f1(answer, references) == pytest.approx(expected)


def test_what_applies_is_scored():
    assert score("blue", []) == {}
    assert score("blue", ["blue"]) == {"exact_match": 1, "anls": 1, "token_f1": 1}
    assert score("Blue.", ["blue"] * 4)["vqa_accuracy"] == 1
    assert "vqa_accuracy" not in score("blue", ["blue"] * 3)
