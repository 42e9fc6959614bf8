"""Prefill of a prompt's text alone, over images of a `ImageKVCache` (see reuse_dsvl.py).

The decoder runs once over the text tokens, at their own positions. In its attention a text query sees the text keys of
this call and the rotated keys of the images, each as far as the decoder's own mask allows. Then text and images are put
into the KV cache in the order of the prompt, which is what an ordinary prefill leaves there.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import Cache, DynamicCache

from .attention_dsvl import masked_attention
from .cache_dsvl import remember_types
from .image_cache_dsvl import ImageKVCache
from .reuse_dsvl import DSVLReuseMixin
from .transformers_dsvl import ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, DynamicLayer
from .visibility_dsvl import Visibility, visibilities

# Queries of which a compiled decoder computes attention by plain products.
_FEW_QUERIES = 128


@dataclass
class Slots:
    """Some tokens of every row of a prompt, in order and padded on the left to equally many.

    Attributes:
        index: (batch, slots) columns of the prompt; where a slot is empty, of some other token.
        filled: (batch, slots), or None where every slot is.
    """

    index: torch.Tensor
    filled: torch.Tensor | None

    @classmethod
    def of(cls, members: torch.Tensor, counts: list[int], step: int = 1) -> "Slots":
        """Those of members (batch, tokens), of which the rows have so many; slots come in multiples of a step, if that is
        more than 1, and some may then always be empty."""
        slots = min(-(-max(counts) // step) * step, members.shape[1])
        index = members.to(torch.uint8).argsort(dim=-1, stable=True)[:, members.shape[1] - slots :]
        return cls(index, None if step == 1 and min(counts) == slots else members.gather(1, index))

    def rows(self, tokens: int) -> torch.Tensor:
        """Flat rows of (batch x tokens, and one more for the empty slots): (batch x slots,)."""
        batch = self.index.shape[0]
        rows = self.index + torch.arange(batch, device=self.index.device)[:, None] * tokens
        return (rows if self.filled is None else torch.where(self.filled, rows, batch * tokens)).flatten()


@dataclass
class TextOverImages:
    """The attention of one layer type in such a prefill; called in the place of a backend.

    Attributes:
        keys, values: of the images, (layers, batch, image slots, key-value heads, head_dim).
        text_mask, image_mask: what the backend takes; None where it is plainly causal.
        sees_image: (batch, text slots, 1, 1), False where no image is seen.
    """

    keys: torch.Tensor
    values: torch.Tensor
    text_mask: Any
    image_mask: Any
    sees_image: torch.Tensor | None

    def __call__(
        self, backend: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        # Of so few queries sdpa's kernels give a GPU too little to do at a time; compiled, plain products take a fifth less.
        few = torch.compiler.is_compiling() and backend == "sdpa" and query.shape[2] <= _FEW_QUERIES

        def branch(key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
            if backend == "eager" or (few and mask is not None):
                return masked_attention(module, query, key, value, mask, **kwargs)
            return ALL_ATTENTION_FUNCTIONS["sdpa" if mask is None else backend](module, query, key, value, mask, **kwargs)[0]

        keys, values = (part[module.layer_idx].transpose(1, 2).to(key.device) for part in (self.keys, self.values))
        image_output = branch(keys, values, self.image_mask)
        if self.sees_image is not None:
            image_output = torch.where(self.sees_image, image_output, 0)
        return branch(key, value, self.text_mask) + image_output, None

    def to(self, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> "TextOverImages":
        """Move the masks: a model spread over devices by accelerate calls this."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("text_mask", "image_mask", "sees_image"):
            moved[name] = moved[name].to(device) if moved[name] is not None else None
        return TextOverImages(**moved)


def attention_over_images(
    visibility: Visibility,
    text: Slots,
    image: Slots,
    keys: torch.Tensor,
    values: torch.Tensor,
    backend: str,
    softcapped: bool,
) -> TextOverImages:
    """The attention of a layer type, from what of the whole prompt it would let a query see."""
    image_filled = image.filled
    if visibility.padding is not None:  # an image token may be hidden as well
        seen = visibility.padding.gather(1, image.index)
        image_filled = seen if image_filled is None else seen & image_filled

    def sees_text(batch: Any, head: Any, q: Any, k: Any) -> torch.Tensor:
        seen = visibility.mask_function(batch, head, text.index[batch, q], text.index[batch, k])
        # An empty slot sees itself, lest it be NaN; nothing else sees it.
        return seen if text.filled is None else (seen & text.filled[batch, k]) | (q == k)

    def sees_image(batch: Any, head: Any, q: Any, k: Any) -> torch.Tensor:
        seen = visibility.mask_function(batch, head, text.index[batch, q], image.index[batch, k])
        return seen if image_filled is None else seen & image_filled[batch, k]

    def build(function: Callable, slots: Slots) -> Any:
        return ALL_MASK_ATTENTION_FUNCTIONS[backend](
            batch_size=visibility.batch_size,
            q_length=text.index.shape[1],
            kv_length=slots.index.shape[1],
            mask_function=function,
            attention_mask=None,
            allow_is_causal_skip=False,
            dtype=keys.dtype,
            device=visibility.device,
        )

    plainly_causal = visibility.is_causal and text.filled is None and backend != "eager" and not softcapped
    text_mask = None if plainly_causal else build(sees_text, text)
    image_mask, any_image = build(sees_image, image), None
    if backend == "sdpa":
        any_image = image_mask.any(-1, keepdim=True)
        image_mask = image_mask | ~any_image  # a row without a key is NaN in some kernels; its result is not used
        text_mask, image_mask = _added(text_mask, keys.dtype), _added(image_mask, keys.dtype)
    elif backend == "eager":
        any_image = (image_mask == 0).any(-1, keepdim=True)
    return TextOverImages(
        keys=keys,
        values=values,
        text_mask=text_mask,
        image_mask=image_mask,
        sees_image=None if any_image is None else any_image.transpose(1, 2),
    )


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as what is added to scores, which sdpa would make of it in every layer."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


class DSVLTextPrefillMixin(DSVLReuseMixin):
    """What `DSVLModel` does to run a prompt over images that are encoded already."""

    @torch.no_grad()
    def prefill_text(
        self,
        input_ids: torch.Tensor,
        image_cache: ImageKVCache,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        copies: int = 1,
    ) -> tuple[torch.Tensor, Cache]:
        """Run the text tokens of prompts, and fill a KV cache with text and images.

        Args:
            input_ids: (batch, tokens); every image holds `image_seq_length` copies of `image_token_id`, in the order of
                `image_cache`; every row ends with text.
            cache: an empty KV cache of any kind; a dynamic one by default.
            attention_mask: (batch, tokens), 0 where padded, on the left.
            position_ids: (batch, tokens); by default they count what is not padded, as in `generate`.
            copies: every so many rows are one prompt with one set of images, as beams are.

        Returns:
            The last hidden state of every row's last token, (batch, 1, hidden), and the cache.

        Raises:
            ValueError: if places and images do not match, the KV cache is not empty, or the image KV cache is not this
                model's.
        """
        rotation = self.rotation_of(image_cache)
        if cache is None:
            cache = DynamicCache(config=self.language_model.config)
        if int(cache.get_seq_length()) > 0:
            raise ValueError(
                f"The KV cache holds {int(cache.get_seq_length())} tokens, but with an image KV cache a prompt "
                "starts afresh, which costs its text alone; pass the whole conversation and an empty KV cache."
            )
        batch, tokens = input_ids.shape
        device = image_cache.device
        input_ids = input_ids.to(device)
        is_image = input_ids == self.config.image_token_id
        is_text = ~is_image
        if attention_mask is not None:
            attention_mask = attention_mask.to(device)
            is_text = is_text & attention_mask.bool()
        if position_ids is None:
            seen = attention_mask if attention_mask is not None else torch.ones_like(input_ids)
            position_ids = (seen.long().cumsum(-1) - 1).clamp(min=0)
        position_ids = position_ids.to(device).expand(batch, tokens)

        # All that the host must know, in one wait for the device.
        told = torch.stack([is_image.sum(-1), is_text.sum(-1), is_text[:, -1].long()]).tolist()
        image_counts, text_counts, ends_with_text = told
        order = self._image_order(image_counts, len(image_cache), copies)
        if not all(ends_with_text):
            raise ValueError(
                f"Row {ends_with_text.index(0)} of the prompts ends with an image or with padding, but the image KV cache "
                "holds nothing that could be continued; end prompts with text, and pad them on the left."
            )
        text, image = Slots.of(is_text, text_counts, self._text_step), Slots.of(is_image, image_counts)
        if order != list(range(len(image_cache))):
            image_cache = image_cache[order]
        keys, values = image_cache.keys.flatten(1, 2), image_cache.values.flatten(1, 2)
        keys = rotation(keys, position_ids.gather(1, image.index).flatten(), self._turn_keys)

        # Before the decoder runs: what is large is moved while the host still prepares the rest.
        padded = any(i + t < tokens for i, t in zip(image_counts, text_counts, strict=True))
        image_rows, text_rows = image.rows(tokens), text.rows(tokens)
        whole = [_room(states, batch * tokens, padded).index_copy_(1, image_rows, states) for states in (keys, values)]

        decoder = self.language_model
        config = decoder.config
        embeds = decoder.get_input_embeddings()(input_ids.gather(1, text.index))
        softcapped = getattr(config, "attn_logit_softcapping", None) is not None
        prompt = torch.empty((batch, tokens, 0), dtype=embeds.dtype, device=device)
        attention = {
            layer_type: attention_over_images(
                visibility,
                text,
                image,
                keys.unflatten(1, (batch, -1)),
                values.unflatten(1, (batch, -1)),
                config._attn_implementation,
                softcapped,
            )
            for layer_type, visibility in visibilities(config, prompt, attention_mask, None, None).items()
        }
        hidden, text_keys, text_values, devices = self._run_decoder(
            decoder, embeds, position_ids.gather(1, text.index), attention
        )

        for part, states in zip(whole, (text_keys, text_values), strict=True):
            part.index_copy_(1, text_rows, states.flatten(1, 2))
        new_keys, new_values = (part[:, :-1].unflatten(1, (batch, tokens)).transpose(2, 3) for part in whole)
        for number, device in enumerate(devices):
            _fill(cache, number, new_keys[number].to(device), new_values[number].to(device))
        remember_types(cache, is_image.long(), may_hold_images=True)
        return hidden[:, -1:].clone(), cache  # what a CUDA graph returned is overwritten by its next run

    def _image_order(self, image_counts: list[int], images: int, copies: int) -> list[int]:
        """Which image takes which place, row by row; rows with fewer places than others get any image before.

        Raises:
            ValueError: if places and images do not match.
        """
        if images == 0:
            raise ValueError("The image KV cache holds no image; leave it out.")
        per_image = self.config.image_seq_length
        counts = image_counts[::copies]
        if any(count % per_image for count in counts) or sum(counts) != images * per_image:
            raise ValueError(
                f"The samples hold {counts} image tokens, {sum(counts)} in all, but there are {images} images of "
                f"{per_image} in the image KV cache; pass as many as the texts name, in the order of their places "
                "(image_cache[[0, 2]] picks some), and do not truncate image tokens."
            )
        places = max(counts) // per_image
        order: list[int] = []
        first = 0
        for count in counts:
            own = list(range(first, first + count // per_image))
            order += ([0] * (places - len(own)) + own) * copies
            first += len(own)
        return order


def _room(states: torch.Tensor, rows: int, padded: bool) -> torch.Tensor:
    """For keys or values of so many tokens, and a last row that takes what belongs nowhere; 0 if some tokens are padding.

    Args:
        states: of the images among these tokens, (layers, tokens, heads, head_dim).
    """
    room = states.new_empty(len(states), rows + 1, *states.shape[-2:])
    return room.zero_() if padded else room


def _fill(cache: Cache, number: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Let a layer of an empty cache hold these (batch, heads, tokens, head_dim)."""
    layer: Any = cache.layers[number] if number < len(cache.layers) else None
    if cache.offloading or type(layer) is not DynamicLayer:
        cache.update(keys, values, number)
        return
    # What `update` comes to, without its copy.
    layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
    layer.is_initialized = True


__all__ = ["DSVLTextPrefillMixin"]
