"""Samples per second from disk to batch on a CPU: DSVL and transformers' LlavaProcessor with the same images.

    python benchmarks/data_loading.py [--samples 400] [--batch-size 8] [--rounds 3] [--workers 0 1 2]

Both read the same JSON lines, decode the same JPEG files (photographs, 640 pixels wide), resize and normalize them with the
same CLIP image processor to 336 pixels, and pad a batch of conversations with one or two images and two turns. DSVL adds
labels for the assistant's tokens. "Cached" reads cached features of a tower instead of images (here random numbers
of their size, 577 x 1,024 in 16 bits). Measurements are interleaved; the table shows medians.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessor, LlavaProcessor

from dsvl import DSVLProcessor
from dsvl.data import load_conversations
from dsvl.demo.photographs import photographs
from dsvl.demo.tiny_models import train_tokenizer
from dsvl.training import ConversationCollator
from dsvl.training.feature_cache import SHARD, FeatureCache, image_key

SIZE, PATCH, WIDTH_OF_TOWER = 336, 14, 1024  # CLIP ViT-L/14 336
WIDTH = 640  # of an image file, as in COCO
QUESTION = "What is shown in this image and how many of them are there on the left side of a large brown table ?"
WORDS = QUESTION.split(" ")
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language.\n\n"
)
TEMPLATE = SYSTEM + (
    "{% for message in messages %}{{ message.role | upper }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
)


def write_conversations(folder: Path, samples: int) -> Path:
    images = list(photographs().values())
    lines = []
    for number in range(samples):
        names = [f"{number}_{index}.jpg" for index in range(1 + number % 2)]
        for index, name in enumerate(names):
            image = images[(number + index) % len(images)].rotate(number % 7)
            image.resize((WIDTH, WIDTH * image.height // image.width)).save(folder / name, quality=90)
        messages: list[dict[str, Any]] = []
        for turn in range(2):
            question = [{"type": "text", "text": " ".join(WORDS[(number + turn) % 5 :])}]
            parts = [{"type": "image", "path": name} for name in names] if turn == 0 else []
            messages.append({"role": "user", "content": parts + question})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": " ".join(WORDS * 4)}]})
        lines.append(json.dumps({"messages": messages}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


class Lines(Dataset):
    """A minimal data set of conversations."""

    def __init__(self, path: Path) -> None:
        self.folder, self.lines = path.parent, path.read_text().splitlines()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Any:
        messages = json.loads(self.lines[index])["messages"]
        for message in messages:
            for part in message["content"]:
                if "path" in part:
                    part["path"] = os.path.join(self.folder, part["path"])
        return messages


class LlavaCollator:
    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor

    def __call__(self, samples: list[Any]) -> Any:
        options = {"padding": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template(samples, tokenize=True, return_dict=True, processor_kwargs=options)


def loaders(path: Path, batch_size: int, workers: int) -> dict[str, DataLoader]:
    side = {"height": SIZE, "width": SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side)
    tokens = (SIZE // PATCH) ** 2 + 1
    ours = DSVLProcessor(image_processor, train_tokenizer(WORDS), image_seq_length=tokens)
    tokenizer = train_tokenizer(WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    theirs = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    cache = FeatureCache(path.parent / "features", {})
    if not len(cache):
        keys = [image_key(str(image)) for image in sorted(path.parent.glob("*.jpg"))]
        for start in range(0, len(keys), SHARD):
            cache.add({key: torch.randn(tokens, WIDTH_OF_TOWER).bfloat16() for key in keys[start : start + SHARD]})
        cache.refresh()
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": workers}
    return {
        "llava": DataLoader(Lines(path), collate_fn=LlavaCollator(theirs), **options),
        "dsvl": DataLoader(load_conversations(path), collate_fn=ConversationCollator(ours), **options),
        "cached": DataLoader(load_conversations(path), collate_fn=ConversationCollator(ours, features=cache), **options),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "An image token sequence", UserWarning)
    with tempfile.TemporaryDirectory() as folder:
        path = write_conversations(Path(folder), arguments.samples)
        print(f"{'workers':8}{'llava':>10}{'dsvl':>10}{'ratio':>8}{'cached':>10}{'ratio':>8}   samples/s")
        for workers in arguments.workers:
            compared = loaders(path, arguments.batch_size, workers)
            speeds: dict[str, list[float]] = {name: [] for name in compared}
            for _ in range(arguments.rounds):
                for name, loader in compared.items():
                    start = time.perf_counter()
                    images = sum(len(batch.get("pixel_values", batch.get("image_features"))) for batch in loader)
                    speeds[name].append(arguments.samples / (time.perf_counter() - start))
                    assert images == sum(1 + number % 2 for number in range(arguments.samples))
            median = {name: statistics.median(values) for name, values in speeds.items()}
            ours = "".join(f"{median[name]:10.1f}{median[name] / median['llava']:8.2f}" for name in ("dsvl", "cached"))
            print(f"{workers:<8}{median['llava']:10.1f}{ours}")


if __name__ == "__main__":
    main()
