"""Converters of published data sets: each is a pure function from a raw record to a conversation.

To add one, write a function of a raw record in a module of this folder, decorate it with `@converter(...)`, and import the
module here.
"""

from . import coco, mimicit, ocr_vqa, public_formats, sparkles  # noqa: F401  (registers the converters)
from .registry import CONVERTERS, Converter, RawRecord, SkipRecord, converter

__all__ = ["CONVERTERS", "Converter", "RawRecord", "SkipRecord", "converter"]
