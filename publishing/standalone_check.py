"""Load a checkpoint with the code that it carries and answer a question about an image.

Runs in a process that cannot import `dsvl` (see `fresh_process`), so it imports torch, transformers and Pillow only.

python standalone_check.py CHECKPOINT
"""

import importlib.util
import json
import sys
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes", "num_tiles")


def image_prompt(processor: Any) -> Any:
    """The model inputs of a fixed question about a fixed image."""
    image = Image.radial_gradient("L").convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.no_grad()
def eager_logits(model: Any, processor: Any) -> torch.Tensor:
    """The logits of the first token of the answer to `image_prompt`, float32 of shape (vocabulary,).

    The decoder's attention is set to eager, which is the same code with and without the package's acceleration: the logits
    are then equal in every dtype.
    """
    model.set_attn_implementation({"text_config": "eager"})
    return model(**image_prompt(processor), logits_to_keep=1).logits[0, -1].float()


def check(checkpoint: str) -> dict[str, Any]:
    """Load a checkpoint directory by the Auto classes and answer a question.

    Returns:
        `parameters` and `tokens` (of the question), two counts, and the `logits` of `eager_logits`.

    Raises:
        SystemExit: naming what is wrong, where transformers itself does not raise.
    """
    if importlib.util.find_spec("dsvl") is not None:
        sys.exit("The package dsvl can be imported, so this process cannot show that the checkpoint loads without it.")
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model, loading = AutoModelForImageTextToText.from_pretrained(
        checkpoint, trust_remote_code=True, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, keys))[:3] for kind, keys in loading.items() if keys}
    if wrong:
        sys.exit(f"The weights are not those of the configuration: {wrong}.")
    inputs = image_prompt(processor)
    written = int((inputs["input_ids"] == config.image_token_id).sum())
    with torch.no_grad():
        images = {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
        taken = sum(map(len, model.get_image_features(**images).pooler_output))
    if written != taken:
        sys.exit(f"The processor writes {written} image tokens for an image; the model takes {taken}.")
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits
    if not torch.isfinite(logits).all():
        sys.exit("The model's logits are not finite; its weights are broken.")
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": inputs["input_ids"].shape[1],
        "logits": eager_logits(model, processor).tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(check(sys.argv[1])))
