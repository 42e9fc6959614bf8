"""A checkpoint, ready to talk."""

from typing import Any

import torch

from ..composition.quantization import quantization_config
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..processing_dsvl import DSVLProcessor
from ..utils.local_paths import check_exists


def load(
    name: str,
    device: str | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[DSVLForConditionalGeneration, DSVLProcessor]:
    """Load a checkpoint's model, in evaluation mode, and its processor.

    Args:
        name: its directory, or its name on the Hub.
        device: "cuda", "cuda:1", "mps", "cpu"; "auto" spreads it over what there is (accelerate). By default the first GPU,
            if there is one.
        dtype: "auto" (as saved), or "float32", "bfloat16", "float16".
        quantization: of the decoder's layers, one of `QUANTIZATIONS` (composition/quantization.py).
        attn_implementation: the decoder's: "sdpa", "eager", "flex_attention".

    Raises:
        ValueError: for a value that is not known, or a model that is no DSVL checkpoint.
        FileNotFoundError: for a directory that does not exist.
        ImportError: naming the package to install.
    """
    check_exists(name)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is not known; choose auto, float32, bfloat16 or float16.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = {"text_config": attn_implementation}
    if quantization is not None:
        compute = torch.float32 if device == "cpu" else torch.bfloat16
        options["quantization_config"] = quantization_config(quantization, compute if dtype == "auto" else options["dtype"])
    if quantization is not None or device == "auto":
        options["device_map"] = device if device == "auto" else {"": device}
    model = DSVLForConditionalGeneration.from_pretrained(name, **options)
    if "device_map" not in options:
        model = model.to(device)
    return model.eval(), DSVLProcessor.from_pretrained(name)
