"""What arguments of several commands may be; told without importing what they choose between."""

QUANTIZATIONS = ("4bit", "8bit", "int8")  # of the decoder's layers, see composition/quantization.py
