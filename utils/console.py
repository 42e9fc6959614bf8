"""What other packages print in ordinary runs, and nobody can act on."""

import logging
import warnings

# A logger, and how the lines begin that it need not print.
_LINES = {
    "transformers.utils.import_utils": ("`CLIPImageProcessor` requires torchvision",),
    "transformers.trainer": (
        "`non_blocking` is enabled but `dataloader_pin_memory` is not",
        # Tied to the embeddings, which are there: keys are compared with the model's own when a checkpoint is written.
        "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",
    ),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    "DeepSpeed": ("Setting accelerator to CPU", "Setting ds_accelerator to"),
}
# How packages call each other; a regular expression of the modules that are called.
_OTHERS = r"(torch|transformers|accelerate|deepspeed|peft|datasets|bitsandbytes)(\.|$)"


class _Hushed(logging.Filter):
    def __init__(self, lines: tuple[str, ...]) -> None:
        super().__init__()
        self.lines = lines

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not record.getMessage().strip().startswith(self.lines)


def hush_others() -> None:
    """Leave these lines out, for the rest of the process; before the packages are imported.

    Errors, all other warnings, and whatever is ours stay.
    """
    for name, lines in _LINES.items():
        logging.getLogger(name).addFilter(_Hushed(lines))
    warnings.filterwarnings("ignore", r"'pin_memory' argument is set as true but no accelerator is found", UserWarning)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=_OTHERS)
