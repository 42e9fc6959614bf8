"""The facts about a training for the model card."""

import csv
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..data.mixture import Mixture, Subset
from ..data.packing import PackedConversations
from ..data.streaming import Stream
from ..hub_card import TrainingFacts
from ..hub_card.base_models import is_repo_id
from .adapters import describe_adapters
from .frozen_precision import describe_frozen_weights

EMISSIONS = "emissions.csv"  # written to the output directory by the Trainer's codecarbon callback


def training_facts(
    trainer: Trainer,
    metrics: dict[str, float],
    data: Any = None,
    train: Sequence[str] | None = None,
    resumed: bool = False,
) -> TrainingFacts:
    """The facts of a finished training.

    Args:
        trainer: the trainer after training.
        metrics: metrics of the training and of the last evaluation, name -> value.
        data: the conversations before packing, *optional*, defaults to the trainer's data set.
        train: parts that were trained in full, by the names of `dsvl train --train`, *optional*.
        resumed: whether the training was resumed from a checkpoint, so that its duration is that of the last part,
            *optional*, defaults to False.
    """
    arguments = trainer.args
    packs = isinstance(trainer.train_dataset, PackedConversations)
    settings: dict[str, Any] = {"trained parts": ", ".join(train)} if train is not None else {}
    settings |= {
        "learning rate": arguments.learning_rate,
        **{
            f"learning rate of the {part}": rate for part, rate in (getattr(arguments, "learning_rates", None) or {}).items()
        },
        "schedule": f"{arguments.lr_scheduler_type.value}, {arguments.warmup_steps:g} warm-up",
        "weight decay": arguments.weight_decay,
        f"{'packs' if packs else 'conversations'} a step": arguments.per_device_train_batch_size
        * arguments.gradient_accumulation_steps
        * (arguments.world_size // getattr(arguments, "image_parallel", 1)),
        "steps": trainer.state.global_step,
        **({} if isinstance(trainer.train_dataset, Stream) else {"epochs": round(trainer.state.epoch or 0, 2)}),
        "seed": arguments.seed,
        "precision": "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32",
        "processes": arguments.world_size,
    }
    if getattr(arguments, "image_parallel", 1) > 1:
        settings["image parallelism"] = f"over {arguments.image_parallel} processes"
    if hasattr(trainer.model, "peft_config"):
        settings["adapters"] = describe_adapters(trainer.model)
    frozen = describe_frozen_weights(trainer.model)
    if frozen is not None:
        settings["frozen weights"] = f"{frozen}, in training and its evaluations; here they are the original ones"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    results = {"last logged training loss": losses[-1]} if losses else {}
    results |= {name: value for name, value in metrics.items() if name in ("eval_loss", "eval_exact_match")}
    counts, datasets = data_counts(trainer.train_dataset if data is None else data)
    return TrainingFacts(
        data=counts,
        datasets=datasets,
        settings=settings,
        results=results,
        hardware=hardware(arguments.world_size),
        seconds=metrics.get("train_runtime"),
        resumed=resumed,
        emissions=read_emissions(Path(str(arguments.output_dir)) / EMISSIONS),
    )


def data_counts(data: Any) -> tuple[dict[str, int | None], list[str]]:
    """The number of conversations per data set, and the data sets that are on the Hub.

    Args:
        data: a data set, mixture, subset, packed data set or stream.

    Returns:
        Name -> number of conversations, None for a stream; and the Hub names of data sets.
    """
    if isinstance(data, PackedConversations):
        data = data.data
    indices = data.indices if isinstance(data, Subset) else None if isinstance(data, Stream) else range(len(data))
    if isinstance(data, Subset):
        data = data.data
    if not isinstance(data, Mixture):
        source = str(getattr(data, "source", "data of a Python program"))
        on_hub = is_repo_id(source) and hasattr(data, "source") and not Path(source).exists()
        count = None if indices is None else len(indices)
        return {source if on_hub else Path(source).name: count}, [source] if on_hub else []
    counts = dict.fromkeys((part.name for part, _ in data.parts), 0)
    for index in indices or ():
        number, group = data.index[index]
        counts[data.parts[number][0].name] += len(group)
    paths = [part.path for part, _ in data.parts]
    return {**counts}, [path for path in paths if is_repo_id(path) and not Path(path).exists()]


def hardware(processes: int) -> str:
    """A description of the devices of a training; all processes are assumed to have the same kind."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        name = torch.cuda.get_device_name() if kind is not None and kind.type == "cuda" else str(kind)
        return f"{processes} x {name}"
    return f"{processes} {'process' if processes == 1 else 'processes'} on CPU ({platform.machine()})"


def read_emissions(path: Path) -> float | None:
    """The emissions of all starts of a training in kg CO2eq, from codecarbon's CSV file."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        return sum(float(row["emissions"]) for row in csv.DictReader(file))
