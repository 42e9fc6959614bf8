"""The code files that travel with a checkpoint."""

import tempfile
from pathlib import Path

from ..modeling_dsvl import DSVLForConditionalGeneration
from ..processing_dsvl import DSVLProcessor
from ..utils.transformers_names import custom_object_save

PATTERN = "*_dsvl.py"


def travelling_code() -> dict[str, bytes]:
    """The files that `save_pretrained` of model and processor writes for `trust_remote_code`, by name."""
    with tempfile.TemporaryDirectory() as folder:
        for travelling in (DSVLForConditionalGeneration, DSVLProcessor):
            custom_object_save(travelling, folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
