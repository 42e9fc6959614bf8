"""CUDA graphs: what a function starts on a GPU, recorded and replayed."""

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Held while something is recorded. Until it is, torch lets no thread draw random numbers on the GPU: who draws some in a
# place where another thread may record holds it, too.
recording = threading.Lock()

# Recordings that nobody replays any more, by the stream beside which they were made. Each lends its memory to the next one,
# as torch gives it back in an emergency alone; and to one only, whose results it could overwrite.
_ended: dict[Any, list[Any]] = defaultdict(list)


class Recording:
    """The kernels that a function starts on a GPU. None of them runs while it is recorded.

    Unlike `torch.cuda.graph` it does not empty the allocator's cache, whose memory the next prompt needs.

    Args:
        run: the function. It must not wait for the GPU, see `WaitsForDevice`: then torch's allocator keeps memory that it
            gives back to nobody.
        device: the GPU.

    Attributes:
        output: the tensor that the function returns, which each `replay` writes.

    Raises:
        RuntimeError: if the function waits for the GPU.
    """

    def __init__(self, run: Callable[[], torch.Tensor], device: torch.device) -> None:
        graph = torch.cuda.CUDAGraph()
        with recording, torch.cuda.device(device):
            current = torch.cuda.current_stream()
            stream, ended = _stream_beside(current), _ended[current]
            before = ended.pop() if ended else None
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                # Other threads may go on, but for random numbers.
                graph.capture_begin(None if before is None else before.pool(), capture_error_mode="thread_local")
                try:
                    self.output = run()
                finally:
                    graph.capture_end()
            current.wait_stream(stream)
        self.replay = graph.replay
        weakref.finalize(self, ended.append, graph).atexit = False


@lru_cache
def _stream_beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream on which is recorded what another replays: cuBLAS keeps memory for each."""
    return torch.cuda.Stream()


class WaitsForDevice(TorchDispatchMode):
    """Finds out whether the host waits for a GPU in what runs within it: by operations whose results depend on values, and
    copies from or to main memory. (Other operations have results in main memory without a copy: attention its random state.)

    Attributes:
        found: whether it does.
    """

    TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put):  # by masks, or by numbers
            self.found |= any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        elif func.overloadpacket in self.COPIES:
            places = [one.device for one in args if isinstance(one, torch.Tensor)] + [kwargs.get("device") or args[0].device]
            self.found |= len({place.type for place in places}) > 1
        else:
            self.found |= any(tag in func.tags for tag in self.TAGS)
        return func(*args, **kwargs)


def let_compiled_functions_record(device: torch.device) -> None:
    """Let functions that are compiled with CUDA graphs run in this thread. Before torch 2.13 those of a thread that Python
    has started fail, as the compiler keeps its graphs in a place that exists in the main thread alone."""
    if device.type != "cuda":
        return
    kept: Any = import_module("torch._inductor.cudagraph_trees").local
    if not hasattr(kept, "tree_manager_containers"):
        kept.tree_manager_containers, kept.tree_manager_locks = {}, defaultdict(threading.Lock)


__all__ = ["Recording", "WaitsForDevice", "let_compiled_functions_record", "recording"]
