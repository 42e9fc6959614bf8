"""Which attention a model runs on a device, and why."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from ..acceleration.attention.kernel_choice import decision

# Decoders of every kind for which the kernels are compiled: heads of (channels, softcap).
KINDS = {"heads of 64": (64, None), "heads of 128": (128, None), "heads of 256": (256, None), "256, softcap": (256, 50.0)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Attention:
    """The attention of one kind of forward call.

    Attributes:
        calls: "training and prefill" or "decode step".
        attention: what computes it.
        reason: why.
    """

    calls: str
    attention: str
    reason: str


def attention_of(
    text_config: Any, multimodal_attention: str, dtype: torch.dtype, device: torch.device, accelerated: bool
) -> list[Attention]:
    """Which attention computes sequences with images. It follows `masks_dsvl.build_masks`.

    Args:
        text_config: the decoder's, with its `_attn_implementation`.
        multimodal_attention: "mmca", "mmca_reference" or "causal".
        dtype: of the weights.
        device: of the decoder.
        accelerated: whether the package's acceleration is active.
    """
    backend = text_config._attn_implementation or "eager"
    if multimodal_attention == "causal":
        return [Attention("all", f"the decoder's own {backend}", 'multimodal_attention="causal"')]
    if multimodal_attention == "mmca_reference":
        return [Attention("all", "definition, over the matrix of scores", 'multimodal_attention="mmca_reference"')]
    decode = Attention("decode step", "decode mask", "up to 16 new tokens over a KV cache take one product")
    return [_many_queries(text_config, backend, dtype, device, accelerated), decode]


def _many_queries(text_config: Any, backend: str, dtype: torch.dtype, device: torch.device, accelerated: bool) -> Attention:
    calls = "training and prefill"
    if backend == "eager":
        return Attention(calls, "definition, over the matrix of scores", 'attn_implementation="eager"')
    if not accelerated:
        return Attention(calls, f"two calls of {backend} over all tokens", "the package's acceleration is not active")
    if backend != "sdpa":
        return Attention(calls, f"gathered {backend}", f'attn_implementation="{backend}"')
    dropout = getattr(text_config, "attention_dropout", None) or 0
    decided = decision(text_config, dtype, device)
    trains = f"; in training gathered sdpa, for attention_dropout={dropout}" if decided.use and dropout > 0 else ""
    return Attention(calls, "fused kernels" if decided.use else "gathered sdpa", decided.reason + trains)


def kinds_of_decoders(device: torch.device, accelerated: bool) -> dict[str, dict[str, Attention]]:
    """The attention of training and prefill under `"mmca"` and sdpa, for each kind of decoder and dtype."""
    table: dict[str, dict[str, Attention]] = {}
    for kind, (head_dim, softcap) in KINDS.items():
        config = LlamaConfig(hidden_size=8 * head_dim, num_attention_heads=8, head_dim=head_dim, attn_implementation="sdpa")
        config.attn_logit_softcapping = softcap
        table[kind] = {
            str(dtype).removeprefix("torch."): _many_queries(config, "sdpa", dtype, device, accelerated) for dtype in DTYPES
        }
    return table
