"""The MLPs of a decoder over tiles of tokens, so that the intermediate states of few tokens exist at a time.

An MLP treats every token alone. With hundreds of images its intermediate states, several times the hidden size for every
token, are the largest tensors of a training step, even with activation checkpointing. Here each tile is computed, and in the
backward pass recomputed and differentiated, on its own (TiledMLP of Arctic Long Sequence Training, arXiv 2506.13996).

Under ZeRO-3 the weights are gathered for every tile, by all processes together, so all run as many tiles as the one with the
most tokens.

A checkpointed layer is not slower for it. A checkpoint stops its recomputation once it has all that was saved; the input of
the whole MLP is saved before the first tile, and nothing after it, so only the tiles recompute the MLP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import distributed, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..decoder_run import layers_of

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
        self.count: int | None = None  # of tiles, where processes have agreed on it

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[:-1].numel() <= self.tokens and (self.count or 1) == 1:
            return self.forward(hidden_states)
        return self.run_tiles(hidden_states)

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tiles of (1, tokens, hidden). Agreed ones are alike, and empty where there are more than tokens."""
        return states.split(self.tokens, dim=1) if self.count is None else states.tensor_split(self.count, dim=1)

    @torch.compiler.disable  # a graph cannot hold the hooks; the tiles themselves may be compiled
    def run_tiles(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.flatten(0, -2)[None].contiguous()
        is_trained = any(parameter.requires_grad for parameter in self.mlp.parameters())
        if not torch.is_grad_enabled() or not (states.requires_grad or is_trained):
            output, first = None, 0
            for tile in self.split(states):
                part = self.forward(tile)
                output = torch.empty_like(states, dtype=part.dtype) if output is None else output
                output[:, first : first + part.shape[1]] = part
                first += part.shape[1]
            assert output is not None
            return output.view(hidden_states.shape)
        if not states.requires_grad:
            states = states.detach().requires_grad_()  # its gradient goes nowhere
        kept = _Keep.apply(states)
        source = _Source(kept)
        # Split, not sliced: its backward joins the gradients of the tiles at once.
        with saved_tensors_hooks(source.pack, source.unpack):
            parts = [self.tile(self.forward, part) for part in self.split(kept)]
        return torch.cat(parts, dim=1).view(hidden_states.shape)


def agree_on_tiles(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a decoder: under ZeRO-3, let every process run as many tiles as the one with the most tokens."""
    tiled = [tiles for layer in layers_of(decoder) if (tiles := tiles_of(layer)) is not None]
    if not tiled or not is_partitioned(tiled[0].mlp):
        return
    inputs = kwargs.get("inputs_embeds")
    inputs = kwargs.get("input_ids", args[0] if args else None) if inputs is None else inputs
    assert inputs is not None
    tokens = inputs.shape[0] * inputs.shape[1]
    count = torch.tensor(max(-(-tokens // tiled[0].tokens), 1), device=inputs.device)
    distributed.all_reduce(count, distributed.ReduceOp.MAX)
    for tiles in tiled:
        tiles.count = int(count)


def is_partitioned(mlp: nn.Module) -> bool:
    """Whether several processes hold a part of each weight (ZeRO-3)."""
    is_shared = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return is_shared and any(hasattr(parameter, "ds_id") for parameter in mlp.parameters())


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
    is_first = all(tiles_of(layer) is None for layer in layers_of(decoder))
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
    if is_first:
        decoder.register_forward_pre_hook(agree_on_tiles, with_kwargs=True)


def tiles_of(layer: nn.Module) -> TiledMLP | None:
    """The tiles of a layer's MLP; None if it runs at once."""
    forward = getattr(getattr(layer, "mlp", None), "forward", None)
    return forward if isinstance(forward, TiledMLP) else None


__all__ = ["DEFAULT_TILE", "TiledMLP", "checkpointed_tile", "tile_mlp", "tiles_of"]
