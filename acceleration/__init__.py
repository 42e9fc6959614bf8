"""Acceleration of DSVL models, in the package only.

The files that travel with a checkpoint look for this package at first use, through the interface that acceleration_dsvl.py
describes. Nothing here changes a result, except for rounding.

Each folder imports from those before it alone: attention, memory, reuse, parallel, decoding. The files beside them are what
all folders use (`decoder_run`, `int8`, `operators`), and what joins several (`masks`, `decoder_layers`, `image_reuse`).
"""

from .decoder_layers import CompiledDecoderLayers
from .decoding.decoding_loop import sample
from .decoding.generation_entry import generate
from .decoding.speculative_decoding import decode_speculatively
from .image_reuse import ImageReuse
from .masks import build_mask
from .memory.memory_reduction import reduce_memory
from .parallel.image_parallelism import check_image_parallel, image_parallel
from .parallel.split_images import SplitImageKVCache
from .reuse.image_cache import ImageKVCache
from .reuse.shared_images import SharedImagesCache

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
