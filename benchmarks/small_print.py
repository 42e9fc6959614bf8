"""Small print: a model trained from scratch reads six digits of 12 px, anywhere on a page of 1,000 x 700 pixels.

    python benchmarks/small_print.py [--layouts crop pad tiles] [--tower-minutes 1.7]
        [--tile-minutes 0.7] [--minutes 3] [--out FILE]

All models share the first two trainings. The tower and the projector are trained on drawings of the tower's own size with
many numbers, by linear heads that say which digit lies where; they are dropped. Then the language model is trained to read
single tiles with a number. Last, each layout (`image_layout`) is trained as a whole on pages, which its processor reads,
side by side with the others, from the same weights and in equally many minutes. The accuracy is that of the whole number,
on new pages; numbers on the border between two tiles are counted separately too. `--small` has three digits on a page of
320 x 220 pixels, for a CPU.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from measure import describe_device, device_type, write
from PIL import Image, ImageFont
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from trained_tasks import (
    Parts,
    add_training_options,
    as_bytes,
    as_flags,
    as_pixels,
    compose_parts,
    fit,
    markdown,
    precision,
    side_by_side,
)
from transformers import set_seed
from transformers.modeling_outputs import CausalLMOutputWithPast

from dsvl.image_layouts_dsvl import best_grid

LAYOUTS = ("crop", "pad", "tiles")
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
FONT_SIZE = 12  # pixels; the digits are 9 pixels high
RULES = 28  # pixels between the grey lines of a page
GREY, BLACK, WHITE = 215, 0, 255
SYSTEM = "You read."
QUESTION = "Which number is on the page?"
DOWNSAMPLE = 2  # side of the square of patches that becomes an image token
CUT = 0.3  # of the pages of the training have their number on a border between tiles
CELLS = 2 * DOWNSAMPLE**2  # of an image token, see `label_cells`
SEEN = 2  # pixels of a digit that are on a tile, at least, if it has a label there


@dataclass(frozen=True)
class Task:
    """What is drawn, and the model that reads it.

    Attributes:
        digits: of the number.
        width, height: of a page, in pixels.
        max_tiles: of the layout "tiles".
        parts: of the model.
    """

    digits: int
    width: int
    height: int
    max_tiles: int
    parts: Parts

    @property
    def scale(self) -> float:
        """By which "tiles" enlarges a page to fill its grid."""
        rows, columns = best_grid(self.height, self.width, self.parts.image_size, self.max_tiles)
        return min(columns * self.parts.image_size / self.width, rows * self.parts.image_size / self.height)

    def is_cut(self, box: tuple[int, int, int, int]) -> bool:
        """Whether a border between tiles goes through a box (left, top, right, bottom) on a page."""
        side, (left, top, right, bottom) = self.parts.image_size, box
        grid = best_grid(self.height, self.width, side, self.max_tiles)
        corners = []
        for x, y in ((left, top), (right, bottom)):
            tiles = []
            for value, length, count in ((x, self.width, grid[1]), (y, self.height, grid[0])):
                tiles.append(((count * side - length * self.scale) / 2 + value * self.scale) // side)
            corners.append(tiles)
        return corners[0] != corners[1]

    @property
    def side(self) -> int:
        """Of the part of a page that a tile shows, in pixels of the page."""
        return round(self.parts.image_size / self.scale)

    @property
    def numbers(self) -> int:
        """On a drawing for the tower's own training, at most."""
        return max(1, self.parts.image_size**2 // 2048)


PAGE = Task(6, 1000, 700, 12, Parts(256, 8, 192, 4, 256, 4, head_dim=64, rope_theta=1e6, max_positions=8192))
SMALL = Task(3, 320, 220, 6, Parts(112, 8, 128, 4, 128, 3, rope_theta=1e6, max_positions=4096))


# ----------------------------------------------------------------------------------------------------------------------
# Pages


@cache
def font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, FONT_SIZE)


def draw(width: int, height: int, numbers: Sequence[tuple[str, int, int]], rng: random.Random) -> Image.Image:
    """A white page with grey rules and a margin, of mode L, and numbers (digits, x, y) whose boxes start at (x, y). What
    lies outside the page is cut off. This is what `ImageDraw.text` draws, in less time."""
    page = np.full((height, width), WHITE, np.uint8)
    page[rng.randrange(RULES) :: RULES] = GREY
    page[:, rng.randrange(width)] = GREY
    for digits, x, y in numbers:
        mask = font().getmask(digits)
        ink = np.array(mask, dtype=np.float32).reshape(mask.size[::-1]) / 255
        ink = ink[max(-y, 0) : height - y, max(-x, 0) : width - x]
        top, left = max(y, 0), max(x, 0)
        area = page[top : top + ink.shape[0], left : left + ink.shape[1]]
        area[:] = np.rint(area * (1 - ink) + BLACK * ink)
    return Image.fromarray(page)


@cache
def extent(digits: int) -> tuple[int, int, float]:
    """Width and height of a number of so many digits, and the width of a digit with its space, in pixels; all digits have
    the same."""
    left, top, right, bottom = font().getbbox("0" * digits)
    return int(right - left), int(bottom - top), font().getlength("0" * digits) / digits


def number(task: Task, rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(task.digits))


def draw_page(task: Task, rng: random.Random, cut: bool = False) -> tuple[Image.Image, str, tuple[int, int, int, int]]:
    """A page, its number, and the number's box (left, top, right, bottom), which is anywhere on the page or, if `cut`,
    anywhere on the borders between tiles."""
    digits = number(task, rng)
    width, height, _ = extent(task.digits)
    while True:
        x, y = rng.randint(0, task.width - width), rng.randint(0, task.height - height)
        if not cut or task.is_cut((x, y, x + width, y + height)):
            break
    return draw(task.width, task.height, [(digits, x, y)], rng), digits, (x, y, x + width, y + height)


Numbers = list[tuple[str, int, int]]


def draw_tile(task: Task, rng: random.Random, numbers: int = 1, cut: bool = True) -> tuple[Image.Image, Numbers]:
    """A drawing of a tile's size, enlarged as a page is, and its numbers with their places before that.

    Args:
        task: what is drawn.
        rng: source of all that is drawn.
        numbers: on the drawing, at most; fewer if there is no room.
        cut: whether numbers may be cut off by the border, as those of pages are.
    """
    placed: Numbers = []
    width, height, _ = extent(task.digits)
    over = (width - 3, height - 3) if cut else (0, 0)  # a few pixels of each number are on the tile
    for _ in range(numbers):
        x, y = (rng.randint(-more, task.side - size + more) for size, more in zip((width, height), over, strict=True))
        if all(abs(x - left) > width + 16 or abs(y - top) > height + 9 for _, left, top in placed):
            placed.append((number(task, rng), x, y))
    tile = draw(task.side, task.side, placed, rng)
    return tile.resize((task.parts.image_size,) * 2, Image.Resampling.BICUBIC), placed


def label_cells(task: Task, numbers: Numbers) -> np.ndarray:
    """Which digit lies where on a tile: (image tokens, cells of a token), -1 or 10 * (index in its number) + digit.

    A cell is as high as a patch and half as wide, so that it holds one digit; of the rows of cells, the one in which the
    middle of the number lies has it.
    """
    patch, rows = task.parts.patch_size, task.parts.image_size // task.parts.patch_size
    scale = task.parts.image_size / task.side
    cells = np.full((rows, 2 * rows), -1, np.int64)
    middles = (np.arange(2 * rows) + 0.5) * patch / 2
    _, height, advance = extent(task.digits)
    for digits, x, y in numbers:
        index = np.floor((middles / scale - x) / advance).astype(int)
        inside = (index >= 0) & (index < len(digits))
        row = min(max(int((y + height / 2) * scale / patch), 0), rows - 1)
        cells[row, inside] = 10 * index[inside] + as_array(digits)[index[inside]]
    squares = cells.reshape(rows // DOWNSAMPLE, DOWNSAMPLE, rows // DOWNSAMPLE, 2 * DOWNSAMPLE).swapaxes(1, 2)
    return squares.reshape(-1, CELLS)


def label_tokens(task: Task, numbers: Numbers) -> np.ndarray:
    """What each image token of a tile holds: (image tokens, digits of a number), the digit of this index in a number, or -1.
    A digit belongs to the token in which its middle lies or, if that was cut off, to the next one."""
    size, side = task.parts.image_size, DOWNSAMPLE * task.parts.patch_size
    squares, scale = size // side, size / task.side
    labels = np.full((squares, squares, task.digits), -1, np.int64)
    _, height, advance = extent(task.digits)

    def square(start: float, length: float) -> int | None:
        if start * scale > size - SEEN or (start + length) * scale < SEEN:
            return None
        return min(max(int((start + length / 2) * scale // side), 0), squares - 1)

    for digits, x, y in numbers:
        row = square(y, height)
        for index, digit in enumerate(digits):
            column = square(x + index * advance, advance)
            if row is not None and column is not None:
                labels[row, column, index] = int(digit)
    return labels.reshape(squares**2, task.digits)


Sample = tuple[np.ndarray, ...]


def drawings(task: Task, rng: random.Random) -> Sample:
    """Pixels of a tile with numbers, (1, height, width) as bytes, and the labels of its tokens and of their cells."""
    tile, numbers = draw_tile(task, rng, task.numbers)
    return np.asarray(tile)[None], label_tokens(task, numbers), label_cells(task, numbers)


def single_tiles(task: Task, rng: random.Random) -> Sample:
    """Pixels of a tile with a number, its digits, and which of them are on the tile."""
    tile, numbers = draw_tile(task, rng)
    return np.asarray(tile)[None], as_array(numbers[0][0]), (label_tokens(task, numbers) >= 0).any(0)


def page_tiles(task: Task, rng: random.Random, processor: Any) -> Sample:
    """Pixels of the tiles of a page, its digits, and that all of them are on it. In `CUT` of the pages, a border between
    tiles goes through the number; in the others that happens as often as in the pages of the measurement."""
    page, digits, _ = draw_page(task, rng, cut=rng.random() < CUT)
    return grey_bytes(processor, page), as_array(digits), np.ones(task.digits, bool)


def as_array(digits: str) -> np.ndarray:
    return np.array([int(digit) for digit in digits])


class Stream(IterableDataset):
    """An endless stream of samples, different in each worker.

    Args:
        draw_sample: draws one from a source of random numbers.
        seed: of all that is drawn.
    """

    def __init__(self, draw_sample: Callable[[random.Random], Sample], seed: str) -> None:
        self.draw_sample, self.seed = draw_sample, seed

    def __iter__(self) -> Iterator[Sample]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        while True:
            yield self.draw_sample(rng)


def grey_bytes(processor: Any, page: Image.Image) -> np.ndarray:
    """The tiles of a page before they are normalized, (tiles, height, width). Pages are grey, so a byte for each pixel holds
    everything, and is a twelfth of what the processor returns."""
    if processor.layout is not None:
        tiles = processor.layout.tiles(page, (WHITE,) * 3, Image.Resampling.BICUBIC)
        return np.stack([np.asarray(tile.convert("L")) for tile in tiles])
    pixels = processor.image_processor([page.convert("RGB")], return_tensors="pt")["pixel_values"]
    return as_bytes(pixels)[:, 0].numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Training and measurement


class Locator(nn.Module):
    """Linear heads on the image tokens, which say which digit of a number lies where. They train the tower and the
    projector, as a tower is trained before it becomes part of a model; then they are dropped.

    What a token holds (`label_tokens`) is what the language model looks up. It is learned once the digit and its index are
    known, which the cells of a token (`label_cells`) teach apart from each other.

    Args:
        model: whose tower and projector are trained.
        digits: of a number.
    """

    def __init__(self, model: Any, digits: int) -> None:
        super().__init__()
        self.model, self.digits = model, digits
        width = model.config.text_config.hidden_size
        self.token_head = nn.Linear(width, digits * 11).to(device_type())
        self.index_head = nn.Linear(width, CELLS * (digits + 1)).to(device_type())
        self.digit_head = nn.Linear(width, CELLS * 11).to(device_type())

    def forward(
        self, pixel_values: torch.Tensor, tokens: torch.Tensor, cells: torch.Tensor, use_cache: bool = False
    ) -> CausalLMOutputWithPast:
        """The loss, and as `logits` whether each digit of `tokens` (tiles, tokens, digits) was right."""
        features = torch.stack(list(self.model.get_image_features(pixel_values).pooler_output))
        held = self.token_head(features).unflatten(-1, (-1, 11))
        loss = _balanced_loss(held, tokens)
        loss = loss + _balanced_loss(self.index_head(features).unflatten(-1, (CELLS, -1)), cells // 10)
        loss = loss + _balanced_loss(
            self.digit_head(features).unflatten(-1, (CELLS, -1)), torch.where(cells < 0, -1, cells % 10)
        )
        full = tokens >= 0
        return CausalLMOutputWithPast(loss=loss / 3, logits=held[full][:, :10].argmax(-1) == tokens[full])


def _balanced_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, in which the few labels that are not -1 count as much as all others. The last logit is that of -1."""
    logits, labels = logits.float().flatten(0, -2), labels.flatten()
    full = labels >= 0
    losses = nn.functional.cross_entropy(logits, torch.where(full, labels, logits.shape[-1] - 1), reduction="none")
    return (losses * full).sum() / full.sum().clamp(min=1) + (losses * ~full).sum() / (~full).sum().clamp(min=1)


class Reader:
    """A model, its processor, and the batches that it is trained on.

    Args:
        task: what it reads.
        layout: its `image_layout`.
        seed: of the weights.
    """

    def __init__(self, task: Task, layout: str, seed: int) -> None:
        set_seed(seed)
        self.task = task
        choices: dict[str, Any] = {} if layout == "crop" else {"image_layout": layout, "max_tiles": task.max_tiles}
        words = f"### Image 1:\n\n(image 1)\n\n\n### Question:\n{QUESTION}\n\n### Answer:\n"
        tags = [f"\nwhole\nrow {row} column {column}\n" for row in range(1, 9) for column in range(1, 9)]
        # A digit is found by its index, which its token holds. With a position for each token, that was learned far later.
        choices |= {"projector_type": "mlp", "downsample": DOWNSAMPLE, "image_positions": "image"}
        self.model, self.processor = compose_parts(task.parts, [SYSTEM, words, *tags], **choices)
        tokenizer = self.processor.tokenizer
        self.digits = torch.tensor([tokenizer(str(digit), add_special_tokens=False)["input_ids"] for digit in range(10)])
        if self.digits.shape != (10, 1):
            raise ValueError(f"The tokenizer has no token for each digit: {self.digits.tolist()}.")
        self.end = torch.tensor([tokenizer.eos_token_id])

    def prompt(self, image: Image.Image) -> torch.Tensor:
        """The ids of the prompt about an image: (tokens,)."""
        content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        rendered = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        return rendered["input_ids"][0]

    def batch(
        self, prompt: torch.Tensor, tiles: torch.Tensor, digits: torch.Tensor, known: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """A batch on the device.

        Args:
            prompt: (tokens,), the same for all images, which are of one size.
            tiles: (batch, tiles, height, width), bytes.
            digits: (batch, digits).
            known: *optional*, (batch, digits), bool: digits without labels are False.
        """
        answers = torch.cat([self.digits[digits, 0], self.end.expand(len(digits), 1)], dim=1)
        ids = torch.cat([prompt.expand(len(digits), -1), answers], dim=1)
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        if known is not None:
            labels[:, len(prompt) : -1].masked_fill_(~known, -100)
        device = device_type()
        pixels = pixels_of(tiles)
        made = {
            "input_ids": ids.to(device),
            "labels": labels.to(device),
            "pixel_values": pixels,
        }
        if getattr(self.model.config, "image_layout", "crop") == "tiles":
            made["num_tiles"] = torch.full((len(digits),), tiles.shape[1]).to(device)
        return made

    @torch.inference_mode()
    def right(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Which tokens of the answers, (batch, digits + 1), are the most probable ones after those before. All are exactly
        if greedy decoding gives the answer."""
        labels = batch["labels"][:, 1:]
        answers = int((labels[0] != -100).sum())
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with precision():
            logits = self.model(**inputs, logits_to_keep=answers + 1, use_cache=False).logits[:, :-1]
        return logits.argmax(-1) == labels[:, -answers:]


def pixels_of(tiles: torch.Tensor) -> torch.Tensor:
    """`pixel_values` (batch * tiles, 3, height, width) on the device, of bytes (batch, tiles, height, width)."""
    pixels = as_pixels(tiles.flatten(0, 1).to(device_type(), non_blocking=True))
    return pixels[:, None].expand(-1, 3, -1, -1)


def stream(
    draw_sample: Callable[[random.Random], Sample], seed: str, batch: int, workers: int
) -> Iterator[list[torch.Tensor]]:
    """Batches of samples, which `workers` processes draw."""
    data = Stream(draw_sample, seed)
    loader = DataLoader(data, batch, num_workers=workers, prefetch_factor=4 if workers else None, collate_fn=_stack_samples)
    for arrays in loader:
        yield [torch.from_numpy(array) for array in arrays]


def _stack_samples(samples: list[Sample]) -> list[np.ndarray]:
    """With NumPy, as tensors would need more shared memory than a container may have."""
    return [np.stack(arrays) for arrays in zip(*samples, strict=True)]


def train_on_tiles(task: Task, options: argparse.Namespace) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The training that all layouts share: the weights, and figures of its two parts with the accuracy on single tiles."""
    reader = Reader(task, "crop", options.seed)
    return reader.model.state_dict(), {"tower": train_tower(reader, options), "tiles": train_reader(reader, options)}


def train_tower(reader: Reader, options: argparse.Namespace) -> dict[str, float]:
    """Train the tower and the projector by `Locator`; returns figures of the training, with the accuracy on digits."""
    locator = Locator(reader.model, reader.task.digits)
    batches = stream(partial(drawings, reader.task), f"{options.seed}/drawings", options.tile_batch, options.workers)

    def make_batch(done: float) -> dict[str, torch.Tensor]:
        tiles, *labels = next(batches)
        tokens, cells = (label.to(device_type(), non_blocking=True) for label in labels)
        return {"pixel_values": pixels_of(tiles), "tokens": tokens, "cells": cells}

    held_out = make_batch(0)

    @torch.inference_mode()
    def right() -> float:
        with precision():
            return float(locator(**held_out).logits.float().mean())

    training = fit(
        locator, make_batch, options.tower_steps, options.tower_minutes, options.tower_learning_rate, "tower       ",
        lambda: f"digits {right():.1%}",
    )  # fmt: skip
    return training | {"digits": right()}


def train_reader(reader: Reader, options: argparse.Namespace) -> dict[str, float]:
    """Train the language model to read single tiles; returns figures of the training, with the accuracy on new ones."""
    task = reader.task
    reader.model.set_trainable(projector=False, embeddings=True, vision_tower=False, language_model=True, lm_head=True)
    batches = stream(partial(single_tiles, task), f"{options.seed}/tiles", options.tile_batch, options.workers)
    prompt = reader.prompt(Image.new("L", (task.parts.image_size,) * 2))
    held_out = [
        draw_tile(task, random.Random(f"{options.seed}/held-out tile/{index}"), cut=False)
        for index in range(min(256, options.pages))
    ]
    tiles = torch.from_numpy(np.stack([np.asarray(image)[None] for image, _ in held_out]))
    digits = torch.from_numpy(np.stack([as_array(numbers[0][0]) for _, numbers in held_out]))

    def make_batch(done: float) -> dict[str, torch.Tensor]:
        return reader.batch(prompt, *next(batches))

    def exact() -> float:
        return float(reader.right(reader.batch(prompt, tiles, digits)).all(1).float().mean())

    training = fit(
        reader.model, make_batch, options.tile_steps, options.tile_minutes, options.learning_rate, "single tiles",
        lambda: f"exact {exact():.0%}",
    )  # fmt: skip
    return training | {"exact": exact()}


def train_on_pages(task: Task, layout: str, weights: dict[str, torch.Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Train a layout; returns figures of the training, and of its accuracy."""
    reader = Reader(task, layout, options.seed)
    reader.model.load_state_dict(weights)
    draw_sample = partial(page_tiles, task, processor=reader.processor)
    batches = stream(draw_sample, f"{options.seed}/pages", options.batch, options.workers)
    prompt = reader.prompt(draw_page(task, random.Random(0))[0])

    def make_batch(done: float) -> dict[str, torch.Tensor]:
        return reader.batch(prompt, *next(batches))

    def check() -> str:
        return f"exact {measure(reader, min(128, options.pages), options)['exact']:.0%}"

    training = fit(
        reader.model, make_batch, options.steps, options.minutes, options.page_learning_rate, f"{layout:12}", check
    )
    return measure(reader, options.pages, options) | {
        "training": training | {"pages": training["steps"] * options.batch},
        "image_tokens": int((prompt == reader.model.config.image_token_id).sum()),
    }


def measure(reader: Reader, pages: int, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy on new pages: of whole numbers (`exact`), of those on one tile (`whole`) and on more (`cut`), of digits."""
    prompt, right, is_cut = reader.prompt(draw_page(reader.task, random.Random(0))[0]), [], []
    for start in range(0, pages, options.batch):
        drawn = [
            draw_page(reader.task, random.Random(f"{options.seed}/held-out page/{index}"))
            for index in range(start, min(start + options.batch, pages))
        ]
        tiles = torch.from_numpy(np.stack([grey_bytes(reader.processor, page) for page, _, _ in drawn]))
        digits = torch.from_numpy(np.stack([as_array(number) for _, number, _ in drawn]))
        right.append(reader.right(reader.batch(prompt, tiles, digits)).cpu())
        is_cut += [reader.task.is_cut(box) for _, _, box in drawn]
    answers = torch.cat(right)
    exact, cut = answers.all(1).float(), torch.tensor(is_cut)
    return {
        "exact": float(exact.mean()),
        "digits": float(answers[:, :-1].float().mean()),
        "whole": float(exact[~cut].mean()) if not cut.all() else None,
        "cut": float(exact[cut].mean()) if cut.any() else None,
        "pages": pages,
        "cut_pages": int(cut.sum()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--small", action="store_true", help="fewer digits on a smaller page, for a CPU")
    parser.add_argument("--tower-steps", type=int, default=4000, help="of the tower's own training")
    parser.add_argument("--tower-minutes", type=float, help="of the tower's own training at most")
    parser.add_argument("--tile-steps", type=int, default=2000, help="of the training on single tiles")
    parser.add_argument("--tile-minutes", type=float, help="of the training on single tiles at most")
    parser.add_argument("--tile-batch", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="pages of a batch")
    parser.add_argument("--pages", type=int, default=600, help="new pages that are measured")
    parser.add_argument("--tower-learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the training on single tiles")
    parser.add_argument("--page-learning-rate", type=float, default=5e-4)
    parser.add_argument("--workers", type=int, default=12, help="processes that draw the images of a training")
    parser.add_argument("--weights", help="file of the training on single tiles: read if it exists, else written")
    add_training_options(parser, steps=6000)
    options = parser.parse_args(argv)
    task = SMALL if options.small else PAGE
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.weights or f"{folder}/weights.pt")
        if not path.exists():
            print(f"{describe_device()}\n{task}", flush=True)
            weights, results["first"] = train_on_tiles(task, options)
            torch.save(weights, path)
        if len(options.layouts) == 1:
            weights = torch.load(path, map_location=device_type())
            results[options.layouts[0]] = train_on_pages(task, options.layouts[0], weights, options)
        else:
            runs = {}
            for layout in options.layouts:  # "pad" reads a page faster
                workers = min(options.workers, 3 if layout == "pad" else 6)
                runs[layout] = as_flags(options, layouts=[layout], weights=path, workers=workers)
            nested = side_by_side(__file__, runs)
            results |= {layout: figures.get(layout, figures) for layout, figures in nested.items()}
    print(f"\n{table(results)}", flush=True)
    write(options.out, options, results | {"task": asdict(task)})


def table(results: dict[str, Any]) -> str:
    """The accuracies as a table in Markdown."""
    rows: list[list[object]] = []
    for layout in LAYOUTS:
        figures = results.get(layout)
        if figures is not None and "failed" in figures:
            rows.append([layout, figures["failed"]])
        elif figures is not None:
            training = figures["training"]
            trained = f"{training['pages']:,} pages, {training['seconds'] / 60:.1f} minutes"
            rows.append([layout, figures["image_tokens"], figures["exact"], figures["digits"], figures["cut"], trained])
    return markdown(
        ["image_layout", "image tokens", "whole number", "digits", "numbers on borders", "training on pages"], rows
    )


if __name__ == "__main__":
    main()
