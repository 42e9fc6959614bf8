"""The names of quantizations, for command-line parsers that must not import torch; see `quantization.py`."""

QUANTIZATIONS = ("4bit", "8bit", "int8", "fp8")
