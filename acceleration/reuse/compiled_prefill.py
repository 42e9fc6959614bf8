"""Compiled calls of the decoder for prompts over encoded images: their text over a KV cache, and the images themselves.

The text of a prompt attends to a KV cache in which the images, and the tokens of earlier turns, are in place already. All
lengths are symbols of one graph, so a conversation compiles nothing from turn to turn.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...cache_dsvl import cached_types
from ...masks_dsvl import HIDDEN, IMAGE, TEXT, AttentionMask, attention_scores, visibilities, weighted_values, with_keys
from ...transformers_dsvl import ALL_ATTENTION_FUNCTIONS
from ..attention.few_queries import address_table, branch_bias, few_queries
from ..attention.gathered_mask import Slots
from ..attention.kernel_choice import has_step_kernels
from ..attention.key_rotation import KeyRotation
from ..decoder_run import OwnValueMask, layer_types, layers_of, run_decoder
from ..recording import let_compiled_functions_record
from .cache_slots import CacheSlots, own_tensors, slots_of
from .image_cache import ImageKVCache

TEXT_MULTIPLE = 32  # the text of a prompt is padded to a multiple of it
FEW_QUERIES = 256  # up to so many, plain products with all slots take less time than two calls of sdpa
PARTS = 4  # into which the kernels divide a KV cache, whose length a graph does not know
TILES_ALONE = 4  # up to so many tiles go through the compiled tower, one by one


@dataclass
class TextOverCacheMask(AttentionMask):
    """`"mmca"` of text tokens over the tokens of a KV cache, and over each other; in evaluation mode, so without dropout.

    Attributes:
        keys, values: for each layer, the slots of a KV cache, (batch, key-value heads, slots, head_dim).
        text, image: (batch, queries, slots), True where a query sees a text or an image token of the cache.
        own: (batch, queries, queries), the same of the new tokens; every query sees itself.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    text: torch.Tensor
    image: torch.Tensor
    own: torch.Tensor

    @classmethod
    def build(
        cls,
        index: torch.Tensor,
        filled: torch.Tensor,
        kinds: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> "TextOverCacheMask":
        """From the slots (batch, text) of the text tokens in the cache, whether each is one, and the modality of all slots
        (batch, slots), `HIDDEN` where a slot is empty, padded, or of this text."""
        slots = torch.arange(kinds.shape[1], device=kinds.device)
        seen, kinds = slots <= index[..., None], kinds[:, None]
        own = (index[:, None] <= index[..., None]) & filled[:, None]
        itself = torch.arange(index.shape[1], device=index.device)
        return cls(keys, values, seen & (kinds == TEXT), seen & (kinds == IMAGE), own | (itself == itself[:, None]))

    def attend(
        self,
        backend: str,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        cached_keys, cached_values = self.keys[module.layer_idx], self.values[module.layer_idx]
        if query.shape[2] > FEW_QUERIES:
            options = kwargs | {"scaling": scaling, "dropout": dropout} | ({} if softcap is None else {"softcap": softcap})
            text = torch.cat([self.text, self.own], -1)[:, None]
            keys, values = torch.cat([cached_keys, key], 2), torch.cat([cached_values, value], 2)
            image, sees_image = with_keys(self.image[:, None])
            attend = ALL_ATTENTION_FUNCTIONS[backend]
            of_images = attend(module, query, cached_keys, cached_values, image, **options)[0]
            return attend(module, query, keys, values, text, **options)[0] + torch.where(sees_image, of_images, 0), None
        # Both branches share the products with the cache: no slot is of both.
        text, image, own = (mask[:, None, None] for mask in (self.text, self.image, self.own))
        dtype = torch.promote_types(query.dtype, torch.float32)
        cached = attention_scores(query, cached_keys, scaling, softcap).to(dtype)
        new = attention_scores(query, key, scaling, softcap).to(dtype).masked_fill(~own, -torch.inf)
        text_m = torch.maximum(cached.masked_fill(~text, -torch.inf).amax(-1, keepdim=True), new.amax(-1, keepdim=True))
        image_m = cached.masked_fill(~image, -torch.inf).amax(-1, keepdim=True)
        image_m = image_m.masked_fill(image_m == -torch.inf, 0)
        of_text = (cached - text_m).masked_fill(~text, -torch.inf).exp()
        of_images = (cached - image_m).masked_fill(~image, -torch.inf).exp()
        new = (new - text_m).exp()
        text_l = of_text.sum(-1, keepdim=True) + new.sum(-1, keepdim=True)
        image_l = of_images.sum(-1, keepdim=True)
        weights = of_text / text_l + of_images / image_l.masked_fill(image_l == 0, 1)
        output = weighted_values(weights.to(query.dtype), cached_values)[0]
        return output + weighted_values((new / text_l).to(query.dtype), value)[0], None


@dataclass
class TextByAddressMask(AttentionMask):
    """As `TextOverCacheMask`, in kernels that read the KV cache where a table says it is.

    Attributes:
        table, last, own: the `table`, `last` and own `bias` of `launch_few_queries`, the table of all layers.
    """

    table: torch.Tensor
    last: torch.Tensor
    own: torch.Tensor

    def attend(
        self,
        backend: str,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        seen = self.own, None, self.last, self.table[module.layer_idx]
        return few_queries(query, key, value, *seen, scaling, softcap or 0.0, PARTS), None


def run_text(
    decoder: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    index: torch.Tensor,
    filled: torch.Tensor,
    kinds: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the text of prompts over a KV cache, which does not change.

    Args:
        input_ids, position_ids: of the text, (batch, text).
        index, filled, kinds, keys, values: see `TextOverCacheMask`.

    Returns:
        The last hidden state, (batch, text, hidden), and the keys and values of the text (layers, batch, text, key-value
        heads, head_dim).
    """
    return _run_text(decoder, input_ids, position_ids, TextOverCacheMask.build(index, filled, kinds, keys, values))


def run_text_by_address(
    decoder: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    index: torch.Tensor,
    filled: torch.Tensor,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `run_text`, over the KV cache of an `address_table`."""
    mask = TextByAddressMask(table, index, branch_bias(filled, torch.zeros_like(filled)))
    return _run_text(decoder, input_ids, position_ids, mask)


def _run_text(
    decoder: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, mask: AttentionMask
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    embeds = decoder.get_input_embeddings()(input_ids)
    return run_decoder(decoder, embeds, position_ids, dict.fromkeys(layer_types(decoder), mask))[:3]


def run_images(decoder: PreTrainedModel, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values (layers, tokens, key-value heads, head_dim) of image tokens (1, tokens, hidden), at position 0."""
    zeros = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    masks = dict.fromkeys(layer_types(decoder), OwnValueMask())
    _, keys, values, _ = run_decoder(decoder, embeds, zeros, masks)
    return keys[:, 0], values[:, 0]


def encode_tile(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Tower and projector for one tile: (tokens, hidden)."""
    return model.encode(pixel_values).pooler_output[0]


def place_images(
    rotation: KeyRotation,
    keys: torch.Tensor,
    values: torch.Tensor,
    is_image: torch.Tensor,
    position_ids: torch.Tensor,
    slots: int,
    copies: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put images into the slots of prompts, where other slots get anything: (layers, batch, key-value heads, slots,
    head_dim).

    Args:
        rotation: of the keys.
        keys, values: of the images, (layers, image tokens, key-value heads, head_dim).
        is_image, position_ids: of the prompts, (batch, tokens). Image tokens are in the order of the images.
        slots: at least as many as tokens.
        copies: the number of consecutive rows with the same images.
    """
    rows, tokens = is_image.shape
    number = (is_image[::copies].flatten().cumsum(0) - 1).clamp(min=0).view(-1, tokens)
    if copies > 1:
        number = number.repeat_interleave(copies, dim=0)
    more = (0, slots - tokens)
    number, positions = (nn.functional.pad(one, more).flatten() for one in (number, position_ids))
    placed = rotation(keys.index_select(1, number), positions, in_parts=False), values.index_select(1, number)
    divided = [states.unflatten(1, (rows, slots)).permute(0, 1, 3, 2, 4).contiguous() for states in placed]
    return divided[0], divided[1]


def own_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `torch.compile` for one function: it takes `guard_filter_fn` out of the dict `options` that it gets."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}


def recording_options(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of `torch.compile` with which a GPU records CUDA graphs, unless they say how to compile already.

    Args:
        model: a `DSVLModel`.
        options: those that the user passed.
    """
    is_asked = bool(options.keys() & {"mode", "options"})
    is_recorded = model.language_model.device.type == "cuda" and not is_asked
    return options | ({"mode": "reduce-overhead"} if is_recorded else {})


class _Compiled:
    """A compiled function, in whose graph lengths are symbols, and nothing else.

    Args:
        function: the function.
        options: of `torch.compile`.
    """

    def __init__(self, function: Callable, options: dict[str, Any]) -> None:
        self._run = torch.compile(function, **own_options(options))
        self._forms: set[Any] = set()

    def __call__(
        self, *inputs: Any, form: Any = None, states: Iterable[torch.Tensor] = (), lengths: tuple[int, ...] = ()
    ) -> Any:
        """Run the function.

        Args:
            form: calls of another form have a graph of their own.
            states: keys and values, whose axes but `lengths` are no lengths. A length that equals a number of heads at the
                first call would be tied to it.
        """
        if form in self._forms:
            return self._run(*inputs)
        for one in states:
            torch._dynamo.mark_static(one, [axis for axis in range(one.ndim) if axis not in lengths])
        # Else every norm's epsilon would be an input, which is made a tensor in every call.
        with torch._dynamo.config.patch(specialize_float=True):
            outputs = self._run(*inputs)
        self._forms.add(form)
        return outputs


class CompiledPrefill:
    """The compiled functions of a model.

    Args:
        model: a `DSVLModel`.
        options: of `torch.compile`.

    Attributes:
        is_causal: whether the decoder has causal attention alone.
        images: `run_images`.
        tile: `encode_tile`.
    """

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        options = {"dynamic": True} | options
        self.images = _Compiled(run_images, options)
        self._text, self._place = _Compiled(run_text, options), _Compiled(place_images, options)
        # A GPU records CUDA graphs of what the host would start more slowly than it runs: a tile, and a text of each length,
        # a multiple of TEXT_MULTIPLE. Their outputs are copied.
        recorded = recording_options(model, options)
        self.tile = _Compiled(encode_tile, recorded | {"dynamic": False})
        self._text_by_address = _Compiled(run_text_by_address, recorded)
        config = model.config.text_config
        seen = visibilities(config, torch.empty((1, 2, 0), dtype=model.dtype, device=model.device), None, None)
        self.is_causal = all(one.is_causal and one.local_size is None for one in seen.values())

    def slots_for(self, decoder: PreTrainedModel, cache: Any, past: int, rows: int, tokens: int) -> int | None:
        """How many slots of a KV cache a prompt would see: as `slots_of`; None if its text cannot be computed here, which
        takes sdpa, causal attention alone, and one device.

        Args:
            past: the number of tokens that the cache holds.
            rows, tokens: of the prompts.
        """
        device = decoder.get_input_embeddings().weight.device
        if (
            not self.is_causal
            or decoder.training
            or decoder.config._attn_implementation != "sdpa"
            or next(layers_of(decoder)[-1].parameters()).device != device
        ):
            return None
        return slots_of(cache, past, rows, tokens)

    def prefill(
        self,
        decoder: PreTrainedModel,
        images: tuple[ImageKVCache, KeyRotation] | None,
        cache: Any,
        past: int,
        slots: int,
        input_ids: torch.Tensor,
        is_image: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        text: Slots,
        text_counts: Sequence[int],
        copies: int,
    ) -> torch.Tensor:
        """Run the text of prompts over their images and what a KV cache holds; fill the cache.

        Args:
            images: the images of the prompts, and how their keys are rotated; None if the prompts have none.
            past: the number of tokens that the cache holds.
            slots: what `slots_for` returned.
            input_ids, is_image, position_ids: of the new tokens, (batch, tokens).
            attention_mask: of all tokens, (batch, past + tokens); None if there is no padding.
            text: the text among the new tokens.
            text_counts: the number of tokens of text of each row.
            copies: the number of consecutive rows with the same images.

        Returns:
            The last hidden state of the text, (batch, text, hidden).
        """
        rows, tokens = input_ids.shape
        kinds = torch.full((rows, slots), HIDDEN, dtype=torch.int8, device=input_ids.device)
        placed = None
        if images is not None:
            new = slots - past
            cached, rotation = images
            own_states = cached.keys, cached.values
            # Of its own strides, to which a graph is tied: it may be a part of the positions of all tokens.
            position_ids = position_ids.clone(memory_format=torch.contiguous_format)
            inputs = rotation, *own_states, is_image, position_ids, new, copies
            placed = self._place(*inputs, form=(rows == 1, copies), states=own_states, lengths=(1,))
            seen = is_image if attention_mask is None else is_image & attention_mask[:, past:].bool()
            kinds[:, past : past + tokens].masked_fill_(seen, IMAGE)
        if past > 0:
            known = cached_types(cache)
            assert known is not None  # `can_extend` asks for them
            types = known[:, :past].to(kinds.device)
            kinds[:, :past] = types if attention_mask is None else types.masked_fill(attention_mask[:, :past] == 0, HIDDEN)
        own = CacheSlots.extend(cache, past, tokens, slots, placed)
        index, filled = text.index + past, text.filled
        of_text = input_ids.gather(1, text.index), position_ids.gather(1, text.index)
        is_text = torch.ones_like(index, dtype=torch.bool) if filled is None else filled
        hidden, *states = self._run_text(decoder, (*of_text, index, is_text), kinds, own)
        own.write(cache, index, filled, text_counts[0], *states)
        return hidden

    def _run_text(
        self,
        decoder: PreTrainedModel,
        text: tuple[torch.Tensor, ...],
        kinds: torch.Tensor,
        own: CacheSlots,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the function `run_text`."""
        is_single, is_long = len(kinds) == 1, text[0].shape[1] > FEW_QUERIES
        device, dtype = own.keys[0].device, own.keys[0].dtype
        # The decoder's own keys and queries, which the kernels get beside these, are of its dtype.
        is_plain = dtype == decoder.dtype and not torch.is_autocast_enabled(device.type)
        if is_plain and not is_long and has_step_kernels(device, dtype):
            bias = branch_bias(kinds == TEXT, kinds == IMAGE)
            table = address_table(own.keys, own.values, bias)
            if table is not None:
                let_compiled_functions_record(device)
                return self._text_by_address(decoder, *text, table, form=is_single, states=(table,))
        keys, values = own_tensors(own.keys), own_tensors(own.values)
        form = is_single, keys[0].is_contiguous(), is_long
        return self._text(decoder, *text, kinds, keys, values, form=form, states=(*keys, *values), lengths=(0, 2))


__all__ = [
    "TEXT_MULTIPLE",
    "TILES_ALONE",
    "CompiledPrefill",
    "TextOverCacheMask",
    "own_options",
    "recording_options",
    "run_text",
]
