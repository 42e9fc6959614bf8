"""What training keeps beside its activations: weights, gradients, optimizer states and buffers, in bytes per GPU.

Each formula names the source that it was read from: torch 2.13, transformers 5.23, DeepSpeed 0.19.8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trace import Trace

ZERO = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3-offload": 3}

# DeepSpeed's defaults of stage3_max_reuse_distance and sub_group_size, in elements (deepspeed/runtime/zero/config.py).
MAX_REUSE_DISTANCE = SUB_GROUP_SIZE = 10**9


@dataclass(frozen=True)
class Memory:
    """What one GPU holds at the fullest moment of a phase, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int  # what comes and goes for communication, or to convert

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, in elements.

    Attributes:
        parameters: of every parameter (tied ones once).
        trained: of those that learn, in the model's order.
        largest_module: of the parameters that one module itself holds, at most.
        hidden: the decoder's width, on which transformers bases DeepSpeed's "auto" buckets.
        element: bytes of a weight.
    """

    parameters: tuple[int, ...]
    trained: tuple[int, ...]
    largest_module: int
    hidden: int
    element: int


def model_states(
    sizes: Sizes, trace: "Trace", zero: str | None = None, world_size: int = 1, accumulation: bool = False
) -> tuple[Memory, Memory, int]:
    """Weights, gradients, optimizer states and buffers, beside the activations.

    Args:
        sizes: the model's.
        trace: of a micro-batch, with its gradients `taken_into` what `arriving_gradients` says.
        zero: a key of `ZERO`, or None for plain data parallelism.
        world_size: GPUs that share the work.
        accumulation: whether a step has several micro-batches, so that gradients outlive a backward.

    Returns:
        Forward and backward, the optimizer's step, and bytes of main memory, all per GPU.
    """
    if zero is None:
        return (*_unpartitioned(sizes, trace, world_size, accumulation), 0)
    if ZERO[zero] < 3:
        return (*_zero_1_2(sizes, trace, ZERO[zero], world_size, accumulation), 0)
    return _zero_3(sizes, trace, world_size, offload=zero.endswith("offload"))


def arriving_gradients(sizes: Sizes, zero: str | None, world_size: int, accumulation: bool) -> int | None:
    """What holds the gradients from the first complete one on, in bytes, where they leave the tensors that backward made.

    None where they stay in them; 0 where they are added to, or put into, what is there already (see `_there_before`).
    """
    stage = 0 if zero is None else ZERO[zero]
    if stage == 0:
        return 0 if accumulation else None
    if stage == 3:
        return 0
    # copy_grads_in_partition: reduced gradients of the parameters that this GPU's partition touches, whole. Stage 1 does not
    # release what other GPUs own; gradients that fit into a bucket have moved there, though.
    bucket = sizes.hidden**2 if stage == 1 and not accumulation else None
    return sizes.element * _held_gradients(sizes.trained, world_size, bucket)


def _there_before(sizes: Sizes, stage: int, world_size: int, accumulation: bool) -> int:
    """Bytes of gradients that are there throughout forward and backward."""
    if stage == 3:
        return sizes.element * _cut(sizes.trained, world_size)  # grad_partitions_flat_buffer, from the start
    if not accumulation:
        return 0
    if stage == 2:
        return sizes.element * _held_gradients(sizes.trained, world_size)  # all_grad_tensors
    return sizes.element * sum(sizes.trained)  # reduced after the last micro-batch only


def _unpartitioned(sizes: Sizes, trace: "Trace", world_size: int, accumulation: bool) -> tuple[Memory, Memory]:
    """`Trainer` without DeepSpeed: everything on every GPU, AdamW with two states in the weights' dtype
    (torch.optim.adamw_fused: no copies in the step)."""
    weights, gradients = (sizes.element * sum(numels) for numels in (sizes.parameters, sizes.trained))
    # DDP keeps a second copy of all gradients in its buckets (torch Reducer, gradient_as_bucket_view=False).
    buckets = gradients if world_size > 1 else 0
    optimizer = 2 * gradients
    there = _there_before(sizes, 0, world_size, accumulation)
    forward_backward = Memory(weights, there + trace.gradients, optimizer, trace.peak - trace.gradients, buckets)
    return forward_backward, Memory(weights, gradients, optimizer, 0, buckets)


def _zero_1_2(sizes: Sizes, trace: "Trace", stage: int, world_size: int, accumulation: bool) -> tuple[Memory, Memory]:
    """deepspeed/runtime/zero/stage_1_and_2.py, with contiguous_gradients and overlap_comm."""
    element, trained = sizes.element, sum(sizes.trained)
    partition = math.ceil(trained / world_size)
    bucket = sizes.hidden**2  # reduce_bucket_size "auto": transformers/integrations/deepspeed.py
    weights = element * sum(sizes.parameters)
    # single_partition_of_fp32_groups and the two states of Adam: float32, of this GPU's partition.
    optimizer = 12 * partition
    # Two buckets (setup_buckets) and the flattened copy that is reduced (allreduce_bucket).
    buffers = 3 * element * bucket
    gradients = _there_before(sizes, stage, world_size, accumulation) + trace.gradients
    forward_backward = Memory(weights, gradients, optimizer, trace.peak - trace.gradients, buffers)
    # step(): the partition is flattened, converted to float32 and only then released. The norm before it converts one
    # gradient at a time to float64 (get_grad_norm_direct).
    conversion = (element + (4 if element < 4 else 0)) * partition
    norm = 8 * min(max(sizes.trained), partition)
    own = element * _held_gradients(sizes.trained, world_size)
    return forward_backward, Memory(weights, own, optimizer, 0, buffers + max(conversion, norm))


def _held_gradients(trained: Sequence[int], world_size: int, stage_1_bucket: int | None = None) -> int:
    """Elements of the gradients that the fullest GPU holds after backward under ZeRO 1 and 2.

    The trained parameters lie end to end and are cut into equal partitions; a parameter across a cut is held whole on both
    sides. Stage 1 does not release the others' gradients: those that fit into a bucket (of `stage_1_bucket` elements) have
    moved there, larger ones stay where they are.
    """
    partition = math.ceil(sum(trained) / world_size)
    held = [0] * world_size
    elsewhere = 0 if stage_1_bucket is None else sum(numel for numel in trained if numel > stage_1_bucket)
    offset = 0
    for numel in trained:
        stays_anyway = stage_1_bucket is not None and numel > stage_1_bucket
        for rank in range(offset // partition, (offset + numel - 1) // partition + 1):
            held[rank] += 0 if stays_anyway else numel
        offset += numel
    return max(held) + elsewhere


def _zero_3(sizes: Sizes, trace: "Trace", world_size: int, offload: bool) -> tuple[Memory, Memory, int]:
    """deepspeed/runtime/zero/stage3.py, partition_parameters.py and partitioned_param_coordinator.py."""
    element, hidden = sizes.element, sizes.hidden
    # The "auto" values of transformers/integrations/deepspeed.py.
    bucket, prefetch, persistence_threshold = hidden**2, int(0.9 * hidden**2), 10 * hidden

    persistent = sum(numel for numel in sizes.parameters if numel <= persistence_threshold)
    # Whole parameters at a time. Not released is what is used again within max_reuse_distance (__params_to_release): where
    # forward turns into backward, the last layers, each counted there and back. Then the module that computes, and the
    # next ones that are fetched together and copied out of one tensor (AllGatherCoalescedHandle.wait).
    gathered = MAX_REUSE_DISTANCE // 2 + sizes.largest_module + 2 * prefetch
    gathered = element * min(gathered, sum(sizes.parameters) - persistent)
    # The bucket (_setup_for_real_optimizer) and flattened copies of two reductions in flight (reduce_scatter_coalesced).
    buckets = 3 * element * bucket

    trained = _cut(sizes.trained, world_size)
    weights = element * _cut(sizes.parameters, world_size)
    gradients = _there_before(sizes, 3, world_size, accumulation=False)
    # The float32 copy (the partition itself, if that is float32) and the two states of Adam.
    optimizer = (12 if element < 4 else 8) * trained
    # _prepare_fp32_grad_for_sub_group: flattened, then converted; before it, one gradient at a time in float64 for the norm.
    sub_group = min(trained, SUB_GROUP_SIZE)
    converted = (element + (4 if element < 4 else 0)) * sub_group
    norm = 8 * math.ceil(max(sizes.trained) / world_size)

    kept = element * persistent
    if not offload:
        return (
            Memory(weights + kept, gradients, optimizer, trace.peak, gathered + buckets),
            Memory(weights + kept, gradients, optimizer, 0, buckets + max(converted, norm)),
            0,
        )
    # initialize_optimizer_states keeps a float32 gradient for every sub-group in main memory as well.
    cpu = weights + gradients + (12 + 4) * trained
    return (
        Memory(kept, 0, 0, trace.peak, gathered + buckets),
        Memory(kept, 0, 0, 0, buckets + norm),
        cpu,
    )


def _cut(numels: Sequence[int], world_size: int) -> int:
    """One GPU's share of parameters that are each partitioned by themselves."""
    return sum(math.ceil(numel / world_size) for numel in numels)
