"""Accuracy of a question about one of many images: a small model, trained from scratch, is asked about one of 2, 8, 64 and
512 images of coloured shapes.

    python benchmarks/distractors.py [--rows token/mmca image/mmca ...] [--counts 2 8 64 512] [--out FILE]

A row is `image_positions`/`multimodal_attention`; rows are trained side by side, on the same data. A question names an image
by its number ("What colour is (image 317)?"), which stands behind the image too. Numbers of images in training are drawn at
random, up to a limit that grows to the largest count in the first 40 %. Images and questions are those of
`dsvl.demo`; the accuracies are measured on new prompts with images that were not drawn in training.
"""

import argparse
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from measure import describe_device, device_type, write
from trained_tasks import Parts, add_training_options, as_flags, compose_parts, fit, markdown, precision, side_by_side
from transformers import set_seed

from dsvl.utils.shape_images import COLOURS, COUNTS, SHAPES, Scene, render

ROWS = ("token/mmca", "image/mmca", "token/causal", "image/causal")
ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "count": COUNTS}
QUESTIONS = {
    "colour": "What colour is (image {})?",
    "shape": "What shape is in (image {})?",
    "count": "How many shapes are in (image {})?",
}
SYSTEM = "You look at images and answer questions."
FEW = 8  # images of a conversation at most, at the start of the training
ANSWER = 3  # tokens of an answer: the name of the image, the value, the end of the turn
TURNS = 256  # questions of a training conversation, at most


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        counts: numbers of images that are measured; the largest is the largest of the training.
        tokens: of a batch.
        pool, held_out: numbers of images that are drawn for the training and for the measurement.
        questions: of each count.
    """

    counts: tuple[int, ...]
    tokens: int
    pool: int
    held_out: int
    questions: int


# ----------------------------------------------------------------------------------------------------------------------
# Data


class Images:
    """A pool of images: their pixels on the device, and the index of each attribute's value.

    Args:
        processor: of the model.
        size: number of images.
        seed: of what is drawn.
    """

    def __init__(self, processor: Any, size: int, seed: str) -> None:
        rng = random.Random(seed)
        values = [[rng.randrange(len(names)) for names in ATTRIBUTES.values()] for _ in range(size)]
        drawn = [render(Scene(*(names[i] for names, i in zip(ATTRIBUTES.values(), v, strict=True))), rng) for v in values]
        self.pixels = processor.image_processor(drawn, return_tensors="pt")["pixel_values"].to(device_type())
        self.values = torch.tensor(values)

    def __len__(self) -> int:
        return len(self.values)


class Conversations:
    """Batches of conversations about many images. All rows of a batch have the same number of images and tokens, so that
    there is no padding; what differs are the images, and the image that each question is about.

    Args:
        processor: of the model.
        seed: of all that is drawn.
    """

    def __init__(self, processor: Any, seed: int) -> None:
        self.processor, self.generator = processor, torch.Generator().manual_seed(seed)
        self.image_token = processor.image_token
        self.heads: dict[int, list[int]] = {}
        self.turns: dict[tuple[str, int, int], list[int]] = {}

    def encode(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def head(self, count: int) -> list[int]:
        """The tokens of a conversation of so many images up to its first question, as the chat template renders them."""
        if count not in self.heads:
            text = self.processor.apply_chat_template(messages(count, [("colour", 1, 0)]), tokenize=False)
            text = text.partition("### Question:")[0]
            self.heads[count] = self.encode(
                text.replace(self.image_token, self.image_token * self.processor.image_seq_length)
            )
        return self.heads[count]

    def turn(self, attribute: str, number: int, value: int) -> list[int]:
        """The tokens of a question and its answer, of which the last `ANSWER` are the answer's."""
        key = attribute, number, value
        if key not in self.turns:
            text = f"### Question:\n{QUESTIONS[attribute].format(number)}\n\n### Answer:\n"
            text += answer(attribute, number, value) + self.processor.tokenizer.eos_token
            self.turns[key] = self.encode(text)
        return self.turns[key]

    def draw(self, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def batch(self, images: Images, count: int, tokens: int) -> dict[str, torch.Tensor]:
        """A batch for the training. Each image is asked about once, up to `TURNS` of them; the answers have labels.

        Args:
            images: the pool.
            count: number of images in each row.
            tokens: of the batch, about.
        """
        turns = min(count, TURNS)
        rows = max(1, tokens // (len(self.head(count)) + turns * 12))
        shown = self.draw(len(images), (rows, count))
        kinds = self.draw(len(ATTRIBUTES), (turns,)).tolist()
        asked = torch.rand(rows, count, generator=self.generator).argsort(1)[:, :turns]
        values = images.values[shown].tolist()
        ids, labels = [], []
        for row, numbers in enumerate(asked.tolist()):
            ids.append(list(self.head(count)))
            labels.append([-100] * len(ids[row]))
            for kind, image in zip(kinds, numbers, strict=True):
                turn = self.turn(list(ATTRIBUTES)[kind], image + 1, values[row][image][kind])
                ids[row] += turn
                labels[row] += [-100] * (len(turn) - ANSWER) + turn[-ANSWER:]
        return {
            "input_ids": torch.tensor(ids).to(device_type(), non_blocking=True),
            "labels": torch.tensor(labels).to(device_type(), non_blocking=True),
            "pixel_values": images.pixels[shown.flatten().to(images.pixels.device)],
        }


def answer(attribute: str, number: int, value: int) -> str:
    """An answer begins with the image that the question named, as in the demo: the model looks up the rest from there."""
    return f"(image {number}) {ATTRIBUTES[attribute][value]}"


def messages(count: int, turns: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """A conversation whose first turn shows all images."""
    said: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    for index, (attribute, number, value) in enumerate(turns):
        parts: list[dict[str, Any]] = [{"type": "image"}] * (count if index == 0 else 0)
        text = QUESTIONS[attribute].format(number)
        said.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
        said.append({"role": "assistant", "content": answer(attribute, number, value)})
    return said


def vocabulary_texts(images: int) -> list[str]:
    """Texts with every word, each number of an image included."""
    texts = [SYSTEM, *(f"(image 1) {value}" for values in ATTRIBUTES.values() for value in values)]
    for number in range(1, images + 1):
        texts += [
            f"### Image {number}:\n\n(image {number})\n\n\n### Question:\n{question.format(number)}\n\n### Answer:\n"
            for question in QUESTIONS.values()
        ]
    return texts


# ----------------------------------------------------------------------------------------------------------------------
# Training and measurement


def drawn_count(done: float, most: int, generator: torch.Generator) -> int:
    """The number of images of a batch: uniform or, in every fourth batch, log-uniform up to a limit.

    The limit grows from `FEW` to `most`, which it reaches after 40 % of the training.
    """
    few = min(FEW, most)
    limit = few * (most / few) ** min(max(done - 0.1, 0) / 0.3, 1)
    kind, where = torch.rand(2, generator=generator).tolist()
    return min(most, int((limit + 1) ** where if kind < 0.25 else 1 + where * limit))


@torch.inference_mode()
def accuracy(model: Any, conversations: Conversations, images: Images, count: int, size: Size) -> dict[str, float]:
    """The fraction of correct answers about one of `count` images of a pool: of each attribute, and of all together. An
    answer is correct if each of its tokens is the most probable one after those before, so if greedy decoding gives it."""
    right: dict[str, list[bool]] = {attribute: [] for attribute in ATTRIBUTES}
    rows = max(1, size.tokens // (len(conversations.head(count)) + 16))
    for number, attribute in enumerate(ATTRIBUTES):
        wanted = -(-size.questions // len(ATTRIBUTES))
        while len(right[attribute]) < wanted:
            shown = conversations.draw(len(images), (rows, count))
            asked = conversations.draw(count, (rows,)).tolist()
            head = conversations.head(count)
            values = images.values[shown[range(rows), asked], number].tolist()
            turns = [conversations.turn(attribute, image + 1, value) for image, value in zip(asked, values, strict=True)]
            ids = torch.tensor([head + turn for turn in turns])
            with precision():
                logits = model(
                    input_ids=ids.to(device_type()),
                    pixel_values=images.pixels[shown.flatten().to(images.pixels.device)],
                    logits_to_keep=ANSWER + 1,
                    use_cache=False,
                ).logits[:, :-1]
            right[attribute] += (logits.argmax(-1).cpu() == ids[:, -ANSWER:]).all(1).tolist()
        del right[attribute][wanted:]
    figures = {attribute: sum(answers) / len(answers) for attribute, answers in right.items()}
    return figures | {"all": sum(figures.values()) / len(figures)}


def measure(row: str, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Train the model of a row; returns `training` and the accuracy by count of images."""
    image_positions, attention = row.split("/")
    set_seed(options.seed)
    most = max(size.counts)
    heads = {"head_dim": 64, "rope_theta": 1e5, "max_positions": 16384}  # a number is looked up at any distance
    parts = Parts(width=options.width, layers=options.layers, **heads)
    choices = {} if image_positions == "token" else {"image_positions": image_positions}
    model, processor = compose_parts(parts, vocabulary_texts(most), 8192, multimodal_attention=attention, **choices)
    images = Images(processor, size.pool, f"{options.seed}/train")
    held_out = Images(processor, size.held_out, f"{options.seed}/held out")
    conversations = Conversations(processor, options.seed)

    def make_batch(done: float) -> dict[str, torch.Tensor]:
        count = drawn_count(done, most, conversations.generator)
        return conversations.batch(images, count, size.tokens)

    def check() -> str:
        few = replace(size, questions=min(90, size.questions))
        asked = Conversations(processor, seed=1)
        accuracies = {count: accuracy(model, asked, held_out, count, few)["all"] for count in size.counts}
        return ", ".join(f"{count}: {value:.0%}" for count, value in accuracies.items())

    training = fit(model, make_batch, options.steps, options.minutes, options.learning_rate, f"{row:12}", check)
    asked = Conversations(processor, seed=options.seed + 2)
    return {
        "training": training,
        "accuracy": {count: accuracy(model, asked, held_out, count, size) for count in size.counts},
    }


def table(results: dict[str, Any], counts: list[int]) -> str:
    """The accuracies as a table in Markdown, with the drop from 8 images, or the second count, to the most."""
    few, most = str(8 if 8 in counts else counts[0]), str(counts[-1])
    rows: list[list[object]] = []
    for row, figures in results.items():
        if "failed" in figures:
            rows.append([*row.split("/"), figures["failed"]])
            continue
        values = {str(count): value["all"] for count, value in figures["accuracy"].items()}
        drop = 100 * (values[few] - values[most])
        rows.append([*row.split("/"), *values.values(), f"{drop:.1f} points", figures["training"]["steps"]])
    head = ["image_positions", "multimodal_attention", *(f"1 of {count}" for count in counts), f"{few} to {most}", "steps"]
    return markdown(head, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="several are trained side by side")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 8, 64, 512], help="numbers of images")
    parser.add_argument("--tokens", type=int, default=32768, help="of a batch, about")
    parser.add_argument("--pool", type=int, default=20000, help="images that are drawn for the training")
    parser.add_argument("--questions", type=int, default=900, help="of each count")
    parser.add_argument("--width", type=int, default=256, help="of the language model")
    parser.add_argument("--layers", type=int, default=3, help="of the language model")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    add_training_options(parser, steps=4000)
    options = parser.parse_args(argv)
    options.counts = sorted(options.counts)
    size = Size(tuple(options.counts), options.tokens, options.pool, max(options.pool // 5, 16), options.questions)
    if len(options.rows) == 1:
        results = {options.rows[0]: measure(options.rows[0], size, options)}
    else:
        print(f"{describe_device()}\n{size}", flush=True)
        nested = side_by_side(__file__, {row: as_flags(options, rows=[row]) for row in options.rows})
        results = {row: figures.get(row, figures) for row, figures in nested.items()}
    print(f"\n{table(results, options.counts)}", flush=True)
    write(options.out, options, results)


if __name__ == "__main__":
    main()
