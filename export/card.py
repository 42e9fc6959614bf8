"""The model card of an exported model: that of its checkpoint, with another way to load it."""

import re
from typing import Any

from huggingface_hub import ModelCard

# Sections of a checkpoint's card that do not apply to an exported model.
DROPPED = ("Attention",)
CODE_LINE = "The code in `*_dsvl.py` is Apache-2.0."
USE = """\
## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "."  # this directory
model = AutoModelForImageTextToText.from_pretrained(name)
processor = AutoProcessor.from_pretrained(name)
messages = [{"role": "user", "content": [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is this?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

"""


def llava_card(card: str) -> str:
    """The card of a checkpoint as that of its export to LLaVA.

    Base models, licences, training and everything else that the card says are kept; the way to load the model is replaced,
    what applies to DSVL's classes alone is dropped.

    Args:
        card: the README.md of the checkpoint.
    """
    made = ModelCard(card, ignore_metadata_errors=True)
    metadata: Any = made.data
    metadata.tags = ["llava", *(tag for tag in metadata.tags or [] if tag not in ("llava", "dsvl", "custom_code"))]
    intro, *sections = re.split(r"^(?=## )", made.text, flags=re.MULTILINE)
    intro = re.sub(r"^# A DSVL model$", "# A LLaVA model", intro, flags=re.MULTILINE)
    exported = (
        "This is `LlavaForConditionalGeneration` of transformers, exported from a checkpoint of DSVL by `dsvl export`: it "
        "computes the same and needs no remote code.\n\n"
    )
    kept = [section for section in sections if _title(section) not in ("Use", *DROPPED)]
    made.text = "".join([intro.rstrip(), "\n\n", exported, USE, *kept]).replace(CODE_LINE, "").rstrip() + "\n"
    return str(made)


def linked_images(card: str) -> list[str]:
    """The relative paths of the images that a card shows."""
    return [path for path in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", card) if not re.match(r"[a-z]+:|/|\.\.", path)]


def _title(section: str) -> str:
    return section.partition("\n")[0].removeprefix("## ").strip()
