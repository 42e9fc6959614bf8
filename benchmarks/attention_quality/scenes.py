"""Scenes of coloured shapes: drawn as images, told in words, and asked about. Everything comes from seeds.

A scene has things (a colour, a shape and a size in a cell of a grid) and a printed number of two digits, the small print.
Its contents alone decide whether it belongs to the training or is held out (`split_of`), so the two are disjoint by
construction; the drawings of the two differ as well (`Sprites`).
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch

from dsvl.utils import shape_images

COLOURS = shape_images.COLOURS | {"orange": (250, 130, 20), "cyan": (40, 200, 210)}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond", "beam", "pillar")
SIZES = ("small", "large")
COUNTS = ("one", "two", "three", "four", "five")
DIGITS = {  # 3 x 5 pixels each, a row after the other
    "0": "111101101101111", "1": "010110010010111", "2": "111001111100111", "3": "111001111001111", "4": "101101111001001",
    "5": "111100111001111", "6": "111100111101111", "7": "111001001001001", "8": "111101111101111", "9": "111101111001111",
}  # fmt: skip
VARIANTS = 16  # drawings of each thing
HELD_OUT_VARIANTS = 4  # of them
HELD_OUT = 8  # one in so many scenes is held out
SYSTEM = "look at the images and answer ."
QUESTION, ANSWER = "### Question:", "### Answer:"

Split = Literal["train", "held out"]
Words = list[str]


# ----------------------------------------------------------------------------------------------------------------------
# Scenes


@dataclass(frozen=True)
class World:
    """What there is to see.

    Attributes:
        colours, shapes: how many of `COLOURS` and `SHAPES`.
        grid: cells in a row and in a column of an image.
        cell: side of a cell, in pixels.
        most_things: of a scene; a scene has 2 at least.
        most_images: the highest number of an image.
    """

    colours: int = len(COLOURS)
    shapes: int = len(SHAPES)
    grid: int = 4
    cell: int = 24
    most_things: int = 4
    most_images: int = 64

    @property
    def image_size(self) -> int:
        return self.grid * self.cell

    @cached_property
    def colour_names(self) -> tuple[str, ...]:
        return tuple(COLOURS)[: self.colours]

    @cached_property
    def shape_names(self) -> tuple[str, ...]:
        return SHAPES[: self.shapes]

    @cached_property
    def place_names(self) -> tuple[str, ...]:
        return tuple(f"{'abcdefgh'[cell % self.grid]}{cell // self.grid + 1}" for cell in range(self.grid**2))

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Every word of the language, but for the tokenizer's special tokens."""
        kinds = [compound(colour, shape) for colour in self.colour_names for shape in self.shape_names]
        numbers = range(1, self.most_images + 1)
        frame = [QUESTION, ANSWER, *(name(n) for n in numbers), *(heading(n) for n in numbers)]
        grammar = (
            "look at the images and answer . , ? in is what colour shape size one printed number which image shows a that"
        )
        grammar += " are there how many things more has or left right above below of yes no a"
        values = [*self.colour_names, *self.shape_names, *SIZES, *COUNTS, *DIGITS, *self.place_names]
        return tuple(dict.fromkeys([*frame, *grammar.split(), *values, *kinds]))


@dataclass(frozen=True)
class Thing:
    """A thing in a cell, which counts from the upper left corner by rows."""

    cell: int
    colour: str
    shape: str
    size: str


@dataclass(frozen=True)
class Scene:
    """What an image shows, or a text tells."""

    things: tuple[Thing, ...]
    printed: str
    printed_at: int

    @cached_property
    def contents(self) -> str:
        """The same for two scenes exactly if they are the same, but for the order in which things are listed."""
        things = sorted(f"{thing.cell} {thing.colour} {thing.shape} {thing.size}" for thing in self.things)
        return "; ".join([*things, f"{self.printed_at} {self.printed}"])


def split_of(scene: Scene) -> Split:
    """To which of the two a scene belongs."""
    return "train" if hashlib.sha256(scene.contents.encode()).digest()[0] % HELD_OUT else "held out"


def draw_scene(world: World, rng: random.Random, split: Split, things: int | None = None) -> Scene:
    """A random scene of a split, of so many things (random by default)."""
    while True:
        count = things or rng.randint(2, world.most_things)
        cells = rng.sample(range(world.grid**2), count + 1)
        made = tuple(
            Thing(cell, rng.choice(world.colour_names), rng.choice(world.shape_names), rng.choice(SIZES))
            for cell in cells[:-1]
        )
        scene = Scene(made, f"{rng.randrange(100):02}", cells[-1])
        if split_of(scene) == split:
            return scene


# ----------------------------------------------------------------------------------------------------------------------
# Words


def name(number: int) -> str:
    """The name of an image, a single word."""
    return f"(image {number})"


def heading(number: int) -> str:
    """What the chat template writes in front of an image, a single word."""
    return f"### Image {number}:"


def compound(colour: str, shape: str) -> str:
    """A kind of things in one word: so one embedding can name two attributes, as an image token has to."""
    return f"{colour}-{shape}"


def kind_words(colour: str, shape: str, rng: random.Random) -> Words:
    return [compound(colour, shape)] if rng.random() < 0.5 else [colour, shape]


def tell(world: World, scene: Scene, rng: random.Random) -> Words:
    """A scene in words, its parts in random order."""
    parts = []
    for thing in scene.things:
        parts.append([thing.size, *kind_words(thing.colour, thing.shape, rng), "at", world.place_names[thing.cell], ","])
    parts.append(["number", *scene.printed, "at", world.place_names[scene.printed_at], ","])
    rng.shuffle(parts)
    return [word for part in parts for word in part][:-1] + ["."]


# ----------------------------------------------------------------------------------------------------------------------
# Questions


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the indexes of the scenes that it takes to answer it.

    An answer about one image begins with its name, as in `dsvl.demo`: the value is looked up from there, which is learned
    sooner.
    """

    kind: str
    words: tuple[str, ...]
    answer: tuple[str, ...]
    scenes: tuple[int, ...]


def unique(scene: Scene, attribute: str) -> list[Thing]:
    """The things that share the value of an attribute with no other."""
    values = [getattr(thing, attribute) for thing in scene.things]
    return [thing for thing, value in zip(scene.things, values, strict=True) if values.count(value) == 1]


def named(attribute: str, value: str) -> Words:
    """ "the circle", "the red one"."""
    return ["the", value] if attribute == "shape" else ["the", value, "one"]


def ask_attribute(scenes: Sequence[Scene], rng: random.Random) -> Question | None:
    """The colour, shape or size of a thing in one image."""
    index = rng.randrange(len(scenes))
    wanted, by = rng.choice((("colour", "shape"), ("shape", "colour"), ("size", "colour"), ("size", "shape")))
    if not (found := unique(scenes[index], by)):
        return None
    thing = rng.choice(found)
    words = ["what", wanted, "is", *named(by, getattr(thing, by)), "in", name(index + 1), "?"]
    return Question("attribute", tuple(words), (name(index + 1), getattr(thing, wanted)), (index,))


def ask_which(scenes: Sequence[Scene], rng: random.Random) -> Question | None:
    """Which image shows a thing that only one of them shows."""
    index = rng.randrange(len(scenes))
    thing = rng.choice(scenes[index].things)
    kind = thing.colour, thing.shape
    if len(scenes) < 2 or sum(any((t.colour, t.shape) == kind for t in scene.things) for scene in scenes) > 1:
        return None
    words = ["which", "image", "shows", "a", *kind_words(*kind, rng), "?"]
    return Question("which", tuple(words), (name(index + 1),), tuple(range(len(scenes))))


def ask_two_hop(scenes: Sequence[Scene], rng: random.Random) -> Question | None:
    """The attribute in one image of what another shows: "in (image 2) , what colour is the shape that is red in (image 1) ?"
    takes the shape of the red thing in the first, and then the colour of this shape in the second."""
    if len(scenes) < 2:
        return None
    first, second = rng.sample(range(len(scenes)), 2)
    wanted, over = rng.choice((("colour", "shape"), ("shape", "colour")))
    pairs = [
        (thing, other)
        for thing in unique(scenes[first], wanted)
        for other in unique(scenes[second], over)
        if getattr(thing, over) == getattr(other, over) and getattr(thing, wanted) != getattr(other, wanted)
    ]
    if not pairs:
        return None
    thing, other = rng.choice(pairs)
    words = ["in", name(second + 1), ",", "what", wanted, "is", "the", over, "that", "is", getattr(thing, wanted)]
    return Question(
        "two_hop", (*words, "in", name(first + 1), "?"), (name(second + 1), getattr(other, wanted)), (first, second)
    )  # fmt: skip


def ask_print(scenes: Sequence[Scene], rng: random.Random) -> Question:
    """The printed number."""
    index = rng.randrange(len(scenes))
    words = ("which", "number", "is", "printed", "in", name(index + 1), "?")
    return Question("print", words, (name(index + 1), *scenes[index].printed), (index,))


def ask_relation(scenes: Sequence[Scene], rng: random.Random, grid: int) -> Question | None:
    """Whether a thing is left of, right of, above or below another."""
    index = rng.randrange(len(scenes))
    if len(found := unique(scenes[index], "colour")) < 2:
        return None
    one, other = rng.sample(found, 2)
    word = rng.choice(("left", "right", "above", "below"))
    a, b = (thing.cell % grid if word in ("left", "right") else thing.cell // grid for thing in (one, other))
    if a == b:
        return None
    holds = (a < b) == (word in ("left", "above"))
    words = ["is", *named("colour", one.colour), word, *(["of"] if word in ("left", "right") else [])]
    words += [*named("colour", other.colour), "in", name(index + 1), "?"]
    return Question("relation", tuple(words), (name(index + 1), "yes" if holds else "no"), (index,))


def ask_count(scenes: Sequence[Scene], rng: random.Random) -> Question:
    """How many things a scene has, or how many of a colour."""
    index = rng.randrange(len(scenes))
    colour = rng.choice(scenes[index].things).colour if rng.random() < 0.7 else None
    count = sum(colour in (None, thing.colour) for thing in scenes[index].things)
    words = ["how", "many", "things", "are", *([colour] if colour else []), "in", name(index + 1), "?"]
    return Question("count", tuple(words), (name(index + 1), COUNTS[count - 1]), (index,))


def ask_comparison(scenes: Sequence[Scene], rng: random.Random) -> Question | None:
    """Which of two scenes has more things."""
    if len(scenes) < 2:
        return None
    first, second = rng.sample(range(len(scenes)), 2)
    counts = [len(scenes[index].things) for index in (first, second)]
    if counts[0] == counts[1]:
        return None
    words = ("which", "has", "more", "things", ",", name(first + 1), "or", name(second + 1), "?")
    return Question("comparison", words, (name((first if counts[0] > counts[1] else second) + 1),), (first, second))


IMAGE_KINDS = ("attribute", "which", "two_hop", "print")
TEXT_SHARES = {"attribute": 3, "which": 3, "two_hop": 4, "print": 1, "relation": 1, "count": 1, "comparison": 1}
TEXT_KINDS = tuple(TEXT_SHARES)
_ASK: dict[str, Callable[..., Question | None]] = {
    "attribute": ask_attribute,
    "which": ask_which,
    "two_hop": ask_two_hop,
    "print": ask_print,
    "relation": ask_relation,
    "count": ask_count,
    "comparison": ask_comparison,
}
_TRIES = 20


def ask(world: World, kind: str, scenes: Sequence[Scene], rng: random.Random) -> Question | None:
    """A question of a kind about scenes; None if they offer none, as far as a few tries show."""
    more: dict[str, Any] = {"grid": world.grid} if kind == "relation" else {}
    tries = (_ASK[kind](scenes, rng, **more) for _ in range(_TRIES))
    return next((question for question in tries if question is not None), None)


def scenes_with_question(world: World, kind: str, count: int, rng: random.Random) -> tuple[list[Scene], Question]:
    """So many held-out scenes that offer a question of a kind, and the question.

    Raises:
        ValueError: if the world has no such scenes.
    """
    for _ in range(1000):
        scenes = [draw_scene(world, rng, "held out") for _ in range(count)]
        question = ask(world, kind, scenes, rng)
        if question is not None:
            return scenes, question
    raise ValueError(f"No {count} scenes of {world} offer a question of the kind {kind!r}; choose a larger world.")


def ask_many(
    world: World, kinds: Mapping[str, int], scenes: Sequence[Scene], count: int, rng: random.Random
) -> list[Question]:
    """Questions of random kinds about scenes, in these shares; another kind where the scenes do not offer one."""
    questions: list[Question] = []
    while len(questions) < count:
        question = ask(world, rng.choices([*kinds], [*kinds.values()])[0], scenes, rng)
        questions += [question] if question is not None else []
    return questions


# ----------------------------------------------------------------------------------------------------------------------
# Documents of text, conversations about images


@dataclass(frozen=True)
class Conversation:
    """Scenes, questions about them, and how each cell is drawn: (scenes, cells), indexes of `Sprites`."""

    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]
    cells: np.ndarray


def text_document(world: World, rng: random.Random, split: Split, scenes: int, questions: int) -> list[tuple[Words, bool]]:
    """Scenes told in words, with questions, as spans of words and whether they are an answer. It has the form of the chat
    template, with a text for each image; some documents name an image before its text alone, some after it alone."""
    told = [draw_scene(world, rng, split) for _ in range(scenes)]
    form = rng.random()
    words = SYSTEM.split()
    for index, scene in enumerate(told):
        words += [heading(index + 1)] if form < 0.8 else []
        words += tell(world, scene, rng)
        words += [name(index + 1)] if form > 0.2 else []
    spans = [(words, False)]
    for question in ask_many(world, TEXT_SHARES, told, questions, rng):
        spans += question_spans(question)
    return spans


def question_spans(question: Question) -> list[tuple[Words, bool]]:
    return [([QUESTION, *question.words, ANSWER], False), (list(question.answer), True)]


def training_conversation(world: World, seed: int, index: int, images: int, questions: int) -> Conversation:
    """Conversation `index` of the training data of a seed: fewer conversations are the first of more."""
    rng = random.Random(f"conversation/{seed}/{index}")
    scenes = tuple(draw_scene(world, rng, "train") for _ in range(images))
    asked = tuple(ask_many(world, dict.fromkeys(IMAGE_KINDS, 1), scenes, questions, rng))
    return Conversation(scenes, asked, cells_of(world, scenes, "train", rng))


def held_out_conversation(world: World, task: str, images: int, index: int) -> Conversation:
    """Item `index` of a task, the same for every run: one question about held-out scenes."""
    rng = random.Random(f"item/{task}/{images}/{index}")
    scenes, question = scenes_with_question(world, task if task in IMAGE_KINDS else "attribute", images, rng)
    return Conversation(tuple(scenes), (question,), cells_of(world, scenes, "held out", rng))


# ----------------------------------------------------------------------------------------------------------------------
# Images


class Sprites:
    """The drawings of which images are put together: a table of cells, (sprites, 3, cell, cell), uint8.

    Its rows are a blank cell, `VARIANTS` drawings of each thing, and of each printed number. The last `HELD_OUT_VARIANTS` of
    them are drawn in held-out images only. NumPy draws them, so they do not depend on the release of an imaging library.

    Args:
        world: what there is to see.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        side = world.cell
        rows = [np.full((1, side, side, 3), 255, np.uint8)]
        rng = np.random.Generator(np.random.PCG64(20260101))
        for colour in world.colour_names:
            for shape in world.shape_names:
                for size in SIZES:
                    rows.append(np.stack([_draw_thing(side, colour, shape, size, rng) for _ in range(VARIANTS)]))
        for number in range(100):
            rows.append(np.stack([_draw_number(side, f"{number:02}", rng) for _ in range(VARIANTS)]))
        self.table = torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2).contiguous()

    def images(self, cells: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, height, width), uint8, of the table's device, from the sprites of their cells (n, grid ** 2)."""
        grid, side = self.world.grid, self.world.cell
        tiles = self.table[cells.to(self.table.device)].unflatten(1, (grid, grid))
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(cells), 3, grid * side, grid * side)

    def to(self, device: str) -> "Sprites":
        self.table = self.table.to(device)
        return self


def cells_of(world: World, scenes: Sequence[Scene], split: Split, rng: random.Random) -> np.ndarray:
    """The sprites of the cells of scenes, (scenes, grid ** 2), with random variants of the split."""
    border = VARIANTS - HELD_OUT_VARIANTS
    low, high = (0, border) if split == "train" else (border, VARIANTS)
    cells = np.zeros((len(scenes), world.grid**2), np.int64)
    things = world.colours * world.shapes * len(SIZES)
    for row, scene in zip(cells, scenes, strict=True):
        for thing in scene.things:
            kind = world.colour_names.index(thing.colour) * world.shapes + world.shape_names.index(thing.shape)
            row[thing.cell] = 1 + (kind * len(SIZES) + SIZES.index(thing.size)) * VARIANTS + rng.randrange(low, high)
        row[scene.printed_at] = 1 + (things + int(scene.printed)) * VARIANTS + rng.randrange(low, high)
    return cells


def labels_of(world: World, cells: torch.Tensor) -> torch.Tensor:
    """What sprites show, for the training of the tower: (..., 5) indexes of colour, shape, size and both digits, -1 for
    none."""
    things = world.colours * world.shapes * len(SIZES)
    kind = torch.div(cells - 1, VARIANTS, rounding_mode="floor")
    is_thing, number = (cells > 0) & (kind < things), kind - things
    look = torch.stack([kind // (world.shapes * len(SIZES)), kind // len(SIZES) % world.shapes, kind % len(SIZES)], -1)
    digits = torch.stack([number // 10, number % 10], -1)
    return torch.cat([look.where(is_thing[..., None], -1), digits.where((number >= 0)[..., None], -1)], -1)


def _draw_thing(side: int, colour: str, shape: str, size: str, rng: np.random.Generator) -> np.ndarray:
    """(side, side, 3), uint8."""
    half = side / 2
    radius = half * (rng.uniform(0.72, 0.82) if size == "large" else rng.uniform(0.4, 0.48))
    slack = half - radius - 1
    y, x = (np.arange(side) + 0.5 - half - rng.uniform(-slack, slack) for _ in range(2))
    y, x = np.abs(y)[:, None] if shape != "triangle" else y[:, None], np.abs(x)[None]
    inside = {
        "circle": lambda: x**2 + y**2 <= radius**2,
        "square": lambda: (x <= 0.85 * radius) & (y <= 0.85 * radius),
        "triangle": lambda: (y <= 0.8 * radius) & (x <= 0.5 * (y + radius)),
        "cross": lambda: ((x <= 0.3 * radius) & (y <= radius)) | ((y <= 0.3 * radius) & (x <= radius)),
        "ring": lambda: (x**2 + y**2 <= radius**2) & (x**2 + y**2 >= (0.55 * radius) ** 2),
        "diamond": lambda: x + y <= radius,
        "beam": lambda: (x <= radius) & (y <= 0.35 * radius),
        "pillar": lambda: (x <= 0.35 * radius) & (y <= radius),
    }[shape]()
    shade = np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255)
    return np.where(inside[..., None], shade, 255).astype(np.uint8)


def _draw_number(side: int, number: str, rng: np.random.Generator) -> np.ndarray:
    """Two digits of 6 x 10 pixels: (side, side, 3), uint8."""
    bitmaps = [np.array([int(bit) for bit in DIGITS[digit]], bool).reshape(5, 3) for digit in number]
    ink = np.concatenate([bitmaps[0], np.zeros((5, 1), bool), bitmaps[1]], 1).repeat(2, 0).repeat(2, 1)
    drawn = np.full((side, side, 3), 255, np.uint8)
    top, left = (int(rng.integers(0, side - length + 1)) for length in ink.shape)
    drawn[top : top + ink.shape[0], left : left + ink.shape[1]][ink] = rng.integers(0, 60)
    return drawn


# ----------------------------------------------------------------------------------------------------------------------
# The generator's hash


@cache
def generator_hash(world: World) -> str:
    """Of all drawings, and of samples of what each function draws: what changes the data changes it."""
    digest = hashlib.sha256(repr((replace(world), world.words)).encode())
    digest.update(Sprites(world).table.numpy().tobytes())
    for index in range(40):
        rng = random.Random(f"hash/{index}")
        split: Split = "train" if index % 2 else "held out"
        digest.update(repr(text_document(world, rng, split, 1 + index % 6, 6)).encode())
        images = min(2 + index % 5, world.most_images)
        drawn = [training_conversation(world, 0, index, images, 4)]
        drawn += [held_out_conversation(world, task, images, index) for task in (*IMAGE_KINDS, "distractors")]
        for conversation in drawn:
            digest.update(repr((conversation.scenes, conversation.questions)).encode() + conversation.cells.tobytes())
    return digest.hexdigest()[:16]
