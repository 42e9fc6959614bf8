"""Converters: the raw records of published data sets as conversations, one small pure function for each.

To add one, write a function of a raw record in a file of this folder, decorate it with `@converter(...)`, and import the
file here.
"""

from . import coco, mimicit, ocr_vqa, public, sparkles  # noqa: F401  (each registers its own)
from .registry import CONVERTERS, Converter, LeftOut, Record, converter

__all__ = ["CONVERTERS", "Converter", "LeftOut", "Record", "converter"]
