"""Questions that are asked with a click."""

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..data import load_conversations
from ..data.messages import images_of
from ..demo.drawing import IMAGE_SIZE, Scene, render
from ..utils.image_loading import open_image

Example = tuple[str, Sequence[Image.Image]]
SHOWN = 4  # examples, of a file
ENLARGED = 8  # drawn images are small, and a model's processor makes them small again


def drawn_examples() -> list[Example]:
    """Questions about coloured shapes, as the model of `make demo` knows them; any other can see them too."""
    rng = random.Random(0)
    side = IMAGE_SIZE * ENLARGED
    red, blue = (
        render(scene, rng).resize((side, side), Image.Resampling.LANCZOS)
        for scene in (Scene("red", "circle", "two"), Scene("blue", "square", "three"))
    )
    return [("What shape is in image 1?", [red]), ("What colour is image 2?", [red, blue])]


def read_examples(source: str | Path) -> list[Example]:
    """The first questions of the first conversations of a data set.

    Args:
        source: whatever `dsvl train` takes as `--data`.

    Raises:
        ValueError: if it holds no question, or an image that cannot be opened.
    """
    samples = load_conversations(source)
    examples: list[Example] = []
    for index in range(min(SHOWN, len(samples))):
        question = next(message for message in samples[index]["messages"] if message["role"] == "user")
        content = question["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = " ".join(part["text"].strip() for part in parts if part["type"] == "text")
        examples.append((text, [open_image(image) for image in images_of([question])]))
    if not examples:
        raise ValueError(f"{source} holds no conversation; pass a file with some.")
    return examples
