"""What the fused kernels know of a forward call: tokens listed by modality, and what each sees as intervals of the lists."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Rows of a sample begin at a multiple of the rows of any block, so that a block never reaches into the rows of the next.
ALIGNMENT = 128


@dataclass
class TokenLists:
    """Tokens by modality, and an interval of list indices for every query and key.

    No shape depends on the data, so the device is never waited for.

    Attributes:
        queries: (batch, queries) int32, indices of the queries: text first, in order, then the others.
        keys: (batch, keys) int32, indices of the keys: text, then image, then hidden ones.
        counts: (batch, 4) int32: text queries, text keys, image keys, and the row at which a sample begins in what is saved
            for the backward pass.
        key_ranges: (batch, 4, queries) int32: start and end in the list of text keys, start and end in the list of image
            keys, of what the query at each list index sees.
        query_ranges: (batch, 2, keys) int32: start and end in the list of text queries that see the key at each list index.
        own_key: (batch, queries) int32, index of each query's own key; for a backward pass these must be consecutive.
        capacity: (rows,) without storage; what is saved for the backward pass has as many rows, enough for the text queries
            of the batch. A shape rather than a number, so that one compiled graph serves all batches.
        windowed: whether the first keys of a list may be hidden from a query.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    counts: torch.Tensor
    key_ranges: torch.Tensor
    query_ranges: torch.Tensor
    own_key: torch.Tensor
    capacity: torch.Tensor
    windowed: bool

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.queries, self.keys, self.counts, self.key_ranges, self.query_ranges, self.own_key, self.capacity]

    @property
    def rows(self) -> int:
        return self.capacity.shape[0]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], windowed: bool) -> "TokenLists":
        """From `tensors`."""
        return cls(*tensors, windowed)  # type: ignore[arg-type,call-arg]

    @classmethod
    def build(
        cls,
        is_text_query: torch.Tensor,
        is_text_key: torch.Tensor,
        is_image_key: torch.Tensor,
        own_key: torch.Tensor,
        visible_from: torch.Tensor | None = None,
        visible_up_to: torch.Tensor | None = None,
        rows: int | None = None,
    ) -> "TokenLists":
        """List the tokens of one forward call.

        Args:
            is_text_query: (batch, queries) bool.
            is_text_key, is_image_key: (batch, keys) bool; a key that is neither is hidden from every query but its own.
            own_key: (queries,) or (batch, queries), index of each query's own key.
            visible_from, visible_up_to: (batch or 1, queries), the interval of keys that a query may see; neither may
                decrease from a query to the next. By default, from the first key up to its own.
            rows: an upper bound of the number of text queries in the batch, if one is known; it saves memory.
        """
        batch, queries = is_text_query.shape
        keys = is_text_key.shape[1]
        up_to = (own_key + 1 if visible_up_to is None else visible_up_to).expand(batch, queries)
        # Indices in order: a stable sort of a few classes.
        query_order = (~is_text_query).to(torch.uint8).argsort(dim=-1, stable=True)
        key_class = torch.where(is_text_key, 0, torch.where(is_image_key, 1, 2)).to(torch.uint8)
        key_order = key_class.argsort(dim=-1, stable=True)
        text_count, image_count = is_text_key.sum(-1, keepdim=True), is_image_key.sum(-1, keepdim=True)
        query_count = is_text_query.sum(-1, keepdim=True)
        aligned = -(-query_count // ALIGNMENT) * ALIGNMENT
        begin = aligned.cumsum(0) - aligned
        rows = (-(-(batch * queries if rows is None else rows) // ALIGNMENT) + batch) * ALIGNMENT

        is_query = torch.arange(queries, device=is_text_query.device) < query_count
        up_to = up_to.gather(1, query_order)
        since = None if visible_from is None else visible_from.expand(batch, queries).gather(1, query_order)
        key_index = torch.arange(keys, device=is_text_query.device).expand(batch, keys)
        ranges, seen_by = [], []
        for members in (is_text_key, is_image_key):
            before = torch.nn.functional.pad(members.cumsum(-1), (1, 0))  # the number of members before a key
            last = before.gather(1, up_to)
            first = torch.zeros_like(last) if since is None else before.gather(1, since)
            beyond = keys + 1  # slots after the text queries see nothing, and keep the ranges sorted
            first_sorted, last_sorted = first.masked_fill(~is_query, beyond), last.masked_fill(~is_query, beyond)
            ranges += [first.masked_fill(~is_query, 0), last.masked_fill(~is_query, 0)]
            within = (key_index if members is is_text_key else key_index - text_count).contiguous()
            seen_by.append([torch.searchsorted(edge, within, right=True) for edge in (last_sorted, first_sorted)])
        is_text, is_hidden = key_index < text_count, key_index >= text_count + image_count
        query_ranges = [
            torch.where(is_text, text, image).masked_fill(is_hidden, 0) for text, image in zip(*seen_by, strict=True)
        ]
        return cls(
            queries=query_order.to(torch.int32),
            keys=key_order.to(torch.int32),
            counts=torch.cat([query_count, text_count, image_count, begin], dim=1).to(torch.int32),
            key_ranges=torch.stack(ranges, dim=1).to(torch.int32),
            query_ranges=torch.stack(query_ranges, dim=1).to(torch.int32),
            own_key=own_key.expand(batch, queries).to(torch.int32).contiguous(),
            capacity=is_text_query.new_empty(()).expand(rows),
            windowed=visible_from is not None,
        )


__all__ = ["ALIGNMENT", "TokenLists"]
