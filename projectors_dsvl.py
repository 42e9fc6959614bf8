"""Projectors: the tower's features (images, tokens, tower width) to (images, image_seq_length, decoder width)."""

import torch
from torch import nn
from transformers import CLIPVisionConfig

from .configuration_dsvl import PERCEIVER_GRID_SIZE, DSVLConfig
from .resampler_dsvl import DSVLResampler
from .transformers_dsvl import CLIPEncoderLayer


class DSVLLinearProjector(nn.Module):
    """Linear and LayerNorm: the original's `baseline`."""

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear = nn.Linear(config.vision_feature_size, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(self.linear(features))


class DSVLVitProjector(DSVLLinearProjector):
    """One CLIP encoder layer, then Linear and LayerNorm: the original's `vit`."""

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__(config)
        self.encoder_layer = CLIPEncoderLayer(_clip_layer_config(config.vision_config))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(self.encoder_layer(features, attention_mask=None))


class DSVLPerceiverProjector(DSVLResampler):
    """Learned queries that read the grid of patches by cross-attention, then LayerNorm and Linear: the original's
    `perceiver`, which is Qwen-VL's resampler. Tokens before the grid (CLS, registers) are dropped."""

    def __init__(self, config: DSVLConfig) -> None:
        width = config.text_config.hidden_size
        super().__init__(config.vision_feature_size, width, PERCEIVER_GRID_SIZE**2, eps=1e-12, kv_bias=True)
        self.num_patches = config.num_patches
        self.layer_norm = nn.LayerNorm(width, eps=1e-12)
        self.linear = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(self.layer_norm(super().forward(features[:, -self.num_patches :])))


def _clip_layer_config(vision: CLIPVisionConfig) -> CLIPVisionConfig:
    """The tower's own configuration if it is CLIP's; otherwise one of a CLIP layer of its width and heads."""
    if vision.model_type == CLIPVisionConfig.model_type:
        return vision
    return CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=4 * vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        attn_implementation="sdpa",
    )


PROJECTORS = {"linear": DSVLLinearProjector, "vit": DSVLVitProjector, "perceiver": DSVLPerceiverProjector}

__all__ = ["PROJECTORS", "DSVLLinearProjector", "DSVLPerceiverProjector", "DSVLVitProjector"]
