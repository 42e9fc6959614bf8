"""`dsvl plan`: the memory of training on GPUs, from a model's configuration alone.

Activations are not estimated by coefficients: trace.py runs the model itself on the meta device and counts. What the
optimizer and DeepSpeed keep beside them is arithmetic, in model_states.py.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..configuration_dsvl import DSVLConfig
from ..utils.local_paths import check_exists
from .model_states import ZERO, Memory, Sizes, arriving_gradients, model_states
from .parts import PARTS

GIB, MIB = 2**30, 2**20
DTYPES = ("bfloat16", "float16", "float32")

# What a GPU's memory has to hold beside the tensors of the plan; bytes, and a share of the whole GPU.
CONTEXT = 2 * GIB  # the CUDA context and its kernels, cuBLAS' workspaces, NCCL's channels
FRAGMENTATION = 0.05  # what the caching allocator holds and cannot use


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of training, per GPU, in bytes; `CONTEXT` and `FRAGMENTATION` come on top.

    Attributes:
        parameters: how many parameters the model has, adapters included.
        trained: how many of them learn.
        forward_backward: the fullest moment of forward and backward.
        optimizer_step: the fullest moment from the end of backward to the end of the step.
        cpu: main memory that offloading takes, per GPU.
    """

    parameters: int
    trained: int
    forward_backward: Memory
    optimizer_step: Memory
    cpu: int = 0

    @property
    def peak(self) -> Memory:
        """The phase that needs more."""
        return max(self.forward_backward, self.optimizer_step, key=lambda memory: memory.total)

    @property
    def total(self) -> int:
        return self.peak.total


# ----------------------------------------------------------------------------------------------------------------------
# The plan


class Planner:
    """Plans for one model and one way to train it; the micro-batch is still open.

    Args:
        config: the model's.
        world_size: GPUs.
        deepspeed: "zero1", "zero2", "zero3", "zero3-offload", or None for plain data parallelism.
        sequence_length: tokens of a sample, its images' included.
        images: of a sample.
        train: what learns in full: keys of `PARTS`.
        lora_rank: rank of adapters on the decoder's linear layers, beside `train`; 0 for none.
        activation_checkpointing: recompute activations in backward.
        gradient_accumulation: a step has several micro-batches.
        supervised_share: of the text tokens, how many have a label. Logits are computed for these alone, and they are a
            large part of the memory where the vocabulary is large; a quarter is usual for questions with answers.
        dtype: of weights and activations, without autocast. Default: the configuration's, or bfloat16.

    Raises:
        ValueError: for values that are unknown or do not go together.
    """

    def __init__(
        self,
        config: DSVLConfig,
        *,
        world_size: int = 1,
        deepspeed: str | None = None,
        sequence_length: int = 2048,
        images: int = 1,
        train: Sequence[str] = ("projector", "embeddings"),
        lora_rank: int = 0,
        activation_checkpointing: bool = False,
        gradient_accumulation: bool = False,
        supervised_share: float = 0.25,
        dtype: str | None = None,
    ) -> None:
        self.world_size, self.deepspeed, self.accumulation = world_size, deepspeed, gradient_accumulation
        self.sequence_length, self.images = sequence_length, images
        self.text_tokens = sequence_length - images * config.image_seq_length
        self.supervised_share = supervised_share
        self._made: dict[int, MemoryPlan] = {}
        self._check(config, train, lora_rank)
        dtype = dtype or _name(config.dtype or config.text_config.dtype) or "bfloat16"
        _one_of("dtype", dtype, DTYPES)

        import torch

        from .trace import StepTracer

        torch_dtype: torch.dtype = getattr(torch, dtype)
        self._tracer = StepTracer(config, train, lora_rank, activation_checkpointing, torch_dtype)
        modules, parameters = self._tracer.model.modules(), list(self._tracer.model.parameters())
        self.sizes = Sizes(
            parameters=tuple(p.numel() for p in parameters),
            trained=tuple(p.numel() for p in parameters if p.requires_grad),
            largest_module=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in modules),
            hidden=config.text_config.hidden_size,
            element=torch_dtype.itemsize,
        )

    def plan(self, micro_batch: int) -> MemoryPlan:
        """The memory for a micro-batch of so many samples on every GPU."""
        if micro_batch not in self._made:
            self._made[micro_batch] = self._plan(micro_batch)
        return self._made[micro_batch]

    def _plan(self, micro_batch: int) -> MemoryPlan:
        _at_least("micro_batch", micro_batch, 1)
        supervised = max(round(micro_batch * self.text_tokens * self.supervised_share), 1)
        into = arriving_gradients(self.sizes, self.deepspeed, self.world_size, self.accumulation)
        trace = self._tracer.trace(micro_batch, self.sequence_length, self.images, supervised, taken_into=into)
        states = model_states(self.sizes, trace, self.deepspeed, self.world_size, self.accumulation)
        return MemoryPlan(sum(self.sizes.parameters), sum(self.sizes.trained), *states)

    def largest_micro_batch(self, gpu_memory: float) -> int:
        """The largest micro-batch that fits a GPU, 0 if none does.

        Args:
            gpu_memory: of one GPU, in bytes; `CONTEXT` and `FRAGMENTATION` of it are left free.
        """
        budget = usable(gpu_memory)
        first = self.plan(1)
        if first.total > budget:  # which the step is a part of, whatever the micro-batch
            return 0
        fits, needed, fails = 1, first.forward_backward.total, math.inf
        probe = 2
        # Memory is all but linear in the micro-batch: guess by the last slope, and trace each guess.
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

    def _check(self, config: DSVLConfig, train: Sequence[str], lora_rank: int) -> None:
        for name, value, least in (
            ("world_size", self.world_size, 1),
            ("images", self.images, 0),
            ("lora_rank", lora_rank, 0),
        ):
            _at_least(name, value, least)
        if self.deepspeed is not None:
            _one_of("deepspeed", self.deepspeed, tuple(ZERO))
        for part in train:
            _one_of("train", part, tuple(PARTS))
        if not train and not lora_rank:
            raise ValueError(
                f"train={list(train)!r} names nothing that learns; name parts ({', '.join(PARTS)}), or pass a lora_rank."
            )
        if lora_rank and "language" in train:
            raise ValueError(
                f"lora_rank={lora_rank} freezes the decoder's layers and adapts them, but train names 'language'; leave "
                "one out."
            )
        if self.text_tokens < 1:
            raise ValueError(
                f"sequence_length={self.sequence_length} is too short: {self.images} images take "
                f"{self.images * config.image_seq_length} tokens ({config.image_seq_length} each), and a token of text "
                f"must follow; pass at least {self.images * config.image_seq_length + 1}, or fewer images."
            )
        if not 0 < self.supervised_share <= 1:
            raise ValueError(
                f"supervised_share={self.supervised_share} is no share of the text; pass a number above 0, at most 1."
            )


def plan(config: DSVLConfig, *, micro_batch: int = 1, **options: Any) -> MemoryPlan:
    """The memory of training a model, per GPU, from its configuration alone.

    Args:
        config: the model's.
        micro_batch: samples of one forward and backward on every GPU.
        options: see `Planner`.
    """
    return Planner(config, **options).plan(micro_batch)


def largest_micro_batch(config: DSVLConfig, gpu_memory: float, **options: Any) -> int:
    """The largest micro-batch that fits a GPU of `gpu_memory` bytes, 0 if none does; options as for `Planner`."""
    return Planner(config, **options).largest_micro_batch(gpu_memory)


def usable(gpu_memory: float) -> int:
    """What a GPU of `gpu_memory` bytes has for the tensors of a plan."""
    return int(gpu_memory * (1 - FRAGMENTATION)) - CONTEXT


def _name(dtype: Any) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(known)}.")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} is too small; pass {least} or more.")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl plan`."""
    parser = commands.add_parser("plan", help="the memory of training, per GPU, from the configuration alone")
    parser.add_argument(
        "--model",
        type=check_exists,
        required=True,
        help="directory or Hub name of a DSVL checkpoint; weights are not needed",
    )
    parser.add_argument("--world-size", type=int, default=1, help="GPUs (default 1)")
    parser.add_argument("--deepspeed", choices=ZERO, help="default: plain data parallelism")
    parser.add_argument("--micro-batch", type=int, default=1, help="samples at a time on every GPU (default 1)")
    parser.add_argument(
        "--sequence-length", type=int, default=2048, help="tokens of a sample, its images' included (default 2048)"
    )
    parser.add_argument("--images", type=int, default=1, help="of a sample (default 1)")
    parser.add_argument(
        "--train", nargs="*", default=["projector", "embeddings"], metavar="PART", help=f"what learns: {', '.join(PARTS)}"
    )
    parser.add_argument("--lora-rank", type=int, default=0, help="adapters on the decoder's linear layers")
    parser.add_argument(
        "--activation-checkpointing",
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in backward",
    )
    parser.add_argument("--gradient-accumulation", action="store_true", help="a step has several micro-batches")
    parser.add_argument(
        "--supervised-share", type=float, default=0.25, help="of the text tokens, how many have a label (default 0.25)"
    )
    parser.add_argument("--gpu-memory", type=float, default=80, help="of one GPU, in GiB (default 80)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the configuration's, or bfloat16")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    planner = Planner(
        _load_config(arguments.model),
        world_size=arguments.world_size,
        deepspeed=arguments.deepspeed,
        sequence_length=arguments.sequence_length,
        images=arguments.images,
        train=arguments.train,
        lora_rank=arguments.lora_rank,
        activation_checkpointing=arguments.activation_checkpointing,
        gradient_accumulation=arguments.gradient_accumulation,
        supervised_share=arguments.supervised_share,
        dtype=arguments.dtype,
    )
    made = planner.plan(arguments.micro_batch)
    print(table(made))
    memory, gpu = arguments.gpu_memory * GIB, f"a GPU of {arguments.gpu_memory:g} GiB"
    verdict = "fits" if made.total <= usable(memory) else "does not fit"
    asked = f"a micro-batch of {arguments.micro_batch}"
    print(f"{asked} {verdict} {gpu}, which has {size(max(usable(memory), 0))} beside the context and fragments")
    largest = planner.largest_micro_batch(memory)
    if largest:
        print(f"largest micro-batch for {gpu}: {largest}")
    else:
        print(f"not even a micro-batch of 1 fits {gpu}; {_remedies(arguments)}")


def _load_config(name: str) -> DSVLConfig:
    try:
        PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:  # the Hub's, about the form of names, is the latter
        raise ValueError(
            f"{name} is neither a directory with a config.json nor a model on the Hub; pass what `dsvl compose` made."
        ) from error
    return DSVLConfig.from_pretrained(name)


def table(made: MemoryPlan) -> str:
    """A plan, readable: GiB per GPU in both phases, or MiB of a small model."""
    phases = made.forward_backward, made.optimizer_step
    rows = {
        "weights": [phase.weights for phase in phases],
        "gradients": [phase.gradients for phase in phases],
        "optimizer states": [phase.optimizer for phase in phases],
        "activations": [phase.activations for phase in phases],
        "buffers": [phase.buffers for phase in phases],
        "total per GPU": [phase.total for phase in phases],
    }
    unit, name_of_unit = (GIB, "GiB") if made.total >= GIB else (MIB, "MiB")
    lines = [
        f"{_parameters(made.parameters)} parameters, {_parameters(made.trained)} of them trained",
        f"{name_of_unit:20}{'forward + backward':>20}{'optimizer step':>18}",
        *(f"{name:20}{first / unit:20,.2f}{second / unit:18,.2f}" for name, (first, second) in rows.items()),
    ]
    if made.cpu:
        lines.append(f"main memory, for each GPU: {size(made.cpu)}")
    return "\n".join(lines)


def size(number: float) -> str:
    """Bytes as GiB, or below one as MiB."""
    return f"{number / GIB:,.2f} GiB" if number >= GIB else f"{number / MIB:,.2f} MiB"


def _parameters(number: int) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.2f} million"


def _remedies(arguments: argparse.Namespace) -> str:
    remedies = []
    if not arguments.activation_checkpointing:
        remedies.append("--activation-checkpointing")
    if arguments.deepspeed not in ("zero3", "zero3-offload"):
        remedies.append("--deepspeed zero3 on more GPUs (--world-size)")
    if arguments.deepspeed != "zero3-offload":
        remedies.append("--deepspeed zero3-offload")
    remedies.append("a shorter --sequence-length")
    return "try " + ", ".join(remedies[:-1]) + (" or " if remedies[:-1] else "") + remedies[-1] + "."
