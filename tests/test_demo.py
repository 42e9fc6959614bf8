"""The demo: its data, its scores, and the chat in a new process. One slow test runs all of it."""

import importlib
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
from dsvl.demo import conversations as demo_conversations
from dsvl.demo import scoring, tiny_models
from dsvl.demo import training as demo_training
from dsvl.demo.conversations import ShapeQuestion, generate_conversation
from dsvl.publishing.fresh_process import run_without_dsvl
from dsvl.training import ConversationCollator
from dsvl.utils.shape_images import BACKGROUND, COLOURS, COUNTS, SHAPES, Scene, render

SCRIPT = Path(demo.__file__).with_name("chat_without_package.py")


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tiny_models.save_tower(directory / "tower")
    tiny_models.save_language_model(directory / "language_model")
    return dsvl.compose(directory / "tower", directory / "language_model", number_after=True)


def _texts(conversation):
    return [[part["text"] for part in message["content"] if part["type"] == "text"] for message in _turns(conversation)]


def _turns(conversation):
    return [message for message in conversation["messages"] if message["role"] != "system"]


# -- conversations ---------------------------------------------------------------------------------------------------------


def test_a_seed_decides_the_whole_conversation():
    first, again, other = generate_conversation("a", 3), generate_conversation("a", 3), generate_conversation("b", 3)
    assert first["scenes"] == again["scenes"] and first["questions"] == again["questions"]
    assert [image.tobytes() for image in first["drawn"]] == [image.tobytes() for image in again["drawn"]]
    assert first["scenes"] != other["scenes"]


@pytest.mark.parametrize("colour", COLOURS)
def test_an_image_has_its_colour_on_white(colour):
    image = render(Scene(colour, "square", "two"), random.Random(0))
    shades = {pixel for _, pixel in image.getcolors() if pixel != BACKGROUND}
    (shade,) = shades  # exactly one, without antialiasing
    distance = {name: sum(abs(a - b) for a, b in zip(shade, rgb, strict=True)) for name, rgb in COLOURS.items()}
    assert min(distance, key=distance.get) == colour


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", COUNTS)
def test_an_image_shows_as_many_shapes_as_it_says(shape, count):
    measure = pytest.importorskip("skimage.measure")
    for seed in range(5):
        image = render(Scene("blue", shape, count), random.Random(seed)).convert("L")
        ink = torch.tensor(list(image.tobytes())).view(image.height, image.width) < 250
        assert measure.label(ink.numpy(), connectivity=2).max() == COUNTS.index(count) + 1


def test_shapes_of_a_size_are_all_different():
    images = {render(Scene("red", shape, "one"), random.Random(1)).tobytes() for shape in SHAPES}
    assert len(images) == len(SHAPES)


@pytest.mark.parametrize("images", (1, 2, 3, 4))
def test_answers_are_true_of_the_drawn_scenes(images):
    for seed in range(50):
        conversation = generate_conversation(f"{seed}", images)
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
        conversation = generate_conversation(f"{seed}", 3)
        asked = [[text] for question in conversation["questions"] for text in (question.text, question.answer)]
        assert _texts(conversation) == asked
        parts_of_all = [part for message in _turns(conversation) for part in message["content"]]
        placed = [part["image"] for part in parts_of_all if part["type"] == "image"]
        assert [id(image) for image in placed] == [id(image) for image in conversation["drawn"]]


def test_no_fact_is_asked_twice():
    for seed in range(100):
        questions = generate_conversation(f"{seed}", 3)["questions"]
        facts = [(question.attribute, question.image) for question in questions]
        assert len(set(facts)) == len(facts)
        for question in questions:
            if question.kind == "which":  # no other question is about this attribute
                assert [other.attribute for other in questions].count(question.attribute) == 1


def test_training_and_held_out_conversations_share_no_sequence_of_images():
    lessons = demo_training.TrainingConversations(seed=0, size=2000)
    trained = {tuple(lessons[index]["scenes"]) for index in range(0, 2000, 2)}
    held_out = {tuple(conversation["scenes"]) for conversation in scoring.held_out_conversations(0, 300)}
    assert not trained & held_out
    assert all(demo_conversations.is_held_out(list(scenes)) for scenes in held_out)
    assert not any(demo_conversations.is_held_out(list(scenes)) for scenes in trained)


# -- training --------------------------------------------------------------------------------------------------------


def test_labels_are_the_answers_and_their_ends(composed):
    _, processor = composed
    conversations = [generate_conversation("a", 2), generate_conversation("b", 3)]
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
    question = ShapeQuestion("colour", "colour", 0, "What colour is image 1?", "(image 1) red", 2)
    for answer in ("(image 1) red", "(image 2) red", "red", "(image 1) red."):
        score.add(question, answer)
    score.add(ShapeQuestion("which", "shape", 1, "Which image shows a ring?", "ring (image 2)", 2), "ring (image 2)")
    assert score.accuracy("colour") == 0.25 and score.accuracy("which") == 1.0 and score.accuracy() == 0.4


def test_swapping_makes_every_direct_answer_wrong():
    for conversation in scoring.held_out_conversations(0, 50):
        images = conversation["drawn"]
        order = [images.index(image) for image in scoring.swapped(images)]
        assert sorted(order) == list(range(len(images)))
        for index, source in enumerate(order):
            there, here = conversation["scenes"][source], conversation["scenes"][index]
            assert there.colour != here.colour and there.shape != here.shape and there.count != here.count


def test_replaced_images_are_deterministic():
    images = generate_conversation("a", 3)["drawn"]
    first, again = scoring.replaced(images), scoring.replaced(images)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again] and len(first) == 3
    assert not {image.tobytes() for image in first} & {image.tobytes() for image in images}


def test_the_chance_level_of_which_is_one_in_the_number_of_images():
    conversation = {"questions": [ShapeQuestion("which", "shape", 0, "", "", shown) for shown in (2, 4)]}
    assert scoring.which_chance_level([conversation]) == 0.375


def test_blank_images_show_nothing():
    (colours,) = [image.getcolors() for image in scoring.blank([Image.new("RGB", (5, 5))])]
    assert [colour for _, colour in colours] == [BACKGROUND]


def test_a_prompt_has_the_previous_turns_and_the_given_images():
    conversation = generate_conversation("a", 3)
    images = scoring.blank(conversation["drawn"])
    prompts = scoring.turn_prompts(conversation, images)
    assert [question for _, question in prompts] == conversation["questions"]
    for number, (prompt, question) in enumerate(prompts):
        roles = [message["role"] for message in prompt]
        assert roles == ["system", "user"] + ["assistant", "user"] * number
        assert prompt[-1]["content"][-1]["text"] == question.text
    placed = [part["image"] for m in prompts[-1][0] if m["role"] == "user" for part in m["content"] if "image" in part]
    assert [id(image) for image in placed] == [id(image) for image in images]


def test_the_held_out_set_asks_every_kind_often_enough_to_measure():
    questions = [q.kind for c in scoring.held_out_conversations(0, demo.HELD_OUT) for q in c["questions"]]
    assert min(Counter(questions)[kind] for kind in demo_conversations.KINDS) >= 200


def test_an_untrained_model_misses_the_thresholds(composed):
    model, processor = composed
    score = scoring.score(model, processor, scoring.held_out_conversations(0, 3))
    figures = {name: score.accuracy(name) for name in score.asked} | {"overall": score.accuracy()}
    figures |= {"colour, swapped": 0.5, "shape, swapped": 0.0}
    sentences = demo.missed_thresholds(figures)
    assert any("overall is 0.0%, expected at least 85%" in sentence for sentence in sentences)
    assert any("colour, swapped is 50.0%, expected at most 10%" in sentence for sentence in sentences)


# -- the chat in a new process ---------------------------------------------------------------------------------------


def test_the_script_refuses_to_run_where_the_package_can_be_imported(tmp_path):
    (tmp_path / "dsvl").mkdir()
    (tmp_path / "dsvl" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, SCRIPT, "nowhere", "nothing.json"],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "can be imported here" in done.stderr


def test_a_checkpoint_answers_in_a_process_without_the_package(composed, tmp_path, capfd):
    checkpoint = dsvl.save_checkpoint(*composed, tmp_path / "checkpoint")
    conversation = demo.write_conversation(tmp_path / "conversation", seed=0)
    run_without_dsvl(SCRIPT, checkpoint, conversation)
    printed = capfd.readouterr().out
    assert "No package dsvl can be imported in this process." in printed
    assert "comes from transformers_modules" in printed
    for turn in json.loads(conversation.read_text())["turns"]:
        assert turn["question"] in printed and turn["expected"] in printed


@pytest.mark.slow
def test_the_whole_demo_meets_its_thresholds(tmp_path):
    done = subprocess.run([sys.executable, "-m", "dsvl.demo", "--output", tmp_path / "out"], cwd=tmp_path)
    assert done.returncode == 0


def test_accuracy_with_frozen_weights_in_8_bits(composed, tmp_path, monkeypatch):
    """The benchmark trains in each precision, from the same weights."""
    monkeypatch.syspath_prepend(str(Path(dsvl.__file__).parent / "benchmarks"))
    checkpoint = dsvl.save_checkpoint(*composed, tmp_path / "checkpoint")
    flags = ["--steps", "1", "--held-out", "2", "--keep", "none", "--out", str(tmp_path / "figures.json")]
    importlib.import_module("frozen_accuracy").main([str(checkpoint), *flags])
    found = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert list(found) == ["float32", "fp8", "int8"]
    assert found["float32"]["layers"] is None and found["float32"]["held_out"] == found["float32"]["saved"]
    assert found["fp8"]["layers"].startswith("fp8 in 21 of 21 linear layers of the decoder and 12 of 12")
    assert all(0 <= figures["saved"]["overall"] <= 1 for figures in found.values())
