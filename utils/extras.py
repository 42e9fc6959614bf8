"""Which extra of the package brings a package that is not installed."""

import re

# As pyproject.toml has them; the first is named unless the command has an extra of its own name.
EXTRAS = {
    "bitsandbytes": ("gpu",),
    "datasets": ("data", "train", "evaluate"),
    "deepspeed": ("train",),
    "fastapi": ("serve",),
    "gradio": ("page",),
    "ijson": ("data",),
    "liger_kernel": ("gpu",),
    "matplotlib": ("train", "bench"),
    "openai": ("serve",),
    "peft": ("train",),
    "prompt_toolkit": ("chat",),
    "rapidfuzz": ("evaluate",),
    "skimage": ("demo",),
    "sklearn": ("demo",),
    "starlette": ("serve", "page"),
    "tensorboard": ("train",),
    "torchao": ("gpu",),
    "uvicorn": ("serve",),
}


def with_remedy(error: ImportError, command: str | None) -> str:
    """An error's message; of a package that is missing, what to install."""
    said = str(error)
    extras = EXTRAS.get((error.name or "").partition(".")[0], ())
    if not extras:
        return said
    extra = command if command in extras else extras[0]
    if "pip install" in said:
        return re.sub(r"'dsvl\[\w+\]'", f"'dsvl[{extra}]'", said)
    return f"{said}; pip install 'dsvl[{extra}]'."
