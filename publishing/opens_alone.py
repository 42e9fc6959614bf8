"""Open a checkpoint with what it brings along, and let it answer; in a process that knows nothing of this package.

python opens_alone.py CHECKPOINT
"""

import importlib.util
import json
import sys

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor


def main(checkpoint: str) -> dict[str, int]:
    """Answer a question about an image by the processor, the chat template and the weights of a directory.

    Returns:
        How many parameters it has, and how many tokens the question took.

    Raises:
        SystemExit: with a sentence, if something is wrong that transformers lets pass.
    """
    if importlib.util.find_spec("dsvl") is not None:
        sys.exit("A package dsvl can be imported, so this would not show that the checkpoint runs on its own.")
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model, loading = AutoModelForImageTextToText.from_pretrained(
        checkpoint, trust_remote_code=True, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, keys))[:3] for kind, keys in loading.items() if keys}
    if wrong:
        sys.exit(f"The weights are not those of the configuration: {wrong}.")
    image = Image.radial_gradient("L").convert("RGB")
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    images = int((inputs["input_ids"] == config.image_token_id).sum())
    if images != config.image_seq_length:
        sys.exit(f"The processor writes {images} image tokens for an image; the model takes {config.image_seq_length}.")
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits
    if not torch.isfinite(logits).all():
        sys.exit("The model's logits are not finite; its weights are broken.")
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return {"parameters": sum(p.numel() for p in model.parameters()), "tokens": inputs["input_ids"].shape[1]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
