"""Acceleration of DSVL models, in the package only.

The files that travel with a checkpoint look for this package at first use, through the interface that acceleration_dsvl.py
describes. Nothing here changes a result, except for rounding.
"""

from .decoder_layers import CompiledDecoderLayers
from .decoding_loop import sample
from .generation_entry import generate
from .image_cache import ImageKVCache
from .image_parallelism import check_image_parallel, image_parallel
from .image_reuse import ImageReuse
from .masks import build_mask
from .memory_reduction import reduce_memory
from .shared_images import SharedImagesCache
from .speculative_decoding import decode_speculatively
from .split_images import SplitImageKVCache

INTERFACE_VERSION = 1  # of acceleration_dsvl.py

__all__ = [
    "INTERFACE_VERSION",
    "CompiledDecoderLayers",
    "ImageKVCache",
    "ImageReuse",
    "SharedImagesCache",
    "SplitImageKVCache",
    "build_mask",
    "check_image_parallel",
    "decode_speculatively",
    "generate",
    "image_parallel",
    "reduce_memory",
    "sample",
]
