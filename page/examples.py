"""Example questions that a visitor can ask with a click."""

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..data import load_conversations
from ..data.messages import images_of
from ..utils.image_loading import open_image
from ..utils.shape_images import IMAGE_SIZE, Scene, render
from ..video_reading_dsvl import is_video

Example = tuple[str, Sequence[Image.Image]]
MAX_EXAMPLES = 4  # of a file
SCALE = 8  # enlarges the drawn images, which are small


def default_examples() -> list[Example]:
    """Questions about images of coloured shapes, in the words of the model that `python -m dsvl.demo` trains."""
    rng = random.Random(0)
    side = IMAGE_SIZE * SCALE
    red, blue = (
        render(scene, rng).resize((side, side), Image.Resampling.LANCZOS)
        for scene in (Scene("red", "circle", "two"), Scene("blue", "square", "three"))
    )
    return [("What shape is in image 1?", [red]), ("What colour is image 2?", [red, blue])]


def read_examples(source: str | Path) -> list[Example]:
    """The first question of each of the first conversations of a data set.

    Args:
        source: anything that `dsvl train --data` takes.

    Raises:
        ValueError: if there is no conversation, or an image cannot be opened.
    """
    samples = load_conversations(source)
    examples: list[Example] = []
    for index in range(min(MAX_EXAMPLES, len(samples))):
        question = next(message for message in samples[index]["messages"] if message["role"] == "user")
        content = question["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if any(map(is_video, parts)):
            raise ValueError(f"{source}: question {index} has a video; examples of the page may have images only.")
        text = " ".join(part["text"].strip() for part in parts if part["type"] == "text")
        examples.append((text, [open_image(image) for image in images_of([question])]))
    if not examples:
        raise ValueError(f"{source} holds no conversation; pass a file with at least one.")
    return examples
