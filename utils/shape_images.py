"""Small images of coloured shapes, drawn from a seed: the data of `python -m dsvl.demo`, and examples on the web page."""

import random
from dataclasses import dataclass

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
COUNTS = ("one", "two", "three", "four")
BACKGROUND = (255, 255, 255)


@dataclass(frozen=True)
class Scene:
    """What an image shows: `count` copies of one shape in one colour."""

    colour: str
    shape: str
    count: str


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as an RGB image of `IMAGE_SIZE`. Positions, size and shade are random; each shape has its own quarter."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
    draw = ImageDraw.Draw(image)
    half = IMAGE_SIZE // 2
    colour = tuple(min(255, max(0, channel + rng.randint(-15, 15))) for channel in COLOURS[scene.colour])
    for quarter in rng.sample(range(4), COUNTS.index(scene.count) + 1):
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
