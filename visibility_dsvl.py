"""What transformers' own mask builders know: which key a query may see, modality aside.

Nothing here waits for a device while a model trains: a causal decoder's, a sliding window's and packed conversations'
queries see an interval of the keys whose ends are known without looking (`visible_edges`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import AttentionMaskInterface, PreTrainedConfig

from .transformers_dsvl import (
    CACHE,
    causal_mask_function,
    create_masks_for_generate,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

HIDDEN, TEXT, IMAGE = -1, 0, 1  # the modality of a key; text and image as in `mm_token_type_ids`

# The name is registered in a table that all models of a process share, and the remote code of two checkpoints may be two
# versions of this file: each copy registers under its own module's name.
_CAPTURE = f"dsvl_visibility:{__name__}"


class ConfigView:
    """A live view of a decoder's configuration; a subclass names another attention implementation.

    Everything else is read from and written to the configuration behind it, so `set_attn_implementation`, deepcopy and
    pickle need no special case, and config.json never contains our names.
    """

    def __init__(self, text_config: PreTrainedConfig) -> None:
        self.__dict__["_text_config"] = text_config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_text_config" not in self.__dict__:  # during copy and unpickling
            raise AttributeError(name)
        return getattr(self.__dict__["_text_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._text_config, name, value)


class _CapturingConfig(ConfigView):
    """The view that makes transformers' mask builders hand over what they know instead of building a mask."""

    _attn_implementation = _CAPTURE

    def get_text_config(self, *args: Any, **kwargs: Any) -> "_CapturingConfig":
        return self


@dataclass
class Visibility:
    """Which key a query may see, modality aside. Positions are absolute: they count from the start of the sequence."""

    mask_function: Callable  # (batch, head, query position, key position) -> bool, elementwise on tensors
    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int | torch.Tensor  # position of the first query
    kv_offset: int  # position of the first key (a sliding cache forgets)
    padding: torch.Tensor | None  # (batch, positions), False where padded
    is_causal: bool  # nothing but causality and padding hides a key
    device: torch.device
    # The last so many positions, its own included, are what a query sees of its conversation; None if that is not known.
    reach: int | None = None
    # Where several conversations may share a row, (batch, positions): the position at which a token's own begins ...
    document_start: torch.Tensor | None = None
    undivided: "Visibility | None" = None  # ... and what is seen if no two do

    def key_types(self, token_types: torch.Tensor) -> torch.Tensor:
        """The modality of every key, `HIDDEN` where padded or not yet written: (batch, keys)."""
        end = self.kv_offset + self.kv_length
        types = token_types
        if self.padding is not None:
            if self.padding.shape[1] < types.shape[1]:
                raise ValueError(
                    f"attention_mask covers {self.padding.shape[1]} tokens, but {types.shape[1]} are seen, cached ones "
                    "included; pass the mask of the whole sequence."
                )
            types = types.masked_fill(~self.padding[:, : types.shape[1]], HIDDEN)
        if types.shape[1] < end:
            types = nn.functional.pad(types, (0, end - types.shape[1]), value=HIDDEN)
        return types[:, self.kv_offset : end]

    def query_positions(self) -> torch.Tensor:
        """(queries,)"""
        return torch.arange(self.q_length, device=self.device) + self.q_offset

    def key_positions(self) -> torch.Tensor:
        """(keys,)"""
        return torch.arange(self.kv_length, device=self.device) + self.kv_offset

    def dense(self) -> torch.Tensor:
        """Everything as one boolean tensor: (batch, 1, queries, keys)."""
        return sdpa_mask(
            batch_size=self.batch_size,
            q_length=self.q_length,
            kv_length=self.kv_length,
            q_offset=self.q_offset,
            kv_offset=self.kv_offset,
            mask_function=self.mask_function,
            attention_mask=self.padding,
            allow_is_causal_skip=False,
            device=self.device,
        )

    def divided(self, position_ids: torch.Tensor) -> "Visibility":
        """The same among packed conversations, none of which sees another: positions (batch or 1, queries) do not go on
        where one begins. As transformers has it, but without asking the device whether there are several."""
        position_ids = position_ids.to(self.device).expand(self.batch_size, -1)
        begins = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
        documents, mask_function = begins.cumsum(-1), self.mask_function

        def within(batch: Any, head: Any, q: Any, k: Any) -> torch.Tensor:
            seen = mask_function(batch, head, position_ids[batch, q], position_ids[batch, k])
            return seen & (documents[batch, q] == documents[batch, k])

        start = torch.where(begins, self.query_positions(), 0).cummax(-1).values
        return replace(self, mask_function=within, is_causal=False, document_start=start, undivided=self)

    def settled(self) -> "Visibility":
        """Without packed conversations if there are none: this waits for the device. A compiled graph cannot ask."""
        if self.document_start is None or self.undivided is None or torch.compiler.is_compiling():
            return self
        return self if bool((self.document_start > 0).any()) else self.undivided


def _capture_visibility(
    mask_function: Callable,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Visibility:
    is_causal = mask_function is causal_mask_function or (
        allow_is_causal_skip and (local_size is None or kv_length <= local_size)
    )
    reach = kv_offset + kv_length if is_causal else None
    if not is_causal and local_size is not None and not torch.compiler.is_compiling():  # which does not look into functions
        reach = local_size if _same(mask_function, sliding_window_causal_mask_function(local_size)) else None
    return Visibility(
        mask_function=mask_function,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        padding=attention_mask,
        is_causal=is_causal,
        device=torch.device(device),
        reach=reach,
    )


AttentionMaskInterface.register(_CAPTURE, _capture_visibility)


def _same(one: Any, other: Any) -> bool:
    """Whether two functions run the same code over the same numbers, so that they are one function."""
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        return one.__code__ is other.__code__ and _same(
            *(tuple(c.cell_contents for c in f.__closure__ or ()) for f in (one, other))
        )
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) is int and one == other


def visibilities(
    text_config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    position_ids: torch.Tensor | None,
) -> dict[str | None, Visibility]:
    """Ask transformers' mask builders what is visible: one answer for each layer type, or one under the key None."""
    # Only there do they look for packed conversations; and they would wait for the device to tell.
    packed = position_ids if attention_mask is None and cache is None else None
    built = create_masks_for_generate(
        config=_CapturingConfig(text_config),
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        **{CACHE: cache},
        position_ids=None if packed is not None else position_ids,
    )
    visible = built if isinstance(built, dict) else {None: built}
    return visible if packed is None else {kind: one.divided(packed) for kind, one in visible.items()}


# How many pairs of a mask function are looked at together.
_PAIRS_AT_ONCE = 2**24


def visible_edges(visibility: Visibility) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """The place of the first key that each query may see and the place behind the last, (batch, queries), modality and
    padding aside. (None, None) if these are the first of all and its own; None if what it may see is no such interval, or
    one that goes back from a query to the next.

    Causality, sliding windows and packed conversations are known. Any other mask function is asked for every pair, a few
    queries at a time, and the answer is looked at on the host, once for each forward call.
    """
    if visibility.is_causal:
        return None, None
    if visibility.reach is not None:
        positions = visibility.query_positions()
        since = positions + 1 - visibility.reach
        if visibility.document_start is not None:
            since = torch.maximum(since, visibility.document_start)
        shape = visibility.batch_size, visibility.q_length
        first, last = since - visibility.kv_offset, positions + 1 - visibility.kv_offset
        return first.clamp(min=0).expand(shape), last.expand(shape)
    return None if torch.compiler.is_compiling() else _looked_up_edges(visibility)


def _looked_up_edges(visibility: Visibility) -> tuple[torch.Tensor, torch.Tensor] | None:
    rows, keys, device = visibility.batch_size, visibility.kv_length, visibility.device
    batch = torch.arange(rows, device=device)[:, None, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    q_positions = visibility.query_positions()[None, :, None]
    kv_positions = visibility.key_positions()[None, None]
    first, last, counts = [], [], []
    for part in q_positions.split(max(_PAIRS_AT_ONCE // (rows * keys), 1), dim=1):
        seen = visibility.mask_function(batch, head, part, kv_positions).expand(rows, part.shape[1], keys).to(torch.uint8)
        first.append(seen.argmax(-1))
        last.append(keys - seen.flip(-1).argmax(-1))
        counts.append(seen.sum(-1))
    since, up_to, count = (torch.cat(part, dim=1) for part in (first, last, counts))
    is_interval = (count > 0) & (count == up_to - since)
    never_back = (since.diff(dim=1) >= 0).all() & (up_to.diff(dim=1) >= 0).all()
    return (since, up_to) if bool(is_interval.all() & never_back) else None
