"""MMCA in a decoder of vLLM: its attention layers are replaced by ones of padded heads, see padded_heads.py."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from .padded_heads import ELSEWHERE, EXTRA, branch_marks, merge_heads, pad_heads

LARGEST_HEAD = 512


def padded_head_size(backend: type[AttentionBackend], head_size: int) -> int:
    """The smallest head size that a backend takes and that has room for the marks. (FlashAttention: 128 -> 136; FlashInfer:
    128 -> 256; Triton: 128 -> 136; CPU: 128 -> 160.)

    Raises:
        ValueError: if there is none.
    """
    for size in range(head_size + EXTRA, LARGEST_HEAD + 1):
        if size % 8 == 0 and backend.supports_head_size(size):
            return size
    raise ValueError(
        f"The attention backend {backend.get_name()} has no head size from {head_size + EXTRA} to {LARGEST_HEAD}, which "
        f"multimodal_attention='mmca' needs for heads of {head_size}; choose another one by --attention-backend."
    )


class MultimodalAttention(nn.Module):
    """Takes the place of an attention layer of vLLM: the same inputs and outputs, (tokens, heads * head_dim)."""

    is_image: torch.Tensor

    def __init__(self, inner: Attention, vllm_config: VllmConfig, is_image: torch.Tensor) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = inner.num_heads, inner.num_kv_heads, inner.head_size
        self.padded_size = padded_head_size(inner.attn_backend, inner.head_size)
        softcap = getattr(inner.impl, "logits_soft_cap", None) or None
        self.marks = branch_marks(inner.impl.scale, softcap)
        # A buffer, so that a compiled graph reads it rather than a copy of its values.
        self.register_buffer("is_image", is_image, persistent=False)
        self.attn = Attention(
            num_heads=EXTRA * self.heads,
            head_size=self.padded_size,
            scale=inner.impl.scale,
            num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=inner.quant_config,
            logits_soft_cap=softcap,
            per_layer_sliding_window=inner.sliding_window,
            prefix=inner.layer_name,
            attn_backend=inner.attn_backend,
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        tokens = query.shape[0]
        is_image = self.is_image[:tokens]
        value = value.view(tokens, self.kv_heads, self.head_size)
        padded = pad_heads(
            query.view(tokens, self.heads, self.head_size),
            key.view(tokens, self.kv_heads, self.head_size),
            value,
            is_image,
            self.padded_size,
            self.marks,
        )
        output = self.attn(*(states.flatten(1) for states in padded))
        return merge_heads(output.view(tokens, -1, self.padded_size), value, is_image).flatten(1)


def route_attention(language_model: nn.Module, vllm_config: VllmConfig, is_image: torch.Tensor, prefix: str) -> None:
    """Replace every attention layer of a decoder.

    Args:
        language_model: vLLM's decoder.
        vllm_config: of the whole model; the sizes of heads that attention backends allocate buffers by are changed in it.
        is_image: which tokens of a step are image tokens; see `MultimodalAttention`.
        prefix: of the names of the decoder's layers.

    Raises:
        ValueError: if a layer attends in a way that padded heads cannot express.
    """
    layers = vllm_config.compilation_config.static_forward_context
    sizes = set()
    for module in list(language_model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Attention:
                _check_layer(child)
                del layers[child.layer_name]
                setattr(module, name, MultimodalAttention(child, vllm_config, is_image))
                sizes.add(getattr(module, name).padded_size)
    replaced = {module.attn.layer_name for module in language_model.modules() if isinstance(module, MultimodalAttention)}
    if others := sorted(name for name in layers if name.startswith(prefix) and name not in replaced):
        raise ValueError(
            f"multimodal_attention='mmca' cannot be carried by {type(language_model).__name__} of vLLM: {len(others)} "
            f"layers, such as {others[0]} ({type(layers[others[0]]).__name__}), do not attend by vLLM's plain Attention. "
            f"{ELSEWHERE}"
        )
    if len(sizes) > 1:
        raise ValueError(
            f"{type(language_model).__name__} has heads of several sizes, {sorted(sizes)} with their marks, which "
            f"multimodal_attention='mmca' does not take. {ELSEWHERE}"
        )
    # Triton's buffers are sized by these.
    for size in sizes:
        sizes_of_model = vllm_config.model_config.model_arch_config
        sizes_of_model.head_size = size
        sizes_of_model.total_num_attention_heads *= EXTRA


def _check_layer(layer: Attention) -> None:
    found = [
        ("attention sinks", layer.has_sink),
        ("ALiBi", getattr(layer.impl, "alibi_slopes", None) is not None),
        ("keys and values of another layer", layer.kv_sharing_target_layer_name is not None),
        (f"attention of type {layer.attn_type}", layer.attn_type != AttentionType.DECODER),
        ("values of another size than keys", layer.head_size_v != layer.head_size),
    ]
    if names := [name for name, is_there in found if is_there]:
        raise ValueError(
            f"{layer.layer_name} has {', '.join(names)}, which multimodal_attention='mmca' does not define. {ELSEWHERE}"
        )


__all__ = ["MultimodalAttention", "padded_head_size", "route_attention"]
