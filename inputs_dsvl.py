"""Checks of a forward call's inputs against each other.

Shapes and dtypes are checked at once. Values (how many image tokens a sample has) are copied to the host asynchronously and
checked after the decoder's kernels are queued, so that nothing waits for the device.
"""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .positions_dsvl import document_starts

# A frequent reason for a sequence that does not fit its types.
PEFT_HINT = (
    "(PEFT's prompt tuning, p-tuning and prefix tuning put virtual tokens before a sequence without its mm_token_type_ids; "
    "use LoRA, or another method that adapts weights.)"
)


def check_sequence(inputs_embeds: torch.Tensor, attention_mask: Any, cache: Cache | None) -> None:
    """Refuse an empty batch, and a two-dimensional mask of another shape than the sequence.

    Args:
        inputs_embeds: (batch, tokens, hidden), of the new tokens.
        attention_mask: (batch, tokens, cached ones included); masks of other dimensions are not checked here.
        cache: the KV cache, if any.

    Raises:
        ValueError: naming both shapes.
    """
    batch, tokens = inputs_embeds.shape[:2]
    if inputs_embeds.numel() == 0:
        raise ValueError(
            f"The inputs hold {batch} rows of {tokens} tokens, so there is nothing to compute; pass at least one token of "
            "one row."
        )
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return
    # The length of a static cache is on the device, and masks may be as long as the cache.
    fixed = cache is not None and cache.is_compileable
    past = int(cache.get_seq_length()) if cache is not None and not fixed else 0
    rows, length = attention_mask.shape
    if rows != batch or length < past + tokens or (length > past + tokens and not fixed):
        raise ValueError(
            f"attention_mask is of shape {(rows, length)}, but the inputs hold {batch} rows of {tokens} tokens"
            + (f" after {past} cached ones" if past else "")
            + f"; pass the mask of the whole sequence, {(batch, past + tokens)}."
        )


def check_token_types(types: torch.Tensor | None, inputs_embeds: torch.Tensor, cache: Cache | None) -> torch.Tensor | None:
    """`mm_token_type_ids` as int64.

    Args:
        types: (batch, new tokens) or (batch, tokens, cached ones included), integers or booleans.
        inputs_embeds: (batch, new tokens, hidden).

    Returns:
        `types` as int64.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: for another dtype, or another shape than the sequence's.
    """
    if types is None:
        return None
    if not isinstance(types, torch.Tensor):
        raise TypeError(f"mm_token_type_ids is a {type(types).__name__}; pass a tensor of integers.")
    if types.is_floating_point() or types.is_complex():
        raise ValueError(f"mm_token_type_ids are {types.dtype}; pass integers, 1 for image tokens and 0 for all others.")
    types = types.long()
    batch, tokens = inputs_embeds.shape[:2]
    if types.shape == (batch, tokens):
        return types
    past = int(cache.get_seq_length()) if cache is not None else 0
    if types.shape != (batch, past + tokens):
        expected = f"{(batch, tokens)}" + (f", or {(batch, past + tokens)} with the {past} cached tokens" if past else "")
        raise ValueError(
            f"mm_token_type_ids are of shape {tuple(types.shape)}, but the inputs hold {batch} rows of {tokens} tokens; "
            f"expected {expected}. {PEFT_HINT}"
        )
    return types


def check_document_ids(
    document_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, attention_mask: Any, has_cache: bool
) -> torch.Tensor | None:
    """`document_ids` on the device of the inputs.

    Args:
        document_ids: (batch, tokens), integers.
        inputs_embeds: (batch, tokens, hidden).
        attention_mask: of the same call.
        has_cache: whether there is a KV cache, or the decoder makes one.

    Raises:
        ValueError: for another dtype or shape, or with an attention mask or a KV cache, which know nothing of documents.
    """
    if document_ids is None:
        return None
    if document_ids.is_floating_point() or document_ids.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"document_ids are {document_ids.dtype} of shape {tuple(document_ids.shape)}, but the inputs hold "
            f"{len(inputs_embeds)} rows of {inputs_embeds.shape[1]} tokens; pass one integer for each token, the same for "
            "the tokens of one packed document."
        )
    if attention_mask is not None or has_cache:
        name = "a KV cache" if attention_mask is None else "an attention_mask"
        raise ValueError(
            f"document_ids came with {name}; pack rows without either (padding is a document of its own), or omit "
            "document_ids."
        )
    return document_ids.to(inputs_embeds.device)


def check_position_order(backward: list[int]) -> None:
    """Refuse positions that go backwards in a row without `document_ids`, under `image_positions="image"`.

    Args:
        backward: how often the positions of each row do.

    Raises:
        ValueError: if they do.
    """
    if any(backward):
        raise ValueError(
            f"position_ids go backwards {backward} times in the rows, but with image_positions='image' positions do not "
            "tell packed documents apart; pass document_ids, (batch, tokens), one id for the tokens of each document."
        )


def check_takes_positions(decoder: PreTrainedModel) -> None:
    """Refuse a decoder that takes no positions, for `image_positions="image"`.

    Raises:
        ValueError: naming it.
    """
    if "position_ids" not in inspect.signature(type(decoder).forward).parameters:
        raise ValueError(
            f"{type(decoder).__name__} does not take position_ids, so image_positions='image' has no effect in it; choose "
            "image_positions='token', or a decoder with rotary positions."
        )


def check_labels(name: str, labels: torch.Tensor, inputs: torch.Tensor) -> None:
    """Refuse labels that are not of the inputs' shape.

    Args:
        name: `labels` or `shift_labels`.
        labels: (batch, tokens).
        inputs: `input_ids` or `inputs_embeds`, (batch, tokens, ...).

    Raises:
        ValueError: naming both shapes.
    """
    if labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"{name} are of shape {tuple(labels.shape)}, but the inputs of {tuple(inputs.shape[:2])}; pass one label for "
            "each token, -100 where nothing is supervised."
        )


def check_image_counts(
    counts: list[int], tokens_per_image: int, lengths: list[int] | None = None, whole_images: bool = False
) -> None:
    """Compare the samples' image tokens with the images.

    Args:
        counts: the number of image tokens of each sample.
        tokens_per_image: `DSVLConfig.image_seq_length`.
        lengths: how many embeddings each of their tiles has; None if the tiles are not known yet.
        whole_images: whether every sample must hold whole tiles.

    Raises:
        ValueError: if they do not match.
    """
    if lengths is not None and sum(counts) != sum(lengths):
        kinds = ", ".join(map(str, sorted(set(lengths)))) or tokens_per_image
        raise ValueError(
            f"The samples hold {counts} image tokens, {sum(counts)} in all, but there are {sum(lengths)} image embeddings "
            f"({len(lengths)} images of {kinds}); pass as many images as the texts name, in reading order, and do not "
            "truncate image tokens."
        )
    if lengths is None:
        cut = any(count % tokens_per_image for count in counts)
    else:
        cut = not set(itertools.accumulate(counts)) <= {0, *itertools.accumulate(lengths)}
    if whole_images and cut:
        raise ValueError(
            f"The samples hold {counts} image tokens, but an image takes {tokens_per_image}: some image is cut or mixed "
            "up; do not truncate image tokens, and use the processor saved with this model."
        )


def check_tiles_are_told(image_layout: str, num_tiles: Any) -> None:
    """Refuse to count images whose tiles cannot be told from them.

    Raises:
        ValueError: under `image_layout="tiles"` without `num_tiles`.
    """
    if image_layout == "tiles" and num_tiles is None:
        raise ValueError(
            "image_layout='tiles' with numbered_images: how many images the tiles are is not known; pass num_tiles, as "
            "the processor returns it, or image_numbers."
        )


def check_image_numbers(numbers: int, images: int, numbered_images: int) -> None:
    """Refuse `image_numbers` of a model without `numbered_images`, or of other images.

    Args:
        numbers: how many were passed.
        images: how many images they are for, or tiles.
        numbered_images: of the configuration.

    Raises:
        ValueError: if the model has none, or these are not as many.
    """
    if not numbered_images:
        raise ValueError("image_numbers for a model of numbered_images=0, which has no embeddings of them; omit them.")
    if numbers != images:
        raise ValueError(f"{numbers} image_numbers for {images} images or tiles; pass one for each image.")


def by_tile(
    image_numbers: torch.Tensor | Sequence[int], num_tiles: torch.Tensor | None, numbered_images: int
) -> torch.Tensor:
    """The number of each tile's image, (tiles,), from the `image_numbers` of a call.

    Args:
        numbered_images: of the configuration.

    Raises:
        ValueError: if these are not as many as the images of `num_tiles`, or the model has none.
    """
    numbers = torch.as_tensor(image_numbers)
    if num_tiles is None:
        return numbers
    check_image_numbers(len(numbers), len(num_tiles), numbered_images)
    return numbers.repeat_interleave(num_tiles.to(numbers.device))


def check_num_tiles(named: int, given: int) -> None:
    """Compare the sum of `num_tiles` with the number of tiles that came with it.

    Raises:
        ValueError: if they differ.
    """
    if named != given:
        raise ValueError(
            f"num_tiles name {named} tiles in all, but pixel_values hold {given}; pass both as the processor returned them."
        )


def check_type_values(
    image_token_id: int,
    image_counts: list[int],
    marked: list[int],
    contradictions: list[int],
    least: list[int],
    most: list[int],
) -> None:
    """Compare `mm_token_type_ids` with `input_ids`, by figures of each sample.

    Args:
        image_token_id: the id of an image token.
        image_counts: how many ids are image tokens.
        marked: the sum of the types.
        contradictions: how many types contradict their ids.
        least, most: the smallest and the largest type.

    Raises:
        ValueError: for types other than 0 and 1, or that contradict the ids.
    """
    if min(least) < 0 or max(most) > 1:
        raise ValueError(
            f"mm_token_type_ids hold values from {min(least)} to {max(most)}; expected 1 for image tokens and 0 for all "
            "others."
        )
    if any(contradictions):
        raise ValueError(
            f"input_ids hold {image_counts} image tokens (id {image_token_id}), but mm_token_type_ids mark {marked} as "
            f"such and differ at {contradictions} positions of the samples; pass those that the processor returned with "
            "these ids, or omit them."
        )


class AsyncHostCopy:
    """An asynchronous device-to-host copy of a tensor.

    Attributes:
        is_complete: whether there is nothing to wait for, as the tensor is on the host already.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.is_complete = not tensor.is_cuda
        self._event: torch.cuda.Event | None = None
        self._values = tensor
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> Any:
        """The values as Python numbers. Waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def reversed_image_order(
    image_tokens: torch.Tensor, images: int, tokens_per_image: int, document_ids: torch.Tensor | None
) -> torch.Tensor:
    """The permutation (images,) that reverses the images of each sample, or of each packed document.

    Shapes do not depend on values, so it can be compiled. If the number of images does not match the image tokens, the
    result has no meaning, and `check_image_counts` raises later.

    Args:
        image_tokens: (batch, tokens), True for image tokens.
        images: how many images the batch has.
        tokens_per_image: `DSVLConfig.image_seq_length`.
        document_ids: (batch or 1, tokens), of packed rows.
    """
    rows, tokens = image_tokens.shape
    sample = torch.arange(rows, device=image_tokens.device)[:, None].expand(rows, tokens) * (tokens + 1)
    if document_ids is not None:
        sample = sample + document_starts(document_ids).to(image_tokens.device).cumsum(-1)
    index = image_tokens.flatten().cumsum(0) - 1
    first = image_tokens.flatten() & (index % tokens_per_image == 0) & (index // tokens_per_image < images)
    target = torch.where(first, index // tokens_per_image, images)  # the last slot takes all other tokens
    of_image = sample.new_zeros(images + 1).scatter(0, target, sample.flatten())[:images]
    start, end = torch.searchsorted(of_image, of_image), torch.searchsorted(of_image, of_image, right=True)
    return (start + end - 1 - torch.arange(images, device=sample.device)).clamp(0, images - 1)


class _GatherUniqueRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy(0, index, gradient), None


def gather_unique_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`rows[index]`, for an index without repetitions: its backward copies, where that of `index_select` adds atomically,
    which is much slower.

    Args:
        rows: (rows, ...).
        index: (selected,), int64.
    """
    return _GatherUniqueRows.apply(rows, index)


__all__ = [
    "PEFT_HINT",
    "AsyncHostCopy",
    "by_tile",
    "check_document_ids",
    "check_image_counts",
    "check_image_numbers",
    "check_labels",
    "check_num_tiles",
    "check_tiles_are_told",
    "check_position_order",
    "check_sequence",
    "check_takes_positions",
    "check_token_types",
    "check_type_values",
    "gather_unique_rows",
    "reversed_image_order",
]
