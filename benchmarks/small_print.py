"""Small print: a model trained from scratch reads six digits of 12 px, anywhere on a page of 1,000 x 700 pixels.

    python benchmarks/small_print.py [--layouts crop pad tiles] [--minutes 4] [--out FILE]

All models share a first training, on single tiles: drawings of the tower's own size, in which the digits move from the
centre to anywhere. Then each layout (`image_layout`) is trained on pages, which its processor reads, side by side with the
others: on equally many pages, from the same weights. The accuracy is that of the whole number, on new pages. `--small` has
three digits on a page of 320 x 220 pixels, for a CPU.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from measure import describe_device, device_type, write
from PIL import Image, ImageDraw, ImageFont
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

LAYOUTS = ("crop", "pad", "tiles")
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
FONT_SIZE = 12  # pixels; the digits are 9 pixels high
RULES = 28  # pixels between the grey lines of a page
GREY, BLACK, WHITE = 215, 0, 255
SYSTEM = "You read."
QUESTION = "Which number is on the page?"


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


PAGE = Task(6, 1000, 700, 12, Parts(256, 16, 192, 6, 256, 4, head_dim=64, rope_theta=1e6, max_positions=8192))
SMALL = Task(3, 320, 220, 6, Parts(112, 16, 96, 3, 128, 2, rope_theta=1e6, max_positions=4096))


# ----------------------------------------------------------------------------------------------------------------------
# Pages


def draw(width: int, height: int, digits: str, x: int, y: int, rng: random.Random) -> Image.Image:
    """A white page with grey rules and a margin, of mode L, and a number whose box starts at (x, y)."""
    page = Image.new("L", (width, height), WHITE)
    pen = ImageDraw.Draw(page)
    for line in range(rng.randrange(RULES), height, RULES):
        pen.line((0, line, width, line), fill=GREY)
    margin = rng.randrange(width)
    pen.line((margin, 0, margin, height), fill=GREY)
    font = ImageFont.truetype(FONT, FONT_SIZE)
    pen.text((x - font.getbbox(digits)[0], y - font.getbbox(digits)[1]), digits, fill=BLACK, font=font)
    return page


def extent(digits: str) -> tuple[int, int]:
    """Width and height of a number, in pixels."""
    left, top, right, bottom = ImageFont.truetype(FONT, FONT_SIZE).getbbox(digits)
    return int(right - left), int(bottom - top)


def number(task: Task, rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(task.digits))


def draw_page(task: Task, rng: random.Random) -> tuple[Image.Image, str, tuple[int, int, int, int]]:
    """A page, its number, and the number's box (left, top, right, bottom), which is anywhere on the page."""
    digits = number(task, rng)
    width, height = extent(digits)
    x, y = rng.randint(0, task.width - width), rng.randint(0, task.height - height)
    return draw(task.width, task.height, digits, x, y, rng), digits, (x, y, x + width, y + height)


def draw_tile(task: Task, reach: float, rng: random.Random) -> tuple[Image.Image, str]:
    """An image of about the tower's size, with a number within `reach` (0 to 1) of the way from its centre to a border."""
    digits = number(task, rng)
    side = round(task.parts.image_size / rng.uniform(0.9, 1.1))  # as tiles, whose scale follows the page
    x, y = (round((side - length) / 2 * (1 + reach * rng.uniform(-1, 1))) for length in extent(digits))
    tile = draw(side, side, digits, x, y, rng)
    return tile.resize((task.parts.image_size,) * 2, Image.Resampling.BICUBIC), digits


class Stream(IterableDataset):
    """An endless stream of samples, different in each worker: pixels (tiles, height, width) as bytes, and the digits.

    Args:
        task: what is drawn.
        processor: reads pages; None draws single tiles instead.
        seed: of all that is drawn.
        reach: of the numbers of single tiles, a tensor in shared memory.
    """

    def __init__(self, task: Task, processor: Any, seed: str, reach: torch.Tensor) -> None:
        self.task, self.processor, self.seed, self.reach = task, processor, seed, reach

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        while True:
            if self.processor is None:
                image, digits = draw_tile(self.task, float(self.reach), rng)
                tiles = np.asarray(image)[None]
            else:
                image, digits, _ = draw_page(self.task, rng)
                tiles = grey_bytes(self.processor, image)
            yield tiles, np.array([int(digit) for digit in digits])


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
        choices = {} if layout == "crop" else {"image_layout": layout, "max_tiles": task.max_tiles}
        words = f"### Image 1:\n\n(image 1)\n\n\n### Question:\n{QUESTION}\n\n### Answer:\n"
        tags = [f"\nwhole\nrow {row} column {column}\n" for row in range(1, 9) for column in range(1, 9)]
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

    def batch(self, prompt: torch.Tensor, tiles: torch.Tensor, digits: torch.Tensor) -> dict[str, torch.Tensor]:
        """A batch on the device.

        Args:
            prompt: (tokens,), the same for all images, which are of one size.
            tiles: (batch, tiles, height, width), bytes.
            digits: (batch, digits).
        """
        answers = torch.cat([self.digits[digits, 0], self.end.expand(len(digits), 1)], dim=1)
        ids = torch.cat([prompt.expand(len(digits), -1), answers], dim=1)
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        device = device_type()
        pixels = as_pixels(tiles.flatten(0, 1).to(device, non_blocking=True))
        made = {
            "input_ids": ids.to(device),
            "labels": labels.to(device),
            "pixel_values": pixels[:, None].expand(-1, 3, -1, -1),
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


def stream(
    task: Task, processor: Any, seed: str, batch: int, workers: int, reach: torch.Tensor | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of tiles and digits, which `workers` processes draw."""
    data = Stream(task, processor, seed, torch.ones(1) if reach is None else reach)
    loader = DataLoader(data, batch, num_workers=workers, prefetch_factor=4 if workers else None, collate_fn=_stack_samples)
    for tiles, digits in loader:
        yield torch.from_numpy(tiles), torch.from_numpy(digits)


def _stack_samples(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """With NumPy, as tensors would need more shared memory than a container may have."""
    tiles, digits = zip(*samples, strict=True)
    return np.stack(tiles), np.stack(digits)


def train_on_tiles(task: Task, options: argparse.Namespace) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The training that all layouts share: the weights, and figures of the training with the accuracy on single tiles."""
    reader = Reader(task, "crop", options.seed)
    reach = torch.zeros(1).share_memory_()
    batches = stream(task, None, f"{options.seed}/tiles", options.tile_batch, options.workers, reach)
    prompt = reader.prompt(Image.new("L", (task.parts.image_size,) * 2))
    held_out = [
        draw_tile(task, 1.0, random.Random(f"{options.seed}/held-out tile/{index}"))
        for index in range(min(256, options.pages))
    ]
    tiles = torch.from_numpy(np.stack([np.asarray(image)[None] for image, _ in held_out]))
    digits = torch.tensor([[int(digit) for digit in number] for _, number in held_out])

    def make_batch(done: float) -> dict[str, torch.Tensor]:
        reach.fill_(min(max(0.02, (done - 0.05) / 0.55), 1))
        return reader.batch(prompt, *next(batches))

    def exact() -> float:
        return float(reader.right(reader.batch(prompt, tiles, digits)).all(1).float().mean())

    training = fit(
        reader.model, make_batch, options.tile_steps, options.tile_minutes, options.learning_rate, "tiles, alone",
        lambda: f"exact {exact():.0%}",
    )  # fmt: skip
    return reader.model.state_dict(), training | {"exact": exact()}


def train_on_pages(task: Task, layout: str, weights: dict[str, torch.Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Train a layout; returns figures of the training, and of its accuracy."""
    reader = Reader(task, layout, options.seed)
    reader.model.load_state_dict(weights)
    batches = stream(task, reader.processor, f"{options.seed}/pages", options.batch, options.workers)
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


def measure(reader: Reader, pages: int, options: argparse.Namespace) -> dict[str, float]:
    """Accuracy on new pages: of whole numbers (`exact`), and of digits."""
    prompt, right = reader.prompt(draw_page(reader.task, random.Random(0))[0]), []
    for start in range(0, pages, options.batch):
        drawn = [
            draw_page(reader.task, random.Random(f"{options.seed}/held-out page/{index}"))
            for index in range(start, min(start + options.batch, pages))
        ]
        tiles = torch.from_numpy(np.stack([grey_bytes(reader.processor, page) for page, _, _ in drawn]))
        digits = torch.tensor([[int(digit) for digit in number] for _, number, _ in drawn])
        right.append(reader.right(reader.batch(prompt, tiles, digits)))
    answers = torch.cat(right)
    return {"exact": float(answers.all(1).float().mean()), "digits": float(answers[:, :-1].float().mean())}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--small", action="store_true", help="fewer digits on a smaller page, for a CPU")
    parser.add_argument("--tile-steps", type=int, default=6000, help="of the training on single tiles")
    parser.add_argument("--tile-minutes", type=float, help="of the training on single tiles at most")
    parser.add_argument("--tile-batch", type=int, default=128)
    parser.add_argument("--batch", type=int, default=24, help="pages of a batch")
    parser.add_argument("--pages", type=int, default=1000, help="new pages that are measured")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--page-learning-rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=8, help="processes that draw the images of a training")
    parser.add_argument("--weights", help="file of the training on single tiles: read if it exists, else written")
    add_training_options(parser, steps=6000)
    options = parser.parse_args(argv)
    task = SMALL if options.small else PAGE
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.weights or f"{folder}/weights.pt")
        if not path.exists():
            print(f"{describe_device()}\n{task}", flush=True)
            weights, results["alone"] = train_on_tiles(task, options)
            torch.save(weights, path)
        if len(options.layouts) == 1:
            weights = torch.load(path, map_location=device_type())
            results[options.layouts[0]] = train_on_pages(task, options.layouts[0], weights, options)
        else:
            runs = {}
            for layout in options.layouts:  # a page of one tile is read faster
                workers = options.workers if layout == "tiles" else min(options.workers, 2)
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
            rows.append([layout, figures["image_tokens"], figures["exact"], figures["digits"], trained])
    return markdown(["image_layout", "image tokens", "whole number", "digits", "training on pages"], rows)


if __name__ == "__main__":
    main()
