"""The MLPs of a decoder over tiles of tokens, so that the intermediate states of few tokens exist at a time.

An MLP treats every token alone. With hundreds of images its intermediate states, several times the hidden size for every
token, are the largest tensors of a training step, even with activation checkpointing. Here each tile is computed, and in the
backward pass recomputed and differentiated, on its own (TiledMLP of Arctic Long Sequence Training, arXiv 2506.13996).

A checkpointed layer is not slower for it. A checkpoint stops its recomputation once it has all that was saved; the input of
the whole MLP is saved before the first tile, and nothing after it, so only the tiles recompute the MLP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .decoder_run import layers_of

DEFAULT_TILE = 8192  # tokens


class _Keep(torch.autograd.Function):
    """The identity, whose node saves its input: for `_Source`, which reads it once, before this node's backward."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient


@dataclass(frozen=True)
class _Part:
    """A view of the input of an MLP, by its shape."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Source:
    """The input of an MLP, from which its tiles take their parts: saved once, and read once in the backward pass.

    Args:
        kept: output of `_Keep`.
    """

    def __init__(self, kept: torch.Tensor) -> None:
        self._node, self._storage, self._offset = kept.grad_fn, kept.untyped_storage()._cdata, int(kept.storage_offset())
        self._tensor: torch.Tensor | None = None
        self._parts = self._unread = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Part:
        """What autograd saves instead of a tensor of a tile."""
        if tensor.untyped_storage()._cdata != self._storage:
            return tensor
        self._parts += 1
        self._unread += 1
        return _Part(tensor.size(), tensor.stride(), int(tensor.storage_offset()) - self._offset)

    def unpack(self, packed: torch.Tensor | _Part) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if self._tensor is None:
            # A checkpoint around the layer recomputes it here, and allows one access.
            (saved,) = self._node.saved_tensors  # type: ignore[union-attr]
            self._tensor = saved.detach()
        states = self._tensor
        self._unread -= 1
        if self._unread == 0:
            self._tensor, self._unread = None, self._parts
        return states.as_strided(packed.size, packed.stride, states.storage_offset() + packed.offset)


def checkpointed_tile(forward: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """A tile, of which only its input is saved."""
    return checkpoint(forward, states, use_reentrant=False)


class TiledMLP:
    """The `forward` of an MLP over tiles of tokens; the parameters stay where they are.

    Args:
        mlp: maps (..., tokens, hidden) to the same shape, every token alone.
        tokens: the number of tokens of a tile. Fewer are computed at once.
    """

    def __init__(self, mlp: nn.Module, tokens: int) -> None:
        self.mlp, self.tokens = mlp, tokens
        # Liger's kernels and accelerate replace an instance's `forward` as well.
        self.replaced = mlp.__dict__.get("forward")
        self.forward = self.replaced or MethodType(type(mlp).forward, mlp)
        self.tile: Callable[..., torch.Tensor] = checkpointed_tile

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[:-1].numel() <= self.tokens:
            return self.forward(hidden_states)
        return self.run_tiles(hidden_states)

    @torch.compiler.disable  # a graph cannot hold the hooks; the tiles themselves may be compiled
    def run_tiles(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.flatten(0, -2)[None].contiguous()
        is_trained = any(parameter.requires_grad for parameter in self.mlp.parameters())
        if not torch.is_grad_enabled() or not (states.requires_grad or is_trained):
            output = None
            for first in range(0, states.shape[1], self.tokens):
                part = self.forward(states[:, first : first + self.tokens])
                output = torch.empty_like(states, dtype=part.dtype) if output is None else output
                output[:, first : first + self.tokens] = part
            assert output is not None
            return output.view(hidden_states.shape)
        if not states.requires_grad:
            states = states.detach().requires_grad_()  # its gradient goes nowhere
        kept = _Keep.apply(states)
        source = _Source(kept)
        # Split, not sliced: its backward joins the gradients of the tiles at once.
        with saved_tensors_hooks(source.pack, source.unpack):
            parts = [self.tile(self.forward, part) for part in kept.split(self.tokens, dim=1)]
        return torch.cat(parts, dim=1).view(hidden_states.shape)


def tile_mlp(decoder: PreTrainedModel, tokens: int = DEFAULT_TILE) -> None:
    """Run the MLP of every layer of a decoder over tiles; a second call changes their size.

    Args:
        decoder: the language model.
        tokens: the number of tokens of a tile, *optional*, defaults to 8192.

    Raises:
        ValueError: if the number is not positive, or a layer has no MLP that treats every token alone.
    """
    if tokens < 1:
        raise ValueError(f"A tile of {tokens} tokens; pass a positive number, such as {DEFAULT_TILE}.")
    for layer in layers_of(decoder):
        mlp = getattr(layer, "mlp", None)
        if not isinstance(mlp, nn.Module) or any("expert" in name for name, _ in mlp.named_modules()):
            what = "no module `mlp`" if mlp is None else "a mixture of experts"
            raise ValueError(
                f"{type(decoder).__name__} cannot run in tiles: its {type(layer).__name__} has {what}; omit the tiles, and "
                "use activation checkpointing and offloading."
            )
        current = tiles_of(layer)
        if current is None:
            mlp.forward = TiledMLP(mlp, tokens)  # type: ignore[method-assign,assignment]
        else:
            current.tokens = tokens


def tiles_of(layer: nn.Module) -> TiledMLP | None:
    """The tiles of a layer's MLP; None if it runs at once."""
    forward = getattr(getattr(layer, "mlp", None), "forward", None)
    return forward if isinstance(forward, TiledMLP) else None


__all__ = ["DEFAULT_TILE", "TiledMLP", "checkpointed_tile", "tile_mlp", "tiles_of"]
