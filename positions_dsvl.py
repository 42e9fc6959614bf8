"""Positions under `image_positions="image"`, and the documents of packed rows.

All tokens of an image (of a tile, where an image is several) share one rotary position, and the next token has the next
one. Which token sees which counts tokens, never positions, so equal positions must not be taken for packed documents, as
transformers takes them: documents are told by `document_ids`.
"""

from collections.abc import Sequence

import torch
from torch import nn


def image_starts(
    is_image: torch.Tensor,
    tokens_per_image: int,
    lengths: Sequence[int] | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first token of every image: (batch, tokens) bool. No shape depends on values.

    Args:
        is_image: (batch, tokens), True for image tokens.
        tokens_per_image: `DSVLConfig.image_seq_length`; a run of image tokens is cut into images of as many.
        lengths: how many tokens each image of the batch has, in reading order, instead.
        document_ids: (batch, tokens); a run ends where a document ends.
    """
    if lengths is not None:
        ends = torch.tensor(lengths, dtype=torch.long).cumsum(0)
        starts = nn.functional.pad(ends, (1, 0))[:-1]
        if is_image.is_cuda:
            starts = starts.pin_memory()
        starts = starts.to(is_image.device, non_blocking=True)
        return _chosen(is_image, starts)  # lengths that do not fit the image tokens are refused later
    goes_on = nn.functional.pad(is_image[:, :-1], (1, 0), value=False)
    if document_ids is not None:
        goes_on = goes_on & ~document_starts(document_ids)
    index = torch.arange(is_image.shape[1], device=is_image.device)
    run = torch.where(is_image & ~goes_on, index, 0).cummax(-1).values
    return is_image & ((index - run) % tokens_per_image == 0)


def tile_numbers(
    is_image: torch.Tensor,
    tiles: int,
    tokens_per_image: int,
    lengths: Sequence[int] | None = None,
    num_tiles: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    past: int = 0,
) -> torch.Tensor:
    """The number of each tile's image in its row or document, from 1: (tiles,), int64. No shape depends on values.

    Args:
        is_image: (batch, tokens), True for image tokens.
        tiles: how many tiles the batch has, after the first `past` tokens of its rows.
        tokens_per_image, lengths: as in `image_starts`.
        num_tiles: (images,), how many of the tiles each image has; one by default.
        document_ids: (batch, tokens), of packed rows.
        past: tokens of each row in the KV cache.
    """
    begins = starts = image_starts(is_image, tokens_per_image, lengths, document_ids)
    if num_tiles is not None:
        begins = _chosen(starts, (num_tiles.cumsum(0) - num_tiles).to(starts.device))
    counts = _counted(begins, document_ids)
    index = (~starts[:, past:].flatten()).to(torch.uint8).argsort(stable=True)[:tiles]
    return counts[:, past:].flatten()[index]


def image_positions(
    token_types: torch.Tensor,
    tokens_per_image: int,
    lengths: Sequence[int] | None = None,
    padding: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    cached: torch.Tensor | None = None,
) -> torch.Tensor:
    """The positions of new tokens: how many text tokens and images of their row or document have begun up to them, less one.

    Args:
        token_types: of the whole sequence, (batch, cached + new tokens), 1 = image.
        tokens_per_image, lengths: as in `image_starts`; lengths are those of the images among the new tokens.
        padding: (batch, at least cached + new tokens), 0 where padded; a padded token takes no position.
        document_ids: (batch, new tokens), of packed rows.
        cached: positions in the KV cache, (batch, cached tokens), -1 where padded.

    Returns:
        (batch, new tokens), int64.
    """
    total = token_types.shape[1]
    past = 0 if cached is None else cached.shape[1]
    is_image = token_types == 1
    if lengths is None:
        starts = image_starts(is_image, tokens_per_image, None, document_ids)[:, past:]
    else:
        starts = image_starts(is_image[:, past:], tokens_per_image, lengths)
    advances = ~is_image[:, past:] | starts
    if padding is not None:
        advances = advances & padding[:, past:total].to(advances.device, torch.bool)
    counts = _counted(advances, document_ids)
    if document_ids is None and cached is not None and past > 0:
        counts = counts + cached.amax(-1, keepdim=True).to(counts.device) + 1
    return (counts - 1).clamp(min=0)


def _chosen(marks: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Of the marked tokens, (batch, tokens) bool, those with these numbers among all of them, in reading order from 0."""
    table = marks.new_zeros(marks.numel() + 1).index_fill(0, numbers.clamp(max=marks.numel()), True)
    index = (marks.flatten().cumsum(0) - 1).clamp(min=0)
    return marks & table[index].view_as(marks)


def _counted(marks: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """How many tokens of a row, or of its document, are marked up to each: (batch, tokens), int64."""
    counts = marks.cumsum(-1)
    if document_ids is None:
        return counts
    before = torch.where(document_starts(document_ids), counts - marks.long(), 0)
    return counts - before.cummax(-1).values


def document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """Whether a token is the first of its document: (batch, tokens) bool. The first of a row is."""
    return nn.functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)


def token_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """The index of each token in its document: (batch, tokens), int64."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return index - torch.where(document_starts(document_ids), index, 0).cummax(-1).values


def documents_of_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """The documents of rows whose positions count tokens: one begins wherever they do not grow by one, as transformers has
    it. This does not wait for the device.

    Args:
        position_ids: (batch or 1, tokens), under `image_positions="token"`.

    Returns:
        `document_ids`, of the same shape.
    """
    return (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).long().cumsum(-1)


__all__ = [
    "document_starts",
    "documents_of_positions",
    "image_positions",
    "image_starts",
    "tile_numbers",
    "token_positions",
]
