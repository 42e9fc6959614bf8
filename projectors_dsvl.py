"""Projectors: the tower's features (pictures, tokens, tower width) to (pictures, image_seq_length, decoder width)."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from .configuration_dsvl import PERCEIVER_GRID_SIZE, PERCEIVER_HEAD_DIM, DSVLConfig


class DSVLLinearProjector(nn.Module):
    """Linear and LayerNorm: the original's `baseline`."""

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear = nn.Linear(config.vision_config.hidden_size, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(self.linear(features))


class DSVLVitProjector(DSVLLinearProjector):
    """One CLIP encoder layer, then Linear and LayerNorm: the original's `vit`."""

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__(config)
        self.encoder_layer = CLIPEncoderLayer(config.vision_config)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(self.encoder_layer(features, attention_mask=None))


class DSVLPerceiverProjector(nn.Module):
    """Learned queries that read the grid of patches by cross-attention, then LayerNorm and Linear: the original's
    `perceiver`, which is Qwen-VL's resampler. A CLS token before the grid is dropped."""

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.num_patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        self.num_heads = max(width // PERCEIVER_HEAD_DIM, 1)
        self.query = nn.Parameter(torch.empty(PERCEIVER_GRID_SIZE**2, width))
        self.position_embedding = nn.Parameter(torch.empty(PERCEIVER_GRID_SIZE**2, width))
        self.kv_proj = nn.Linear(config.vision_config.hidden_size, width)
        self.query_norm = nn.LayerNorm(width, eps=1e-12)
        self.kv_norm = nn.LayerNorm(width, eps=1e-12)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-12)
        self.linear = nn.Linear(width, width)

    def init_weights(self) -> None:
        """The learned queries and their positions; the layers are initialized like any other."""
        init.trunc_normal_(self.query, std=0.02)
        init.copy_(self.position_embedding, sincos_position_table(PERCEIVER_GRID_SIZE, self.query.shape[1]))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        values = self.kv_norm(self.kv_proj(features[:, -self.num_patches :]))
        keys = values + _resize_grid(self.position_embedding, self.num_patches)
        queries = (self.query_norm(self.query) + self.position_embedding).expand(len(values), -1, -1)
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.linear(self.layer_norm(self.out_proj(attended.transpose(1, 2).flatten(2))))


def _resize_grid(table: torch.Tensor, positions: int) -> torch.Tensor:
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


PROJECTORS = {"linear": DSVLLinearProjector, "vit": DSVLVitProjector, "perceiver": DSVLPerceiverProjector}

__all__ = ["PROJECTORS", "DSVLLinearProjector", "DSVLPerceiverProjector", "DSVLVitProjector"]
