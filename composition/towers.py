"""Loading vision towers and image processors, and determining image size and number of prefix tokens."""

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel

from ..configuration_dsvl import NATIVE_TOWERS, DSVLQwenVisionConfig
from ..transformers_dsvl import no_init_weights

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor

logger = logging.getLogger(__name__)


def load_tower(vision: str | Path | PreTrainedModel) -> PreTrainedModel:
    """Load a vision tower.

    Args:
        vision: name or directory of a tower, or of a model that has one, or a loaded model.

    Raises:
        ValueError: if there is no tower, or some of its weights are missing.
    """
    if isinstance(vision, PreTrainedModel):
        tower = getattr(vision, "vision_model", vision)
        tower_config(tower.config, type(vision).__name__)
        return tower
    config = tower_config(AutoConfig.from_pretrained(vision), str(vision))
    tower_class = type(config) in AutoModel._model_mapping and AutoModel._model_mapping[type(config)]
    if not tower_class or isinstance(tower_class, tuple):
        raise ValueError(f"vision={str(vision)!r} has a tower of type {config.model_type!r}, which AutoModel does not know.")
    tower, info = tower_class.from_pretrained(vision, config=config, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"vision={str(vision)!r} lacks {len(missing)} weights of its {config.model_type!r} tower, such as {missing[0]}; "
            "pass a checkpoint of the tower, or of a model that has one."
        )
    return tower


def tower_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The configuration of the vision tower in a model's configuration.

    Raises:
        ValueError: if there is no supported tower.
    """
    config = getattr(config, "vision_config", config)
    if config.model_type in NATIVE_TOWERS:
        return config
    if not isinstance(getattr(config, "image_size", None), int) or not isinstance(getattr(config, "patch_size", None), int):
        raise ValueError(
            f"vision={name!r} is a model of type {config.model_type!r}, which has no tower that turns a square image "
            "into a sequence of patches; pass CLIP, SigLIP, DINOv2, DINOv3, or a tower of dsvl migrate qwen-tower."
        )
    return config


def load_image_processor(vision: str | Path | PreTrainedModel) -> Any:
    """Load the image processor of a name, directory or loaded model; if it has none CLIP's, or
    SigLIP 2's for its towers, with the tower's sizes."""
    source = vision.name_or_path if isinstance(vision, PreTrainedModel) else vision
    try:
        if source:
            return AutoImageProcessor.from_pretrained(source)
    except OSError:
        logger.info(
            "%s has no image processor; that of CLIP (of SigLIP 2 for its towers) is used with the tower's sizes.", source
        )
    config = vision.config if isinstance(vision, PreTrainedModel) else AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", config)
    if config.model_type in NATIVE_TOWERS:
        from transformers import Siglip2ImageProcessor

        return Siglip2ImageProcessor(patch_size=config.patch_size)
    return clip_image_processor(config.image_size)


def clip_image_processor(size: int) -> "CLIPImageProcessor":
    """CLIP's image processor for square images of `size` pixels."""
    from transformers import CLIPImageProcessor  # here, as it warns without torchvision

    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def processed_size(image_processor: Any) -> int:
    """The side, in pixels, of the square images that an image processor returns, determined with two test images.

    Raises:
        ValueError: if it does not return square images of one size.
    """
    shapes = set()
    for width, height in ((80, 40), (30, 90)):
        pixels = image_processor(images=Image.new("RGB", (width, height)), return_tensors="pt")["pixel_values"]
        shapes.add(tuple(pixels.shape))
    shape = shapes.pop()
    if shapes or len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(
            f"{type(image_processor).__name__} returns pixel_values of shapes {sorted([shape, *shapes])} for two images; "
            "expected one square for both. Pass image_processor= with a fixed size (do_resize, or do_center_crop)."
        )
    return shape[2]


def check_native_processor(image_processor: Any, patch_size: int) -> None:
    """Whether an image processor cuts images of any size into patches of this size (`Siglip2ImageProcessor`).

    Raises:
        ValueError: if not.
    """
    found = getattr(image_processor, "patch_size", None)
    if found != patch_size or not hasattr(image_processor, "max_num_patches"):
        raise ValueError(
            f"{type(image_processor).__name__} makes no patches of {patch_size} pixels (patch_size={found}), as the tower "
            "takes them; pass image_processor=, the one saved with the tower (Siglip2ImageProcessor)."
        )


def count_prefix_tokens(tower: PreTrainedModel, image_size: int) -> int:
    """The number of tokens (CLS, registers) that a tower returns before its patches, determined on the meta device.

    Raises:
        ValueError: if it does not support images of this size, or does not return a sequence of features.
    """
    config = copy.deepcopy(tower.config)
    config._attn_implementation = "eager"
    with torch.device("meta"), no_init_weights(), torch.no_grad():
        meta_tower = type(tower)(config).eval()
        try:
            features = meta_tower(torch.zeros(1, 3, image_size, image_size)).last_hidden_state
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"The image processor returns images of {image_size} pixels, which {type(tower).__name__} does not support "
                f"({error}); pass image_processor= with its size, {config.image_size}."
            ) from error
    patches, width = (image_size // config.patch_size) ** 2, config.hidden_size
    if config.model_type == DSVLQwenVisionConfig.model_type:
        patches, width = config.num_queries, config.output_dim
    if features.ndim != 3 or features.shape[1] < patches or features.shape[2] != width:
        raise ValueError(
            f"{type(tower).__name__} returns features of shape {tuple(features.shape)} for an image of {patches} patches; "
            f"expected (1, at least {patches}, {width}). Use a tower that returns a feature for every patch."
        )
    return features.shape[1] - patches
