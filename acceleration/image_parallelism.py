"""Image parallelism: the images of a batch are spread over the processes of a group, through all layers of the decoder.

Under `"mmca"` an image token needs nothing but itself. Every process of a group gets the same batch and runs all text
tokens, but only its own images: through the tower, the projector and the decoder, at their positions in the whole batch.
Text queries see the images of all processes (split_attention.py). Each layer sends text queries x heads x (head_dim + 1)
numbers, whatever the number of images.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import distributed, nn
from transformers import LogitsProcessor, LogitsProcessorList

from ..inputs_dsvl import check_document_ids, check_image_counts, check_labels, check_num_tiles, check_sequence
from ..masks_dsvl import AttentionMask, visibilities
from ..positions_dsvl import documents_of_positions, token_positions
from ..transformers_dsvl import CACHE, BaseModelOutputWithPooling
from ..vision_dsvl import blank_image
from .image_cache import changing_ropes
from .split_attention import SplitMask, SplitTokens
from .split_images import SplitImageKVCache, assign_images

# The mask of the forward call that runs in this context.
_mask: ContextVar[AttentionMask | None] = ContextVar("dsvl_image_parallel_mask", default=None)


def split_mask() -> AttentionMask | None:
    """The mask of the image-parallel forward call that is running; None outside of one."""
    return None if torch.compiler.is_compiling() else _mask.get()


def check_image_parallel(model: Any, training: bool = True) -> None:
    """Refuse a model whose images cannot be spread over processes with the results of one.

    Args:
        model: a `DSVLForConditionalGeneration`.
        training: whether dropout applies.

    Raises:
        ValueError: naming the setting and the remedy.
    """
    config, decoder = model.config, model.model.language_model
    attention, backend = config.multimodal_attention, decoder.config._attn_implementation
    if attention != "mmca":
        raise ValueError(
            f"Image parallelism needs multimodal_attention='mmca', but it is {attention!r}, under which image tokens see "
            "other tokens; choose 'mmca', or drop image parallelism."
        )
    if backend == "eager":
        raise ValueError(
            "Image parallelism with attn_implementation='eager', which returns the weights of all keys; choose 'sdpa', or "
            "'flex_attention' where the decoder caps its scores."
        )
    if config.reversed_images:
        raise ValueError(
            "Image parallelism with reversed_images=True: the places of images depend on the images of other processes; "
            "use a model without reversed_images."
        )
    if ropes := changing_ropes(config.text_config):
        raise ValueError(
            f"Image parallelism with rope_type={ropes[0]!r}: rotary positions depend on the length of the sequence, of "
            "which each process has a part; use a decoder with another rope_type."
        )
    if not training:
        return
    dropout = {name: module.p for name, module in decoder.named_modules() if isinstance(module, nn.Dropout) and module.p > 0}
    attention_dropout = getattr(decoder.config, "attention_dropout", None) or 0
    if attention_dropout > 0:
        dropout["attention_dropout"] = attention_dropout
    if dropout:
        name = next(iter(dropout))
        raise ValueError(
            f"Image parallelism with dropout in the decoder ({name}: {dropout[name]:g}): text, which all processes compute, "
            "would differ between them; set it to 0 (--lora-dropout 0, attention_dropout=0)."
        )
    if model.model.compiles_layers:
        raise ValueError(
            "Image parallelism with compiled decoder layers: a graph cannot exchange the results of attention; drop "
            "compile_decoder_layers (--compile-decoder-layers)."
        )


@contextlib.contextmanager
def image_parallel(model: Any, group: Any = None) -> Iterator[None]:
    """Spread the images of a model's forward calls over the processes of a group.

    All processes of the group call the model with the same inputs, of the whole batch, at the same time. Each runs all text
    tokens and its own images. Losses are those of a single process. After `backward`, the mean of the gradients over the
    processes of the group is the gradient of a single process: that is what `DistributedDataParallel` and DeepSpeed make of
    them. With labels, `logits` are not returned (pass `skip_logits=False` in evaluation for those of all tokens).

    `generate` answers with the same tokens in all processes; each encodes its own images and keeps their keys and values.
    `encode_images` returns a `SplitImageKVCache`, for `generate(..., image_cache=...)`. Sampling takes the random numbers of
    the first process.

    Args:
        model: a `DSVLForConditionalGeneration`, or PEFT's wrapper around one; not one of DDP or DeepSpeed around it.
        group: a `torch.distributed` process group, *optional*, defaults to None: all processes.

    Raises:
        ValueError: if the model does not allow it, see `check_image_parallel`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_image_parallel(base, base.training)
    if distributed.get_world_size(group) == 1:
        yield
        return
    group = distributed.group.WORLD if group is None else group
    replaced = {name: base.__dict__.get(name) for name in ("forward", "encode_images", "generate")}
    base.forward = _forward_over(base, group, base.forward)
    base.encode_images = _encoding_over(base, group, base.encode_images)
    base.generate = _generation_over(base, group, base.generate)
    try:
        yield
    finally:
        for name, method in replaced.items():
            if method is None:
                delattr(base, name)
            else:
                setattr(base, name, method)


def _forward_over(model: Any, group: Any, forward: Any) -> Any:
    """`forward` of a model, over the images of this process."""
    signature = inspect.signature(forward)

    @wraps(forward)
    def split_forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if name != "kwargs"}
        given |= bound.arguments.get("kwargs", {})
        given = {name: value for name, value in given.items() if value is not None}
        if CACHE in given or "past_key_values" in given:  # a step of `generate`
            if images := [name for name in _IMAGES if name in given]:
                raise ValueError(
                    f"Image parallelism got {images[0]} with a KV cache; pass the whole conversation to generate, or call "
                    "the model without a KV cache."
                )
            return forward(**given)
        if "labels" in given or "shift_labels" in given:
            given.setdefault("skip_logits", True)
        if torch.is_grad_enabled() and not given.get("skip_logits"):
            raise ValueError(
                "Image parallelism returns logits without gradients only, as each process has the image tokens of its own "
                "images; pass labels, or call the model under torch.no_grad()."
            )
        batch = split_batch(model, given, group)
        token = _mask.set(batch.mask)
        try:
            outputs = forward(**batch.inputs)
        finally:
            _mask.reset(token)
        if batch.mask is not None and isinstance(outputs, dict) and outputs.get("logits") is not None:
            outputs["logits"] = batch.gather(outputs["logits"])
        return outputs

    return split_forward


def _encoding_over(model: Any, group: Any, encode_images: Any) -> Any:
    """`encode_images` of a model, for the images of this process."""

    @wraps(encode_images)
    def split_encode(pixel_values: torch.Tensor, chunk_size: int = 16, **options: Any) -> SplitImageKVCache:
        number, shapes, num_tiles = len(pixel_values), options.get("spatial_shapes"), options.pop("num_tiles", None)
        lengths = model.config.tile_lengths(number, shapes)
        tiles_of = [1] * number if num_tiles is None else [int(tiles) for tiles in num_tiles]
        check_num_tiles(sum(tiles_of), number)
        ends = list(accumulate(tiles_of, initial=0))
        tile_lengths = [lengths[start:end] for start, end in pairwise(ends)]
        owners = assign_images([list(map(sum, tile_lengths))], distributed.get_world_size(group))
        rank = distributed.get_rank(group)
        own = [image for image, owner in enumerate(owners) if owner == rank]
        tiles = [tile for image in own for tile in range(ends[image], ends[image + 1])]
        encoded = None
        if own:
            images = {key: value[tiles] for key, value in options.items() if key in _PER_IMAGE and value is not None}
            others = {key: value for key, value in options.items() if key not in _PER_IMAGE}
            counts = [tiles_of[image] for image in own]
            encoded = encode_images(pixel_values[tiles], chunk_size, num_tiles=counts, **images, **others)
        return SplitImageKVCache(encoded, tile_lengths, owners, group)

    return split_encode


def _generation_over(model: Any, group: Any, generate: Any) -> Any:
    """`generate` of a model, over the images of all processes."""

    @wraps(generate)
    def split_generate(
        inputs: torch.Tensor | None = None, *args: Any, logits_processor: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        pixels = kwargs.pop("pixel_values", None)
        if unknown := [name for name in ("image_features", "mm_encoder_outputs") if kwargs.get(name) is not None]:
            raise ValueError(f"generate over several processes got {unknown[0]}; pass pixel_values or an image_cache.")
        if pixels is not None:
            images = {name: kwargs.pop(name) for name in (*_PER_IMAGE, "num_tiles") if kwargs.get(name) is not None}
            kwargs["image_cache"] = model.encode_images(pixels, **images)
        first = distributed.get_global_rank(group, 0)
        processors = LogitsProcessorList([*(logits_processor or []), ScoresOfFirst(group)])
        device = model.device
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        shared = state.to(device)
        distributed.broadcast(shared, first, group=group)
        if device.type == "cuda":
            torch.cuda.set_rng_state(shared.cpu(), device)
        else:
            torch.set_rng_state(shared)
        return generate(inputs, *args, logits_processor=processors, **kwargs)

    return split_generate


class ScoresOfFirst(LogitsProcessor):
    """Lets all processes of a group choose by the scores of the first, as rounding may differ."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.contiguous()
        distributed.broadcast(scores, distributed.get_global_rank(self.group, 0), group=self.group)
        return scores


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

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the whole batch, (batch, tokens, vocabulary), from those of this process's tokens; 0 for padding."""
        assert self.tokens is not None
        is_own = self.tokens.is_image
        if distributed.get_rank(self.group) == 0:
            is_own = is_own | self.tokens.is_text
        row, slot = is_own.nonzero(as_tuple=True)
        whole = logits.new_zeros(*self.shape, logits.shape[-1])
        whole[row, self.tokens.positions[row, slot]] = logits[row, slot]
        distributed.all_reduce(whole, group=self.group)
        return whole


# What `forward` takes beside tokens and images; None of it depends on the length of the rows.
_OTHERS = ("num_items_in_batch", "skip_logits", "return_dict")
_IMAGES = ("pixel_values", "image_features", "mm_encoder_outputs")
_PER_IMAGE = ("pixel_attention_mask", "spatial_shapes")


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
    is_text = replicated = ~is_image & real
    if targets is not None:  # padding in front of the first token may have its label
        replicated = is_text | (~is_image & (targets != -100))
    figures = [is_image.sum(-1), is_text.sum(-1), replicated.sum(-1)]
    if targets is not None:
        figures.append(((targets != -100) & is_image).sum(-1))
    if (types := given.get("mm_token_type_ids")) is not None:
        figures.append(((types == 1) != is_image).sum(-1))
    image_counts, text_counts, replicated_counts, *wrong = torch.stack(figures).tolist()  # the one copy to the host
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
    if sum(image_counts) == 0:
        plain = {name: value for name, value in given.items() if name not in ("labels", "shift_labels")}
        return SplitBatch(plain if targets is None else plain | {"shift_labels": targets})

    # Which process has which image
    shapes, num_tiles = given.get("spatial_shapes"), given.get("num_tiles")
    images = (given.get("mm_encoder_outputs") or {}).get("image")
    if images is not None:
        lengths = [len(tile) for tile in images.pooler_output]
    else:
        tiles = len(shapes) if shapes is not None else sum(image_counts) // config.image_seq_length
        lengths = config.tile_lengths(tiles, shapes)
    check_image_counts(image_counts, config.image_seq_length, lengths, whole_images=True)
    tiles_of = [1] * len(lengths) if num_tiles is None else num_tiles.tolist()
    check_num_tiles(sum(tiles_of), len(lengths))
    ends = list(accumulate(tiles_of, initial=0))
    sizes = [sum(lengths[start:end]) for start, end in pairwise(ends)]
    owners = assign_images(_rows(sizes, image_counts), distributed.get_world_size(group))
    rank = distributed.get_rank(group)
    own = [number for number, owner in enumerate(owners) if owner == rank]
    own_tiles = [tile for number in own for tile in range(ends[number], ends[number + 1])]
    inputs = _own_images(config, given, own_tiles, len(lengths))
    if num_tiles is not None:
        inputs["num_tiles"] = num_tiles[own] if own else num_tiles.new_ones(1)

    # Its tokens
    owned = torch.zeros(len(lengths), dtype=torch.bool)
    owned[own_tiles] = True
    owned = owned.repeat_interleave(torch.tensor(lengths)).to(ids.device, non_blocking=True)
    own_image = torch.zeros_like(is_image).masked_scatter_(is_image, owned)
    own_counts = [
        sum(size for size, owner in zip(row, of_row, strict=True) if owner == rank)
        for row, of_row in _paired(_rows(sizes, image_counts), owners)
    ]
    own_lengths = [text + image for text, image in zip(replicated_counts, own_counts, strict=True)]
    kept = max(own_lengths)
    blank = 0 if own else config.tile_lengths(1, inputs.get("spatial_shapes"))[0]
    slots = max(kept + blank, 2)
    order = (replicated | own_image).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :kept]
    order = nn.functional.pad(order, (0, slots - kept))
    filled = torch.arange(slots, device=ids.device) < torch.tensor(own_lengths, device=ids.device)[:, None]

    def gathered(whole: torch.Tensor, empty: Any) -> torch.Tensor:
        return whole.expand(ids.shape).gather(1, order).masked_fill(~filled, empty)

    is_text, is_own = gathered(is_text, False), gathered(own_image & real, False)
    inputs["input_ids"] = gathered(ids, 0 if config.image_token_id else 1)
    if blank:
        inputs["input_ids"][0, kept : kept + blank] = config.image_token_id  # hidden from all queries
    inputs["attention_mask"] = (is_text | is_own).long()
    document_ids = _documents(config, given, ids)
    inputs["position_ids"] = gathered(_positions(model, given, is_image, lengths), 0)
    if targets is not None:
        inputs["shift_labels"] = gathered(targets, -100)
    tokens = SplitTokens(
        positions=gathered(torch.arange(ids.shape[1], device=ids.device)[None], ids.shape[1]),
        is_text=is_text,
        is_image=is_own,
        text=text_counts,
        image=own_counts,
    )
    dtype = model.get_input_embeddings().weight.dtype
    whole = torch.empty((*ids.shape, 0), dtype=dtype, device=ids.device)
    visible = visibilities(decoder.config, whole, padding, None, document_ids)
    mask = SplitMask.build(tokens, visible, decoder.config, dtype, model.training, group)
    return SplitBatch(inputs | others | {"use_cache": False}, mask, tokens, tuple(ids.shape), group)


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
        "spatial_shapes",
        "pixel_attention_mask",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        *_IMAGES,
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
    if sum(name in given for name in _IMAGES) > 1:
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
        encoded = given["mm_encoder_outputs"]["image"].pooler_output
        images = [encoded[tile] for tile in own] or [torch.zeros_like(encoded[0])]
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=images)}}
    name = next((name for name in _IMAGES if name in given), None)
    found = 0 if name is None else len(given[name])
    if found not in (tiles, len(own)) or name is None:
        raise ValueError(
            f"The batch has {tiles} images or tiles, of which this process has {len(own)}, but {found} came with it; pass "
            "those of the whole batch, or those of this process."
        )
    parts = {key: given[key] for key in (name, "pixel_attention_mask", "spatial_shapes") if key in given}
    if own:
        return {key: value if len(value) == len(own) else value[own] for key, value in parts.items()}
    blank: dict[str, torch.Tensor] = blank_image(config)
    like = given[name]
    pixels = blank.pop("pixel_values") if name == "pixel_values" else like.new_zeros(1, *like.shape[1:])
    if name == "image_features":
        blank.pop("pixel_attention_mask", None)
    return {name: pixels.to(like)} | {key: value.to(like.device) for key, value in blank.items() if key in parts}


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


__all__ = ["SplitBatch", "check_image_parallel", "image_parallel", "split_batch", "split_mask"]
