"""Image parallelism: the images of a batch are spread over the processes of a group, through all layers of the decoder.

Under `"mmca"` an image token needs nothing but itself. Every process of a group gets the same batch and runs all text
tokens, but only its own images: through the tower, the projector and the decoder, at their positions in the whole batch.
Text queries see the images of all processes (attention/split_attention.py). Each layer sends text queries x heads x
(head_dim + 1) numbers, whatever the number of images. Of a long text (`split_batch.deals_text`) every process runs a share.
"""

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import distributed, nn
from transformers import LogitsProcessor, LogitsProcessorList

from ...masks_dsvl import AttentionMask
from ...transformers_dsvl import CACHE
from ..reuse.image_cache import changing_ropes, lengths_by_image
from .split_batch import IMAGES, PER_IMAGE, split_batch
from .split_images import SplitImageKVCache, assign_images, tiles_of_images

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

    All processes of the group call the model with the same inputs, of the whole batch, at the same time. Each runs its own
    images, and all text tokens or, with the fused kernels, a share of a long text. Losses are those of a single process.
    After `backward`, the mean of the gradients over the processes of the group is the gradient of a single process: that is
    what `DistributedDataParallel` and DeepSpeed make of them. With labels, `logits` are not returned (pass
    `skip_logits=False` in evaluation for those of all tokens).

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
            if images := [name for name in IMAGES if name in given]:
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
        returns_dict = given.pop("return_dict", model.config.return_dict)
        batch = split_batch(model, given, group)
        token = _mask.set(batch.mask)
        try:
            outputs = forward(**batch.inputs, return_dict=True)
        finally:
            _mask.reset(token)
        if batch.deals_text and outputs.loss is not None:
            outputs.loss = batch.whole_loss(outputs.loss)
        if batch.mask is not None and outputs.logits is not None:
            outputs.logits = batch.gather(outputs.logits)
        return outputs if returns_dict else outputs.to_tuple()

    return split_forward


def _encoding_over(model: Any, group: Any, encode_images: Any) -> Any:
    """`encode_images` of a model, for the images of this process."""

    @wraps(encode_images)
    def split_encode(pixel_values: torch.Tensor, chunk_size: int = 16, **options: Any) -> SplitImageKVCache:
        number, shapes, num_tiles = len(pixel_values), options.get("spatial_shapes"), options.pop("num_tiles", None)
        lengths = model.config.tile_lengths(number, shapes)
        tile_lengths = lengths_by_image(lengths, None if num_tiles is None else [int(tiles) for tiles in num_tiles])
        numbers = model.model.image_reuse.numbers_of(options.pop("image_numbers", None), len(tile_lengths), num_tiles)
        owners = assign_images([list(map(sum, tile_lengths))], distributed.get_world_size(group))
        rank = distributed.get_rank(group)
        own = [image for image, owner in enumerate(owners) if owner == rank]
        tiles = tiles_of_images(tile_lengths, own)
        encoded = None
        if own:
            images = {key: value[tiles] for key, value in options.items() if key in PER_IMAGE and value is not None}
            others = {key: value for key, value in options.items() if key not in PER_IMAGE}
            counts = [len(tile_lengths[image]) for image in own]
            others["image_numbers"] = numbers and [numbers[image] for image in own]
            encoded = encode_images(pixel_values[tiles], chunk_size, num_tiles=counts, **images, **others)
        return SplitImageKVCache(encoded, tile_lengths, owners, group, numbers)

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
            images = {name: kwargs.pop(name) for name in (*PER_IMAGE, "num_tiles") if kwargs.get(name) is not None}
            if getattr(model.config, "numbered_images", 0):  # older code has no field
                ids = kwargs["input_ids"] if inputs is None else inputs
                images["image_numbers"] = _numbers(model, ids, pixels, images, kwargs)
            kwargs["image_cache"] = model.encode_images(pixels, **images)
            kwargs["image_cache"].numbers = None  # they are those of the call: nothing to compare
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


def _numbers(
    model: Any, ids: torch.Tensor, pixels: torch.Tensor, images: dict[str, torch.Tensor], kwargs: dict[str, Any]
) -> list[int]:
    """The number of each image of a batch of prompts, as `generate` counts them."""
    given, tiles = kwargs.pop("image_numbers", None), images.get("num_tiles")
    lengths = model.config.tile_lengths(len(pixels), images.get("spatial_shapes"))
    numbers = model._image_numbers(ids == model.config.image_token_id, lengths, tiles, given, kwargs)
    if numbers is None:  # `prefill` says what does not fit
        return list(range(1, 1 + (len(pixels) if tiles is None else len(tiles))))
    firsts = slice(None) if tiles is None else (tiles.cumsum(0) - tiles).cpu()
    return numbers[firsts].tolist()


class ScoresOfFirst(LogitsProcessor):
    """Lets all processes of a group choose by the scores of the first, as rounding may differ."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.contiguous()
        distributed.broadcast(scores, distributed.get_global_rank(self.group, 0), group=self.group)
        return scores


__all__ = ["ScoresOfFirst", "check_image_parallel", "image_parallel", "split_mask"]
