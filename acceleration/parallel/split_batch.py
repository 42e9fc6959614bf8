"""The part of a batch that one process of a group runs: its own images, and all text tokens or its share of a long text.

See image_parallelism.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import distributed, nn

from ...generation_dsvl import IMAGE_INPUTS
from ...inputs_dsvl import check_document_ids, check_image_counts, check_labels, check_sequence
from ...masks_dsvl import visibilities
from ...positions_dsvl import documents_of_positions, token_positions
from ...transformers_dsvl import BaseModelOutputWithPooling
from ...vision_dsvl import blank_image
from ..attention import kernel_choice
from ..reuse.image_cache import lengths_by_image
from .split_images import assign_images, tiles_of_images
from .split_mask import SplitMask, SplitTokens

# What `forward` takes beside tokens and images; None of it depends on the length of the rows.
_OTHERS = ("num_items_in_batch", "skip_logits")
# Text of fewer tokens is not dealt out: its tokens take less time than the communication.
LONG_TEXT = 4096
IMAGES = ("pixel_values", "image_features", "mm_encoder_outputs")
PER_IMAGE = IMAGE_INPUTS[1:]  # beside the pixels


@dataclass
class SplitBatch:
    """A batch as one process runs it.

    Attributes:
        inputs: the keyword arguments of `forward`.
        mask: of its attention; None if no process has an image.
        tokens: its tokens; None without a mask.
        shape: of the whole batch, (rows, tokens).
        group: the process group.
    """

    inputs: dict[str, Any]
    mask: SplitMask | None = None
    tokens: SplitTokens | None = None
    shape: tuple[int, int] = (0, 0)
    group: Any = None

    @property
    def deals_text(self) -> bool:
        """Whether the text is dealt out to the processes, so that each has the loss of its own tokens."""
        return self.mask is not None and self.mask.deals_text

    def whole_loss(self, own: torch.Tensor) -> torch.Tensor:
        """The loss of the batch, from the loss of this process's tokens divided by the number of all.

        Its gradient is that of `own` times the number of processes, so that the mean of the gradients over the processes is
        that of a single process.
        """
        whole = own.detach().clone()
        distributed.all_reduce(whole, group=self.group)
        return whole + distributed.get_world_size(self.group) * (own - own.detach())

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the whole batch, (batch, tokens, vocabulary), from those of this process's tokens; 0 for padding."""
        assert self.tokens is not None
        is_own = self.tokens.is_image
        if self.deals_text or distributed.get_rank(self.group) == 0:
            is_own = is_own | self.tokens.is_text
        row, slot = is_own.nonzero(as_tuple=True)
        whole = logits.new_zeros(*self.shape, logits.shape[-1])
        whole[row, self.tokens.positions[row, slot]] = logits[row, slot]
        distributed.all_reduce(whole, group=self.group)
        return whole


def deals_text(text: int, images: int, size: int, fuses: bool) -> bool:
    """Whether text is dealt out to the processes of a group: if it is long, and more than the image tokens of a process.

    Otherwise, and without the fused kernels, each process runs all text tokens: for a share of the queries PyTorch's
    attention would need a mask of all pairs.

    Args:
        text, images: the number of text and of image tokens in the batch.
        size: the number of processes.
        fuses: whether the fused kernels compute the attention.
    """
    return fuses and size > 1 and text >= LONG_TEXT and text * size > images


def split_batch(model: Any, given: dict[str, Any], group: Any) -> SplitBatch:
    """The inputs of this process, from those of the whole batch.

    Args:
        model: a `DSVLForConditionalGeneration`.
        given: keyword arguments of its `forward` that are not None. `pixel_values` (or what is passed instead) may be those
            of this process alone, with `num_tiles` and `spatial_shapes` of all images.
        group: the process group.

    Raises:
        ValueError: for inputs that cannot be split, or that do not match each other.
    """
    config, decoder = model.config, model.model.language_model
    ids = _check_inputs(given)
    is_image = ids == config.image_token_id
    padding = given.get("attention_mask")
    real = torch.ones_like(is_image) if padding is None else padding.bool()
    targets = _targets(given, ids)
    is_text = ~is_image & real
    # Padding in front of the first token may have its label.
    padded = torch.zeros_like(real) if targets is None else ~is_image & ~real & (targets != -100)
    figures = [is_image.sum(-1), is_text.sum(-1), padded.sum(-1)]
    if targets is not None:
        figures.append(((targets != -100) & is_image).sum(-1))
    if (types := given.get("mm_token_type_ids")) is not None:
        figures.append(((types == 1) != is_image).sum(-1))
    image_counts, text_counts, padded_counts, *wrong = torch.stack(figures).tolist()  # the one copy to the host
    if types is not None and any(wrong.pop()):
        raise ValueError(
            f"mm_token_type_ids contradict input_ids, which hold {image_counts} image tokens (id {config.image_token_id}); "
            "pass those that the processor returned with these ids, or omit them."
        )
    if wrong and any(wrong[0]):
        raise ValueError(
            f"{sum(wrong[0])} image tokens are followed by a token with a label, but only one process of the group has "
            "their hidden states; put text between an image and the answer, as chat templates do."
        )
    others = {name: given[name] for name in _OTHERS if name in given}
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    dtype, kind = model.get_input_embeddings().weight.dtype, ids.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    fuses = kernel_choice.can_fuse(decoder.config, computed, ids.device, model.training)
    is_dealt = deals_text(sum(text_counts), sum(image_counts), size, fuses)
    if sum(image_counts) == 0:
        if not is_dealt:
            plain = {name: value for name, value in given.items() if name not in ("labels", "shift_labels")}
            return SplitBatch(plain if targets is None else plain | {"shift_labels": targets})
        given = {name: value for name, value in given.items() if name != "mm_encoder_outputs"} | _no_images(model, given)

    # Which process has which image
    shapes, num_tiles = given.get("spatial_shapes"), given.get("num_tiles")
    images = (given.get("mm_encoder_outputs") or {}).get("image")
    if images is not None:
        lengths = [len(tile) for tile in images.pooler_output]
    else:
        tiles = len(shapes) if shapes is not None else sum(image_counts) // config.image_seq_length
        lengths = config.tile_lengths(tiles, shapes)
    check_image_counts(image_counts, config.image_seq_length, lengths, whole_images=True)
    tile_lengths = lengths_by_image(lengths, None if num_tiles is None else num_tiles.tolist())
    sizes = list(map(sum, tile_lengths))
    owners = assign_images(_rows(sizes, image_counts), size)
    own = [number for number, owner in enumerate(owners) if owner == rank]
    own_tiles = tiles_of_images(tile_lengths, own)
    inputs = _own_images(config, given, own_tiles, len(lengths))
    if num_tiles is not None:
        inputs["num_tiles"] = num_tiles[own] if own else num_tiles.new_ones(1)
    document_ids = _documents(config, given, ids)
    if getattr(config, "numbered_images", 0):  # older code has no field
        numbers = given.get("image_numbers")
        if numbers is None:
            firsts = list(accumulate(map(len, tile_lengths), initial=0))[:-1]
            numbers = model.model.tile_numbers(is_image, lengths, num_tiles, document_ids)[firsts]
        inputs["image_numbers"] = numbers[own] if own else numbers.new_zeros(1)

    # Its tokens
    all_text, text_slots = is_text, -(-max(text_counts) // size) if is_dealt else 0
    if is_dealt:
        is_text = is_text & ((is_text.cumsum(-1) - 1) % size == rank)
        text_counts = [len(range(rank, count, size)) for count in text_counts]
        if rank:  # the first process has the loss of padding
            padded, padded_counts = torch.zeros_like(padded), [0] * len(padded_counts)
        if targets is not None and "num_items_in_batch" not in others:
            others["num_items_in_batch"] = (targets != -100).sum()
    owned = torch.zeros(len(lengths), dtype=torch.bool)
    owned[own_tiles] = True
    owned = owned.repeat_interleave(torch.tensor(lengths, dtype=torch.long)).to(ids.device, non_blocking=True)
    own_image = torch.zeros_like(is_image).masked_scatter_(is_image, owned)
    own_counts = [
        sum(tokens for tokens, owner in zip(row, of_row, strict=True) if owner == rank)
        for row, of_row in _paired(_rows(sizes, image_counts), owners)
    ]
    own_lengths = list(map(sum, zip(text_counts, padded_counts, own_counts, strict=True)))
    kept = max(own_lengths)
    blank = 0 if own else config.tile_lengths(1, inputs.get("spatial_shapes"))[0]
    slots = max(kept + blank, text_slots, 2)
    order = (is_text | padded | own_image).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :kept]
    order = nn.functional.pad(order, (0, slots - kept))
    filled = torch.arange(slots, device=ids.device) < torch.tensor(own_lengths, device=ids.device)[:, None]

    def gathered(whole: torch.Tensor, empty: Any) -> torch.Tensor:
        return whole.expand(ids.shape).gather(1, order).masked_fill(~filled, empty)

    is_text, is_own = gathered(is_text, False), gathered(own_image & real, False)
    inputs["input_ids"] = gathered(ids, 0 if config.image_token_id else 1)
    if blank:
        inputs["input_ids"][0, kept : kept + blank] = config.image_token_id  # hidden from all queries
    inputs["attention_mask"] = (is_text | is_own).long()
    inputs["position_ids"] = gathered(_positions(model, given, is_image, lengths), 0)
    if targets is not None:
        inputs["shift_labels"] = gathered(targets, -100)
    tokens = SplitTokens(
        positions=gathered(torch.arange(ids.shape[1], device=ids.device)[None], ids.shape[1]),
        is_text=is_text,
        is_image=is_own,
        text=text_counts,
        image=own_counts,
        dealt=all_text if is_dealt else None,
        dealt_slots=text_slots,
    )
    whole = torch.empty((*ids.shape, 0), dtype=dtype, device=ids.device)
    visible = visibilities(decoder.config, whole, padding, None, document_ids)
    mask = SplitMask.build(tokens, visible, decoder.config, computed, fuses, group, bool(lengths))
    return SplitBatch(inputs | others | {"use_cache": False}, mask, tokens, (ids.shape[0], ids.shape[1]), group)


def _check_inputs(given: dict[str, Any]) -> torch.Tensor:
    """The ids; raises `ValueError` for inputs that cannot be split."""
    known = {
        "input_ids",
        "attention_mask",
        "position_ids",
        "mm_token_type_ids",
        "document_ids",
        "labels",
        "shift_labels",
        "logits_to_keep",
        "num_tiles",
        "image_numbers",
        *PER_IMAGE,
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        *IMAGES,
        *_OTHERS,
    }
    off = ("logits_to_keep", "use_cache", "output_attentions", "output_hidden_states")
    asked = [name for name in given if name not in known or (name in off and given[name])]
    if "input_ids" not in given or asked:
        what = ", ".join(asked) or "no input_ids"
        raise ValueError(
            f"Image parallelism got {what}; it takes input_ids with pixel_values (or image_features, mm_encoder_outputs), "
            "masks, positions and labels of the whole batch."
        )
    ids = given["input_ids"]
    check_sequence(ids[..., None], given.get("attention_mask"), None)
    if getattr(given.get("attention_mask"), "ndim", 2) != 2:
        raise ValueError("Image parallelism needs a two-dimensional attention_mask, (batch, tokens), 0 where padded.")
    if sum(name in given for name in IMAGES) > 1:
        raise ValueError("Pass one of pixel_values, mm_encoder_outputs and image_features: they are the same images.")
    return ids


def _targets(given: dict[str, Any], ids: torch.Tensor) -> torch.Tensor | None:
    """The next token of each, -100 where it has no label."""
    for name in ("labels", "shift_labels"):
        if name in given:
            check_labels(name, given[name], ids)
    if "shift_labels" in given:
        return given["shift_labels"]
    labels = given.get("labels")
    return None if labels is None else nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


def _rows(sizes: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """The sizes of the images of each row, which has so many image tokens."""
    rows, remaining = [], list(sizes)
    for count in counts:
        row: list[int] = []
        while sum(row) < count:
            row.append(remaining.pop(0))
        rows.append(row)
    return rows


def _paired(rows: list[list[int]], owners: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Each row of images with their owners."""
    ends = accumulate(map(len, rows), initial=0)
    return zip(rows, [owners[start:end] for start, end in pairwise(ends)], strict=True)


def _own_images(config: Any, given: dict[str, Any], own: list[int], tiles: int) -> dict[str, Any]:
    """The images of this process; a blank one if it has none, so that tower and projector run in all processes.

    Args:
        own: the indices of its tiles.
        tiles: how many tiles the batch has.

    Raises:
        ValueError: if the number of images is neither that of the batch nor that of this process.
    """
    if "mm_encoder_outputs" in given:
        whole = given["mm_encoder_outputs"]["image"]
        encoded = whole.pooler_output
        images = [encoded[tile] for tile in own] or [torch.zeros_like(encoded[0])]
        return {"mm_encoder_outputs": {"image": type(whole)(pooler_output=images)}}  # the class tells who holds numbers
    name = next((name for name in IMAGES if name in given), None)
    found = 0 if name is None else len(given[name])
    if found not in (tiles, len(own)) or name is None:
        raise ValueError(
            f"The batch has {tiles} images or tiles, of which this process has {len(own)}, but {found} came with it; pass "
            "those of the whole batch, or those of this process."
        )
    parts = {key: given[key] for key in (name, *PER_IMAGE) if key in given}
    if own:
        return {key: value if len(value) == len(own) else value[own] for key, value in parts.items()}
    blank: dict[str, torch.Tensor] = blank_image(config)
    like = given[name]
    pixels = blank.pop("pixel_values") if name == "pixel_values" else like.new_zeros(1, *like.shape[1:])
    if name == "image_features":
        blank.pop("pixel_attention_mask", None)
    return {name: pixels.to(like)} | {key: value.to(like.device) for key, value in blank.items() if key in parts}


def _no_images(model: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What stands for the images of a batch that has none, so that tower and projector run: tensors of length 0."""
    if any(name in given for name in ("pixel_values", "image_features")):
        return {}
    config, device = model.config, given["input_ids"].device
    empty: dict[str, torch.Tensor] = {name: value[:0].to(device) for name, value in blank_image(config).items()}
    empty["pixel_values"] = empty["pixel_values"].to(model.model.vision_tower.dtype)
    if config.image_layout == "tiles":
        empty["num_tiles"] = torch.zeros(0, dtype=torch.long, device=device)
    return empty


def _documents(config: Any, given: dict[str, Any], ids: torch.Tensor) -> torch.Tensor | None:
    """The packed documents, as `DSVLModel.forward` finds them."""
    documents, positions = given.get("document_ids"), given.get("position_ids")
    padding = given.get("attention_mask")
    if documents is not None:
        return check_document_ids(documents, ids[..., None], padding, has_cache=False)
    if positions is None or padding is not None or config.image_positions != "token":
        return None
    return documents_of_positions(positions).expand(ids.shape)


def _positions(model: Any, given: dict[str, Any], is_image: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The positions of all tokens, (batch or 1, tokens)."""
    if "position_ids" in given:
        return given["position_ids"]
    documents = given.get("document_ids")
    if model.config.image_positions == "image":
        images = BaseModelOutputWithPooling(pooler_output=[range(length) for length in lengths])
        return model.model.make_position_ids(
            is_image.long(), is_image.shape[1], images, given.get("attention_mask"), documents, None
        )
    if documents is not None:
        return token_positions(documents)
    return torch.arange(is_image.shape[1], device=is_image.device)[None]


__all__ = ["IMAGES", "PER_IMAGE", "SplitBatch", "split_batch"]
