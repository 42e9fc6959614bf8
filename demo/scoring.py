"""Accuracy on held-out conversations: by kind of question, and with swapped, replaced or blank images."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..utils.shape_images import BACKGROUND, IMAGE_SIZE, render
from .conversations import KINDS, ShapeQuestion, generate_conversation, sample_scenes


@dataclass
class Score:
    """Counts of questions and of exact answers, by kind."""

    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    asked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def add(self, question: ShapeQuestion, answer: str) -> None:
        """Count one answer. It is right if it equals the expected text exactly."""
        self.asked[question.kind] += 1
        self.right[question.kind] += answer == question.answer

    def accuracy(self, *kinds: str) -> float:
        """The share of exact answers among questions of these kinds, or of all kinds."""
        kinds = kinds or KINDS
        return sum(self.right[kind] for kind in kinds) / max(sum(self.asked[kind] for kind in kinds), 1)


def held_out_conversations(seed: int, size: int) -> list[dict[str, Any]]:
    """Conversations about two or three images, whose sequences of images do not occur in training."""
    names = [f"{seed}/held out/{index}" for index in range(size)]
    return [generate_conversation(name, random.Random(name).choice((2, 3)), held_out=True) for name in names]


def swapped(images: list[Image.Image]) -> list[Image.Image]:
    """The images rotated by one position, so that every position shows another colour, shape and count."""
    return images[-1:] + images[:-1]


def blank(images: list[Image.Image]) -> list[Image.Image]:
    """The same number of images without shapes."""
    return [Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND) for _ in images]


def replaced(images: list[Image.Image]) -> list[Image.Image]:
    """The same number of unrelated images: answers that are still right were guessed, or derived from the text."""
    rng = random.Random(b"".join(image.tobytes() for image in images))
    return [render(scene, rng) for scene in sample_scenes(rng, len(images))]


def which_chance_level(conversations: list[dict[str, Any]]) -> float:
    """The accuracy on "Which image ..." questions of picking one of the shown images at random."""
    shown = [question.images for one in conversations for question in one["questions"] if question.kind == "which"]
    return sum(1 / images for images in shown) / len(shown)


def turn_prompts(
    conversation: dict[str, Any], images: list[Image.Image]
) -> list[tuple[list[dict[str, Any]], ShapeQuestion]]:
    """The prompt of each turn, with the correct answers of the previous turns, and its question.

    Args:
        conversation: as `generate_conversation` returns it.
        images: the images to show instead of its own.
    """
    queue, prompts = list(images), []
    messages: list[dict[str, Any]] = []
    questions = iter(conversation["questions"])
    for message in conversation["messages"]:
        if message["role"] == "user":
            parts = [part | {"image": queue.pop(0)} if part["type"] == "image" else part for part in message["content"]]
            messages = [*messages, message | {"content": parts}]
            prompts.append((messages, next(questions)))
        else:
            messages = [*messages, message]
    return prompts


@torch.inference_mode()
def generate_answers(model: Any, processor: Any, prompts: list[list[dict[str, Any]]], batch_size: int = 64) -> list[str]:
    """Generate the next message of each conversation with greedy decoding."""
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
    """Score a model on every question of the conversations.

    Args:
        model: a `DSVLForConditionalGeneration`.
        processor: its `DSVLProcessor`.
        conversations: as `generate_conversation` returns them.
        change (*optional*, defaults to no change): what to do with the images: `swapped`, `blank` or `replaced`. The
            expected answers remain those for the original images.
    """
    prompts = [pair for one in conversations for pair in turn_prompts(one, change(one["drawn"]))]
    prompts.sort(key=lambda pair: len(pair[0]))  # batches of similar length
    result = Score()
    answers = generate_answers(model, processor, [prompt for prompt, _ in prompts])
    for (_, question), answer in zip(prompts, answers, strict=True):
        result.add(question, answer)
    return result
