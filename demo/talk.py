"""A conversation with a saved checkpoint, in a process that knows nothing of this package.

Copy this file anywhere and run it:

    python talk.py CHECKPOINT CONVERSATION.json

The checkpoint brings its own code along (`trust_remote_code=True`), so the script refuses to run where a package `dsvl`
could be imported instead. CONVERSATION.json holds `{"system": ..., "rounds": [...]}`, a round being
`{"images": [file, ...], "question": ..., "truth": ...}`.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def refuse_installed_package() -> None:
    """Stop unless the code must come from the checkpoint.

    Raises:
        SystemExit: if a package `dsvl` can be imported here.
    """
    found = importlib.util.find_spec("dsvl")
    if found is not None:
        sys.exit(
            f"A package dsvl can be imported here (from {found.origin}), so this would not show that the checkpoint runs on "
            "its own; run this script from another directory, in an environment without dsvl."
        )


def talk(checkpoint: Path, conversation: dict[str, Any], folder: Path) -> list[str]:
    """Load a checkpoint and hold a conversation, each answer of the model being part of what it reads next.

    Args:
        checkpoint: its directory.
        conversation: as in CONVERSATION.json.
        folder: where the images are.

    Returns:
        The answers.
    """
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    print(f"  {type(model).__name__} comes from {type(model).__module__.split('.')[0]}, as the checkpoint has it.")

    messages: list[dict[str, Any]] = [{"role": "system", "content": conversation["system"]}]
    answers = []
    for turn in conversation["rounds"]:
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
            print(f"  image:  {name}")
        print(f"  question: {turn['question']}\n  answer:   {answer}\n  truth:    {turn['truth']}")
    return answers


def main() -> None:
    """Run the command."""
    refuse_installed_package()
    print("  No package dsvl can be imported in this process.")
    checkpoint, conversation = map(Path, sys.argv[1:3])
    talk(checkpoint, json.loads(conversation.read_text(encoding="utf-8")), conversation.parent)


if __name__ == "__main__":
    main()
