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
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

NEW_TOKENS = 8


def answer(name: str, revision: str = "main") -> dict[str, Any]:
    """What a checkpoint says about two images, and what of the package's friends could be imported meanwhile."""
    options = {"trust_remote_code": True, "revision": revision}
    model = AutoModelForImageTextToText.from_pretrained(name, **options)
    processor = AutoProcessor.from_pretrained(name, **options)
    image = Image.radial_gradient("L").convert("RGB").resize((40, 30))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is <image> it?"}]},
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": [{"type": "image", "image": image.rotate(90)}, {"type": "text", "text": "And now?"}]},
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    told = pipeline("image-text-to-text", model=model, processor=processor)(
        text=messages, max_new_tokens=NEW_TOKENS, do_sample=False, return_full_text=False
    )
    return {
        "transformers": transformers.__version__,
        "importable": [name for name in ("dsvl", "accelerate", "peft", "datasets") if importlib.util.find_spec(name)],
        "input_ids": inputs["input_ids"][0].tolist(),
        "types": inputs["mm_token_type_ids"][0].tolist(),
        "logits": logits[0].tolist(),
        "answer": generated_ids(model, inputs),
        "beams": generated_ids(model, inputs, num_beams=3),
        "static cache": generated_ids(model, inputs, cache_implementation="static"),
        "own loop": looped_ids(model, inputs),
        "pipeline": told[0]["generated_text"],
        "losses": training_losses(model, inputs),
    }


def generated_ids(model: Any, inputs: Any, **options: Any) -> list[int]:
    generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return generated[0, inputs["input_ids"].shape[1] :].tolist()


def looped_ids(model: Any, inputs: Any) -> list[int]:
    """Greedy search by hand, over the cache that the model makes."""
    ids: list[int] = []
    with torch.no_grad():
        outputs = model(**inputs)
        while True:
            scores = outputs.logits[0, -1]
            scores[model.config.image_token_id] = -torch.inf
            ids.append(int(scores.argmax()))
            if len(ids) == NEW_TOKENS or ids[-1] == model.generation_config.eos_token_id:
                return ids
            outputs = model(input_ids=torch.tensor([ids[-1:]]), past_key_values=outputs.past_key_values)


def training_losses(model: Any, inputs: Any) -> list[float]:
    """The losses of three steps in which projector and embeddings are trained."""
    model.set_trainable().train()
    labels = torch.where(inputs["mm_token_type_ids"] == 1, -100, inputs["input_ids"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    print(json.dumps(answer(*sys.argv[1:])))
