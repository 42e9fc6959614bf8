"""The language model of all arms: its tokens, its documents, its training from scratch on text, and its answers in text."""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from measure import device_type
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from trained_tasks import fit, precision
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import CausalLMOutputWithPast

from attention_quality.scenes import (
    IMAGE_KINDS,
    SYSTEM,
    TEXT_KINDS,
    Conversation,
    Words,
    World,
    heading,
    name,
    question_spans,
    scenes_with_question,
    tell,
    text_document,
)
from attention_quality.sizes import Size

IMAGE_TOKEN = "<image>"
WORD = r"### Image \d+:|### \w+:|\(image \d+\)|[\w-]+|[^\w\s]"
TOLD = 0.1  # weight of the words that tell a scene, which are random, beside the words of an answer
MORE_ROUNDS = 3  # of the language model's training
TEXT_IMAGES = 4  # scenes in a question's text, when the language model is measured


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


def make_language_model(size: Size, tokenizer: Any) -> LlamaForCausalLM:
    """A LLaMA of random weights. They are as large as keeps the size of activations, which trains small widths sooner.

    Rows are padded on the right, where no query sees it, so it needs no masks: sdpa is causal by itself, and chooses a
    kernel that is fast, and deterministic if wanted.
    """
    AttentionInterface.register("unmasked_sdpa", sdpa_attention_forward)
    AttentionMaskInterface.register("unmasked_sdpa", lambda *args, **kwargs: None)
    model = LlamaForCausalLM(
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
    model.set_attn_implementation("unmasked_sdpa")
    return model


class Documents(IterableDataset):
    """Batches of documents, drawn by the workers of a loader: ids and weights of the loss, (documents, tokens).

    Two or three scenes at first, as questions about them are learned sooner; then up to seven; and up to `most_images` in
    every fourth batch of the last two fifths, and of all that follow.

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
        scenes = rng.randint(2, 3) if done < 0.4 else rng.randint(1, 7)
        if done > 0.6 and index % 4 == 0:
            scenes = round(math.exp(rng.uniform(math.log(7), math.log(world.most_images))))
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


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for all else, with one learning rate.

    In pilots it answered more questions after 1,000 steps than with AdamW alone after 4,000.
    """
    matrices, others = [], []
    for key, parameter in model.named_parameters():
        (matrices if ".layers." in key and parameter.ndim == 2 else others).append(parameter)
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train_language_model(size: Size, tokenizer: Any, seed: int, workers: int) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train the language model; returns it with figures of its training, and its accuracy in text by kind of question.

    The training goes on, in rounds of half as many steps at half the learning rate, until each of `IMAGE_KINDS` is answered
    well enough, `MORE_ROUNDS` times at most.

    Args:
        size: of the experiment.
        tokenizer: of `make_tokenizer`.
        seed: of weights and data.
        workers: processes that draw documents.
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

    if device_type() == "cuda":
        for layer in model.model.layers:  # they share what is compiled
            layer.compile(dynamic=True)
    optimizers, rounds = muon(model), []
    while True:
        share = 0.5 if rounds else 1
        rounds.append(
            fit(
                WeightedText(model),
                make_batch,
                round(size.language_steps * share),
                learning_rate=size.language_learning_rate * share,
                label="language",
                check=check,
                optimizers=optimizers,
            )
        )
        accuracy = text_accuracy(model, tokenizer, size, size.items)
        print("language", ", ".join(f"{kind} {value:.1%}" for kind, value in accuracy.items()), flush=True)
        if all(accuracy[kind] >= size.enough for kind in IMAGE_KINDS) or len(rounds) > MORE_ROUNDS:
            break
    return model, {
        "rounds": rounds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": accuracy,
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
