"""CUDA graphs: what a function starts on a GPU, recorded and replayed."""

import threading
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

_recording = threading.Lock()


def record(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """Record the kernels that a function starts on a GPU. None of them runs.

    Unlike `torch.cuda.graph` it does not empty the allocator's cache, whose memory the next prompt needs.

    Returns:
        A function that runs the kernels, and the tensor that they write.

    Raises:
        RuntimeError: if the function waits for the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    with _recording, torch.cuda.device(device):
        current = torch.cuda.current_stream()
        stream = _stream_beside(current)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
            try:
                output = run()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
    return graph.replay, output


@lru_cache
def _stream_beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream on which is recorded what another replays: cuBLAS keeps memory for each."""
    return torch.cuda.Stream()


def let_compiled_functions_record(device: torch.device) -> None:
    """Let functions that are compiled with CUDA graphs run in this thread. Before torch 2.13 those of a thread that Python
    has started fail, as the compiler keeps its graphs in a place that exists in the main thread alone."""
    if device.type != "cuda":
        return
    kept: Any = import_module("torch._inductor.cudagraph_trees").local
    if not hasattr(kept, "tree_manager_containers"):
        kept.tree_manager_containers, kept.tree_manager_locks = {}, defaultdict(threading.Lock)


__all__ = ["let_compiled_functions_record", "record"]
