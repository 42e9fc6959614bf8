"""How the batch of a step is divided among processes, and what keeps it when a run continues on another number of them."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .arguments import DataArguments, DSVLTrainingArguments
from .fsdp import SETTINGS


@dataclass(frozen=True)
class BatchDivision:
    """The division of a batch; `run.json` holds that of a run's flags.

    Attributes:
        processes: number of processes.
        per_device: samples in a batch of one process.
        accumulation: batches of a process in one step.
        workers: worker processes of each data loader.
        sharing: processes that have one batch together (`--image-parallel`).
    """

    processes: int
    per_device: int
    accumulation: int
    workers: int = 0
    sharing: int = 1

    @property
    def groups(self) -> int:
        """How many different batches the processes have at a time."""
        return self.processes // self.sharing

    @property
    def batch_size(self) -> int:
        """The effective batch size."""
        return self.groups * self.per_device * self.accumulation

    @property
    def flags(self) -> str:
        """The flags that ask for it."""
        return f"--per-device-train-batch-size {self.per_device} --gradient-accumulation-steps {self.accumulation}"

    def among(self, processes: int, sharing: int = 1) -> "BatchDivision":
        """The same batch on another number of processes, with batches of a process that are not larger.

        Args:
            processes, sharing: see the attributes; sharing is *optional*, and defaults to 1.

        Raises:
            ValueError: if it cannot be divided among them.
        """
        share, rest = divmod(self.batch_size, processes // sharing)
        if rest:
            possible = [str(n * sharing) for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise ValueError(
                f"The run's batch of {self.batch_size} samples cannot be divided among {processes} processes; start "
                f"{_or(possible)} of them, or pass --overwrite-output to start over with another batch size."
            )
        per_device = max(size for size in range(1, min(self.per_device, share) + 1) if share % size == 0)
        return replace(self, processes=processes, per_device=per_device, accumulation=share // per_device, sharing=sharing)

    @classmethod
    def of(cls, arguments: DSVLTrainingArguments) -> "BatchDivision":
        """The division that arguments ask for."""
        return cls(
            arguments.world_size,
            arguments.per_device_train_batch_size,
            arguments.gradient_accumulation_steps,
            arguments.dataloader_num_workers,
            arguments.image_parallel,
        )

    @classmethod
    def read(cls, content: Any) -> "BatchDivision | None":
        """The division in a record; None if the record is of an earlier release, which did not write it.

        Raises:
            TypeError: if it is not one.
        """
        return None if content is None else cls(**content)

    def to_dict(self) -> dict[str, int]:
        """The content of a record."""
        return asdict(self)


def keep_batch_size(
    before: BatchDivision, data_arguments: DataArguments, arguments: DSVLTrainingArguments, finished: bool = False
) -> BatchDivision:
    """The division of the batch for a run that continues, perhaps on another number of processes.

    If the flags are those of the run and only the number of processes differs, the effective batch size is kept: batches of
    a process become smaller, or are accumulated. Otherwise it is the division that is requested.

    Args:
        before: division of the run's flags, see `RunRecord`.
        data_arguments, arguments: what is requested.
        finished: whether the run has ended, *optional*, defaults to False: it will read samples.

    Raises:
        ValueError: if the batch cannot be divided among the processes, or if they would read other samples than the run's.
    """
    now = BatchDivision.of(arguments)
    same_flags = (before.per_device, before.accumulation) == (now.per_device, now.accumulation)
    kept = before.among(now.processes, now.sharing) if same_flags else now
    if not finished:
        _check_order(before, kept, data_arguments, arguments)
    return replace(kept, workers=now.workers)


def with_division(arguments: DSVLTrainingArguments, division: BatchDivision) -> DSVLTrainingArguments:
    """The arguments with this division of the batch; DeepSpeed's configuration follows."""
    if division == BatchDivision.of(arguments):
        return arguments
    changes: dict[str, Any] = {
        "per_device_train_batch_size": division.per_device,
        "gradient_accumulation_steps": division.accumulation,
    }
    if arguments.fsdp:  # transformers has added settings of its own
        settings: Any = arguments.fsdp_config
        changes["fsdp_config"] = {name: value for name, value in settings.items() if name in SETTINGS}
    return replace(arguments, **changes)


def _check_order(
    before: BatchDivision, now: BatchDivision, data_arguments: DataArguments, arguments: DSVLTrainingArguments
) -> None:
    """Refuse a run whose processes would read other samples than those of the interrupted run."""
    workers = arguments.dataloader_num_workers
    if data_arguments.streaming and before.groups == now.groups and before.workers != workers:
        raise ValueError(
            f"--streaming divides the data among the workers of the loaders, so a run with {before.workers} of them cannot "
            f"continue with {workers} without reading samples twice; pass --dataloader-num-workers {before.workers}."
        )
    if before.groups != now.groups and data_arguments.streaming:
        reason = "--streaming divides the data among the processes"
    elif arguments.dataloader_drop_last and before.accumulation != now.accumulation:
        reason = "--dataloader-drop-last ends an epoch after whole batches, of which a step now accumulates another number"
    else:
        return
    raise ValueError(
        f"{reason}, so a run of {count_processes(before.processes)} cannot continue on {now.processes} with "
        f"{now.flags} without reading samples twice or skipping some. Start {count_processes(before.processes)} (torchrun "
        f"--nproc-per-node {before.processes} on one host) with {before.flags}, or pass --overwrite-output to start over."
    )


def saved_processes(checkpoint: Path) -> int | None:
    """The number of processes that wrote a checkpoint, from their random states; None if it has none."""
    if (checkpoint / "rng_state.pth").is_file():
        return 1
    return sum(1 for _ in checkpoint.glob("rng_state_*.pth")) or None


def describe_resuming(checkpoint: Path, arguments: DSVLTrainingArguments) -> str:
    """The line that is logged when a run resumes."""
    saved, now = saved_processes(checkpoint), BatchDivision.of(arguments)
    if saved is None or saved == now.processes:
        return f"Resuming from {checkpoint}."
    return (
        f"Resuming from {checkpoint}, which {count_processes(saved)} wrote, on {now.processes}: batches of {now.per_device} "
        f"x {now.accumulation} accumulated x {now.processes}, {now.batch_size} samples a step. Random numbers, such as "
        "those of dropout, differ from those of an uninterrupted run."
    )


def count_processes(processes: int) -> str:
    """A number of processes in words."""
    return "1 process" if processes == 1 else f"{processes} processes"


def _or(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"
