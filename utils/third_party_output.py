"""Silences log lines and warnings of other packages that users cannot act on."""

import logging
import warnings

# Logger -> the beginnings of its messages to drop.
_LINES = {
    "transformers.utils.import_utils": ("`CLIPImageProcessor` requires torchvision",),
    "transformers.trainer": (
        "`non_blocking` is enabled but `dataloader_pin_memory` is not",
        # lm_head.weight is tied to the embeddings. dsvl compares the keys itself when it writes a checkpoint.
        "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",
    ),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    "DeepSpeed": ("Setting accelerator to CPU", "Setting ds_accelerator to"),
}
# Modules whose deprecation warnings are about calls between these packages; a regular expression.
_OTHERS = r"(torch|transformers|accelerate|deepspeed|peft|datasets|bitsandbytes)(\.|$)"


class _DropMessages(logging.Filter):
    def __init__(self, lines: tuple[str, ...]) -> None:
        super().__init__()
        self.lines = lines

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not record.getMessage().strip().startswith(self.lines)


def silence_third_party_output() -> None:
    """Drop these messages for the rest of the process; call it before the packages are imported.

    Errors, other warnings and the messages of `dsvl` are kept.
    """
    for name, lines in _LINES.items():
        logging.getLogger(name).addFilter(_DropMessages(lines))
    warnings.filterwarnings("ignore", r"'pin_memory' argument is set as true but no accelerator is found", UserWarning)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=_OTHERS)
