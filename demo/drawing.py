"""Images of coloured shapes, and conversations of several rounds about several of them, drawn from a seed.

Within a conversation all images differ in colour, in shape and in count, so that every question has one answer and
another image always has another. The text gives no answer away: a conversation asks for an attribute either directly, of
two images ("What colour is image 2?", "(image 2) red"), or once the other way round ("Which image shows the colour
red?", "red (image 2)"). An answer starts by repeating what was asked about, and the rest is looked up from there.
"""

import random
import zlib
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

IMAGE_SIZE = 32  # pixels
COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 160, 40),
    "blue": (30, 60, 220),
    "yellow": (240, 210, 0),
    "purple": (150, 30, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
NUMBERS = ("one", "two", "three", "four")
BACKGROUND = (255, 255, 255)
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
HELD_OUT_SHARE = 8  # one in so many sequences of images is never trained on


@dataclass(frozen=True)
class Scene:
    """What an image shows: `count` times the same shape in one colour."""

    colour: str
    shape: str
    count: str


@dataclass(frozen=True)
class Question:
    """One round: what is asked, about which image (0 is the first), and the true answer."""

    kind: str  # one of KINDS
    attribute: str  # colour, shape or count
    image: int
    text: str
    answer: str
    images: int  # how many have been shown by then


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene: an RGB image, each shape somewhere in a quarter of its own, in a size and shade of its own."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
    draw = ImageDraw.Draw(image)
    half = IMAGE_SIZE // 2
    colour = tuple(min(255, max(0, channel + rng.randint(-15, 15))) for channel in COLOURS[scene.colour])
    for quarter in rng.sample(range(4), NUMBERS.index(scene.count) + 1):
        radius = rng.randint(5, 6)
        x = quarter % 2 * half + rng.randint(radius + 1, half - radius - 2)
        y = quarter // 2 * half + rng.randint(radius + 1, half - radius - 2)
        _draw_shape(draw, scene.shape, x, y, radius, colour)
    return image


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, radius: int, colour: tuple[int, ...]) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    elif shape == "cross":
        arm = radius // 3
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=2)
    else:
        raise ValueError(f"shape={shape!r} cannot be drawn; choose one of {', '.join(SHAPES)}.")


def is_held_out(scenes: list[Scene]) -> bool:
    """Whether a sequence of images belongs to the held-out conversations; single images never do."""
    name = "/".join(f"{scene.colour} {scene.shape} {scene.count}" for scene in scenes)
    return len(scenes) > 1 and zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def converse(seed: str, images: int, held_out: bool = False, which: float = 0.5) -> dict[str, Any]:
    """Draw one conversation.

    Args:
        seed: decides everything that is left to chance.
        images: how many, from 1 to 4.
        held_out: draw from the sequences of images that are kept from training, instead of the others.
        which: the chance of an attribute to be asked as "Which image ..." (never of a single image).

    Returns:
        `messages` (content parts {"type": "image", "image"} and {"type": "text", "text"}), `drawn` (the images, in order),
        `scenes`, and `questions`, one `Question` for each round.

    Raises:
        ValueError: for a number of images that cannot be drawn, or a single held-out one.
    """
    if held_out and images < 2:
        raise ValueError("Single images are never held out; ask for 2 images or more.")
    rng = random.Random(seed)
    scenes = draw_scenes(rng, images)
    while is_held_out(scenes) != held_out:
        scenes = draw_scenes(rng, images)
    questions = _questions(rng, scenes, which)
    while max(question.images for question in questions) < images:  # the last image never came
        questions = _questions(rng, scenes, which)
    return assemble([render(scene, rng) for scene in scenes], scenes, questions)


def assemble(images: list[Image.Image], scenes: list[Scene], questions: list[Question]) -> dict[str, Any]:
    """Put images and questions together as a conversation (see `converse`)."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    shown = 0
    for question in questions:
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images[shown : question.images]]
        shown = max(shown, question.images)
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    return {"messages": messages, "drawn": images[:shown], "scenes": scenes[:shown], "questions": questions}


def draw_scenes(rng: random.Random, images: int) -> list[Scene]:
    """Scenes that all differ in colour, in shape and in count.

    Raises:
        ValueError: if there are not enough counts for so many images.
    """
    if not 1 <= images <= len(NUMBERS):
        raise ValueError(f"images={images} cannot all differ; choose 1 to {len(NUMBERS)}.")
    values = zip(rng.sample(list(COLOURS), images), rng.sample(SHAPES, images), rng.sample(NUMBERS, images), strict=True)
    return [Scene(*value) for value in values]


def _questions(rng: random.Random, scenes: list[Scene], which: float) -> list[Question]:
    """The rounds of a conversation, in order. The last of three images or more sometimes arrives in a later round."""
    first = len(scenes) - (len(scenes) > 2 and rng.random() < 0.3)
    questions = []
    for attribute in DIRECT:
        if len(scenes) > 1 and rng.random() < which:
            shown = rng.choice((first, len(scenes)))
            image = rng.randrange(shown)  # any of those shown is as likely
            value = getattr(scenes[image], attribute)
            text, answer = WHICH[attribute].format(value), f"{value} (image {image + 1})"
            questions.append(Question("which", attribute, image, text, answer, shown))
            continue
        for image in rng.sample(range(len(scenes)), min(len(scenes), 2)):
            shown = len(scenes) if image >= first else rng.choice((first, len(scenes)))
            text, answer = (
                DIRECT[attribute].format(image + 1),
                f"(image {image + 1}) {getattr(scenes[image], attribute)}",
            )
            questions.append(Question(attribute, attribute, image, text, answer, shown))
    rng.shuffle(questions)
    return sorted(questions, key=lambda question: question.images)  # stable


def words() -> list[str]:
    """Every text that the questions and answers are made of, for a tokenizer to learn."""
    texts = [SYSTEM]
    for attribute, values in {"colour": COLOURS, "shape": SHAPES, "count": NUMBERS}.items():
        for image in range(1, 5):
            texts += [f"{DIRECT[attribute].format(image)}\n(image {image}) {value}" for value in values]
        texts += [f"{WHICH[attribute].format(value)}\n{value} (image 1)" for value in values]
    return texts
