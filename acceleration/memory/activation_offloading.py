"""Saved activations in the main memory of the host, copied while the device computes.

With activation checkpointing the input of every layer is saved: layers x tokens x hidden numbers, with hundreds of images
more than the weights. transformers' `offload=True` copies them on the stream that computes, which then waits. Here a second
stream copies: in the forward pass while the next layers run, and in the backward pass the input of a layer while the layer
after it is computed. The host's memory is pinned, and reused by the next step.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

MIN_BYTES = 2**20  # smaller tensors stay on the device
# The allocator of pinned memory rounds up to a power of two, so that one block for a whole tensor might take twice its size.
BLOCK_BYTES = 2**26
IN_FLIGHT = 2  # tensors that are kept on the device until they are copied


class HostMemory:
    """Pinned blocks of the host, which tensors that are freed leave to the next ones."""

    def __init__(self) -> None:
        self.free: list[torch.Tensor] = []
        self.blocks = 0

    def take(self, count: int, device: str) -> list[torch.Tensor]:
        """`count` blocks of `BLOCK_BYTES` bytes for a type of device; for "meta" they are only counted."""
        blocks: list[torch.Tensor] = []
        if device == "meta":
            self.blocks += count
            return blocks
        for _ in range(count):
            if not self.free:
                self.free.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=device != "cpu"))
                self.blocks += 1
            blocks.append(self.free.pop())
        return blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostMemory":
        """A copy of a model has memory of its own."""
        return HostMemory()


class SavedOnHost:
    """A tensor that autograd saved, on the host.

    Args:
        tensor: on a device; contiguous.
        memory: where its bytes go.
        index: its index among the tensors of a forward pass.
    """

    def __init__(self, tensor: torch.Tensor, memory: HostMemory, index: int) -> None:
        self.shape, self.dtype, self.device, self.index = tensor.shape, tensor.dtype, tensor.device, index
        self.memory = memory
        self.blocks = memory.take(-(-tensor.nbytes // BLOCK_BYTES), tensor.device.type)
        self.fetched: torch.Tensor | None = None
        self.ready: Any = None  # the event after which `fetched` is complete

    def __del__(self) -> None:
        if self.ready is not None:  # fetched in vain: its memory is free when the copy is complete
            torch.cuda.current_stream(self.device).wait_event(self.ready)
        # The one stream that copies orders the last read of these blocks before the next write.
        self.memory.free.extend(self.blocks)

    def store(self, tensor: torch.Tensor) -> None:
        """Copy the tensor to the host."""
        for block, part in self._pairs(tensor):
            block[: len(part)].copy_(part, non_blocking=True)

    def fill(self, tensor: torch.Tensor) -> None:
        """Copy it back."""
        for block, part in self._pairs(tensor):
            part.copy_(block[: len(part)], non_blocking=True)

    def _pairs(self, tensor: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Each block, and its part of the tensor's bytes."""
        if tensor.device.type == "meta":
            return ()
        return zip(self.blocks, tensor.detach().view(-1).view(torch.uint8).split(BLOCK_BYTES), strict=True)


class OffloadedPass(AbstractContextManager):
    """One forward pass, and its backward pass: what autograd saves in this context is moved to the host.

    Args:
        memory: shared by all passes.
        streams: device -> its stream that copies; shared by all passes.
        devices: the types of devices whose tensors are moved.
        fixed: addresses of storages that stay where they are: weights.
    """

    def __init__(
        self, memory: HostMemory, streams: dict[torch.device, Any], devices: Sequence[str], fixed: set[int]
    ) -> None:
        self.memory, self.streams, self.devices, self.fixed = memory, streams, devices, fixed
        self.saved: list[Any] = []  # weak references, in the order of the forward pass
        self.in_flight: deque[tuple[torch.Tensor, Any, SavedOnHost]] = deque()
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)

    def __enter__(self) -> "OffloadedPass":
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        self._release(0)

    def pack(self, tensor: torch.Tensor) -> Any:
        """Begin to copy a tensor to the host."""
        if (
            tensor.device.type not in self.devices
            or tensor.nbytes < MIN_BYTES
            or not tensor.is_contiguous()
            or type(tensor) is not torch.Tensor
            # FSDP and ZeRO-3 gather weights after the pass has begun.
            or isinstance(tensor._base, nn.Parameter)
            or tensor.untyped_storage()._cdata in self.fixed
        ):
            return tensor
        for copied, _, known in self.in_flight:  # several operations may save one tensor
            if is_same(copied, tensor):
                return known
        saved = SavedOnHost(tensor, self.memory, len(self.saved))
        stream = self._stream(tensor.device)
        event = None
        if stream is None:
            saved.store(tensor)
        else:
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                saved.store(tensor)
            event = stream.record_event()
        self.in_flight.append((tensor.detach(), event, saved))
        self._release(IN_FLIGHT)
        self.saved.append(weakref.ref(saved))
        return saved

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor on its device; the one that was saved before it begins to be copied."""
        if not isinstance(packed, SavedOnHost):
            return packed
        self._fetch(packed)
        tensor, event = packed.fetched, packed.ready
        packed.fetched = packed.ready = None
        assert tensor is not None
        if event is not None:
            torch.cuda.current_stream(tensor.device).wait_event(event)
        before = self.saved[packed.index - 1]() if packed.index > 0 else None
        if before is not None:
            self._fetch(before)
        return tensor

    def _fetch(self, saved: SavedOnHost) -> None:
        if saved.fetched is not None:
            return
        saved.fetched = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
        stream = self._stream(saved.device)
        if stream is None:
            saved.fill(saved.fetched)
            return
        stream.wait_stream(torch.cuda.current_stream(saved.device))  # which may still use the memory
        with torch.cuda.stream(stream):
            saved.fill(saved.fetched)
        saved.ready = stream.record_event()

    def _release(self, number: int) -> None:
        """Free all but the last `number` tensors that were copied, once they are."""
        while len(self.in_flight) > number:
            tensor, event, _ = self.in_flight.popleft()
            if event is not None:
                torch.cuda.current_stream(tensor.device).wait_event(event)

    def _stream(self, device: torch.device) -> Any:
        """The stream that copies; None where there are no streams."""
        if device.type != "cuda":
            return None
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        return self.streams[device]


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same bytes."""
    same_storage = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    layouts = [(part.storage_offset(), part.shape, part.dtype) for part in (one, other)]
    return same_storage and layouts[0] == layouts[1]


class ActivationOffloading:
    """Moves what a decoder saves for the backward pass to the host, outside of its checkpointed layers: their inputs.

    Args:
        devices: the types of devices whose tensors are moved, *optional*, defaults to GPUs.
    """

    def __init__(self, devices: Sequence[str] = ("cuda",)) -> None:
        self.devices, self.memory = tuple(devices), HostMemory()
        self.running: list[OffloadedPass] = []

    def begin(self, decoder: nn.Module, args: tuple) -> None:
        """Before the decoder."""
        if torch.is_grad_enabled() and decoder.training and not torch.compiler.is_compiling():
            fixed = (*decoder.parameters(), *decoder.buffers())  # weights in 8 bits are buffers
            weights = {tensor.untyped_storage()._cdata for tensor in fixed}
            self.running.append(OffloadedPass(self.memory, _STREAMS, self.devices, weights).__enter__())

    def end(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        """After the decoder, also if it failed."""
        if self.running:
            self.running.pop().__exit__(None, None, None)

    @property
    def nbytes(self) -> int:
        """Bytes of the host that are reserved."""
        return self.memory.blocks * BLOCK_BYTES


_STREAMS: dict[torch.device, Any] = {}


def offload_activations(decoder: PreTrainedModel, devices: Sequence[str] = ("cuda",)) -> ActivationOffloading:
    """Move the inputs of a decoder's checkpointed layers to the host in training.

    Args:
        decoder: the language model.
        devices: the types of devices whose tensors are moved, *optional*, defaults to GPUs.
    """
    for hook in decoder._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, ActivationOffloading):
            owner.devices = tuple(devices)
            return owner
    offloading = ActivationOffloading(devices)
    decoder.register_forward_pre_hook(offloading.begin)
    decoder.register_forward_hook(offloading.end, always_call=True)
    return offloading


__all__ = ["ActivationOffloading", "offload_activations"]
