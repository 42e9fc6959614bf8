"""`"mmca"` over gathered tokens: text queries are gathered once, and the backend runs twice, over the gathered text keys and
over the gathered image keys. Image queries take part in no product."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...inputs_dsvl import gather_unique_rows
from ...masks_dsvl import IMAGE, TEXT, AttentionMask, Visibility, own_values, with_keys
from ...transformers_dsvl import ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS

# Smaller parts of the image branch cost more than they save.
LEAST_PART = 256


@dataclass
class Slots:
    """Tokens of one kind, gathered: each row has as many slots as the row with most of them.

    Attributes:
        index: (batch, slots), indices of the tokens in their row, in order. An empty slot holds some other token's index; no
            index appears twice.
        filled: (batch, slots); None where every slot is known to be filled.
    """

    index: torch.Tensor
    filled: torch.Tensor | None

    @classmethod
    def gather(cls, members: torch.Tensor, counts: Sequence[int], multiple_of: int = 1) -> "Slots":
        """Members (batch, tokens) at the end of their slots, empty slots first.

        Args:
            counts: the number of members of each row.
            multiple_of: of what the number of slots is a multiple, if there are enough tokens.
        """
        slots = min(-(-max(counts) // multiple_of) * multiple_of, members.shape[1])
        index = members.to(torch.uint8).argsort(dim=-1, stable=True)[:, members.shape[1] - slots :]
        return cls(index, None if multiple_of == 1 and min(counts) == slots else members.gather(1, index))

    @classmethod
    def gather_kinds(cls, kinds: Sequence[torch.Tensor], least: int = 1) -> list["Slots"]:
        """Several kinds of members (batch, tokens), each at the beginning of its slots.

        Args:
            least: the least number of slots.
        """
        counts = torch.stack([members.sum(-1) for members in kinds])
        # A compiled graph cannot ask for the counts, so it has a slot for each token. All kinds are asked for at once, as
        # this waits for the device.
        known = None if torch.compiler.is_compiling() else counts.tolist()
        gathered = []
        for number, members in enumerate(kinds):
            slots = members.shape[1] if known is None else max(*known[number], least)
            index = members.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :slots]
            is_full = known is not None and min(known[number]) == index.shape[1]
            filled = None if is_full else torch.arange(index.shape[1], device=members.device) < counts[number][:, None]
            gathered.append(cls(index, filled))
        return gathered

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "Slots":
        """One empty slot in each row."""
        index = torch.zeros(rows, 1, dtype=torch.long, device=device)
        return cls(index, torch.zeros_like(index, dtype=torch.bool))

    def followed_by(self, later: "Slots", tokens: int) -> "Slots":
        """These slots of the first so many tokens, and then those of the tokens after them."""
        index = torch.cat([self.index, later.index + tokens], dim=1)
        if self.filled is None and later.filled is None:
            return Slots(index, None)
        filled = [
            torch.ones_like(one.index, dtype=torch.bool) if one.filled is None else one.filled for one in (self, later)
        ]
        return Slots(index, torch.cat(filled, dim=1))

    def every(self, step: int) -> "Slots":
        """Those of every so-manieth row."""
        return Slots(self.index[::step], None if self.filled is None else self.filled[::step])

    def rows(self, tokens: int) -> torch.Tensor:
        """The indices in a flattened (batch x tokens): (batch, slots)."""
        return self.index + torch.arange(len(self.index), device=self.index.device)[:, None] * tokens


def gathered_branch_mask(
    visibility: Visibility,
    backend: str,
    dtype: torch.dtype,
    queries: Slots,
    keys: Slots,
    own_keys_from: int | None = None,
) -> Any:
    """A backend's mask of gathered queries over gathered keys.

    Args:
        visibility: of the whole sequences.
        backend: "eager", "sdpa" or "flex_attention".
        dtype: of an additive mask.
        queries, keys: the gathered tokens; empty slots of keys are hidden.
        own_keys_from: *optional*; slot i of the queries sees slot `own_keys_from + i` of the keys even if it is empty, for
            kernels that return NaN for a query without keys.
    """
    q_positions, kv_positions = queries.index + visibility.q_offset, keys.index + visibility.kv_offset

    def sees(batch: Any, head: Any, q: Any, k: Any) -> torch.Tensor:
        seen = visibility.mask_function(batch, head, q_positions[batch, q], kv_positions[batch, k])
        if keys.filled is None:
            return seen
        seen = seen & keys.filled[batch, k]
        return seen if own_keys_from is None else seen | (q + own_keys_from == k)

    return ALL_MASK_ATTENTION_FUNCTIONS[backend](
        batch_size=visibility.batch_size,
        q_length=queries.index.shape[1],
        kv_length=keys.index.shape[1],
        mask_function=sees,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=visibility.device,
    )


def settled(visibility: Visibility) -> Visibility:
    """Without the borders of packed documents if there is only one in each row. This waits for the device, which a compiled
    graph cannot."""
    if visibility.document_start is None or visibility.undivided is None or torch.compiler.is_compiling():
        return visibility
    return visibility if bool((visibility.document_start > 0).any()) else visibility.undivided


@dataclass
class ImagePart:
    """Consecutive text queries that see the same number of image keys, or fewer.

    Attributes:
        first, last: the queries.
        keys: how many of the image keys they see at most.
        mask: (batch, 1, queries, keys); None if every query sees all of these.
    """

    first: int
    last: int
    keys: int
    mask: torch.Tensor | None


@dataclass
class GatheredMask(AttentionMask):
    """The mask over gathered tokens. Queries and keys are those of one forward call.

    Attributes:
        text_queries: (batch, text queries), rows of the flattened (batch x queries).
        text_keys, image_keys: (batch, keys of the kind), rows of the flattened (batch x keys).
        text_filled: (batch, text queries, 1, 1), which slots of the queries are filled; None where all are.
        own_key: (queries,), index of each query's own key.
        text_mask: the backend's mask; None where it is causal, for which sdpa has the fastest kernels.
        image_mask: the backend's mask.
        sees_image: (batch, text queries, 1, 1); None where the backend itself returns 0 for a query without keys.
        image_parts: on a CPU with "sdpa", the image branch in parts.
    """

    text_queries: torch.Tensor
    text_keys: torch.Tensor
    image_keys: torch.Tensor
    text_filled: torch.Tensor | None
    own_key: torch.Tensor
    text_mask: Any
    image_mask: Any
    sees_image: torch.Tensor | None
    image_parts: list[ImagePart] | None = None

    @classmethod
    def build(
        cls,
        visibility: Visibility,
        token_types: torch.Tensor,
        text_config: PreTrainedConfig,
        dtype: torch.dtype,
        compiled: bool = False,
    ) -> "GatheredMask":
        """For one layer type; for the arguments see `masks.build_mask`."""
        backend = text_config._attn_implementation
        visibility = settled(visibility)
        key_types = visibility.key_types(token_types)
        kinds = visibility.query_types(token_types) == TEXT, key_types == TEXT, key_types == IMAGE
        # A length of 1 would be a graph of its own.
        queries, text, image = Slots.gather_kinds(kinds, least=2 if compiled else 1)
        # Without a cache, the gathered text queries and keys are the same tokens in the same order, so they are causal among
        # themselves. (Unwritten keys of a static cache are hidden, and so never gathered.)
        starts_empty = isinstance(visibility.q_offset, int) and visibility.q_offset == 0
        same_text = starts_empty and queries.index.shape == text.index.shape
        # No causal kernel of sdpa caps scores.
        softcapped = getattr(text_config, "attn_logit_softcapping", None) is not None
        is_causal = visibility.is_causal and same_text and not softcapped
        text_mask = None if is_causal else gathered_branch_mask(visibility, backend, dtype, queries, text)
        image_mask, sees_image, image_parts = gathered_branch_mask(visibility, backend, dtype, queries, image), None, None
        if backend == "sdpa":
            if visibility.device.type == "cpu" and not compiled and not torch.compiler.is_compiling():
                image_parts = split_image_branch(image_mask)
            image_mask, sees_image = with_keys(image_mask)
        filled = queries.filled
        if filled is None and compiled:  # the next batch may have empty slots
            filled = torch.ones_like(queries.index, dtype=torch.bool)
        mask = cls(
            text_queries=queries.rows(visibility.q_length),
            text_keys=text.rows(visibility.kv_length),
            image_keys=image.rows(visibility.kv_length),
            text_filled=None if filled is None else filled[:, :, None, None],
            own_key=visibility.query_positions() - visibility.kv_offset,
            text_mask=text_mask,
            image_mask=image_mask,
            sees_image=sees_image,
            image_parts=image_parts,
        )
        if compiled:
            mask.mark_dynamic()
        return mask

    @property
    def text_rows(self) -> torch.Tensor:
        """(text queries,), rows of the flattened (batch x queries), and those of the tokens in empty slots."""
        return self.text_queries.flatten()

    def to(self, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> "GatheredMask":
        moved = super().to(device, non_blocking=non_blocking)
        moved.image_parts = None
        return moved

    def mark_dynamic(self) -> None:
        """Tell the compiler that the next batch has more or fewer text and image tokens."""
        slots = (self.text_queries, self.text_keys, self.image_keys, self.text_filled, self.sees_image)
        for states, dims in [*((part, [1]) for part in slots), (self.text_mask, [2, 3]), (self.image_mask, [2, 3])]:
            if isinstance(states, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(states, dims)

    def attend(
        self, backend: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        text_query = gather_tokens(query, self.text_queries)

        def branch(rows: torch.Tensor, mask: Any) -> torch.Tensor:
            attend = ALL_ATTENTION_FUNCTIONS["sdpa" if mask is None else backend]
            return attend(module, text_query, gather_tokens(key, rows), gather_tokens(value, rows), mask, **kwargs)[0]

        output = branch(self.text_keys, self.text_mask)
        if self.image_parts is None:
            image_output = branch(self.image_keys, self.image_mask)
        else:
            image_key, image_value = gather_tokens(key, self.image_keys), gather_tokens(value, self.image_keys)
            image_output = _attend_parts(module, text_query, image_key, image_value, self.image_parts, **kwargs)
        sees = self.sees_image
        output = output + image_output if sees is None else torch.addcmul(output, image_output, sees)
        own, rows = own_values(query, value, self.own_key).flatten(0, 1), self.text_queries.flatten()
        if self.text_filled is not None:
            output = torch.where(self.text_filled, output, gather_unique_rows(own, rows).view_as(output))
        return own.index_copy(0, rows, output.flatten(0, 1)).unflatten(0, (-1, query.shape[2])), None


def split_image_branch(mask: torch.Tensor) -> list[ImagePart]:
    """Split a (batch, 1, text queries, image keys) mask where another image becomes visible: earlier queries need not be
    multiplied with it, and those that see all earlier images need no mask."""
    queries, keys = mask.shape[2:]
    seen = mask.any(0)[0]
    reach = torch.where(seen.any(-1), keys - seen.flip(-1).to(torch.uint8).argmax(-1), 0)
    cuts = [0]
    for index in (reach.diff().nonzero()[:, 0] + 1).tolist():
        if index - cuts[-1] >= LEAST_PART and queries - index >= LEAST_PART:
            cuts.append(index)
    parts: list[ImagePart] = []
    for first, last in zip(cuts, [*cuts[1:], queries], strict=True):
        in_reach = int(reach[first:last].max())
        part = mask[:, :, first:last, :in_reach]
        parts.append(ImagePart(first, last, in_reach, None if part.all() else with_keys(part)[0]))
    return parts


def _attend_parts(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: list[ImagePart], **kwargs: Any
) -> torch.Tensor:
    options, outputs = kwargs | {"is_causal": False}, []
    for part in parts:
        if part.keys == 0:
            outputs.append(query.new_zeros(len(query), part.last - part.first, query.shape[1], value.shape[3]))
        else:
            states = query[:, :, part.first : part.last], key[:, :, : part.keys], value[:, :, : part.keys]
            outputs.append(ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, part.mask, **options)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def gather_tokens(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Tokens of (batch, heads, tokens, head_dim) by their (batch, slots) rows: (batch, heads, slots, head_dim)."""
    tokens = states.transpose(1, 2).flatten(0, 1)  # the memory layout of a decoder's projections
    return gather_unique_rows(tokens, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


__all__ = ["GatheredMask", "Slots", "gather_tokens", "gathered_branch_mask", "settled"]
