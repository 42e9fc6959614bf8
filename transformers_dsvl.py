"""What DSVL uses of transformers beyond its documented API, and what differs between its releases.

Code in a checkpoint cannot be changed once it is on the Hub, and transformers renames what it does not document. So the
files that travel with a checkpoint import such names from here alone, and `MEMBERS` lists the methods and attributes that
they override, call or read. `tests/test_transformers_names.py` tells which of them an installed release lacks.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import transformers
from torch import distributed
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers import initialization as init
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    create_masks_for_generate,
    sdpa_mask,
)
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.utils import TransformersKwargs, requires_backends
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

# The releases whose behaviour the tests have seen, as (major, minor).
OLDEST_TESTED, NEWEST_TESTED = (5, 20), (5, 24)

# What the travelling code overrides, calls or reads of these classes, or of their instances, though it is not documented.
MEMBERS: dict[type, tuple[str, ...]] = {
    Cache: ("layers",),
    GenerationMixin: (
        "_assisted_decoding",
        "_prefill",
        "_prepare_position_ids_for_generation",
        "_sample",
        "prepare_inputs_for_generation",
    ),
    PreTrainedConfig: ("_attn_implementation",),
    PreTrainedModel: (
        "_can_compile_fullgraph",
        "_can_record_outputs",
        "_default_compile_config",
        "_from_config",
        "_init_weights",
        "_input_embed_layer",
        "_no_split_modules",
        "_skip_keys_device_placement",
        "_supports_attention_backend",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_supports_sdpa",
        "_tied_weights_keys",
        "_tp_plan",
    ),
    ProcessorMixin: (
        "_check_special_mm_tokens",
        "_process_images",
        "prepare_inputs_layout",
        "valid_processor_kwargs",
        "validate_inputs",
    ),
}


def installed_release() -> tuple[int, int]:
    """The installed transformers' (major, minor)."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def warn_of_a_newer_release() -> None:
    """Say that the installed release is newer than any that was tested; on import, so once."""
    if installed_release() > NEWEST_TESTED:
        warnings.warn(
            f"transformers {transformers.__version__} is newer than {'.'.join(map(str, NEWEST_TESTED))}, the newest release "
            "that this DSVL code was tested with. If results look wrong, update the package dsvl, or install an older one.",
            stacklevel=3,
        )


warn_of_a_newer_release()

# transformers 5.24 calls the KV cache `cache`; until then it was `past_key_values`.
CACHE = "cache" if "cache" in inspect.signature(create_masks_for_generate).parameters else "past_key_values"

# Below 5.21 its sdpa attention ignores softcapping; below 5.23 its chunked prefill ignores encoded images.
SDPA_SOFTCAPS = "softcap" in inspect.getsource(sdpa_attention_forward)
CHUNKED_PREFILL_TAKES_IMAGES = installed_release() >= (5, 23)


def gathers_weights(module: torch.nn.Module) -> bool:
    """Whether processes hold parts of a module's weights, and gather them together in every call: ZeRO-3 and FSDP2."""
    if is_deepspeed_zero3_enabled():
        return True
    if torch.compiler.is_compiling() or not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(one, FSDPModule) for one in module.modules())


# Keyword arguments that every decoder of transformers takes.
COMMON_KEYWORDS = frozenset(TransformersKwargs.__annotations__) | frozenset(FlashAttentionKwargs.__annotations__)


def takes_cache(method: Callable) -> Callable:
    """Let a method with a parameter `cache` take `past_key_values` too; its signature shows the installed release's name.

    Raises (on a call):
        ValueError: if both names are given.
    """

    @wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            rename_cache(kwargs, "cache")
        return method(*args, **kwargs)

    signature = inspect.signature(method)
    parameters = [p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapper


def rename_cache(kwargs: dict[str, Any], name: str = CACHE) -> None:
    """Give the KV cache in keyword arguments one name, in place.

    Raises:
        ValueError: if it is given under both of its names.
    """
    given = [kwargs.pop(key) for key in ("cache", "past_key_values") if key in kwargs]
    values = [value for value in given if value is not None]
    if len(values) > 1:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them.")
    if given:
        kwargs[name] = values[0] if values else None


class EitherCacheName:
    """For outputs: the KV cache by the name that the installed release does not have as a field."""

    if CACHE == "past_key_values":

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values  # type: ignore[attr-defined]


def keywords_of(decoder: PreTrainedModel) -> frozenset[str]:
    """The keyword arguments that a decoder's `forward` knows: its own by name, and what all decoders take."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(type(decoder).forward).parameters.values()
    return COMMON_KEYWORDS | {p.name for p in parameters if p.kind in kinds} - {"self"}


__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "BaseModelOutput",
    "BaseModelOutputWithPast",
    "BaseModelOutputWithPooling",
    "CLIPEncoderLayer",
    "CausalLMOutputWithPast",
    "GradientCheckpointingLayer",
    "MultiModalData",
    "ProcessingKwargs",
    "Unpack",
    "can_return_tuple",
    "capture_outputs",
    "causal_mask_function",
    "create_masks_for_generate",
    "init",
    "gathers_weights",
    "is_deepspeed_zero3_enabled",
    "no_init_weights",
    "requires_backends",
    "sdpa_mask",
]
