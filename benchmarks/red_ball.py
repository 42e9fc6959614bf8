"""Video: a small model, trained from scratch, is asked in which second of a clip a red ball appears.

    python benchmarks/red_ball.py [--clips 8000] [--steps 3000] [--rows token/mmca image/mmca ...] [--out FILE]

A clip has balls of other colours from the start; the red one comes in at a random time and leaves after a second or more.
Clips are encoded (H.264) and read as any video is, {"type": "video"} with a time behind each frame. The accuracy is that of
the answer ("3 s") on new clips; in a second measurement, the frames are blank. Rows are
`image_positions`/`multimodal_attention`.
"""

import argparse
import os
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import describe_device, device_type, write
from PIL import Image, ImageDraw
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

from dsvl.utils.shape_images import BACKGROUND, COLOURS

ROWS = ("token/mmca", "image/mmca", "token/causal", "image/causal")
SYSTEM = "You watch videos and answer questions."
QUESTION = "In which second does the red ball appear?"
SIDE = 64  # pixels of a clip
RATE = 8  # frames of a clip per second
OTHERS = [name for name in COLOURS if name != "red"]


# ----------------------------------------------------------------------------------------------------------------------
# Clips


@dataclass(frozen=True)
class Ball:
    """A ball of a colour, with where it is at a time: it moves on a line and is reflected by the borders."""

    colour: str
    start: tuple[float, float]
    speed: tuple[float, float]
    radius: int

    def box(self, seconds: float) -> tuple[float, float, float, float]:
        reach = SIDE - 2 * self.radius
        x, y = (
            self.radius + reach - abs((place + seconds * speed) % (2 * reach) - reach)
            for place, speed in zip(self.start, self.speed, strict=True)
        )
        return (x - self.radius, y - self.radius, x + self.radius, y + self.radius)


def ball(colour: str, rng: random.Random) -> Ball:
    start, speed = ((rng.uniform(0, SIDE), rng.uniform(0, SIDE)), (rng.uniform(-20, 20), rng.uniform(-20, 20)))
    return Ball(colour, start, speed, rng.randint(7, 10))


def draw_clip(seed: str, seconds: int) -> tuple[list[Image.Image], int]:
    """The frames of a clip, and the second in which the red ball appears.

    Args:
        seed: of the clip.
        seconds: its length.
    """
    rng = random.Random(seed)
    others = [ball(colour, rng) for colour in rng.sample(OTHERS, rng.randint(1, 2))]
    red, second = ball("red", rng), rng.randrange(seconds)
    # Frames that are read are about half a second apart, and one of them has to show the ball within this second.
    appears = second + rng.randrange(3 * RATE // 8 + 1) / RATE
    leaves = appears + rng.uniform(1, 3)
    frames = []
    for index in range(seconds * RATE):
        now = index / RATE
        frame = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
        pen = ImageDraw.Draw(frame)
        for one in [*others, *([red] if appears <= now < leaves else [])]:
            pen.ellipse(one.box(now), fill=COLOURS[one.colour])
        frames.append(frame)
    return frames, second


def encode(frames: list[Image.Image], path: Path) -> None:
    """Write a clip as an H.264 file, or as MPEG-4 where PyAV lacks the encoder."""
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = SIDE, SIDE, "yuv420p", 400_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


# ----------------------------------------------------------------------------------------------------------------------
# Data


@dataclass
class Clips:
    """Clips as the processor reads them; all have the same prompt.

    Attributes:
        prompt: the ids of the prompt, (tokens,).
        pixels: (clips, frames, 3, height, width), as bytes.
        seconds: of the answers, (clips,).
    """

    prompt: torch.Tensor
    pixels: torch.Tensor
    seconds: torch.Tensor


def read_clip(processor: Any, seed: str, seconds: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Draw, encode and read a clip: the ids of its prompt, its frames as bytes, and the second of its answer."""
    torch.set_num_threads(1)
    frames, second = draw_clip(seed, seconds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        encode(frames, path)
        content = [{"type": "video", "path": str(path)}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        read = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
    return read["input_ids"][0].numpy(), as_bytes(read["pixel_values"]).numpy(), second


def read_clips(processor: Any, name: str, count: int, seconds: int, workers: int) -> Clips:
    """Clips that are drawn from a name, by several processes.

    Raises:
        ValueError: if the prompts of two clips differ, which are all of one length.
    """
    seeds = [f"{name}/{index}" for index in range(count)]
    read = partial(read_clip, processor, seconds=seconds)
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            clips = list(pool.map(read, seeds, chunksize=32))
    else:
        clips = list(map(read, seeds))
    prompts, pixels, answers = zip(*clips, strict=True)
    if any(not np.array_equal(prompt, prompts[0]) for prompt in prompts):
        raise ValueError("The prompts of two clips differ; they should be of one length, with equal times.")
    return Clips(torch.from_numpy(prompts[0]), torch.from_numpy(np.stack(pixels)), torch.tensor(answers))


# ----------------------------------------------------------------------------------------------------------------------
# Training and measurement


def compose_row(row: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """The model of a row and its processor."""
    set_seed(options.seed)
    image_positions, attention = row.split("/")
    times = [f"{tenth / 10:.1f} s\n" for tenth in range(10 * options.seconds + 1)]
    words = f"### Video 1:\n\n\n### Question:\n{QUESTION}\n\n### Answer:\n"
    choices = {} if image_positions == "token" else {"image_positions": image_positions}
    texts = [SYSTEM, words, *times]
    model, processor = compose_parts(Parts(layers=4), texts, multimodal_attention=attention, **choices)
    return model, processor


class Batches:
    """Batches of clips with their answers.

    Args:
        processor: of the model.
        clips: what is drawn from.
        seed: of what is drawn.
    """

    def __init__(self, processor: Any, clips: Clips, seed: int) -> None:
        tokenizer = processor.tokenizer
        self.clips, self.pixels = clips, clips.pixels.to(device_type())
        self.generator = torch.Generator().manual_seed(seed)
        answers = [f"{second} s{tokenizer.eos_token}" for second in range(int(clips.seconds.max()) + 1)]
        self.answers = torch.tensor([tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers])

    def draw(self, size: int) -> dict[str, torch.Tensor]:
        return self.batch(torch.randint(len(self.clips.seconds), (size,), generator=self.generator))

    def batch(self, rows: torch.Tensor, blank: bool = False) -> dict[str, torch.Tensor]:
        """The clips of some rows, or the same questions about blank frames."""
        answers = self.answers[self.clips.seconds[rows]]
        ids = torch.cat([self.clips.prompt.expand(len(rows), -1), answers], dim=1)
        labels = ids.clone()
        labels[:, : len(self.clips.prompt)] = -100
        pixels = as_pixels(self.pixels[rows.to(self.pixels.device)].flatten(0, 1))
        return {
            "input_ids": ids.to(device_type()),
            "labels": labels.to(device_type()),
            "pixel_values": torch.zeros_like(pixels) if blank else pixels,
        }


@torch.inference_mode()
def accuracy(model: Any, batches: Batches, blank: bool = False, most: int | None = None) -> float:
    """The fraction of clips whose answer greedy decoding gives: each of its tokens is the most probable after those
    before."""
    right = []
    for rows in torch.arange(len(batches.clips.seconds))[:most].split(128):
        batch = batches.batch(rows, blank)
        labels, length = batch.pop("labels")[:, 1:], batches.answers.shape[1]
        with precision():
            logits = model(**batch, logits_to_keep=length + 1, use_cache=False).logits[:, :-1]
        right += (logits.argmax(-1) == labels[:, -length:]).all(1).tolist()
    return sum(right) / len(right)


def measure(row: str, clips: Clips, held_out: Clips, options: argparse.Namespace) -> dict[str, Any]:
    """Train the model of a row; returns figures of its training and the accuracies."""
    model, processor = compose_row(row, options)
    batches, asked = Batches(processor, clips, options.seed), Batches(processor, held_out, options.seed)
    training = fit(
        model,
        lambda done: batches.draw(options.batch),
        options.steps,
        options.minutes,
        options.learning_rate,
        f"{row:12}",
        lambda: f"exact {accuracy(model, asked, most=256):.0%}",
    )
    return {
        "training": training,
        "exact": accuracy(model, asked),
        "exact, blank frames": accuracy(model, asked, blank=True),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["token/mmca", "image/mmca"])
    parser.add_argument("--clips", type=int, default=8000, help="that are trained on")
    parser.add_argument("--held-out", type=int, default=1000, help="clips that are measured")
    parser.add_argument("--seconds", type=int, default=8, help="length of a clip, 10 at most")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw and read clips")
    parser.add_argument("--data", help="file of the clips as they are read: read if it exists, else written")
    add_training_options(parser, steps=2000)
    options = parser.parse_args(argv)
    if not 1 <= options.seconds <= 10:
        parser.error(f"--seconds is {options.seconds}; the answer is one digit, so pass 1 to 10.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.data or f"{folder}/clips.pt")
        if not path.exists():
            print(describe_device(), flush=True)
            processor, started = compose_row("token/mmca", options)[1], time.monotonic()
            made = [
                read_clips(processor, f"{options.seed}/{name}", count, options.seconds, options.workers)
                for name, count in (("train", options.clips), ("held out", options.held_out))
            ]
            print(f"{options.clips + options.held_out} clips read in {time.monotonic() - started:.0f} s", flush=True)
            torch.save([vars(clips) for clips in made], path)
        if len(options.rows) == 1:
            clips, held_out = (Clips(**saved) for saved in torch.load(path))
            results = {options.rows[0]: measure(options.rows[0], clips, held_out, options)}
        else:
            nested = side_by_side(__file__, {row: as_flags(options, rows=[row], data=path) for row in options.rows})
            results = {row: figures.get(row, figures) for row, figures in nested.items()}
    print(f"\n{table(results)}", flush=True)
    write(options.out, options, results)


def table(results: dict[str, Any]) -> str:
    """The accuracies as a table in Markdown."""
    rows: list[list[object]] = []
    for row, figures in results.items():
        if "failed" in figures:
            rows.append([*row.split("/"), figures["failed"]])
        else:
            rows.append([*row.split("/"), figures["exact"], figures["exact, blank frames"], figures["training"]["steps"]])
    return markdown(["image_positions", "multimodal_attention", "exact", "blank frames", "steps"], rows)


if __name__ == "__main__":
    main()
