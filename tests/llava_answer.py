"""Open exported models by transformers alone and answer; prints JSON.

python llava_answer.py DIR...
"""

import importlib.util
import json
import sys
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

NEW_TOKENS = 10


def images(side: int | None = None) -> list[Image.Image]:
    """Different images, none of them a square; or squares of a size, which image processors of that size leave alone."""
    size = (40, 30) if side is None else (side, side)
    circles, ramp = Image.radial_gradient("L").resize(size), Image.linear_gradient("L").resize(size)
    turned = ramp.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    bands = ((circles, circles, circles), (circles, ramp, turned), (turned, turned, circles))
    return [Image.merge("RGB", three) for three in bands]


def conversations(side: int | None = None) -> list[list[dict[str, Any]]]:
    """One conversation each with no, one, two and three images (see `images`), of one or two turns.

    The special tokens in the texts are text.
    """
    made = []
    for count in range(4):
        content: list[dict[str, Any]] = [{"type": "text", "text": "red cup"}]
        for image in images(side)[:count]:
            content += [{"type": "image", "image": image}, {"type": "text", "text": "blue <image> dog</s>"}]
        messages = [{"role": "user", "content": content}]
        if count % 2:
            messages += [{"role": "assistant", "content": [{"type": "text", "text": "It is green."}]}]
            messages += [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]
        made.append(messages)
    return made


def model_inputs(processor: Any, batch: list[list[dict[str, Any]]]) -> Any:
    """The inputs of a batch of conversations, padded."""
    return processor.apply_chat_template(
        batch,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )


@torch.no_grad()
def answers(model: Any, processor: Any, side: int | None = None) -> dict[str, Any]:
    """What a model computes for the conversations: together in a padded batch, and one by one."""
    inputs = model_inputs(processor, conversations(side))
    alone = [model_inputs(processor, [one]) for one in conversations(side)]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    return {
        "prompts": [processor.apply_chat_template(one, add_generation_prompt=True) for one in conversations(side)],
        "input_ids": inputs["input_ids"].tolist(),
        "logits": model(**inputs).logits[inputs["attention_mask"] == 1].tolist(),
        "generated": model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist(),
        "alone": [model.generate(**one, **options)[0, one["input_ids"].shape[1] :].tolist() for one in alone],
    }


if __name__ == "__main__":
    found = {}
    for name in sys.argv[1:]:
        model, loading = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(name)
        found[name] = answers(model.eval(), processor) | {
            "classes": [type(model).__name__, type(processor).__name__],
            "wrong weights": {kind: sorted(map(str, keys)) for kind, keys in loading.items() if keys},
        }
    importable = [name for name in ("dsvl", "accelerate", "peft") if importlib.util.find_spec(name)]
    print(json.dumps({"transformers": transformers.__version__, "importable": importable, "models": found}))
