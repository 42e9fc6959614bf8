"""Image parallelism in the Trainer: the groups of processes that share the images of a batch (`--image-parallel`)."""

import contextlib
from typing import Any

import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard

from ..acceleration.parallel.image_parallelism import check_image_parallel, image_parallel
from .adapters import base_model


class ImageGroups:
    """Consecutive processes in groups of `size`: each group reads one batch, and spreads its images.

    All processes must make it together.

    Args:
        size: processes of a group; 1 for no groups.

    Attributes:
        index: which group this process is in.

    Raises:
        ValueError: if the processes cannot be divided.
    """

    def __init__(self, size: int) -> None:
        processes = dist.get_world_size() if dist.is_initialized() else 1
        check_divides(size, processes)
        self.size = size
        self.index = (dist.get_rank() if dist.is_initialized() else 0) // size
        self.count = processes // size
        self.group = dist.new_subgroups(size)[0] if size > 1 else None

    def spread(self, model: Any) -> contextlib.AbstractContextManager:
        """The context in which a model spreads the images of its batches."""
        return contextlib.nullcontext() if self.size == 1 else image_parallel(model, self.group)

    def check(self, model: Any) -> None:
        """Refuse a model whose images cannot be spread in training; see `check_image_parallel`."""
        if self.size > 1:
            check_image_parallel(base_model(model))

    def share(self, loader: Any) -> Any:
        """Let a data loader of accelerate read the batches of the group, not of the process.

        Raises:
            ValueError: if it does not distribute the batches of a map-style data set.
        """
        if self.size == 1:
            return loader
        sampler = getattr(loader, "batch_sampler", None)
        if not isinstance(sampler, BatchSamplerShard):
            raise ValueError(
                f"image_parallel={self.size} with a data loader of type {type(loader).__name__} and batch sampler "
                f"{type(sampler).__name__}, whose batches cannot be shared by groups; pass a map-style data set or a Stream "
                "of dsvl.data, without dispatch_batches and train_sampling_strategy='batch_rebalance'."
            )
        sampler.num_processes, sampler.process_index = self.count, self.index
        return loader


def check_divides(size: int, processes: int) -> None:
    """Refuse a number of processes that cannot be divided into groups.

    Raises:
        ValueError: naming both numbers.
    """
    if size < 1 or processes % size:
        raise ValueError(
            f"--image-parallel {size} with {processes} {'process' if processes == 1 else 'processes'}: they cannot "
            f"form groups of {size}; pass a divisor of the number of processes (torchrun --nproc-per-node)."
        )


__all__ = ["ImageGroups", "check_divides"]
