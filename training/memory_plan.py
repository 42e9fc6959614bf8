"""The GPU memory of training, computed from a model's configuration.

Activations are measured, not estimated: `activation_memory.py` runs the model on the meta device and counts its allocations.
Weights, gradients, optimizer states and communication buffers are computed in `model_states.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..acceleration.memory.frozen_linear import PRECISIONS
from ..acceleration.parallel.split_batch import deals_text
from ..configuration_dsvl import DSVLConfig
from ..transformers_dsvl import GradientCheckpointingLayer
from .activation_memory import StepTracer
from .adapters import LABELS
from .deepspeed_config import ZERO, weights_at_once
from .frozen_precision import frozen_linears
from .model_states import (
    DTYPES,
    GIB,
    ModelSizes,
    PhaseMemory,
    arriving_gradients,
    dealt_text_buffers,
    fsdp_states,
    model_states,
)
from .trainable_parts import PARTS

# GPU memory that is not available for the tensors of the plan.
CONTEXT = 2 * GIB  # CUDA context and kernels, cuBLAS workspaces, NCCL channels
FRAGMENTATION = 0.05  # fraction of the GPU's memory lost to fragmentation in the caching allocator

_NOT_OPTIONS = ("self", "config")  # arguments of `Planner` that are no options


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of training per GPU, in bytes, without `CONTEXT` and `FRAGMENTATION`.

    Attributes:
        parameters: number of parameters, adapters included.
        trained: number of trainable parameters.
        forward_backward: peak during forward and backward.
        optimizer_step: peak between the end of backward and the end of the optimizer step.
        cpu: main memory used by offloading, per GPU.
    """

    parameters: int
    trained: int
    forward_backward: PhaseMemory
    optimizer_step: PhaseMemory
    cpu: int = 0

    @property
    def peak(self) -> PhaseMemory:
        """The phase with the larger total."""
        return max(self.forward_backward, self.optimizer_step, key=lambda memory: memory.total)

    @property
    def total(self) -> int:
        """Bytes of the larger phase."""
        return self.peak.total


class Planner:
    """Plans the memory of one model and training setup for any micro-batch size.

    Args:
        config: configuration of the model.
        world_size: number of GPUs, *optional*, defaults to 1.
        image_parallel: number of GPUs that share the images of a sample, and a long text, *optional*, defaults to 1.
        deepspeed: "zero1", "zero2", "zero3" or "zero3-offload", *optional*, defaults to None: plain data parallelism.
        fsdp: shard by FSDP2 (`--fsdp`) instead, *optional*, defaults to False.
        sequence_length: tokens per sample, image tokens included, *optional*, defaults to 2048.
        images: images per sample, *optional*, defaults to 1.
        tiles: tiles per image with `image_layout="tiles"`, *optional*, defaults to None: the most that an image can have.
            Native images have the most tokens that an image can have.
        train: parts that are trained in full, keys of `PARTS`, *optional*, defaults to projector and embeddings.
        lora_rank: rank of adapters on the decoder's linear layers, *optional*, defaults to 0: no adapters.
        lora: further arguments of `adapters.lora_config` (`targets`, `language`, `vision`, `vision_rank`,
            `vision_targets`), *optional*.
        activation_checkpointing: recompute activations in backward, *optional*, defaults to False.
        mlp_tile: tokens of a tile of the MLPs (`--tiled-mlp`), *optional*, defaults to None: all at once.
        offload_activations: keep the inputs of checkpointed layers in main memory, *optional*, defaults to False.
        frozen_precision: of frozen linear layers, "fp8" or "int8" (`--frozen-precision`), *optional*, defaults to None.
            Counted are 8-bit weights, and the transposed or dequantized one of a layer that is computed.
        frozen_keep: layers that it leaves as they are, *optional*, see `freeze_in_8_bits`.
        compile_decoder_layers: compile the decoder's layers (`--compile-decoder-layers`), *optional*, defaults to False.
            The compiler decides what a layer keeps for backward; its kernels need less beside that than is counted.
        gradient_accumulation: whether a step has several micro-batches, *optional*, defaults to False.
        supervised_share: fraction of the text tokens that have a label, *optional*, defaults to 0.25, which is typical of
            question-answer data. Logits are computed for these tokens only and dominate the memory of large vocabularies.
        dtype: dtype of weights and activations, without autocast, *optional*, defaults to the configuration's or bfloat16.
        mixed_precision: whether trainable weights, their gradients and AdamW's states are float32 with a `dtype` of 16 bits,
            as `dsvl train --bf16` keeps them without DeepSpeed, *optional*, defaults to False. With FSDP they always are.

    Raises:
        ValueError: if a value is unknown or the values do not go together.
    """

    def __init__(
        self,
        config: DSVLConfig,
        *,
        world_size: int = 1,
        image_parallel: int = 1,
        deepspeed: str | None = None,
        fsdp: bool = False,
        sequence_length: int = 2048,
        images: int = 1,
        tiles: int | None = None,
        train: Sequence[str] = ("projector", "embeddings"),
        lora_rank: int = 0,
        lora: Mapping[str, Any] | None = None,
        activation_checkpointing: bool = False,
        mlp_tile: int | None = None,
        offload_activations: bool = False,
        frozen_precision: str | None = None,
        frozen_keep: Sequence[str] | None = None,
        compile_decoder_layers: bool = False,
        gradient_accumulation: bool = False,
        supervised_share: float = 0.25,
        dtype: str | None = None,
        mixed_precision: bool = False,
    ) -> None:
        self._config, self._arguments = config, {name: value for name, value in locals().items() if name not in _NOT_OPTIONS}
        self.world_size, self.deepspeed, self.accumulation = world_size, deepspeed, gradient_accumulation
        self.fsdp = fsdp
        self.sequence_length, self.images = sequence_length, images
        most = 1 + config.max_tiles if config.image_layout == "tiles" else 1
        self.tiles = most if tiles is None else tiles
        if not 1 <= self.tiles <= most:
            raise ValueError(f"tiles={tiles} of an image: with image_layout={config.image_layout!r} it has 1 to {most}.")
        self.text_tokens = sequence_length - images * self.tiles * config.image_seq_length
        # Of the process with most images.
        self.image_parallel, self.own_images = image_parallel, -(-images // max(image_parallel, 1))
        self.supervised_share = supervised_share
        self.activation_checkpointing = activation_checkpointing
        self.mlp_tile, self.offload_activations = mlp_tile, offload_activations
        self.frozen_precision = frozen_precision
        self._plans: dict[int, MemoryPlan] = {}
        self._check(config, train, lora_rank, lora or {})
        dtype = dtype or _dtype_name(config.dtype or config.text_config.dtype) or "bfloat16"
        _one_of("dtype", dtype, DTYPES)
        torch_dtype: torch.dtype = getattr(torch, dtype)
        # DeepSpeed and FSDP have copies and shards of their own.
        self._keeps_float32 = mixed_precision and torch_dtype.itemsize < 4 and deepspeed is None and not fsdp
        self.tracer = StepTracer(
            config,
            train,
            lora_rank,
            activation_checkpointing,
            torch_dtype,
            lora,
            mlp_tile,
            offload_activations,
            frozen_precision,
            frozen_keep,
            compile_decoder_layers,
        )
        modules, parameters = self.tracer.model.modules(), list(self.tracer.model.parameters())
        blocks = [one for one in self.tracer.model.modules() if isinstance(one, GradientCheckpointingLayer)]
        layers, in_blocks = list(map(_count, blocks)), list(map(_bytes_in_8_bits, blocks))
        in_8_bits = _bytes_in_8_bits(self.tracer.model)
        embeddings = _count(self.tracer.model.get_input_embeddings())
        self._in_8_bits = sum(layer.weight.numel() for _, layer in frozen_linears(self.tracer.model))
        self.sizes = ModelSizes(
            parameters=tuple(p.numel() for p in parameters),
            trained=tuple(p.numel() for p in parameters if p.requires_grad),
            largest_module=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in modules),
            largest_layer=max(layers, default=0),
            unlayered=sum(p.numel() for p in parameters) - sum(layers) - embeddings,
            hidden=config.text_config.hidden_size,
            element=torch_dtype.itemsize,
            in_8_bits=in_8_bits,
            layers=tuple(torch_dtype.itemsize * numel + nbytes for numel, nbytes in zip(layers, in_blocks, strict=True)),
            unlayered_in_8_bits=in_8_bits - sum(in_blocks),
            tower_at_once=weights_at_once(self.tracer.model.model.vision_tower),
        )

    def changed(self, **options: Any) -> "Planner":
        """The planner of the same training with other options."""
        return Planner(self._config, **(self._arguments | options))

    def plan(self, micro_batch: int) -> MemoryPlan:
        """The memory for `micro_batch` samples per GPU in each forward and backward."""
        if micro_batch not in self._plans:
            self._plans[micro_batch] = self._plan(micro_batch)
        return self._plans[micro_batch]

    def _plan(self, micro_batch: int) -> MemoryPlan:
        _at_least("micro_batch", micro_batch, 1)
        config, text, exchanged = self._config, self.text_tokens, 0
        per_image = self.tiles * config.image_seq_length
        if deals_text(micro_batch * text, micro_batch * self.images * per_image, self.image_parallel, fuses=True):
            layers = 1 if self.activation_checkpointing else config.text_config.num_hidden_layers
            exchanged = dealt_text_buffers(config.text_config, micro_batch * text, layers, self.sizes.element)
            text = -(-text // self.image_parallel)
        supervised = max(round(micro_batch * text * self.supervised_share), 1)
        into = 0 if self.fsdp else arriving_gradients(self.sizes, self.deepspeed, self.world_size, self.accumulation)
        trace = self.tracer.trace(
            micro_batch,
            text + self.own_images * per_image,
            self.own_images * self.tiles,
            supervised,
            gradient_buffer=into,
            gradient_element=4 if self._keeps_float32 else None,
        )
        if self.fsdp:
            forward_backward, optimizer_step = fsdp_states(self.sizes, trace, self.world_size)
            cpu = 0
        else:
            states = model_states(self.sizes, trace, self.deepspeed, self.world_size, self.accumulation)
            forward_backward, optimizer_step, cpu = states
        if self._keeps_float32:
            forward_backward = self._in_float32(forward_backward, whole_gradients=self.accumulation)
            optimizer_step = self._in_float32(optimizer_step, whole_gradients=True)
        forward_backward = replace(forward_backward, buffers=forward_backward.buffers + exchanged)
        return MemoryPlan(
            sum(self.sizes.parameters) + self._in_8_bits,
            sum(self.sizes.trained),
            forward_backward,
            optimizer_step,
            cpu + trace.host,
        )

    def _in_float32(self, phase: PhaseMemory, whole_gradients: bool) -> PhaseMemory:
        """A phase with trainable weights in float32, which autocast also copies to 16 bits.

        Args:
            whole_gradients: whether its gradients are of all trainable weights, and counted in 16 bits rather than traced.
        """
        element, trained = self.sizes.element, sum(self.sizes.trained)
        more = (4 - element) * trained
        return replace(
            phase,
            weights=phase.weights + more + element * trained,
            gradients=phase.gradients + (more if whole_gradients else 0),
            optimizer=phase.optimizer + 2 * more,
            buffers=phase.buffers + (more if self.world_size > 1 else 0),
        )

    def largest_micro_batch(self, gpu_memory: float) -> int:
        """The largest micro-batch that fits into a GPU; 0 if none does.

        Args:
            gpu_memory: memory of one GPU, in bytes; `CONTEXT` and `FRAGMENTATION` are subtracted from it.
        """
        budget = usable(gpu_memory)
        first = self.plan(1)
        if first.total > budget:  # the optimizer step counts too, and does not depend on the micro-batch
            return 0
        fits, needed, fails = 1, first.forward_backward.total, math.inf
        probe = 2
        # Memory is nearly linear in the micro-batch: extrapolate with the last slope, and trace each guess.
        while fits + 1 < fails:
            got = self.plan(probe).forward_backward.total
            slope = max((got - needed) / (probe - fits), 1)
            if got <= budget:
                fits, needed = probe, got
            else:
                fails = probe
            guess = fits + int((budget - needed) / slope)
            probe = int(min(max(guess, fits + 1), fails - 1))
        return fits

    def _check(self, config: DSVLConfig, train: Sequence[str], lora_rank: int, lora: Mapping[str, Any]) -> None:
        for name, value, least in (
            ("world_size", self.world_size, 1),
            ("image_parallel", self.image_parallel, 1),
            ("images", self.images, 0),
            ("lora_rank", lora_rank, 0),
        ):
            _at_least(name, value, least)
        if self.world_size % self.image_parallel:
            raise ValueError(
                f"image_parallel={self.image_parallel} does not divide world_size={self.world_size}; pass a divisor of it."
            )
        if self.deepspeed is not None:
            _one_of("deepspeed", self.deepspeed, tuple(ZERO))
        for name in ("compile_decoder_layers", "fsdp"):
            if self.image_parallel > 1 and self._arguments[name]:
                raise ValueError(
                    f"image_parallel={self.image_parallel} with {name}=True, which dsvl train refuses; drop one."
                )
        if self.deepspeed is not None and self.fsdp:
            raise ValueError(f"deepspeed={self.deepspeed!r} with fsdp=True: both shard the model; pass one of them.")
        if self.frozen_precision is None and self._arguments["frozen_keep"]:
            raise ValueError("frozen_keep without frozen_precision; pass both.")
        if self.frozen_precision is not None:
            _one_of("frozen_precision", self.frozen_precision, PRECISIONS)
            if self.deepspeed in ("zero3", "zero3-offload"):
                raise ValueError(
                    f"frozen_precision={self.frozen_precision!r} with deepspeed={self.deepspeed!r}, which does not "
                    "partition 8-bit weights; pass fsdp=True or deepspeed='zero2'."
                )
        for part in train:
            _one_of("train", part, tuple(PARTS))
        if not train and not lora_rank:
            raise ValueError(f"train={list(train)!r} trains nothing; name parts ({', '.join(PARTS)}), or pass a lora_rank.")
        if lora and not lora_rank:
            raise ValueError(f"lora={dict(lora)!r} without adapters; also pass a lora_rank (for example 16).")
        adapted = {"language": lora.get("language", True), "vision": lora.get("vision", False)} if lora_rank else {}
        for part in train:
            if adapted.get(part):
                raise ValueError(
                    f"lora_rank={lora_rank} freezes the {LABELS[part]}'s layers and adapts them, but train contains "
                    f"{part!r}; pass one of them."
                )
        if self.text_tokens < 1:
            needed, of_tiles = self.images * self.tiles * config.image_seq_length, ""
            fewer = "fewer images"
            if config.image_layout == "tiles":
                of_tiles, fewer = f" of {self.tiles} tiles", "fewer images or tiles"
            raise ValueError(
                f"sequence_length={self.sequence_length} is too short: {self.images} images{of_tiles} take "
                f"{needed} tokens ({config.image_seq_length} each), and a token of text "
                f"must follow; pass at least {needed + 1}, or {fewer}."
            )
        if self.mlp_tile is not None:
            _at_least("mlp_tile", self.mlp_tile, 1)
        if self.offload_activations and not self.activation_checkpointing:
            raise ValueError("offload_activations=True without activation_checkpointing; pass both.")
        if not 0 < self.supervised_share <= 1:
            raise ValueError(
                f"supervised_share={self.supervised_share} is out of range; pass a number above 0 and at most 1."
            )


def plan(config: DSVLConfig, *, micro_batch: int = 1, **options: Any) -> MemoryPlan:
    """The memory of training a model, per GPU.

    Args:
        config: configuration of the model.
        micro_batch: samples per GPU in one forward and backward, *optional*, defaults to 1.
        options: arguments of `Planner`.
    """
    return Planner(config, **options).plan(micro_batch)


def largest_micro_batch(config: DSVLConfig, gpu_memory: float, **options: Any) -> int:
    """The largest micro-batch that fits into a GPU of `gpu_memory` bytes, or 0; `options` are those of `Planner`."""
    return Planner(config, **options).largest_micro_batch(gpu_memory)


def usable(gpu_memory: float) -> int:
    """Bytes that a GPU of `gpu_memory` bytes has for the tensors of a plan."""
    return int(gpu_memory * (1 - FRAGMENTATION)) - CONTEXT


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes_in_8_bits(module: torch.nn.Module) -> int:
    return sum(layer.nbytes for _, layer in frozen_linears(module))


def _dtype_name(dtype: Any) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(known)}.")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} is too small; pass {least} or more.")
