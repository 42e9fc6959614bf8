"""A KV cache that does not copy the images of an `ImageKVCache`.

Under `"mmca"` a text query has one softmax over text keys and another one over image keys. So they need not be stored
together: the cache keeps the images of a prompt as they are in the image KV cache, in 8 bits or on the host too, and beside
them the keys and values of text, which grow. Images of later turns are kept with the text.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ...masks_dsvl import IN_IMAGE, IN_TEXT, AttentionMask, Visibility, attention_scores, mmca_codes
from ...utils.transformers_names import DynamicLayer
from ..attention.gathered_mask import Slots
from ..attention.image_states import HostLayers, ImageStates, Softmax
from ..attention.key_rotation import KeyRotation, Turn
from ..attention.split_attention import merge
from .image_cache import ImageKVCache, pinned

# Queries that are computed at a time.
QUERIES_AT_ONCE = 256


class SharedImagesCache(DynamicCache):
    """A KV cache for `generate(..., image_cache=...)` that uses the images where they are, instead of a copy in it.

    An image KV cache in 8 bits or on the host makes such a cache of a `DynamicCache` by itself; with 16 bits, pass one. With
    hundreds of images it saves their memory and, in each step, the time to append a token to them. The rotated keys are its
    own, in as many bits, except on the host: there they are rotated whenever they are read.

    Args:
        config: the model's or the decoder's, as for `DynamicCache`.
    """


@dataclass
class SharedPrompt:
    """Which tokens of a prompt are in the image states, and which beside them.

    Attributes:
        image, rest: the slots of image tokens, (prompts, image slots), and of other tokens, (prompts, text slots).
        tokens: of the prompt.
        copies: rows of each prompt in the prefill.
        images_follow: whether later turns have images.
        group: the processes that hold the other images of the prompt, *optional*; see parallel/split_images.py.
    """

    image: Slots
    rest: Slots
    tokens: int
    copies: int = 1
    images_follow: bool = False
    group: Any = None


class SharedImagesLayer(DynamicLayer):
    """A layer whose `keys` and `values` are those of the tokens beside the images of a prompt.

    Args:
        number: its index.
        prompt: shared by all layers.
        states: the images on the device; or on the host, for all layers.
        turn: the rotation of keys on the host.
        dtype: the model's.
        keys, values: of the prompt's other tokens, (batch, key-value heads, text slots, head_dim).
    """

    def __init__(
        self,
        number: int,
        prompt: SharedPrompt,
        states: ImageStates | HostLayers,
        turn: Turn | None,
        dtype: torch.dtype,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.number, self.states, self.turn, self.images_dtype = number, states, turn, dtype
        self.prompt: SharedPrompt | None = prompt
        self.rows: torch.Tensor | None = None  # (batch,), the prompt of each row; None: as many consecutive rows for each

    def images(self, device: torch.device) -> ImageStates:
        """The images on a device, for each prompt or, after its rows have moved, for each row."""
        assert self.prompt is not None
        states = layer_images(self.states, self.number, self.prompt, self.turn, self.images_dtype, device)
        return states if self.rows is None else states.select(self.rows)

    def get_seq_length(self) -> int:
        """The number of tokens, those of images included."""
        if self.prompt is None:
            return super().get_seq_length()
        return self.prompt.tokens + self._following()

    def _following(self) -> int:
        """The number of tokens after the prompt."""
        assert self.prompt is not None
        return self.keys.shape[-2] - self.prompt.rest.index.shape[1]

    def prompts_of_rows(self) -> torch.Tensor:
        """The index of each row's prompt, (batch,)."""
        assert self.prompt is not None
        if self.rows is not None:
            return self.rows
        prompts = torch.arange(len(self.prompt.image.index), device=self.keys.device)
        return prompts.repeat_interleave(len(self.keys) // len(prompts))

    def _move_rows(self, index: torch.Tensor) -> None:
        """Let row i be what row index[i] was. With one prompt, all rows are alike."""
        if self.prompt is not None and len(self.prompt.image.index) > 1:
            self.rows = self.prompts_of_rows()[index.to(self.keys.device)]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._move_rows(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._move_rows(torch.as_tensor(indices))
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is not None:
            self.rows = self.rows.repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens at the end.

        Raises:
            ValueError: for tokens of the prompt, which are not in their order.
        """
        if self.prompt is not None and tokens_to_remove < -self._following():
            raise ValueError(
                f"The KV cache shares the images of its prompt, so only the {self._following()} tokens after it can be "
                f"removed, not {-tokens_to_remove}; run the shorter prompt over the image KV cache again."
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens, and the images; the layer is an ordinary one from then on."""
        super().reset()
        self.prompt = self.turn = self.rows = None
        del self.states

    def offload(self) -> None:
        raise ValueError("A KV cache that shares images cannot be offloaded; offload the image KV cache instead.")

    def build_mask(self, visibility: Visibility, token_types: torch.Tensor, layers: list[Any]) -> AttentionMask | None:
        """The mask of a forward call over the layers of a cache; None if they hold no image (see masks_dsvl.py)."""
        if self.prompt is None:
            return None
        return SharedImagesMask.build(visibility, token_types, layers)


@dataclass
class SharedImagesMask(AttentionMask):
    """`"mmca"` over shared images: a softmax over them, and one over the text beside them.

    Attributes:
        layers: of the cache.
        members: of the images, (batch, queries, image slots), True where a query sees a key.
        text, later_images: the same of the tokens beside them, (batch, queries, keys); None without later images.
    """

    layers: list[Any]
    members: torch.Tensor
    text: torch.Tensor
    later_images: torch.Tensor | None

    @classmethod
    def build(cls, visibility: Visibility, token_types: torch.Tensor, layers: list[Any]) -> "SharedImagesMask":
        """From the visibility of the whole sequence and its modality, (batch, tokens)."""
        first: SharedImagesLayer = layers[0]
        prompt = first.prompt
        assert prompt is not None
        codes = mmca_codes(visibility, token_types)[:, 0]
        rows = first.prompts_of_rows().to(codes.device)

        def of(slots: Slots, following: int = 0) -> torch.Tensor:
            """The codes of these slots and of the tokens after the prompt: (batch, queries, keys)."""
            index = slots.index.to(codes.device)[rows]
            gathered = codes.gather(2, index[:, None].expand(-1, codes.shape[1], -1))
            if slots.filled is not None:
                gathered = gathered * slots.filled.to(codes.device)[rows][:, None]
            return (
                torch.cat([gathered, codes[:, :, prompt.tokens : prompt.tokens + following]], -1) if following else gathered
            )

        if visibility.q_length > 1 and not prompt.images_follow:  # a generated token is text
            prompt.images_follow = bool((token_types[:, prompt.tokens :] == 1).any())
        beside = of(prompt.rest, visibility.kv_length - prompt.tokens)
        later_images = (beside & IN_IMAGE).bool() if prompt.images_follow else None
        return cls(layers, (of(prompt.image) & IN_IMAGE).bool(), (beside & IN_TEXT).bool(), later_images)

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
        if dropout > 0:
            raise ValueError(f"A KV cache that shares images takes no attention dropout, but it is {dropout}; call eval().")
        layer = self.layers[module.layer_idx]
        images, group = layer.images(query.device), layer.prompt.group
        members, text = self.members.to(query.device), self.text.to(query.device)
        outputs = []
        for start in range(0, query.shape[2], QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            part = query[:, :, some]
            grouped = part.unflatten(1, (key.shape[1], -1)) * scaling
            output, lse = images.attend(grouped, members[:, some], softcap)
            if group is not None:
                output, lse = merge(output, lse, group)
            scores = attention_scores(part, key, scaling, softcap)
            if self.later_images is not None:
                later = self.later_images[:, some].to(query.device)
                output = _joined(output, lse, *_attend(scores, later, value))
            output = output + _attend(scores, text[:, some], value)[0]
            outputs.append(output.to(query.dtype).flatten(1, 2).transpose(1, 2))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).contiguous(), None


def _attend(scores: torch.Tensor, members: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the members (batch, queries, keys): the output, and the logarithm of its sum.

    Args:
        scores: (batch, key-value heads, query heads of each, queries, keys).
        value: (batch, key-value heads, keys, head_dim).
    """
    batch, kv_heads, group, queries, keys = scores.shape
    rows = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~members[:, None, None], -torch.inf)
    state = Softmax(value.new_empty(batch * kv_heads, group * queries, value.shape[-1]))
    state.add(rows.view(batch * kv_heads, group * queries, keys), value.flatten(0, 1))
    output, lse = state.result()
    return output.view(batch, kv_heads, group, queries, -1), lse.view(batch, kv_heads, group, queries)


def _joined(one: torch.Tensor, one_lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """The output of one softmax over the keys of two, each 0 where it has none."""
    m = torch.maximum(one_lse, other_lse)
    m = m.masked_fill(m == -torch.inf, 0)
    one_weight, other_weight = (one_lse - m).exp()[..., None], (other_lse - m).exp()[..., None]
    total = one_weight + other_weight
    return (one * one_weight + other * other_weight) / total.masked_fill(total == 0, 1)


def shares_images(cache: Any, image_cache: ImageKVCache, model: Any, is_split: bool = False) -> bool:
    """Whether an empty KV cache is to use the images of an image KV cache where they are.

    Args:
        is_split: whether other processes hold further images of the prompt.

    Raises:
        ValueError: if it should but cannot.
    """
    if not (is_split or image_cache.is_quantized or image_cache.is_offloaded or isinstance(cache, SharedImagesCache)):
        return False
    how = "offloaded" if image_cache.is_offloaded else "in 8 bits" if image_cache.is_quantized else "shared"
    how = "spread over processes" if is_split else how
    whole = "image_cache.to(model.device, model.dtype)"
    layers = getattr(cache, "layers", [])
    is_dynamic = isinstance(cache, DynamicCache) and not cache.offloading
    if not is_dynamic or not all(isinstance(layer, DynamicLayer) for layer in layers):
        raise ValueError(
            f"The images are {how}, but a {type(cache).__name__} would hold a copy of them in 16 bits on the device; omit "
            f"cache_implementation, or pass {whole}."
        )
    if not getattr(model, "takes_masks_of_caches", False):
        raise ValueError(
            f"The images are {how}, which the code of this checkpoint does not know; refresh it (dsvl migrate code "
            f"DIR_OR_REPO), or pass {whole} with an ordinary KV cache."
        )
    return True


@dataclass
class SharedImages:
    """The images of some prompts, for a prefill and for the KV cache that it leaves.

    Attributes:
        prompt: which tokens they are.
        states: of each layer, rotated; or all on the host.
        turns: the rotations of the keys of each layer on the host.
        dtype: the model's.
    """

    prompt: SharedPrompt
    states: list[ImageStates] | HostLayers
    turns: list[Turn | None]
    dtype: torch.dtype

    @classmethod
    def build(
        cls,
        image_cache: ImageKVCache,
        rotation: KeyRotation,
        prompt: SharedPrompt,
        positions: torch.Tensor,
        order: torch.Tensor | None,
    ) -> "SharedImages":
        """From an image KV cache.

        Args:
            positions: of the image slots of all prompts, (slots,).
            order: the token in each slot; None if they are in order.
        """
        turns, tensors = rotation.turns(positions), image_cache.tensors
        if image_cache.is_offloaded:
            if order is not None:
                tensors = {name: pinned(tensor[:, order.to(tensor.device)]) for name, tensor in tensors.items()}
            return cls(prompt, HostLayers(tensors), turns, rotation.dtype)
        order = None if order is None else order.to(image_cache.device)
        states = []
        for number, turn in enumerate(turns):
            of_layer: dict[str, Any] = {
                name: tensor[number] if order is None else tensor[number, order] for name, tensor in tensors.items()
            }
            prompts = len(prompt.image.index)
            states.append(ImageStates.rotated(prompts=prompts, dtype=rotation.dtype, turn=turn, **of_layer))
        return cls(prompt, states, [None] * len(turns), rotation.dtype)

    def of_layer(self, number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (batch, image slots, key-value heads, head_dim)."""
        parts = layer_images(self.states, number, self.prompt, self.turns[number], self.dtype, device).dense()
        keys, values = (part.repeat_interleave(self.prompt.copies, 0) if self.prompt.copies > 1 else part for part in parts)
        return keys, values

    def fill(self, cache: Any, keys: torch.Tensor, values: torch.Tensor, devices: list[torch.device]) -> None:
        """Let an empty cache share them, beside the text (layers, batch, text slots, key-value heads, head_dim).

        Args:
            devices: of the layers.
        """
        keys, values = keys.transpose(2, 3), values.transpose(2, 3)
        cache.layer_class_to_replicate = None
        cache.layers = [
            SharedImagesLayer(
                number,
                self.prompt,
                self.states if isinstance(self.states, HostLayers) else self.states[number].to(device),
                self.turns[number],
                self.dtype,
                keys[number].to(device),
                values[number].to(device),
            )
            for number, device in enumerate(devices)
        ]


def layer_images(
    states: Any, number: int, prompt: SharedPrompt, turn: Turn | None, dtype: torch.dtype, device: torch.device
) -> ImageStates:
    """The images of a layer on a device."""
    if not isinstance(states, HostLayers):
        return (states[number] if isinstance(states, list) else states).to(device)
    tensors = states.layer(number, device)
    return ImageStates.rotated(prompts=len(prompt.image.index), dtype=dtype, turn=turn, keep_bits=False, **tensors)


__all__ = ["SharedImages", "SharedImagesCache", "SharedImagesLayer", "SharedPrompt", "shares_images"]
