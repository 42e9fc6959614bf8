"""The parts that all arms share: a language model that was trained on text, and a vision tower that was trained to classify.

Both are trained from scratch by `make_parts`, from a seed, and are stored where the caller says, never in the repository.
"""

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import device_name, device_type
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from trained_tasks import Parts, as_pixels, fit, precision, random_tower
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from attention_quality.scenes import (
    IMAGE_KINDS,
    SIZES,
    SYSTEM,
    TEXT_KINDS,
    Conversation,
    Sprites,
    Words,
    World,
    cells_of,
    draw_scene,
    generator_hash,
    heading,
    labels_of,
    name,
    question_spans,
    scenes_with_question,
    tell,
    text_document,
)

IMAGE_TOKEN = "<image>"
WORD = r"### Image \d+:|### \w+:|\(image \d+\)|[\w-]+|[^\w\s]"
TOLD = 0.1  # weight of the words that tell a scene, which are random, beside the words of an answer
TEXT_IMAGES = 4  # scenes in a question's text, when the language model is measured


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        world: what there is to see.
        patch_size, tower_width, tower_layers: of the tower.
        width, layers, head_dim: of the language model; its MLPs are 2.7 times as wide.
        language_steps, language_tokens, language_learning_rate: of its training; tokens of a batch.
        tower_steps, tower_images, tower_learning_rate: of the tower's training; images of a batch.
        enough: accuracy that the language model must reach in text in each of `IMAGE_KINDS`, or runs are refused.
        batch: conversations of a step.
        images: of a training conversation, a choice of these.
        questions: of a training conversation.
        least_steps: optimizer steps of a run; more if it takes more to see each conversation once.
        items: held-out items of each task.
        distractors: numbers of images of the task of that name.
        distractor_items: of each of these numbers.
        curve: how often a run is measured, its end included.
        curve_items: of each task at these times.
        documents: held-out documents for the perplexity.
    """

    world: World = World()
    patch_size: int = 8
    tower_width: int = 192
    tower_layers: int = 4
    width: int = 640
    layers: int = 12
    head_dim: int = 64
    language_steps: int = 4000
    language_tokens: int = 32768
    language_learning_rate: float = 8e-4
    tower_steps: int = 2500
    tower_images: int = 256
    tower_learning_rate: float = 1e-3
    enough: float = 0.9
    batch: int = 32
    images: tuple[int, ...] = (3, 4, 5, 6, 7)
    questions: int = 5
    least_steps: int = 512
    items: int = 512
    distractors: tuple[int, ...] = (4, 8, 16, 32, 64)
    distractor_items: int = 128
    curve: int = 6
    curve_items: int = 96
    documents: int = 256

    @property
    def asked_images(self) -> int:
        """Of a held-out item, but for distractors."""
        return self.images[len(self.images) // 2]

    @property
    def tokens_per_image(self) -> int:
        return (self.world.image_size // self.patch_size) ** 2


SIZES_OF_EXPERIMENT = {
    "full": Size(),
    # Minutes on a CPU: it shows that everything runs, not which arm is better.
    "tiny": Size(
        world=World(colours=3, shapes=3, grid=2, cell=16, most_things=3, most_images=8),
        tower_width=64,
        tower_layers=2,
        width=64,
        layers=4,
        head_dim=32,
        language_steps=150,
        language_tokens=1024,
        language_learning_rate=3e-3,
        tower_steps=100,
        tower_images=32,
        enough=0.0,
        batch=8,
        images=(2, 3),
        questions=4,
        least_steps=12,
        items=16,
        distractors=(4, 8),
        distractor_items=8,
        curve=2,
        curve_items=8,
        documents=16,
    ),
}


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of the generator; it has no other words."""
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *world.words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


class Encoder:
    """Token ids of documents and conversations, as the chat template renders them.

    Args:
        tokenizer: of `make_tokenizer`, with or without the image token.
        tokens_per_image: of an image.
    """

    def __init__(self, tokenizer: Any, tokens_per_image: int) -> None:
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.tokens_per_image = tokens_per_image

    def words(self, words: Sequence[str]) -> list[int]:
        return [self.ids[word] for word in words]

    def spans(self, spans: Sequence[tuple[Words, bool]]) -> tuple[list[int], list[bool]]:
        """Ids of spans of words, and which of them are an answer, its end included."""
        ids, answers = [self.ids["<s>"]], [False]
        for words, is_answer in spans:
            span = self.words(words) + ([self.ids["</s>"]] if is_answer else [])
            ids += span
            answers += [is_answer] * len(span)
        return ids, answers

    def conversation(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """As `spans`, of a conversation about images."""
        image = [IMAGE_TOKEN] * self.tokens_per_image
        words = SYSTEM.split()
        for number in range(1, len(conversation.scenes) + 1):
            words += [heading(number), *image, name(number)]
        return self.spans([(words, False), *(span for q in conversation.questions for span in question_spans(q))])


def padded(rows: Sequence[Sequence[int]], value: int) -> np.ndarray:
    """Rows padded on the right, (rows, longest)."""
    array = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for line, row in zip(array, rows, strict=True):
        line[: len(row)] = row
    return array


# ----------------------------------------------------------------------------------------------------------------------
# The language model


def make_language_model(size: Size, tokenizer: Any) -> LlamaForCausalLM:
    """A LLaMA of random weights. They are as large as keeps the size of activations, which trains small widths sooner."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            intermediate_size=64 * round(2.7 * size.width / 64),
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // size.head_dim,
            max_position_embeddings=16384,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            initializer_range=size.width**-0.5,
            tie_word_embeddings=False,  # so the head stays frozen where only the embeddings are trained, as in LLaMA
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Documents(IterableDataset):
    """Batches of documents, drawn by the workers of a loader: ids and weights of the loss, (documents, tokens).

    Few scenes at first, as questions about them are learned sooner; then up to `most_images` in every fifth batch.

    Args:
        size: of the experiment.
        tokenizer: of `make_tokenizer`.
        seed: of what is drawn.
    """

    def __init__(self, size: Size, tokenizer: Any, seed: int) -> None:
        self.size, self.seed, self.encoder = size, seed, Encoder(tokenizer, 0)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        worker = torch.utils.data.get_worker_info()
        index, step = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            yield self.batch(index)
            index += step

    def batch(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = random.Random(f"documents/{self.seed}/{index}")
        world, done = self.size.world, index / self.size.language_steps
        most = 2 if done < 0.1 else 4 if done < 0.3 else 7
        scenes = rng.randint(1, most)
        if done > 0.3 and rng.random() < 0.2:
            scenes = round(math.exp(rng.uniform(math.log(most), math.log(world.most_images))))
        scenes, questions = min(scenes, world.most_images), min(8 + scenes, 32)
        rows, answers, tokens = [], [], 0
        while tokens < self.size.language_tokens or not rows:
            ids, is_answer = self.encoder.spans(text_document(world, rng, "train", scenes, questions))
            rows.append(ids)
            answers.append([2 if one else 1 for one in is_answer])
            tokens += len(ids)
        kinds = padded(answers, 0)
        return padded(rows, 0), np.array([0.0, TOLD, 1.0], np.float32)[kinds]


class WeightedText(nn.Module):
    """A language model, whose loss weighs tokens."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, weights: torch.Tensor, use_cache: bool = False) -> CausalLMOutputWithPast:
        logits = self.model(input_ids=ids, use_cache=use_cache).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        return CausalLMOutputWithPast(loss=(losses * weights).sum() / weights.sum())


def train_language_model(
    size: Size, tokenizer: Any, seed: int, workers: int, minutes: float | None = None
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train the language model; returns it with figures of its training, and its accuracy in text by kind of question.

    Args:
        size: of the experiment.
        tokenizer: of `make_tokenizer`.
        seed: of weights and data.
        workers: processes that draw documents.
        minutes: the training ends earlier, if its steps take longer than this.
    """
    set_seed(seed)
    model = make_language_model(size, tokenizer).to(device_type())
    documents = Documents(size, tokenizer, seed)
    loader = DataLoader(documents, None, num_workers=workers, prefetch_factor=4 if workers else None)
    batches = iter(loader)

    def make_batch(done: float) -> dict[str, torch.Tensor]:
        ids, weights = (torch.as_tensor(array).to(device_type(), non_blocking=True) for array in next(batches))
        return {"ids": ids, "weights": weights}

    def check() -> str:
        return ", ".join(
            f"{kind} {value:.0%}" for kind, value in text_accuracy(model, tokenizer, size, min(64, size.items)).items()
        )

    training = fit(
        WeightedText(model), make_batch, size.language_steps, minutes, size.language_learning_rate, "language", check
    )  # fmt: skip
    return model, training | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": text_accuracy(model, tokenizer, size, size.items),
        "perplexity": text_perplexity(model, tokenizer, size),
    }


@torch.inference_mode()
def text_accuracy(model: Any, tokenizer: Any, size: Size, questions: int) -> dict[str, float]:
    """The fraction of questions about held-out scenes, told in words, whose answer greedy decoding gives; by kind, and of
    attributes among as many scenes as there are names for ("distractors")."""
    encoder, accuracies = Encoder(tokenizer, 0), {}
    for kind in (*TEXT_KINDS, "distractors"):
        right: list[bool] = []
        count = size.world.most_images if kind == "distractors" else min(TEXT_IMAGES, size.world.most_images)
        wanted = min(questions, size.distractor_items) if kind == "distractors" else questions
        for start in range(0, wanted, 64):
            rows = [text_item(size.world, kind, count, index) for index in range(start, min(start + 64, wanted))]
            encoded = [encoder.spans(row) for row in rows]
            ids = torch.from_numpy(padded([one for one, _ in encoded], 0)).to(device_type())
            answers = torch.from_numpy(padded([one for _, one in encoded], 0)).bool()
            right += answers_right(
                lambda ids=ids, **kept: model(input_ids=ids, use_cache=False, **kept).logits, ids, answers
            )
        accuracies[kind] = sum(right) / len(right)
    return accuracies


def text_item(world: World, kind: str, count: int, index: int) -> list[tuple[Words, bool]]:
    """Item `index` of a kind: a document with one question about held-out scenes."""
    rng = random.Random(f"text item/{kind}/{index}")
    scenes, question = scenes_with_question(world, "attribute" if kind == "distractors" else kind, count, rng)
    words = SYSTEM.split()
    for number, scene in enumerate(scenes, start=1):
        words += [heading(number), *tell(world, scene, rng), name(number)]
    return [(words, False), *question_spans(question)]


def answers_right(logits: Any, ids: torch.Tensor, answers: torch.Tensor) -> list[bool]:
    """Which rows have an answer that greedy decoding gives: each of its tokens is the most probable after those before.

    Args:
        logits: computes logits (rows, kept tokens, vocabulary), of a `logits_to_keep`.
        ids: (rows, tokens), padded on the right.
        answers: (rows, tokens), which tokens are an answer's; one answer in a row. They lie near the end of each row.
    """
    kept = ids.shape[1] - int(answers.int().argmax(1).min()) + 1
    with precision():
        best = logits(logits_to_keep=kept)[:, :-1].argmax(-1).cpu()
    return ((best == ids[:, 1 - kept :].cpu()) | ~answers[:, 1 - kept :]).all(1).tolist()


@torch.inference_mode()
def text_perplexity(model: Any, tokenizer: Any, size: Size) -> float:
    """Of held-out documents of text, questions and answers included."""
    encoder, total, count = Encoder(tokenizer, 0), 0.0, 0
    for start in range(0, size.documents, 64):
        rows = []
        for index in range(start, min(start + 64, size.documents)):
            rng = random.Random(f"perplexity/{index}")
            rows.append(encoder.spans(text_document(size.world, rng, "held out", rng.randint(1, 4), 6))[0])
        ids = torch.from_numpy(padded(rows, -100)).to(device_type())
        with precision():
            logits = model(input_ids=ids.clamp(min=0), use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(losses), count + int((ids[:, 1:] != -100).sum())
    return math.exp(total / count)


# ----------------------------------------------------------------------------------------------------------------------
# The vision tower


class Classifier(nn.Module):
    """Linear heads on a tower's patches, which say what the cell of each patch shows. They train the tower, and are dropped.

    Args:
        tower: the tower.
        world: what there is to see.
    """

    def __init__(self, tower: CLIPVisionModel, world: World) -> None:
        super().__init__()
        self.tower, self.world = tower, world
        self.classes = (world.colours, world.shapes, len(SIZES), 10, 10)
        self.head = nn.Linear(tower.config.hidden_size, sum(self.classes) + len(self.classes))

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor, use_cache: bool = False) -> CausalLMOutputWithPast:
        """The loss, and as `logits` whether each label that is not -1 was right. Labels are (images, cells, 5)."""
        patches = self.tower(pixels).last_hidden_state[:, 1:]  # as the projector gets them
        per_side = self.tower.config.image_size // self.tower.config.patch_size
        cells = torch.arange(per_side, device=pixels.device) * self.world.grid // per_side
        labels = labels[:, (cells[:, None] * self.world.grid + cells).flatten()]
        parts = self.head(patches).float().split([count + 1 for count in self.classes], -1)
        loss, right = torch.zeros((), device=pixels.device), []
        for scores, wanted in zip(parts, labels.unbind(-1), strict=True):
            full = wanted >= 0
            losses = nn.functional.cross_entropy(
                scores.flatten(0, 1), torch.where(full, wanted, scores.shape[-1] - 1).flatten(), reduction="none"
            ).view_as(wanted)
            # The few patches that show something count as much as all others.
            loss = (
                loss + (losses * full).sum() / full.sum().clamp(min=1) + (losses * ~full).sum() / (~full).sum().clamp(min=1)
            )
            right.append(scores.argmax(-1)[full] == wanted[full])
        return CausalLMOutputWithPast(loss=loss, logits=torch.cat(right))


def train_tower(size: Size, sprites: Sprites, seed: int) -> tuple[CLIPVisionModel, dict[str, Any]]:
    """Train the tower; returns it with figures of its training, and its accuracy on cells of held-out scenes."""
    set_seed(seed)
    tower = random_tower(
        Parts(size.world.image_size, size.patch_size, size.tower_width, size.tower_layers)
    )  # fmt: skip
    classifier = Classifier(tower, size.world).to(device_type())
    drawn = np.random.Generator(np.random.PCG64(seed))

    def make_batch(done: float) -> dict[str, torch.Tensor]:
        return _tower_batch(size, sprites, random.Random(int(drawn.integers(2**62))), "train")

    @torch.inference_mode()
    def right() -> float:
        with precision():
            held_out = _tower_batch(size, sprites, random.Random("tower"), "held out")
            return float(classifier(**held_out).logits.float().mean())

    training = fit(
        classifier, make_batch, size.tower_steps, None, size.tower_learning_rate, "tower   ", lambda: f"cells {right():.1%}"
    )
    return tower, training | {"accuracy": right()}


def _tower_batch(size: Size, sprites: Sprites, rng: random.Random, split: Any) -> dict[str, torch.Tensor]:
    scenes = [draw_scene(size.world, rng, split) for _ in range(size.tower_images)]
    cells = torch.from_numpy(cells_of(size.world, scenes, split, rng)).to(device_type())
    return {"pixels": as_pixels(sprites.images(cells)), "labels": labels_of(size.world, cells)}


# ----------------------------------------------------------------------------------------------------------------------
# Both


def make_parts(size_name: str, folder: Path, seed: int, workers: int, minutes: float | None = None) -> dict[str, Any]:
    """Train both parts and save them in a folder. The language model is saved first: if the command was stopped after that,
    the next one goes on with the tower.

    Args:
        size_name: of `SIZES_OF_EXPERIMENT`.
        folder: the output directory, complete exactly if it holds `parts.json`.
        seed: of weights and data.
        workers: processes that draw documents.
        minutes: of the language model's training at most. If it ends by them, its weights depend on the device's speed.

    Returns:
        What `parts.json` holds: figures of both trainings, and a hash of all weights.
    """
    size, started = SIZES_OF_EXPERIMENT[size_name], time.monotonic()
    tokenizer, path = make_tokenizer(size.world), folder / "language"
    mark = {"size": size_name, "seed": seed, "generator": generator_hash(size.world)}
    with deterministic():
        if (path / "figures.json").exists():
            saved = json.loads((path / "figures.json").read_text())
            if saved["of"] != mark:
                raise ValueError(f"{path} holds the language model of {saved['of']}, not of {mark}; pass another --parts.")
            language, language_figures = LlamaForCausalLM.from_pretrained(path), saved["figures"]
        else:
            language, language_figures = train_language_model(size, tokenizer, seed, workers, minutes)
            language.save_pretrained(path)
            tokenizer.save_pretrained(path)
            _write_json(path / "figures.json", {"of": mark, "figures": language_figures})
        tower, tower_figures = train_tower(size, Sprites(size.world).to(device_type()), seed)
    record = mark | {
        "device": device_name(),
        "torch": torch.__version__,
        "weights": weights_hash(language, tower),
        "language": language_figures,
        "tower": tower_figures,
        "seconds": time.monotonic() - started,
    }
    tower.save_pretrained(folder / "tower")
    _write_json(folder / "parts.json", record)
    return record


def _write_json(path: Path, record: dict[str, Any]) -> None:
    """The file is complete if it exists."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.rename(path)


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, so that one seed gives the same weights again on the same device with the same releases."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def weights_hash(*modules: nn.Module) -> str:
    """Of all weights and buffers."""
    digest = hashlib.sha256()
    for module in modules:
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class SharedParts:
    """The parts as they are loaded for a run: `language` and `tower` belong to the model that they are composed to."""

    record: dict[str, Any]
    size: Size
    tokenizer: Any
    language: LlamaForCausalLM
    tower: CLIPVisionModel
    image_processor: CLIPImageProcessor


def read_record(folder: Path) -> dict[str, Any]:
    """The `parts.json` of a folder.

    Raises:
        ValueError: if the folder has none, or if it was made by another generator, or if the language model does not answer
            well enough in text.
    """
    path = folder / "parts.json"
    if not path.exists():
        raise ValueError(
            f"{folder} holds no parts.json; make the parts first: python -m attention_quality parts --parts {folder}"
        )
    record = json.loads(path.read_text())
    size = SIZES_OF_EXPERIMENT[record["size"]]
    if (now := generator_hash(size.world)) != record["generator"]:
        raise ValueError(f"{path} is of the generator {record['generator']}, but this one is {now}; make the parts again.")
    accuracy = record["language"]["accuracy"]
    weak = {kind: accuracy[kind] for kind in IMAGE_KINDS if accuracy[kind] < size.enough}
    if weak:
        told = ", ".join(f"{kind} {value:.1%}" for kind, value in weak.items())
        raise ValueError(
            f"The language model of {folder} answers too little in text ({told}; expected {size.enough:.0%}), so images "
            "would tell nothing about attention; raise language_steps in parts.py and make the parts again."
        )
    return record


def load_parts(folder: Path) -> SharedParts:
    """Parts of `make_parts`, on the device.

    Raises:
        ValueError: as `read_record`.
    """
    record = read_record(folder)
    size = SIZES_OF_EXPERIMENT[record["size"]]
    side = {"height": size.world.image_size, "width": size.world.image_size}
    return SharedParts(
        record=record,
        size=size,
        tokenizer=AutoTokenizer.from_pretrained(folder / "language"),
        language=LlamaForCausalLM.from_pretrained(folder / "language").to(device_type()),
        tower=CLIPVisionModel.from_pretrained(folder / "tower").to(device_type()),
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": size.world.image_size}, crop_size=side, image_mean=[1.0] * 3, image_std=[0.5] * 3
        ),
    )
