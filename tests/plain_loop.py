"""MMCA written from its definition, one query at a time: the oracle that every backend is held against."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface


class PlainLoop:
    """An attention function that knows the modality, padding and document of every key.

    Registered as an ordinary attention implementation, it makes any decoder compute MMCA by the definition.

    Args:
        types: (batch, tokens), 1 = image.
        real: (batch, tokens), False where padded.
        documents: (batch, tokens), the packed document of each token.
        kind: "mmca" or "causal".
    """

    name = "plain_loop"

    def __init__(
        self,
        types: torch.Tensor,
        real: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        kind: str = "mmca",
    ) -> None:
        self.types = types
        self.real = torch.ones_like(types).bool() if real is None else real.bool()
        self.documents = torch.zeros_like(types) if documents is None else documents
        self.kind = kind
        AttentionInterface.register(self.name, self)

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        output = []
        for b in range(query.shape[0]):
            for i in range(query.shape[2]):
                output.append(self._one(b, i, query[b, :, i], key[b], value[b], scaling, softcap, sliding_window))
        return torch.stack(output).unflatten(0, (query.shape[0], query.shape[2])), None

    def _one(self, b, i, query, key, value, scaling, softcap, window) -> torch.Tensor:
        """(heads, head_dim) of one query."""
        if not self.real[b, i]:
            return torch.zeros_like(query)
        if self.kind == "mmca" and self.types[b, i] == 1:
            return value[:, i]
        total = torch.zeros_like(query)
        modalities = (0, 1) if self.kind == "mmca" else (None,)
        for modality in modalities:
            members = [
                j
                for j in range(i + 1)
                if self.real[b, j]
                and self.documents[b, j] == self.documents[b, i]
                and (window is None or j > i - window)
                and (modality is None or self.types[b, j] == modality)
            ]
            if not members:
                continue
            scores = (query[:, None] * key[:, members]).sum(-1) * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            total = total + (scores.softmax(-1)[..., None] * value[:, members]).sum(1)
        return total


def run_by_loop(model: Any, inputs: dict[str, Any], loop: PlainLoop, **kwargs: Any) -> Any:
    """Run a model whose `multimodal_attention` is "causal", so that nothing of ours is in its decoder, by the loop."""
    assert model.config.multimodal_attention == "causal"
    model.model.language_model.set_attn_implementation(loop.name)
    return model(**inputs, use_cache=False, **kwargs)
