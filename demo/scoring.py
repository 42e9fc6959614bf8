"""Exact answers on held-out conversations: each kind, with the images swapped, and with blank ones."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from .drawing import BACKGROUND, IMAGE_SIZE, KINDS, Question, converse, draw_scenes, render


@dataclass
class Score:
    """Exact answers and answers, of each kind."""

    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    asked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def add(self, question: Question, answer: str) -> None:
        """Count one answer: right if it is the true one, to the letter."""
        self.asked[question.kind] += 1
        self.right[question.kind] += answer == question.answer

    def share(self, *kinds: str) -> float:
        """The share of exact answers among questions of these kinds, or of all."""
        kinds = kinds or KINDS
        return sum(self.right[kind] for kind in kinds) / max(sum(self.asked[kind] for kind in kinds), 1)


def held_out_conversations(seed: int, size: int) -> list[dict[str, Any]]:
    """Conversations about two or three images, in sequences that no training conversation has."""
    names = [f"{seed}/held out/{index}" for index in range(size)]
    return [converse(name, random.Random(name).choice((2, 3)), held_out=True) for name in names]


def swapped(images: list[Image.Image]) -> list[Image.Image]:
    """Each image in the place of the next one: no place keeps its colour, shape or count."""
    return images[-1:] + images[:-1]


def blank(images: list[Image.Image]) -> list[Image.Image]:
    """Images that show nothing."""
    return [Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND) for _ in images]


def others(images: list[Image.Image]) -> list[Image.Image]:
    """As many images of something else: what is right all the same was guessed, or told by the text."""
    rng = random.Random(b"".join(image.tobytes() for image in images))
    return [render(scene, rng) for scene in draw_scenes(rng, len(images))]


def chance_of_which(conversations: list[dict[str, Any]]) -> float:
    """How often "Which image ..." is answered rightly by naming any image that has been shown."""
    shown = [question.images for talk in conversations for question in talk["questions"] if question.kind == "which"]
    return sum(1 / images for images in shown) / len(shown)


def rounds_of(conversation: dict[str, Any], images: list[Image.Image]) -> list[tuple[list[dict[str, Any]], Question]]:
    """Each round as what a model is given, the true answers of earlier rounds included, and its question.

    Args:
        conversation: as `converse` returns it.
        images: the images to show in the place of its own.
    """
    queue, rounds = list(images), []
    messages: list[dict[str, Any]] = []
    questions = iter(conversation["questions"])
    for message in conversation["messages"]:
        if message["role"] == "user":
            parts = [part | {"image": queue.pop(0)} if part["type"] == "image" else part for part in message["content"]]
            messages = [*messages, message | {"content": parts}]
            rounds.append((messages, next(questions)))
        else:
            messages = [*messages, message]
    return rounds


@torch.inference_mode()
def answers(model: Any, processor: Any, prompts: list[list[dict[str, Any]]], batch_size: int = 64) -> list[str]:
    """Generate the next message of each conversation, greedily."""
    texts = []
    for start in range(0, len(prompts), batch_size):
        inputs = processor.apply_chat_template(
            prompts[start : start + batch_size],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        texts += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def score(model: Any, processor: Any, conversations: list[dict[str, Any]], change: Callable = list) -> Score:
    """Ask every question of every conversation.

    Args:
        conversations: as `converse` returns them.
        change: what is shown instead of a conversation's images: `swapped`, `blank`, `others`, or by default
            themselves. The answers that count as right stay those about the images themselves.
    """
    rounds = [pair for talk in conversations for pair in rounds_of(talk, change(talk["drawn"]))]
    rounds.sort(key=lambda pair: len(pair[0]))  # of about the same length in a batch
    result = Score()
    for (_, question), answer in zip(rounds, answers(model, processor, [prompt for prompt, _ in rounds]), strict=True):
        result.add(question, answer)
    return result
