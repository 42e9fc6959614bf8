"""DSVL: vision-language models with multi-modal causal attention, composed, trained and shared the Hugging Face way."""

import warnings
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_dsvl import DSVLConfig, DSVLQwenVisionConfig
from .modeling_dsvl import DSVLForConditionalGeneration, DSVLModel
from .processing_dsvl import DSVLProcessor
from .utils.lazy import lazy_attributes
from .utils.transformers_names import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from .vision_dsvl import DSVLQwenVisionModel

if TYPE_CHECKING:
    from . import migration
    from .acceleration import ImageKVCache, SharedImagesCache
    from .composition import compose, prepare_chat_template, save_checkpoint
    from .export import export_llava
    from .image_library import ImageLibrary

# Once this package is imported, the Auto classes use it rather than the copy in a checkpoint, as transformers prefers
# registered classes, also with trust_remote_code=True.
AutoConfig.register(DSVLConfig.model_type, DSVLConfig, exist_ok=True)
AutoProcessor.register(DSVLConfig, DSVLProcessor, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(DSVLConfig, DSVLForConditionalGeneration, exist_ok=True)
# TRL uses these tables to detect vision-language models, and `Trainer` to decide whether label smoothing shifts labels.
for _names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
    _names[DSVLConfig.model_type] = DSVLForConditionalGeneration.__name__
AutoConfig.register(DSVLQwenVisionConfig.model_type, DSVLQwenVisionConfig, exist_ok=True)
AutoModel.register(DSVLQwenVisionConfig, DSVLQwenVisionModel, exist_ok=True)
# Saved checkpoints contain a copy of the code.
DSVLConfig.register_for_auto_class()
DSVLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
DSVLProcessor.register_for_auto_class()
DSVLQwenVisionConfig.register_for_auto_class()
DSVLQwenVisionModel.register_for_auto_class("AutoModel")

__all__ = [
    "DSVLConfig",
    "DSVLForConditionalGeneration",
    "DSVLModel",
    "DSVLProcessor",
    "DSVLQwenVisionConfig",
    "DSVLQwenVisionModel",
    "ImageKVCache",
    "ImageLibrary",
    "SharedImagesCache",
    "compose",
    "export_llava",
    "migration",
    "prepare_chat_template",
    "save_checkpoint",
]
# Imported on first use, as importing them takes time.
_lazy = lazy_attributes(
    __name__,
    {
        "ImageKVCache": "acceleration.reuse.image_cache",
        "ImageLibrary": "image_library",
        "SharedImagesCache": "acceleration.reuse.shared_images",
        "compose": "composition",
        "export_llava": "export",
        "migration": "",
        "prepare_chat_template": "composition",
        "save_checkpoint": "composition",
    },
)


def __getattr__(name: str) -> Any:
    if name == "PictureCache":
        warnings.warn("PictureCache is deprecated; use ImageKVCache.", DeprecationWarning, stacklevel=2)
        name = "ImageKVCache"
    return _lazy(name)
