"""Vision towers: how one is made and run, and Qwen-VL's, which transformers does not have."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_dsvl import NATIVE_TOWERS, DSVLConfig, DSVLQwenVisionConfig
from .projectors_dsvl import DSVLResampler, resize_grid
from .transformers_dsvl import (
    ALL_ATTENTION_FUNCTIONS,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    GradientCheckpointingLayer,
    capture_outputs,
    init,
    no_init_weights,
)


def make_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A vision tower of this configuration, with fresh weights."""
    if config.model_type == DSVLQwenVisionConfig.model_type:
        return DSVLQwenVisionModel._from_config(config)
    return AutoModel.from_config(config)


def run_tower(
    vision_tower: PreTrainedModel,
    config: DSVLConfig,
    pixel_values: torch.Tensor,
    pixel_attention_mask: torch.Tensor | None = None,
    spatial_shapes: torch.Tensor | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
) -> BaseModelOutputWithPooling:
    """Run a vision tower. A tower without trainable parameters runs without a graph.

    Args:
        vision_tower: the tower.
        config: says which layers' features are used, and whether CLS and registers are kept.
        pixel_values: (tiles, 3, height, width), any float dtype; of native images (images, patches, 3 * patch_size ** 2).
        pixel_attention_mask: of native images, (images, patches), 0 where padded; by default from `spatial_shapes`.
        spatial_shapes: of native images, (images, 2), rows and columns of patches.
        output_hidden_states, output_attentions: whether the tower's own are returned too.

    Returns:
        `last_hidden_state`: the features before projection, (tiles, tower tokens, tower width); on request
        `hidden_states` and `attentions`.

    Raises:
        ValueError: for inputs of another image layout.
    """
    is_trained = torch.is_grad_enabled() and (
        pixel_values.requires_grad or any(p.requires_grad for p in vision_tower.parameters())
    )
    layers = config.vision_feature_layers
    options: dict[str, Any] = {"output_attentions": True} if output_attentions else {}
    if (spatial_shapes is not None) != (config.image_layout == "native"):
        raise ValueError(
            f"spatial_shapes are {'missing' if spatial_shapes is None else 'given'} with image_layout="
            f"{config.image_layout!r}; native images have them, others do not. Use the processor saved with this model."
        )
    if spatial_shapes is not None:
        if pixel_attention_mask is None:
            patches = torch.arange(pixel_values.shape[1], device=spatial_shapes.device)
            pixel_attention_mask = (patches < spatial_shapes.prod(-1, keepdim=True)).int()
        options |= {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
    with torch.set_grad_enabled(is_trained):
        tower = vision_tower(
            pixel_values.to(vision_tower.dtype),
            output_hidden_states=output_hidden_states or layers != [-1],
            return_dict=True,
            **options,
        )
        chosen = [tower.last_hidden_state if layer == -1 else tower.hidden_states[layer] for layer in layers]
        features = torch.cat(chosen, dim=-1) if len(chosen) > 1 else chosen[0]
    if config.vision_feature_select_strategy == "default":
        features = features[:, config.num_prefix_tokens :]
    return BaseModelOutputWithPooling(
        last_hidden_state=features,
        hidden_states=tower.hidden_states if output_hidden_states else None,
        attentions=tower.attentions if output_attentions else None,
    )


def unused_tower_parameters(vision_tower: PreTrainedModel, config: DSVLConfig) -> list[str]:
    """Names of the tower's parameters that do not influence its features: pooling heads, layers after
    `vision_feature_layer`, tokens for pre-training.

    Found by autograd on a copy without values, so it works for any tower.
    """
    vision_config = copy.deepcopy(config.vision_config)
    vision_config._attn_implementation = "eager"
    inputs, device = blank_image(config), "meta"
    if "spatial_shapes" in inputs:  # whose values the tower reads: a real copy, but of one channel a head
        vision_config.hidden_size = vision_config.intermediate_size = vision_config.num_attention_heads
        device = "cpu"
    with torch.device(device), no_init_weights(), torch.enable_grad():
        tower = type(vision_tower)(vision_config).to(vision_tower.dtype).eval()
        moved: dict[str, Any] = {name: one.to(device) for name, one in inputs.items()}
        features = run_tower(tower, config, **moved).last_hidden_state
        names, parameters = zip(*tower.named_parameters(), strict=True)
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


def blank_image(config: DSVLConfig) -> dict[str, torch.Tensor]:
    """The inputs of the tower for one image of zeros, the smallest that it takes."""
    if config.vision_config.model_type not in NATIVE_TOWERS:
        return {"pixel_values": torch.zeros([1, 3] + [config.image_size] * 2)}  # type: ignore[list-item]  # not native
    patch_size = config.vision_config.patch_size
    return {
        "pixel_values": torch.zeros(1, 1, config.vision_config.num_channels * patch_size**2),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.int32),
        "spatial_shapes": torch.ones(1, 2, dtype=torch.long),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Qwen-VL's tower: a ViT whose grid of patches is read by learned queries


class DSVLQwenVisionAttention(nn.Module):
    """Self-attention whose one projection holds query, key and value of a head side by side, head after head."""

    is_causal = False

    def __init__(self, config: DSVLQwenVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        states = self.qkv_proj(hidden_states).unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2)
        query, key, value = states.split(self.head_dim, dim=-1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager_attention)
        output, weights = attend(self, query, key, value, None, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs)
        return self.out_proj(output.flatten(2)), weights


def _eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, heads, tokens, head_dim) each; without mask and dropout."""
    weights = (query @ key.transpose(-1, -2) * scaling).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class DSVLQwenVisionMLP(nn.Module):
    def __init__(self, config: DSVLQwenVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states)))


class DSVLQwenVisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: DSVLQwenVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = DSVLQwenVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = DSVLQwenVisionMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class DSVLQwenVisionEmbeddings(nn.Module):
    """Patches and their learned positions, which are interpolated bicubically for another number of patches."""

    def __init__(self, config: DSVLQwenVisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        if height != width or height < self.patch_size:
            raise ValueError(
                f"Images of {height} x {width} pixels; this tower takes squares of at least {self.patch_size} pixels. Use "
                "the image processor that was saved with it."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        return patches + resize_grid(self.position_embedding.weight, *[height // self.patch_size] * 2)


class DSVLQwenVisionPreTrainedModel(PreTrainedModel):
    config: DSVLQwenVisionConfig
    config_class = DSVLQwenVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DSVLQwenVisionEmbeddings", "DSVLQwenVisionLayer", "DSVLResampler"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DSVLQwenVisionLayer, "attentions": DSVLQwenVisionAttention}
    _input_embed_layer = "patch_embedding"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DSVLQwenVisionEmbeddings):
            init.normal_(module.position_embedding.weight, std=self.config.hidden_size**-0.5)
        elif isinstance(module, DSVLResampler):
            module.init_weights()


class DSVLQwenVisionModel(DSVLQwenVisionPreTrainedModel):
    """The tower of Qwen-VL (arXiv 2308.12966): OpenCLIP's ViT-bigG, and a resampler to `num_queries` embeddings an image.

    Weights come from `dsvl migrate qwen-tower`.
    """

    def __init__(self, config: DSVLQwenVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = DSVLQwenVisionEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([DSVLQwenVisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.resampler = DSVLResampler(
            config.hidden_size, config.output_dim, config.num_queries, eps=config.layer_norm_eps, kv_bias=False
        )
        self.post_layernorm = nn.LayerNorm(config.output_dim, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encode images.

        Args:
            pixel_values: (images, 3, side, side), any float dtype.
            kwargs: `output_hidden_states`, `output_attentions`.

        Returns:
            `last_hidden_state`: (images, num_queries, output_dim); on request `hidden_states`, those of the grid of
            patches, (images, patches, hidden_size) before every layer and after the last, and `attentions`.

        Raises:
            ValueError: for images that are not square.
        """
        hidden_states = self.pre_layernorm(self.embeddings(pixel_values))
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=self.post_layernorm(self.resampler(hidden_states)))


__all__ = [
    "DSVLQwenVisionModel",
    "DSVLQwenVisionPreTrainedModel",
    "blank_image",
    "make_vision_tower",
    "run_tower",
    "unused_tower_parameters",
]
