"""The pipeline on photographs, without training: compose, load, and a two-turn conversation about four photographs.

The weights are random, so the answers are meaningless. The example shows that images of any size are processed, with the
input size of CLIP ViT-L/14 (224 pixels, patches of 14, 257 tokens per image), and that the answers depend on the images.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..cli import main as dsvl
from . import tiny_models


def photographs() -> dict[str, Image.Image]:
    """Sample photographs of scikit-image and scikit-learn, by name."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = {"astronaut": data.astronaut(), "coffee": data.coffee(), "cat": data.chelsea()}
    samples = load_sample_images()
    arrays |= {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}
    return {name: Image.fromarray(array) for name, array in arrays.items()}


def show_photographs(directory: Path) -> None:
    """Compose a model with random weights in `directory`, and ask it about photographs.

    Raises:
        RuntimeError: if the command fails, or the answers do not depend on the images and their order.
    """
    tiny_models.save_tower(directory / "tower", image_size=224, patch_size=14)
    tiny_models.save_language_model(directory / "language_model")
    arguments = ["compose", "--vision", directory / "tower", "--language", directory / "language_model"]
    if dsvl([*map(str, arguments), "--out", str(directory / "composed"), "--number-after"]):
        raise RuntimeError("dsvl compose failed; its message is above.")
    model = AutoModelForImageTextToText.from_pretrained(directory / "composed").eval()
    processor = AutoProcessor.from_pretrained(directory / "composed")

    images = photographs()
    print("  The weights are random, so the answers are meaningless; they show that the output depends on the images.")
    names = list(images)
    messages: list[dict[str, Any]] = []
    for shown, question in ((names[:3], "What is in image 2?"), (names[3:4], "Which image shows a cat?")):
        messages.append(_question([images[name] for name in shown], question))
        inputs = _inputs(processor, messages)
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        sizes = ", ".join(f"{name} {images[name].width} x {images[name].height}" for name in shown)
        print(f"  {sizes}: {inputs['input_ids'].shape[1]} tokens so far\n  question: {question}\n  answer:   {answer!r}")

    order = [images[name] for name in names]
    scores = [_next_token_scores(model, processor, shown) for shown in (order, order[::-1], order)]
    if torch.allclose(scores[0], scores[1], atol=1e-4) or not torch.allclose(scores[0], scores[2], atol=1e-4):
        raise RuntimeError("The scores of the next token must depend on the order of the photographs, and on nothing else.")
    change = (scores[0] - scores[1]).abs().max().item()
    print(f"  {len(order)} photographs in reverse order change the scores of the next token by up to {change:.3f}.")


def _question(images: list[Image.Image], text: str) -> dict[str, Any]:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _inputs(processor: Any, messages: list[dict[str, Any]]) -> Any:
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )


@torch.inference_mode()
def _next_token_scores(model: Any, processor: Any, images: list[Image.Image]) -> torch.Tensor:
    return model(**_inputs(processor, [_question(images, "What is in image 1?")]), logits_to_keep=1).logits[0, -1]
