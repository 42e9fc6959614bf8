"""A hash that ties what a decoder computed for images to the model's weights."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ...utils.quantization import stored_tensors

# Keys of a configuration that do not influence what the model computes for a tile, or only by the shapes of weights, which
# are in the fingerprint. Caches of before the configuration had them stay valid.
_IGNORED_KEYS = (
    "architectures",
    "auto_map",
    "downsample",
    "dtype",
    "image_layout",
    "image_positions",
    "image_token_id",
    "max_image_tokens",
    "max_tiles",
    "num_queries",
    "numbered_images",
    "transformers_version",
    "use_cache",
    "vocab_size",
)


def fingerprint_of(model: Any) -> tuple[str, list[nn.Parameter]]:
    """A hash of a `DSVLModel`'s configuration and of samples of every weight that influences an image; and these weights."""
    table = model.language_model.get_input_embeddings().weight
    parts = (model.vision_tower, model.multi_modal_projector, model.language_model)
    parameters = {
        f"{number}.{name}": p
        for number, part in enumerate(parts)
        for name, p in part.named_parameters()
        if p is not table and not p.is_meta  # offloaded
    }
    digest = hashlib.sha256(json.dumps(_relevant(model.config.to_dict()), sort_keys=True, default=str).encode())
    digest.update(json.dumps({name: list(p.shape) for name, p in parameters.items()}).encode())
    samples = [_sample(_own_part(p)) for p in parameters.values()]
    digest.update(torch.cat([sample.to(samples[0].device) for sample in samples]).cpu().numpy().tobytes())
    return digest.hexdigest(), list(parameters.values())


def _own_part(weight: torch.Tensor) -> torch.Tensor:
    """The part of a weight that this process holds, under tensor parallelism. Keys and values are of its heads alone."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _sample(weight: torch.Tensor) -> torch.Tensor:
    parts = [part.detach().flatten() for part in stored_tensors(weight)]
    return torch.cat([part[:: max(1, part.numel() // 64)][:64].float() for part in parts])


def _relevant(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        key: _relevant(value)
        for key, value in config.items()
        if key not in _IGNORED_KEYS and not str(key).startswith("_") and not str(key).endswith("_token_id")
    }


__all__ = ["fingerprint_of"]
