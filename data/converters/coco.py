"""Data sets about images of COCO (LLaVA, A-OKVQA, captions), and the captions of MiniGPT-4."""

import re
from pathlib import Path
from random import Random
from typing import Any

from ...utils.text import shortened
from .public_formats import llava_conversations
from .registry import Sample, SkipRecord, assistant, converter, read_list, read_records, take, take_texts, user

TRAIN2017 = "coco/train2017"
LLAVA = ("llava/detail_23k.json", "llava/complex_reasoning_77k.json")
LLAVA_DIAL = "llava/conversation_58k.json"

DESCRIBE = (
    "Describe this image.",
    "What does this image show?",
    "What can be seen here?",
    "Give this image a caption.",
    "Write a short description of the image.",
    "In one sentence, what is in the image?",
    "Tell me what you see.",
    "How would you describe this image to somebody who cannot see it?",
    "What is going on in this image?",
    "Summarize the image briefly.",
)
WHY = (
    "Why?",
    "Explain your answer.",
    "Give the reason for your answer.",
    "Say why you think so.",
    "What makes you think so?",
    "Answer with a reason.",
)


def llava_image(record: Any) -> Sample:
    """Convert a LLaVA record about one image of COCO."""
    sample = llava_conversations(record, Random())
    if len(sample["images"]) != 1 or not isinstance(sample["images"][0], str):
        raise ValueError(f"'image' of the record is {shortened(repr(record.get('image')))}; expected the name of one image.")
    return sample | {"images": [f"{TRAIN2017}/{sample['images'][0]}"]}


@converter("llava", "LLaVA-Instruct: detailed descriptions and complex reasoning, first turn", LLAVA, read_list(*LLAVA))
def llava(record: Any, random: Random) -> Sample:
    sample = llava_image(record)
    if not any(part["type"] == "image" for part in sample["messages"][0]["content"]):
        raise SkipRecord("no image in the first turn")
    return sample | {"messages": sample["messages"][:2]}


@converter("llava_dial", "LLaVA-Instruct: conversations, all turns", (LLAVA_DIAL,), read_list(LLAVA_DIAL))
def llava_dial(record: Any, random: Random) -> Sample:
    return llava_image(record)


AOKVQA = "aokvqa/annotations/aokvqa_v1p0_train.json"


@converter("aokvqa", "A-OKVQA: questions answered with reasons", (AOKVQA,), read_list(AOKVQA, key="question_id"))
def aokvqa(record: Any, random: Random) -> Sample:
    choices, right = take_texts(record, "choices"), take(record, "correct_choice_idx", int)
    if not 0 <= right < len(choices):
        raise ValueError(f"'correct_choice_idx' is {right}; expected one of {len(choices)} choices.")
    reasons = [reason.strip().rstrip(".") for reason in take_texts(record, "rationales")]
    reasons = [reason for reason in dict.fromkeys(reasons) if reason]
    answer = f"The answer is {choices[right].strip()}."
    if reasons:
        answer += f" Because {'. '.join(reasons)}."
    question = f"{take(record, 'question', str).strip()} {random.choice(WHY)}"
    image = f"{TRAIN2017}/{take(record, 'image_id', int):012d}.jpg"
    return {"messages": [user(None, question), assistant(answer)], "images": [image]}


CAPTIONS = "coco_caption/dataset.json"
CAPTION_SPLITS = ("train", "restval")  # val and test are evaluation data


@converter(
    "coco_caption",
    "COCO captions (Karpathy's split; train and restval), one random caption per image",
    (CAPTIONS,),
    read_list(CAPTIONS, key="imgid", inside="images"),
)
def coco_caption(record: Any, random: Random) -> Sample:
    split = take(record, "split", str)
    if split not in CAPTION_SPLITS:
        raise SkipRecord(f"split {shortened(split)}")
    captions = [take(sentence, "raw", str, "a sentence") for sentence in take(record, "sentences", list)]
    if not captions:
        raise SkipRecord("no caption")
    image = "/".join(["coco/2014", take(record, "filepath", str), take(record, "filename", str)])
    messages = [user(None, random.choice(DESCRIBE)), assistant(random.choice(captions))]
    return {"messages": messages, "images": [image]}


MINIGPT4 = "cc_sbu_align/filter_cap.json"


@converter(
    "minigpt4",
    "MiniGPT-4's aligned descriptions",
    (MINIGPT4,),
    read_list(MINIGPT4, key="image_id", inside="annotations"),
)
def minigpt4(record: Any, random: Random) -> Sample:
    messages = [user(None, random.choice(DESCRIBE)), assistant(take(record, "caption", str))]
    return {"messages": messages, "images": [f"cc_sbu_align/image/{take(record, 'image_id', (str, int))}.jpg"]}


def coco_name(image_id: str) -> str:
    """The path of a COCO image, from its id in MIMIC-IT: `CGD_IMG_` and the name of the image."""
    name = image_id[8:]
    if not re.fullmatch(r"\w+", name):
        raise ValueError(
            f"the image id {shortened(repr(image_id))} does not name an image of COCO; expected CGD_IMG_ and 12 digits."
        )
    return f"{TRAIN2017}/{name}.jpg"


def conversations_by_image(root: Path) -> dict[str, list[Any]]:
    """Image path -> the LLaVA records about it: descriptions, then reasoning, then conversations."""
    by_image: dict[str, list[Any]] = {}
    for file in (*LLAVA, LLAVA_DIAL):
        for record in read_records(root / file):
            if isinstance(record, dict) and isinstance(record.get("image"), str):
                by_image.setdefault(f"{TRAIN2017}/{record['image']}", []).append(record)
    return by_image
