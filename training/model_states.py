"""The memory of weights, gradients, optimizer states and buffers, in bytes per GPU.

Each formula names its source in torch 2.13, transformers 5.23 or DeepSpeed 0.19.8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..acceleration.attention.kernel_choice import Heads
from .deepspeed_config import MAX_LIVE_PARAMETERS, PREFETCHED_LAYERS, ZERO

if TYPE_CHECKING:
    from .activation_memory import ActivationMemory

GIB, MIB = 2**30, 2**20
DTYPES = ("bfloat16", "float16", "float32")  # of weights and activations

# DeepSpeed's defaults of stage3_max_reuse_distance and sub_group_size, in elements (deepspeed/runtime/zero/config.py).
MAX_REUSE_DISTANCE = SUB_GROUP_SIZE = 10**9


@dataclass(frozen=True)
class PhaseMemory:
    """The memory of one GPU at the peak of a phase of the training step, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int  # temporary: for communication and dtype conversion

    @property
    def total(self) -> int:
        """The sum of all of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model's parameters, in elements.

    Attributes:
        parameters: size of every parameter; tied parameters count once.
        trained: size of every trainable parameter, in the model's order.
        largest_module: largest sum of the parameters that one module holds itself.
        hidden: hidden size of the decoder, from which transformers computes DeepSpeed's "auto" bucket sizes.
        element: bytes per weight.
        largest_layer: parameters of the largest layer of decoder or tower, for ZeRO-3 and FSDP.
        unlayered: parameters outside of these layers and of the embeddings, for FSDP.
        in_8_bits: bytes of frozen weights in 8 bits and of their scales, which are not among `parameters`.
        layers: bytes of each of these layers, weights in 8 bits included, for FSDP.
        unlayered_in_8_bits: those of `in_8_bits` outside of the layers, for FSDP.
        tower_at_once: parameters of a tower that are gathered at once, for ZeRO-3.
    """

    parameters: tuple[int, ...]
    trained: tuple[int, ...]
    largest_module: int
    hidden: int
    element: int
    largest_layer: int = 0
    unlayered: int = 0
    in_8_bits: int = 0
    layers: tuple[int, ...] = ()
    unlayered_in_8_bits: int = 0
    tower_at_once: int = 0


def model_states(
    sizes: ModelSizes, trace: "ActivationMemory", zero: str | None = None, world_size: int = 1, accumulation: bool = False
) -> tuple[PhaseMemory, PhaseMemory, int]:
    """The memory of a training step, activations included.

    Args:
        sizes: sizes of the model.
        trace: memory of a micro-batch, traced with the `gradient_buffer` that `arriving_gradients` returns.
        zero: key of `ZERO`, *optional*, defaults to None: plain data parallelism.
        world_size: number of GPUs, *optional*, defaults to 1.
        accumulation: whether a step has several micro-batches, so that gradients outlive a backward pass, *optional*,
            defaults to False.

    Returns:
        The memory of forward and backward, the memory of the optimizer step, and bytes of main memory, each per GPU.
    """
    if zero is None:
        return (*_unpartitioned(sizes, trace, world_size, accumulation), 0)
    if ZERO[zero] < 3:
        return (*_zero_1_2(sizes, trace, ZERO[zero], world_size, accumulation), 0)
    return _zero_3(sizes, trace, world_size, offload=zero.endswith("offload"))


def arriving_gradients(sizes: ModelSizes, zero: str | None, world_size: int, accumulation: bool) -> int | None:
    """Bytes of the buffer that gradients are moved to as soon as they are complete.

    None if gradients stay in the tensors that backward allocated; 0 if they are added to or copied into memory that is
    allocated before forward (see `_preallocated_gradients`).
    """
    stage = 0 if zero is None else ZERO[zero]
    if stage == 0:
        return 0 if accumulation else None
    if stage == 3:
        return 0
    # copy_grads_in_partition: whole reduced gradients of all parameters that overlap with this GPU's partition. Stage 1 does
    # not release the gradients of other partitions, except for those that were moved into a bucket.
    bucket = sizes.hidden**2 if stage == 1 and not accumulation else None
    return sizes.element * _held_gradients(sizes.trained, world_size, bucket)


def _preallocated_gradients(sizes: ModelSizes, stage: int, world_size: int, accumulation: bool) -> int:
    """Bytes of gradients that are allocated throughout forward and backward."""
    if stage == 3:
        return sizes.element * _partitioned(sizes.trained, world_size)  # grad_partitions_flat_buffer
    if not accumulation:
        return 0
    if stage == 2:
        return sizes.element * _held_gradients(sizes.trained, world_size)  # all_grad_tensors
    return sizes.element * sum(sizes.trained)  # reduced after the last micro-batch only


def _unpartitioned(
    sizes: ModelSizes, trace: "ActivationMemory", world_size: int, accumulation: bool
) -> tuple[PhaseMemory, PhaseMemory]:
    """`Trainer` without DeepSpeed: every GPU holds everything; AdamW has two states in the weights' dtype
    (torch.optim.adamw_fused, without copies in the step)."""
    weights, gradients = (sizes.element * sum(numels) for numels in (sizes.parameters, sizes.trained))
    weights += sizes.in_8_bits
    # DDP copies all gradients into its buckets (torch Reducer, gradient_as_bucket_view=False).
    buckets = gradients if world_size > 1 else 0
    optimizer = 2 * gradients
    preallocated = _preallocated_gradients(sizes, 0, world_size, accumulation)
    forward_backward = PhaseMemory(weights, preallocated + trace.gradients, optimizer, trace.peak - trace.gradients, buckets)
    return forward_backward, PhaseMemory(weights, gradients, optimizer, 0, buckets)


def _zero_1_2(
    sizes: ModelSizes, trace: "ActivationMemory", stage: int, world_size: int, accumulation: bool
) -> tuple[PhaseMemory, PhaseMemory]:
    """deepspeed/runtime/zero/stage_1_and_2.py, with contiguous_gradients and overlap_comm."""
    element, trained = sizes.element, sum(sizes.trained)
    partition = math.ceil(trained / world_size)
    bucket = sizes.hidden**2  # reduce_bucket_size "auto": transformers/integrations/deepspeed.py
    weights = element * sum(sizes.parameters) + sizes.in_8_bits
    # single_partition_of_fp32_groups and the two states of Adam, in float32, for this GPU's partition.
    optimizer = 12 * partition
    # Two buckets (setup_buckets) and a flattened copy for the reduction (allreduce_bucket).
    buffers = 3 * element * bucket
    gradients = _preallocated_gradients(sizes, stage, world_size, accumulation) + trace.gradients
    forward_backward = PhaseMemory(weights, gradients, optimizer, trace.peak - trace.gradients, buffers)
    # step() flattens the partition and converts it to float32 before releasing it. Before that, the norm converts one
    # gradient at a time to float64 (get_grad_norm_direct).
    conversion = (element + (4 if element < 4 else 0)) * partition
    norm = 8 * min(max(sizes.trained), partition)
    own = element * _held_gradients(sizes.trained, world_size)
    return forward_backward, PhaseMemory(weights, own, optimizer, 0, buffers + max(conversion, norm))


def _held_gradients(trained: Sequence[int], world_size: int, stage_1_bucket: int | None = None) -> int:
    """The largest number of gradient elements on any GPU after backward, under ZeRO 1 and 2.

    The trainable parameters are concatenated and cut into equal partitions; both GPUs hold the whole gradient of a parameter
    across a cut. Stage 1 does not release the gradients of other partitions if they are larger than a bucket of
    `stage_1_bucket` elements.
    """
    partition = math.ceil(sum(trained) / world_size)
    held = [0] * world_size
    unreleased = 0 if stage_1_bucket is None else sum(numel for numel in trained if numel > stage_1_bucket)
    offset = 0
    for numel in trained:
        counted = stage_1_bucket is not None and numel > stage_1_bucket
        for rank in range(offset // partition, (offset + numel - 1) // partition + 1):
            held[rank] += 0 if counted else numel
        offset += numel
    return max(held) + unreleased


def _zero_3(
    sizes: ModelSizes, trace: "ActivationMemory", world_size: int, offload: bool
) -> tuple[PhaseMemory, PhaseMemory, int]:
    """deepspeed/runtime/zero/stage3.py, partition_parameters.py and partitioned_param_coordinator.py."""
    element = sizes.element
    # Whole parameters that are gathered at the same time. Parameters that are used again within max_reuse_distance are not
    # released (__params_to_release): between forward and backward these are the last layers, counted in both directions.
    # Then the current layer, or another module, and the prefetched weights; layers and these are copied out of one tensor
    # (AllGatherCoalescedHandle.wait). Nothing is prefetched beyond MAX_LIVE_PARAMETERS in all (fetch_sub_module).
    prefetch = MAX_LIVE_PARAMETERS - MAX_REUSE_DISTANCE // 2 - sizes.largest_layer
    prefetch = max(0, min(PREFETCHED_LAYERS * sizes.largest_layer, prefetch))
    gathered = MAX_REUSE_DISTANCE // 2 + max(sizes.largest_module, 2 * sizes.largest_layer) + 2 * prefetch
    gathered = element * min(gathered, sum(sizes.parameters))
    # A tower that is gathered at once runs before the decoder. (Its own activations are neglected.)
    tower = element * (2 * sizes.tower_at_once + 2 * prefetch)
    # The bucket (_setup_for_real_optimizer) and flattened copies for two concurrent reductions (reduce_scatter_coalesced);
    # reduce_bucket_size "auto": transformers/integrations/deepspeed.py.
    buckets = 3 * element * sizes.hidden**2

    trained = _partitioned(sizes.trained, world_size)
    weights = element * _partitioned(sizes.parameters, world_size)
    gradients = _preallocated_gradients(sizes, 3, world_size, accumulation=False)
    # The float32 copy (of float32 weights, the partition itself) and the two states of Adam.
    optimizer = (12 if element < 4 else 8) * trained
    # _prepare_fp32_grad_for_sub_group flattens and converts; before that, the norm takes one gradient at a time in float64.
    sub_group = min(trained, SUB_GROUP_SIZE)
    converted = (element + (4 if element < 4 else 0)) * sub_group
    norm = 8 * math.ceil(max(sizes.trained) / world_size)

    phases = (trace.peak, gathered + buckets), (0, tower + buckets)
    activations, buffers = max(phases, key=sum)
    if not offload:
        return (
            PhaseMemory(weights, gradients, optimizer, activations, buffers),
            PhaseMemory(weights, gradients, optimizer, 0, buckets + max(converted, norm)),
            0,
        )
    # initialize_optimizer_states also keeps a float32 gradient for every sub-group in main memory.
    cpu = weights + gradients + (12 + 4) * trained
    return (
        PhaseMemory(0, 0, 0, activations, buffers),
        PhaseMemory(0, 0, 0, 0, buckets + norm),
        cpu,
    )


def fsdp_states(sizes: ModelSizes, trace: "ActivationMemory", world_size: int) -> tuple[PhaseMemory, PhaseMemory]:
    """FSDP2 (torch/distributed/fsdp/_fully_shard) as `dsvl train --fsdp` sets it up (training/fsdp.py).

    Args:
        sizes: sizes of the model.
        trace: memory of a micro-batch, traced with a `gradient_buffer` of 0: gradients are sharded layer by layer.
        world_size: number of GPUs.

    Returns:
        The memory of forward and backward, and of the optimizer step.
    """
    element, trained = sizes.element, _partitioned(sizes.trained, world_size)
    own = 4  # shards of trainable weights, their gradients and AdamW's states are float32
    weights = element * (_partitioned(sizes.parameters, world_size) - trained) + own * trained
    weights += math.ceil(sizes.in_8_bits / world_size)  # neglecting that scales are whole on every GPU
    # The root and the head stay gathered (reshard_after_forward=False); of the layers, the current one, the next, and the
    # output of the next one's all-gather, from which it is copied (foreach_all_gather_copy_out).
    neighbours: list[tuple[int, ...]] = [*pairwise(sizes.layers)] or [sizes.layers * 2]
    gathered = element * sizes.unlayered + sizes.unlayered_in_8_bits
    gathered += max(sum(both) + max(both, default=0) for both in neighbours)
    # The whole gradients of the largest unit that is trained, as they are reduced (foreach_reduce): copied, in float32.
    reduced = own * min(max(sizes.largest_layer, sizes.unlayered, max(sizes.trained)), sum(sizes.trained))
    states = 2 * own * trained
    forward_backward = PhaseMemory(weights, own * trained, states, trace.peak, gathered + reduced)
    return forward_backward, PhaseMemory(weights, own * trained, states, 0, 0)


def dealt_text_buffers(text_config: Any, text: int, layers: int, element: int) -> int:
    """The bytes that image parallelism holds of the whole text where the processes share it (attention/split_attention.py).

    Args:
        text_config: the decoder's.
        text: text tokens of the micro-batch, in all processes.
        layers: of how many layers it is held at a time: 1 with activation checkpointing.
        element: bytes per element of activations.
    """
    heads = Heads.of(text_config)
    queries = text * text_config.num_attention_heads * heads.head_dim
    keys = queries // heads.group_size
    kept = element * (queries + 2 * keys)
    # In the backward pass of a layer: the gradient, the merged output (float32), two of the kernels' rows, and the gradients
    # of queries, keys and values.
    return layers * kept + (4 * element + 4) * queries + 2 * element * keys


def _partitioned(numels: Sequence[int], world_size: int) -> int:
    """Elements per GPU of parameters that are partitioned one by one."""
    return sum(math.ceil(numel / world_size) for numel in numels)
