"""The demo's own promises: its data, its scores, and its fresh process. One slow test runs all of it."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

import dsvl
from dsvl.demo import __main__ as demo
from dsvl.demo import drawing, learning, parts, scoring
from dsvl.demo.drawing import COLOURS, NUMBERS, SHAPES, Question, Scene, converse
from dsvl.publishing.fresh_process import run_without_dsvl
from dsvl.training import ConversationCollator

TALK = Path(demo.__file__).with_name("talk.py")


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    parts.save_tower(directory / "tower")
    parts.save_language_model(directory / "language_model")
    return dsvl.compose(directory / "tower", directory / "language_model", number_after=True)


def _texts(conversation):
    return [[part["text"] for part in message["content"] if part["type"] == "text"] for message in _turns(conversation)]


def _turns(conversation):
    return [message for message in conversation["messages"] if message["role"] != "system"]


# -- drawing ---------------------------------------------------------------------------------------------------------


def test_a_seed_decides_the_whole_conversation():
    first, again, other = converse("a", 3), converse("a", 3), converse("b", 3)
    assert first["scenes"] == again["scenes"] and first["questions"] == again["questions"]
    assert [image.tobytes() for image in first["drawn"]] == [image.tobytes() for image in again["drawn"]]
    assert first["scenes"] != other["scenes"]


@pytest.mark.parametrize("colour", COLOURS)
def test_an_image_has_its_colour_on_white(colour):
    image = drawing.render(Scene(colour, "square", "two"), random.Random(0))
    shades = {pixel for _, pixel in image.getcolors() if pixel != drawing.BACKGROUND}
    (shade,) = shades  # one, and not a blend
    distance = {name: sum(abs(a - b) for a, b in zip(shade, rgb, strict=True)) for name, rgb in COLOURS.items()}
    assert min(distance, key=distance.get) == colour


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", NUMBERS)
def test_an_image_shows_as_many_shapes_as_it_says(shape, count):
    measure = pytest.importorskip("skimage.measure")
    for seed in range(5):
        image = drawing.render(Scene("blue", shape, count), random.Random(seed)).convert("L")
        ink = torch.tensor(list(image.tobytes())).view(image.height, image.width) < 250
        assert measure.label(ink.numpy(), connectivity=2).max() == NUMBERS.index(count) + 1


def test_shapes_of_a_size_are_all_different():
    images = {drawing.render(Scene("red", shape, "one"), random.Random(1)).tobytes() for shape in SHAPES}
    assert len(images) == len(SHAPES)


@pytest.mark.parametrize("images", (1, 2, 3, 4))
def test_answers_are_true_of_the_drawn_scenes(images):
    for seed in range(50):
        conversation = converse(f"{seed}", images)
        assert len(conversation["drawn"]) == len(conversation["scenes"]) == images
        for question in conversation["questions"]:
            scene, name = conversation["scenes"][question.image], f"(image {question.image + 1})"
            value = getattr(scene, question.attribute)
            if question.kind == "which":
                shown = conversation["scenes"][: question.images]
                assert [getattr(other, question.attribute) for other in shown].count(value) == 1
                assert value in question.text and question.answer == f"{value} {name}"
            else:
                assert f"image {question.image + 1}?" in question.text and question.answer == f"{name} {value}"
            assert question.image < question.images


def test_messages_hold_the_questions_the_answers_and_every_image_in_order():
    for seed in range(20):
        conversation = converse(f"{seed}", 3)
        asked = [[text] for question in conversation["questions"] for text in (question.text, question.answer)]
        assert _texts(conversation) == asked
        parts_of_all = [part for message in _turns(conversation) for part in message["content"]]
        placed = [part["image"] for part in parts_of_all if part["type"] == "image"]
        assert [id(image) for image in placed] == [id(image) for image in conversation["drawn"]]


def test_no_fact_is_asked_for_twice():
    for seed in range(100):
        questions = converse(f"{seed}", 3)["questions"]
        facts = [(question.attribute, question.image) for question in questions]
        assert len(set(facts)) == len(facts)
        for question in questions:
            if question.kind == "which":  # nothing else in the conversation speaks about this attribute
                assert [other.attribute for other in questions].count(question.attribute) == 1


def test_training_and_held_out_conversations_share_no_sequence_of_images():
    lessons = learning.Lessons(seed=0, size=2000)
    trained = {tuple(lessons[index]["scenes"]) for index in range(0, 2000, 2)}
    held_out = {tuple(conversation["scenes"]) for conversation in scoring.held_out_conversations(0, 300)}
    assert not trained & held_out
    assert all(drawing.is_held_out(list(scenes)) for scenes in held_out)
    assert not any(drawing.is_held_out(list(scenes)) for scenes in trained)


# -- learning --------------------------------------------------------------------------------------------------------


def test_labels_are_the_answers_and_their_ends(composed):
    _, processor = composed
    conversations = [converse("a", 2), converse("b", 3)]
    batch = ConversationCollator(processor)(conversations)
    assert len(batch["pixel_values"]) == 5
    for labels, ids, conversation in zip(batch["labels"], batch["input_ids"], conversations, strict=True):
        supervised = labels != -100
        assert torch.equal(labels[supervised], ids[supervised])
        expected = "".join(question.answer + "</s>" for question in conversation["questions"])
        assert processor.decode(labels[supervised]) == expected


def test_the_names_of_images_are_one_token_and_any_text_survives(composed):
    _, processor = composed
    assert processor.tokenizer.tokenize("(image 2)") == processor.tokenizer.tokenize("(image 2) red")[:1]
    text = "Größe: 3 cm?\n\nNothing of this was in the training text - (image 17)"
    assert processor.tokenizer.decode(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


# -- scoring ---------------------------------------------------------------------------------------------------------


def test_a_score_counts_exact_answers_of_each_kind():
    score = scoring.Score()
    question = Question("colour", "colour", 0, "What colour is image 1?", "(image 1) red", 2)
    for answer in ("(image 1) red", "(image 2) red", "red", "(image 1) red."):
        score.add(question, answer)
    score.add(Question("which", "shape", 1, "Which image shows a ring?", "ring (image 2)", 2), "ring (image 2)")
    assert score.share("colour") == 0.25 and score.share("which") == 1.0 and score.share() == 0.4


def test_swapping_makes_every_direct_answer_wrong():
    for conversation in scoring.held_out_conversations(0, 50):
        images = conversation["drawn"]
        order = [images.index(image) for image in scoring.swapped(images)]
        assert sorted(order) == list(range(len(images)))
        for place, source in enumerate(order):
            there, here = conversation["scenes"][source], conversation["scenes"][place]
            assert there.colour != here.colour and there.shape != here.shape and there.count != here.count


def test_other_images_are_as_many_and_always_the_same_ones():
    images = converse("a", 3)["drawn"]
    first, again = scoring.others(images), scoring.others(images)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again] and len(first) == 3
    assert not {image.tobytes() for image in first} & {image.tobytes() for image in images}


def test_the_chance_of_which_is_one_in_the_images_shown():
    conversation = {"questions": [Question("which", "shape", 0, "", "", shown) for shown in (2, 4)]}
    assert scoring.chance_of_which([conversation]) == 0.375


def test_blank_images_show_nothing():
    (colours,) = [image.getcolors() for image in scoring.blank([Image.new("RGB", (5, 5))])]
    assert [colour for _, colour in colours] == [drawing.BACKGROUND]


def test_a_round_is_asked_with_the_rounds_before_it_and_the_images_given():
    conversation = converse("a", 3)
    images = scoring.blank(conversation["drawn"])
    rounds = scoring.rounds_of(conversation, images)
    assert [question for _, question in rounds] == conversation["questions"]
    for number, (prompt, question) in enumerate(rounds):
        roles = [message["role"] for message in prompt]
        assert roles == ["system", "user"] + ["assistant", "user"] * number
        assert prompt[-1]["content"][-1]["text"] == question.text
    placed = [part["image"] for m in rounds[-1][0] if m["role"] == "user" for part in m["content"] if "image" in part]
    assert [id(image) for image in placed] == [id(image) for image in images]


def test_the_held_out_set_asks_every_kind_often_enough_to_measure():
    questions = [q.kind for c in scoring.held_out_conversations(0, demo.HELD_OUT) for q in c["questions"]]
    assert min(Counter(questions)[kind] for kind in drawing.KINDS) >= 200


def test_a_model_that_has_learnt_nothing_misses_the_floors(composed):
    model, processor = composed
    score = scoring.score(model, processor, scoring.held_out_conversations(0, 3))
    figures = {name: score.share(name) for name in score.asked} | {"over all": score.share()}
    figures |= {"colour, swapped": 0.5, "shape, swapped": 0.0}
    sentences = demo.missed_floors(figures)
    assert any("over all is 0.0%, expected at least 85%" in sentence for sentence in sentences)
    assert any("colour, swapped is 50.0%, expected at most 10%" in sentence for sentence in sentences)


# -- the fresh process -----------------------------------------------------------------------------------------------


def test_the_talk_refuses_to_run_where_the_package_can_be_imported(tmp_path):
    (tmp_path / "dsvl").mkdir()
    (tmp_path / "dsvl" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, TALK, "nowhere", "nothing.json"],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "can be imported here" in done.stderr


def test_a_checkpoint_talks_in_a_process_without_the_package(composed, tmp_path, capfd):
    checkpoint = dsvl.save_checkpoint(*composed, tmp_path / "checkpoint")
    conversation = demo.write_talk(tmp_path / "talk", seed=0)
    run_without_dsvl(TALK, checkpoint, conversation)
    printed = capfd.readouterr().out
    assert "No package dsvl can be imported in this process." in printed
    assert "comes from transformers_modules" in printed
    for turn in json.loads(conversation.read_text())["rounds"]:
        assert turn["question"] in printed and turn["truth"] in printed


@pytest.mark.slow
def test_the_whole_demo_reaches_its_floors(tmp_path):
    done = subprocess.run([sys.executable, "-m", "dsvl.demo", "--output", tmp_path / "out"], cwd=tmp_path)
    assert done.returncode == 0
