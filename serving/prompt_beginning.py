"""The tokens with which all prompts of a chat template begin, such as a system message: computed once."""

from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache

from ..acceleration.reuse.image_cache import reuse_is_exact
from ..chat.prompts import read_prompt
from ..image_library.content_keys import adapter_state
from ..transformers_dsvl import CACHE
from .kept_rows import KeptRow, can_take, copy_row, take_rows

LEAST_TOKENS = 16  # fewer are not worth a KV cache of their own
# Conversations that have nothing in common but what the chat template adds.
PROBES: tuple[dict[str, Any], ...] = (
    {"type": "text", "text": "0"},
    {"type": "text", "text": "Why?"},
    {"type": "image", "image_size": (32, 32)},
)


class PromptBeginning:
    """Keys and values of the tokens with which prompts begin, whatever they ask.

    They come from the chat template alone, never from a request, so their use tells nothing about other requests.

    Args:
        model: a DSVL model in evaluation mode.
        processor: its processor.

    Attributes:
        ids: the tokens; empty if prompts have fewer than `LEAST_TOKENS` in common, or where the KV cache of a prefix cannot
            be continued: see `reuse_is_exact`; under a compiled prefill, which takes whole prompts; with sliding windows.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.ids = _common_ids(processor)
        decoder_config = model.config.text_config
        slides = any(layer.is_sliding for layer in DynamicCache(config=decoder_config).layers)
        is_compiled = model.model.image_reuse.text_multiple > 1
        if len(self.ids) < LEAST_TOKENS or not reuse_is_exact(model.config) or slides or is_compiled:
            self.ids = []
        self._row: KeptRow | None = None
        self._weights: Any = None
        if self.ids:
            self._compute()

    def begins(self, ids: torch.Tensor) -> bool:
        """Whether a prompt (1, tokens) begins with these tokens, and has two others at least."""
        return 0 < len(self.ids) < ids.shape[1] - 1 and ids[0, : len(self.ids)].tolist() == self.ids

    def cache(self, rows: int) -> DynamicCache:
        """A KV cache of the tokens, for so many rows."""
        if self._state_of_weights() != self._weights:
            self._compute()
        assert self._row is not None
        return copy_row(self._row, rows, self.model.config.text_config)

    def _compute(self) -> None:
        cache = DynamicCache(config=self.model.config.text_config)
        ids = torch.tensor([self.ids], device=self.model.device)
        with torch.no_grad():
            self.model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        if not can_take(cache):  # of layers of other kinds
            self.ids = []
            return
        (self._row,), self._weights = take_rows(cache, {0: len(self.ids)}), self._state_of_weights()

    def _state_of_weights(self) -> Any:
        table = self.model.get_input_embeddings().weight
        return self.model.model.image_reuse.fingerprint(), table._version, adapter_state(self.model)


def _common_ids(processor: Any) -> list[int]:
    """The token ids with which the prompts of all `PROBES` begin."""
    prompts = [read_prompt(processor, [{"role": "user", "content": [dict(part)]}]).ids for part in PROBES]
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))]


__all__ = ["PromptBeginning"]
