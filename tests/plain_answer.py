"""Load a checkpoint by the Auto classes and answer, with nothing but torch, transformers and Pillow; prints JSON.

python plain_answer.py CHECKPOINT [REVISION]
"""

import importlib.util
import json
import sys
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def answer(name: str, revision: str = "main") -> dict[str, Any]:
    """What a checkpoint says about two pictures, and what of the package's friends could be imported meanwhile."""
    options = {"trust_remote_code": True, "revision": revision}
    model = AutoModelForImageTextToText.from_pretrained(name, **options)
    processor = AutoProcessor.from_pretrained(name, **options)
    picture = Image.radial_gradient("L").convert("RGB").resize((40, 30))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is <image> it?"}]},
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": [{"type": "image", "image": picture.rotate(90)}, {"type": "text", "text": "And now?"}]},
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return {
        "transformers": transformers.__version__,
        "importable": [name for name in ("dsvl", "accelerate", "peft", "datasets") if importlib.util.find_spec(name)],
        "input_ids": inputs["input_ids"][0].tolist(),
        "types": inputs["mm_token_type_ids"][0].tolist(),
        "logits": logits[0].tolist(),
        "answer": generated[0, inputs["input_ids"].shape[1] :].tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(answer(*sys.argv[1:])))
