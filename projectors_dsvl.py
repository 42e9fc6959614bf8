"""Projectors: the tower's features (images, tokens, tower width) to (images, image_seq_length, decoder width)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import CLIPVisionConfig

from .configuration_dsvl import PERCEIVER_GRID_SIZE, DSVLConfig
from .transformers_dsvl import CLIPEncoderLayer, init

HEAD_DIM = 128  # of the cross-attention, for any width (Qwen-VL, and DeepSpeed-VisualChat's perceiver)


class DSVLResampler(nn.Module):
    """Learned queries on a square grid read a square grid of patches (Qwen-VL, arXiv 2308.12966).

    Args:
        kv_width: of the patches' features.
        width: of the queries and of what comes out.
        num_queries: a square number.
        eps: of the layer norms.
        kv_bias: whether the projection of the features has a bias.
    """

    def __init__(self, kv_width: int, width: int, num_queries: int, eps: float, kv_bias: bool) -> None:
        super().__init__()
        self.num_heads = max(width // HEAD_DIM, 1)
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.position_embedding = nn.Parameter(torch.empty(num_queries, width))
        self.kv_proj = nn.Linear(kv_width, width, bias=kv_bias)
        self.query_norm = nn.LayerNorm(width, eps=eps)
        self.kv_norm = nn.LayerNorm(width, eps=eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def init_weights(self) -> None:
        """The learned queries and their positions; the layers are initialized like any other."""
        queries, width = self.query.shape
        init.trunc_normal_(self.query, std=0.02)
        init.copy_(self.position_embedding, sincos_position_table(int(queries**0.5), width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(images, patches, kv_width) to (images, num_queries, width)."""
        values = self.kv_norm(self.kv_proj(features))
        keys = values + resize_grid(self.position_embedding, features.shape[1])
        queries = (self.query_norm(self.query) + self.position_embedding).expand(len(values), -1, -1)
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def resize_grid(table: torch.Tensor, positions: int) -> torch.Tensor:
    """A square grid's position table (cells, width) as one of `positions` cells, interpolated bicubically."""
    if len(table) == positions:
        return table
    side, target = int(len(table) ** 0.5), int(positions**0.5)
    grid = table.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    grid = nn.functional.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
    return grid[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)


def sincos_position_table(grid_size: int, width: int) -> torch.Tensor:
    """2-D sine-cosine positions (grid_size ** 2, width), row by row; first half of the width for the column, second for
    the row (MAE, arXiv 2111.06377, as in Qwen-VL)."""
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(*[torch.arange(grid_size, dtype=torch.float64)] * 2, indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=-1).float()


class DSVLLinearProjector(nn.Module):
    """Linear and LayerNorm: the original's `baseline`."""

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear = nn.Linear(config.vision_feature_size, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(self.linear(features))


class DSVLMlpProjector(nn.Module):
    """Linear, GELU, Linear: LLaVA-1.5's (arXiv 2310.03744), with the names of its parameters in transformers."""

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_feature_size, width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


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


PROJECTORS: dict[str, Callable[[DSVLConfig], nn.Module]] = {
    "linear": DSVLLinearProjector,
    "mlp": DSVLMlpProjector,
    "vit": DSVLVitProjector,
    "perceiver": DSVLPerceiverProjector,
}

__all__ = [
    "PROJECTORS",
    "DSVLLinearProjector",
    "DSVLMlpProjector",
    "DSVLPerceiverProjector",
    "DSVLResampler",
    "DSVLVitProjector",
]
