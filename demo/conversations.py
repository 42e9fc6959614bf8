"""Multi-turn conversations about several images of coloured shapes, generated from a seed.

All images of a conversation differ in colour, shape and count. So every question has exactly one answer, and swapping
images makes an answer wrong. The text alone does not give answers away: a conversation asks for an attribute either
directly, of up to two images ("What colour is image 2?", "(image 2) red"), or once in reverse ("Which image shows the colour
red?", "red (image 2)"). An answer begins with what the question named, so that the model can look up the rest from there.
"""

import random
import zlib
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..utils.shape_images import COLOURS, COUNTS, SHAPES, Scene, render

SYSTEM = "You look at images and answer questions."

KINDS = ("colour", "shape", "count", "which")
DIRECT = {
    "colour": "What colour is image {}?",
    "shape": "What shape is in image {}?",
    "count": "How many shapes are in image {}?",
}
WHICH = {
    "colour": "Which image shows the colour {}?",
    "shape": "Which image shows a {}?",
    "count": "Which image shows {} of them?",
}
HELD_OUT_EVERY = 8  # 1 in 8 sequences of images is held out from training


@dataclass(frozen=True)
class ShapeQuestion:
    """The question of a turn.

    Attributes:
        kind: one of `KINDS`.
        attribute: "colour", "shape" or "count".
        image: the index of the image it is about.
        text: the question.
        answer: the correct answer.
        images: the number of images shown up to this turn.
    """

    kind: str
    attribute: str
    image: int
    text: str
    answer: str
    images: int


def is_held_out(scenes: list[Scene]) -> bool:
    """Whether a sequence of images is held out from training. Single images never are."""
    name = "/".join(f"{scene.colour} {scene.shape} {scene.count}" for scene in scenes)
    return len(scenes) > 1 and zlib.crc32(name.encode()) % HELD_OUT_EVERY == 0


def generate_conversation(seed: str, images: int, held_out: bool = False, which: float = 0.5) -> dict[str, Any]:
    """Generate one conversation.

    Args:
        seed: of all random choices.
        images: the number of images, 1 to 4.
        held_out (*optional*, defaults to `False`): generate a held-out conversation instead of one for training.
        which (*optional*, defaults to 0.5): the probability that an attribute is asked as "Which image ..."; 0 for a single
            image.

    Returns:
        A dict with `messages` (with content parts {"type": "image", "image"} and {"type": "text", "text"}), `drawn` (the
        images, in order), `scenes` (their `Scene`s), and `questions` (one `ShapeQuestion` per turn).

    Raises:
        ValueError: for an invalid number of images, or a single held-out one.
    """
    if held_out and images < 2:
        raise ValueError("Single images are never held out; ask for 2 images or more.")
    rng = random.Random(seed)
    scenes = sample_scenes(rng, images)
    while is_held_out(scenes) != held_out:
        scenes = sample_scenes(rng, images)
    questions = _questions(rng, scenes, which)
    while max(question.images for question in questions) < images:  # no question shows the last image
        questions = _questions(rng, scenes, which)
    return assemble([render(scene, rng) for scene in scenes], scenes, questions)


def assemble(images: list[Image.Image], scenes: list[Scene], questions: list[ShapeQuestion]) -> dict[str, Any]:
    """Build a conversation from its images and questions (see `generate_conversation`)."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    shown = 0
    for question in questions:
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images[shown : question.images]]
        shown = max(shown, question.images)
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    return {"messages": messages, "drawn": images[:shown], "scenes": scenes[:shown], "questions": questions}


def sample_scenes(rng: random.Random, images: int) -> list[Scene]:
    """Sample scenes that all differ in colour, shape and count.

    Raises:
        ValueError: if there are fewer counts than images.
    """
    if not 1 <= images <= len(COUNTS):
        raise ValueError(f"images={images} cannot all differ; choose 1 to {len(COUNTS)}.")
    values = zip(rng.sample(list(COLOURS), images), rng.sample(SHAPES, images), rng.sample(COUNTS, images), strict=True)
    return [Scene(*value) for value in values]


def _questions(rng: random.Random, scenes: list[Scene], which: float) -> list[ShapeQuestion]:
    """The questions, in order. With three or more images, the last one sometimes first appears in a later turn."""
    first = len(scenes) - (len(scenes) > 2 and rng.random() < 0.3)
    questions = []
    for attribute in DIRECT:
        if len(scenes) > 1 and rng.random() < which:
            shown = rng.choice((first, len(scenes)))
            image = rng.randrange(shown)
            value = getattr(scenes[image], attribute)
            text, answer = WHICH[attribute].format(value), f"{value} (image {image + 1})"
            questions.append(ShapeQuestion("which", attribute, image, text, answer, shown))
            continue
        for image in rng.sample(range(len(scenes)), min(len(scenes), 2)):
            shown = len(scenes) if image >= first else rng.choice((first, len(scenes)))
            text, answer = (
                DIRECT[attribute].format(image + 1),
                f"(image {image + 1}) {getattr(scenes[image], attribute)}",
            )
            questions.append(ShapeQuestion(attribute, attribute, image, text, answer, shown))
    rng.shuffle(questions)
    return sorted(questions, key=lambda question: question.images)  # stable, so questions stay shuffled


def vocabulary_texts() -> list[str]:
    """Texts with every word of the questions and answers, to train the tokenizer on."""
    texts = [SYSTEM]
    for attribute, values in {"colour": COLOURS, "shape": SHAPES, "count": COUNTS}.items():
        for image in range(1, 5):
            texts += [f"{DIRECT[attribute].format(image)}\n(image {image}) {value}" for value in values]
        texts += [f"{WHICH[attribute].format(value)}\n{value} (image 1)" for value in values]
    return texts
