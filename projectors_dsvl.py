"""Projectors: the tower's features (tiles, tower tokens, tower width) to (tiles, tokens, decoder width).

`grids` are the rows and columns of patches of native images (SigLIP 2 NaFlex), whose features are padded to one length, as
are their tokens; None if all tiles have the same square grid.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig

from .configuration_dsvl import DSVLConfig
from .transformers_dsvl import BaseModelOutputWithPooling, CLIPEncoderLayer, init

Grids = Sequence[tuple[int, int]]

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
        init.copy_(self.position_embedding, sincos_position_table(math.isqrt(queries), width))

    def forward(self, features: torch.Tensor, grids: Grids | None = None) -> torch.Tensor:
        """(images, patches, kv_width) to (images, num_queries, width)."""
        values = self.kv_norm(self.kv_proj(features))
        positions, mask = resize_grid(self.position_embedding, *[math.isqrt(features.shape[1])] * 2), None
        if grids is not None:
            tables = [resize_grid(self.position_embedding, rows, columns) for rows, columns in grids]
            patches = features.shape[1]
            positions = torch.stack([nn.functional.pad(table, (0, 0, 0, patches - len(table))) for table in tables])
            counts = torch.tensor([len(table) for table in tables], device=features.device)
            mask = (torch.arange(patches, device=features.device) < counts[:, None])[:, None, None]
        keys = values + positions
        queries = (self.query_norm(self.query) + self.position_embedding).expand(len(values), -1, -1)
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def resize_grid(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A square grid's position table (cells, width) as one of rows x columns cells, interpolated bicubically."""
    side = math.isqrt(len(table))
    if (rows, columns) == (side, side):
        return table
    grid = table.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    grid = nn.functional.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return grid[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)


def pixel_shuffle(features: torch.Tensor, rows: int, columns: int, side: int) -> torch.Tensor:
    """Squares of `side` x `side` features as one (InternVL, arXiv 2404.16821; Idefics 3, arXiv 2408.12637).

    Args:
        features: (tiles, rows * columns, width), row by row. Rows and columns that do not fill a square are padded by zeros.

    Returns:
        (tiles, squares, side ** 2 * width); the features of a square row by row.
    """
    grid = features.unflatten(1, (rows, columns))
    grid = nn.functional.pad(grid, (0, 0, 0, -columns % side, 0, -rows % side))
    squares = grid.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)


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

    def forward(self, features: torch.Tensor, grids: Grids | None = None) -> torch.Tensor:
        return self.layer_norm(self.linear(features))


class DSVLMlpProjector(nn.Module):
    """Linear, GELU, Linear: LLaVA-1.5's (arXiv 2310.03744), with the names of its parameters in transformers. With
    `downsample` it reads squares of patches (see `pixel_shuffle`), and tokens before the grid are dropped."""

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.downsample, self.num_patches = config.downsample, config.num_patches
        self.linear_1 = nn.Linear(config.vision_feature_size * config.downsample**2, width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: torch.Tensor, grids: Grids | None = None) -> torch.Tensor:
        if self.downsample > 1:
            features = self._squares(features, grids)
        return self.linear_2(self.act(self.linear_1(features)))

    def _squares(self, features: torch.Tensor, grids: Grids | None) -> torch.Tensor:
        if grids is None:
            side = math.isqrt(self.num_patches)
            return pixel_shuffle(features[:, -self.num_patches :], side, side, self.downsample)
        squares = [
            pixel_shuffle(one[None, : rows * columns], rows, columns, self.downsample)[0]
            for one, (rows, columns) in zip(features, grids, strict=True)
        ]
        return nn.utils.rnn.pad_sequence(squares, batch_first=True)


class DSVLVitProjector(DSVLLinearProjector):
    """One CLIP encoder layer, then Linear and LayerNorm: the original's `vit`."""

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__(config)
        self.encoder_layer = CLIPEncoderLayer(_clip_layer_config(config.vision_config))

    def forward(self, features: torch.Tensor, grids: Grids | None = None) -> torch.Tensor:
        return super().forward(self.encoder_layer(features, attention_mask=None))


class DSVLPerceiverProjector(DSVLResampler):
    """Learned queries that read the grid of patches by cross-attention, then LayerNorm and Linear: the original's
    `perceiver`, which is Qwen-VL's resampler. Tokens before the grid (CLS, registers) are dropped."""

    def __init__(self, config: DSVLConfig) -> None:
        width = config.text_config.hidden_size
        super().__init__(config.vision_feature_size, width, config.num_queries, eps=1e-12, kv_bias=True)
        self.num_patches = config.num_patches
        self.layer_norm = nn.LayerNorm(width, eps=1e-12)
        self.linear = nn.Linear(width, width)

    def forward(self, features: torch.Tensor, grids: Grids | None = None) -> torch.Tensor:
        if grids is None:
            features = features[:, -self.num_patches :]
        return self.linear(self.layer_norm(super().forward(features, grids)))


class DSVLImageNumbers(nn.Module):
    """What is added to the embeddings of an image's tokens so that they hold the image's number: a linear map, zero at
    first, of an embedding of the number. `dsvl.compose` makes these embeddings of the language model's own for the number.
    """

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.embeddings = nn.Parameter(torch.empty(config.numbered_images, width))
        self.weight = nn.Parameter(torch.empty(width, width))

    def init_weights(self) -> None:
        """The map begins at zero, so that a new model is one without numbers."""
        init.normal_(self.embeddings, std=0.02)
        init.zeros_(self.weight)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers (images,), from 1, to (images, decoder width); zero for numbers that have no embedding."""
        known = (numbers >= 1) & (numbers <= len(self.embeddings))
        rows = nn.functional.embedding((numbers - 1).clamp(0, len(self.embeddings) - 1), self.embeddings)
        return nn.functional.linear(rows, self.weight) * known[:, None]


@dataclass
class NumberedImages(BaseModelOutputWithPooling):
    """The output of `get_image_features` for images whose embeddings hold their numbers. Its class tells it, as transformers
    makes others of it for the chunks of a prompt."""


def make_projector(config: DSVLConfig) -> Any:
    """The projector of a model, a module; its `image_numbers` are None without `numbered_images`."""
    projector: Any = PROJECTORS[config.projector_type](config)
    projector.image_numbers = DSVLImageNumbers(config) if config.numbered_images else None
    return projector


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
    "DSVLImageNumbers",
    "DSVLLinearProjector",
    "DSVLMlpProjector",
    "DSVLPerceiverProjector",
    "DSVLResampler",
    "DSVLVitProjector",
    "NumberedImages",
    "make_projector",
]
