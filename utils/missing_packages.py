"""Messages about packages that are not installed: which extra of `dsvl` installs them."""

import re

# The extras in pyproject.toml. The first is named, unless there is one with the name of the command.
EXTRAS = {
    "av": ("video",),
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


def import_error_message(error: ImportError, command: str | None) -> str:
    """The message of an `ImportError`, with the command that installs a missing package.

    Args:
        error (`ImportError`): The error.
        command (`str`, *optional*): The subcommand of `dsvl` that failed.
    """
    message = str(error)
    extras = EXTRAS.get((error.name or "").partition(".")[0], ())
    if not extras:
        return message
    extra = command if command in extras else extras[0]
    if "pip install" in message:
        return re.sub(r"'dsvl\[\w+\]'", f"'dsvl[{extra}]'", message)
    return f"{message}; pip install 'dsvl[{extra}]'."
