"""Quantization of the decoder's weights by bitsandbytes or torchao, through transformers."""

from typing import Any

import torch

from .quantization_choices import QUANTIZATIONS

# Modules that are small or lose accuracy when they are quantized.
UNQUANTIZED = ("model.multi_modal_projector", "model.vision_tower", "lm_head")


def stored_tensors(weight: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors of a weight: itself, or the numbers and scales of a quantized one."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names = weight.__tensor_flatten__()[0]
    return [part for name in names for part in stored_tensors(getattr(weight, name))]


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """Make the `quantization_config` argument of `from_pretrained`.

    Args:
        kind: "4bit" (NF4 with double quantization) or "8bit" (LLM.int8()) by bitsandbytes; "int8" or "fp8" (E4M3) of the
            weights alone, with a scale for each output channel, by torchao, which work with torch.compile.
        dtype: dtype of the computation, for "4bit".

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
    if kind in ("int8", "fp8"):
        try:
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
        except ImportError as error:
            raise ImportError(f"quantization={kind!r} needs torchao: pip install torchao") from error
        made = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
        # Without settings of the compiler for the whole process: `generate` passes its own.
        return TorchAoConfig(made(set_inductor_config=False), modules_to_not_convert=list(UNQUANTIZED))
    raise ValueError(f"quantization={kind!r} is not known; choose from {', '.join(map(repr, QUANTIZATIONS))}.")
