"""Conversations about the colour of drawn shapes, and how many of them a model answers right."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsvl.data import trl_dataset
from dsvl.demo.conversations import DIRECT, SYSTEM, WHICH, sample_scenes
from dsvl.evaluation.metrics import exact_match
from dsvl.utils.shape_images import COLOURS, render


def conversations(folder: Path, seed: str, number: int, counts: Sequence[int] = (0, 1, 2, 3)) -> list[list[dict[str, Any]]]:
    """Questions about the colour of one of several images, and without an image ones about a word of the question.

    Args:
        folder: gets the images.
        seed: of the conversations.
        number: of conversations.
        counts: numbers of images, in turn.
    """
    found = []
    for index in range(number):
        rng = random.Random(f"{seed}/{index}")
        content: list[dict[str, str]] = []
        count = counts[index % len(counts)]
        scenes = sample_scenes(rng, count) if count else []
        for image, scene in enumerate(scenes):
            path = f"images/{seed}-{index}-{image}.png"
            render(scene, rng).save(folder / path)
            content.append({"type": "image", "path": path})
        if scenes:
            image = rng.randrange(len(scenes))
            question, answer = DIRECT["colour"].format(image + 1), f"(image {image + 1}) {scenes[image].colour}"
        else:
            colour = rng.choice(list(COLOURS))
            question, answer = WHICH["colour"].format(colour), f"{colour} (image 1)"
        found.append(
            [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": [*content, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ]
        )
    return found


def preference(messages: list[dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    """The right answer is chosen, and the same with another colour rejected."""
    *prompt, answer = messages
    right = next(colour for colour in COLOURS if colour in answer["content"])
    wrong = answer["content"].replace(right, rng.choice([colour for colour in COLOURS if colour != right]))
    return {"prompt": prompt, "chosen": [answer], "rejected": [{"role": "assistant", "content": wrong}]}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def accuracy(model: Any, processor: Any, folder: Path) -> float:
    """The share of held-out questions that the model answers right."""
    from trl.data_utils import prepare_multimodal_messages

    model.eval()
    rows, right = list(trl_dataset(folder / "held-out.jsonl", "prompt")), 0.0
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        inputs = processor.apply_chat_template(
            [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in part],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(ids, skip_special_tokens=True)
        right += sum(exact_match(answer, row["references"]) for answer, row in zip(answers, part, strict=True))
    return right / len(rows)
