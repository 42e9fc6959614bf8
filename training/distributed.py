"""Helpers for several training processes; without `torch.distributed` they do what a single process needs."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from accelerate.utils import broadcast_object_list

T = TypeVar("T")

GLOO_RELEASE = 0.2  # seconds; Gloo's threads need microseconds of them


def on_first_process(work: Callable[[], T]) -> T:
    """Run a function in the first process only; all processes return its result or raise its error."""
    if not dist.is_initialized():
        return work()
    result: T | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as error:
            failure = error
    result, failure = broadcast_object_list([result, failure])
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def destroy_process_groups() -> None:
    """Destroy the process groups without a crash at exit; does nothing if there are none.

    Gloo's worker threads release the tensors of finished collectives shortly after these have returned. They need the GIL,
    and a thread that waits for it while the interpreter shuts down aborts the process ("terminate called without an active
    exception"). Destroying the groups would join the threads, but DeepSpeed's engine outlives its trainer and keeps
    references to them. Sleeping gives the threads the GIL.
    """
    if not dist.is_initialized():
        return
    gloo = dist.get_backend() == "gloo"
    dist.destroy_process_group()
    if gloo:
        time.sleep(GLOO_RELEASE)
