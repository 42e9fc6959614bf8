"""Loading a checkpoint's model and processor for inference."""

from typing import Any

import torch

from ..modeling_dsvl import DSVLForConditionalGeneration
from ..processing_dsvl import DSVLProcessor
from .local_paths import check_exists
from .quantization import quantization_config

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_checkpoint(
    name: str,
    device: str | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[DSVLForConditionalGeneration, DSVLProcessor]:
    """Load a checkpoint's model, in evaluation mode, and its processor.

    Args:
        name: its directory, or its name on the Hub.
        device: *optional*; "cuda", "cuda:1", "mps" or "cpu", or "auto" to distribute the model over all devices (needs
            accelerate). Defaults to the first GPU, or the CPU if there is none.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        quantization: *optional*, of the decoder's linear layers; see `quantization_config`.
        attn_implementation: *optional*, of the decoder: "sdpa", "eager" or "flex_attention".

    Raises:
        ValueError: for an unknown value, or a model that is not a DSVL checkpoint.
        FileNotFoundError: for a directory that does not exist.
        ImportError: naming the package to install.
    """
    check_exists(name)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = {"text_config": attn_implementation}
    if quantization is not None:
        compute_dtype = torch.float32 if device == "cpu" else torch.bfloat16
        options["quantization_config"] = quantization_config(
            quantization, compute_dtype if dtype == "auto" else options["dtype"]
        )
    if quantization is not None or device == "auto":
        options["device_map"] = device if device == "auto" else {"": device}
    model = DSVLForConditionalGeneration.from_pretrained(name, **options)
    if "device_map" not in options:
        model = model.to(device)
    return model.eval(), DSVLProcessor.from_pretrained(name)
