"""Label smoothing as a loss function with the signature of transformers' `ForCausalLMLoss`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def smoothed_loss(factor: float) -> Callable[..., torch.Tensor]:
    """A cross-entropy loss with label smoothing (Szegedy et al., arXiv:1512.00567).

    Args:
        factor: probability that is distributed over the whole vocabulary, 0 to 1.

    Returns:
        A function with the signature of `transformers.loss.loss_utils.ForCausalLMLoss`. For logits (..., tokens, vocabulary)
        and `shift_labels` (..., tokens), -100 for no label, it returns the sum of `(1 - factor) * -log p(label) + factor *
        mean(-log p)` divided by `num_items_in_batch`; without that, the mean over tokens with a label.
    """

    def loss(
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if shift_labels is None:
            if labels is None:
                raise ValueError("Neither labels nor shift_labels were given; pass one of them.")
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        total = nn.functional.cross_entropy(
            logits.float().view(-1, vocab_size),
            shift_labels.to(logits.device).reshape(-1),
            ignore_index=ignore_index,
            reduction="sum",
            label_smoothing=factor,
        )
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != ignore_index).sum().clamp(min=1)
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    return loss
