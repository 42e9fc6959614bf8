"""The attention mask of the tokens that one process of a group runs; see attention/split_attention.py."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from ...masks_dsvl import AttentionMask, Visibility, own_values
from ...transformers_dsvl import ALL_ATTENTION_FUNCTIONS
from ..attention.gathered_mask import gather_tokens
from ..attention.query_intervals import query_intervals
from ..attention.split_attention import BlockedBranch, FusedBranch, branch_attention, dealt_text_attention


@dataclass
class SplitTokens:
    """The tokens of whole sequences that one process runs: text, and its own images.

    Attributes:
        positions: (batch, tokens), their indices in the whole sequences, in order; the length of these in the slots after
            them, which are empty.
        is_text, is_image: (batch, tokens), of the slots whose token is not padding.
        text: how many text tokens each row has, in this process.
        image: how many image tokens.
        dealt: (batch, tokens of the whole sequences), which of these are text, if it is dealt out to the processes; None if
            each runs all of it.
        dealt_slots: how many text slots every process has then, for each row.
    """

    positions: torch.Tensor
    is_text: torch.Tensor
    is_image: torch.Tensor
    text: list[int]
    image: list[int]
    dealt: torch.Tensor | None = None
    dealt_slots: int = 0


@dataclass
class SplitMask(AttentionMask):
    """The mask of a process's tokens, for the layers of all types.

    Attributes:
        text: (batch, text slots), rows of the flattened (batch x tokens).
        text_filled: (batch, text slots, 1, 1), False for an empty slot; None if there is none.
        image: (batch, image slots), rows.
        branches: by layer type, the branches over text keys and over image keys. None instead of the first where the causal
            kernels of sdpa compute it, and instead of the second if no process has an image.
        dtype: of queries, keys and values.
        group: the process group.
        deals_text: whether each process runs a part of the text.
    """

    text: torch.Tensor
    text_filled: torch.Tensor | None
    image: torch.Tensor
    branches: dict[str | None, tuple[BlockedBranch | FusedBranch | None, BlockedBranch | FusedBranch | None]]
    dtype: torch.dtype
    group: Any
    deals_text: bool = False

    @classmethod
    def build(
        cls,
        tokens: SplitTokens,
        visible: dict[str | None, Visibility],
        text_config: Any,
        dtype: torch.dtype,
        fuses: bool,
        group: Any,
        has_images: bool,
    ) -> "SplitMask":
        """For a forward call.

        Args:
            tokens: of this process.
            visible: for each layer type the visibility of the whole sequences, see `masks_dsvl.visibilities`.
            text_config: the decoder's.
            dtype: of queries, keys and values.
            fuses: whether the fused kernels compute them.
            group: the process group.
            has_images: whether any process has images.
        """
        device, length = tokens.positions.device, tokens.positions.shape[1]
        softcapped = getattr(text_config, "attn_logit_softcapping", None) is not None
        text, image = (
            members.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :slots]
            for members, slots in (
                (tokens.is_text, max(1, tokens.dealt_slots, *tokens.text)),
                (tokens.is_image, max(1, *tokens.image)),
            )
        )
        text_filled, image_filled = tokens.is_text.gather(1, text), tokens.is_image.gather(1, image)
        all_text, all_filled = tokens.positions.gather(1, text), text_filled
        if tokens.dealt is not None:
            slots = tokens.dealt_slots * distributed.get_world_size(group)
            all_text = tokens.dealt.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :slots]
            all_text = nn.functional.pad(all_text, (0, slots - all_text.shape[1]))
            all_filled = torch.arange(slots, device=device) < tokens.dealt.sum(-1, keepdim=True)
        branches: dict[str | None, Any] = {}
        for kind, whole in visible.items():
            inside = tokens.positions.clamp(max=whole.kv_length - 1)
            queries, all_queries = inside.gather(1, text), all_text.clamp(max=whole.kv_length - 1)
            intervals = query_intervals(whole) if fuses else None
            of_images: Any
            of_text: Any
            if intervals is None:
                of_images = BlockedBranch(whole, all_queries, inside.gather(1, image), image_filled)
                of_text = BlockedBranch(whole, queries, all_queries, all_filled)
            else:
                of_text = FusedBranch.build(
                    all_text.masked_fill(~all_filled, whole.kv_length), all_filled, _seen(intervals, queries), text_filled
                )
                of_images = FusedBranch.build(tokens.positions, tokens.is_image, _seen(intervals, all_queries), all_filled)
            if tokens.dealt is not None:
                branches[kind] = (of_text, of_images if has_images else None)
            else:
                is_causal = whole.is_causal and not softcapped
                branches[kind] = (None if is_causal else of_text, of_images)
        is_full = min(tokens.text) == text.shape[1]
        rows = torch.arange(len(text), device=device)[:, None] * length
        return cls(
            text=text + rows,
            text_filled=None if is_full else text_filled[:, :, None, None],
            image=image + rows,
            branches=branches,
            dtype=dtype,
            group=group,
            deals_text=tokens.dealt is not None,
        )

    @property
    def text_rows(self) -> torch.Tensor:
        """(text queries,), rows of the flattened (batch x tokens), and those of the tokens in empty slots."""
        return self.text.flatten()

    def attend(
        self,
        backend: str,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (states.to(self.dtype) for states in (query, key, value))
        of_text, of_images = self.branches[getattr(module.config, "_layer_type", None)]
        text_query, text_key, text_value = (gather_tokens(states, self.text) for states in (query, key, value))
        is_packed = of_images is None or isinstance(of_images, FusedBranch)  # which packs the keys of its list itself
        images = (key, value) if is_packed else (gather_tokens(key, self.image), gather_tokens(value, self.image))
        if self.deals_text:
            assert of_text is not None
            output = dealt_text_attention(
                text_query, text_key, text_value, *images, (of_text, of_images), scaling, softcap, self.group
            )
        else:
            assert of_images is not None
            if of_text is None:
                # Empty slots come last, so no other slot sees them.
                output = ALL_ATTENTION_FUNCTIONS["sdpa"](
                    module, text_query, text_key, text_value, None, scaling=scaling, is_causal=True
                )[0]
            else:
                output = branch_attention(text_query, text_key, text_value, of_text, scaling, softcap)
            output = output + branch_attention(text_query, *images, of_images, scaling, softcap, self.group)
        own = own_values(query, value).flatten(0, 1)
        if self.text_filled is not None:
            output = torch.where(self.text_filled, output, own[self.text_rows].view_as(output))
        return own.index_copy(0, self.text_rows, output.flatten(0, 1)).unflatten(0, (-1, query.shape[2])), None


def _seen(
    intervals: tuple[torch.Tensor | None, torch.Tensor | None], queries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first position that each query sees and the position after the last, (batch, queries) each.

    Args:
        intervals: of all positions, see `query_intervals`.
        queries: (batch, queries), positions.
    """
    since, up_to = (None if part is None else part.expand(len(queries), -1).gather(1, queries) for part in intervals)
    return torch.zeros_like(queries) if since is None else since, queries + 1 if up_to is None else up_to


__all__ = ["SplitMask", "SplitTokens"]
