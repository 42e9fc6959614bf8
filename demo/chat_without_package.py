"""A conversation with a saved checkpoint in a process without the package dsvl.

Copy this file anywhere and run it:

    python chat_without_package.py CHECKPOINT CONVERSATION.json

It loads the code of the checkpoint (`trust_remote_code=True`), and therefore refuses to run where a package `dsvl` can be
imported. CONVERSATION.json holds `{"system": ..., "turns": [...]}`; a turn is
`{"images": [file, ...], "question": ..., "expected": ...}`.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def refuse_installed_package() -> None:
    """Exit if a package `dsvl` can be imported.

    Raises:
        SystemExit: if so.
    """
    found = importlib.util.find_spec("dsvl")
    if found is not None:
        sys.exit(
            f"A package dsvl can be imported here (from {found.origin}), so this would not show that the checkpoint runs on "
            "its own; run this script from another directory, in an environment without dsvl."
        )


def chat(checkpoint: Path, conversation: dict[str, Any], folder: Path) -> list[str]:
    """Load a checkpoint and ask the questions of a conversation. Each prompt contains the model's previous answers.

    Args:
        checkpoint: the checkpoint's directory.
        conversation: the content of CONVERSATION.json.
        folder: the directory of its images.

    Returns:
        The answers.
    """
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    print(f"  {type(model).__name__} comes from {type(model).__module__.split('.')[0]}, the code in the checkpoint.")

    messages: list[dict[str, Any]] = [{"role": "system", "content": conversation["system"]}]
    answers = []
    for turn in conversation["turns"]:
        images = [{"type": "image", "image": Image.open(folder / name)} for name in turn["images"]]
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn["question"]}]})
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": answer})
        answers.append(answer)
        for name in turn["images"]:
            print(f"  image:    {name}")
        print(f"  question: {turn['question']}\n  answer:   {answer}\n  expected: {turn['expected']}")
    return answers


def main() -> None:
    """Run the command."""
    refuse_installed_package()
    print("  No package dsvl can be imported in this process.")
    checkpoint, conversation = map(Path, sys.argv[1:3])
    chat(checkpoint, json.loads(conversation.read_text(encoding="utf-8")), conversation.parent)


if __name__ == "__main__":
    main()
