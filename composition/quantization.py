"""Fewer bits for the decoder's weights, by bitsandbytes or torchao through transformers."""

from typing import Any

import torch

from ..utils.quantization_choices import QUANTIZATIONS

# Small, or too delicate: they stay as they are.
UNQUANTIZED = ("model.multi_modal_projector", "model.vision_tower", "lm_head")


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """What `from_pretrained(quantization_config=...)` takes.

    Args:
        kind: "4bit" (NF4, quantized twice) or "8bit" (LLM.int8()) by bitsandbytes; "int8" (weights alone, a scale for each
            output) by torchao, which torch.compile sees through.
        dtype: to compute in.

    Raises:
        ValueError: for another kind.
        ImportError: naming the package to install.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(UNQUANTIZED),
        )
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(UNQUANTIZED))
    if kind == "int8":
        try:
            from torchao.quantization import Int8WeightOnlyConfig
        except ImportError as error:
            raise ImportError("quantization='int8' needs torchao: pip install torchao") from error
        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(UNQUANTIZED))
    raise ValueError(f"quantization={kind!r} is not known; choose from {', '.join(map(repr, QUANTIZATIONS))}.")
