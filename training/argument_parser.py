"""The argument parser of `dsvl train`, whose help shows the important flags in groups."""

import argparse
import textwrap
from collections.abc import Iterator
from enum import Enum
from typing import Any

from transformers import HfArgumentParser

from ..utils.command_line import CommandParser

# Fields of the package and common fields of TrainingArguments; names that the installed release lacks are ignored.
GROUPS = {
    "model": "model attn_implementation",
    "data": "data dataset_names dataset_samples dataset_concatenate_samples max_num_image_per_sample streaming "
    "on_bad_sample video_fps max_frames cache_image_features dataloader_num_workers",
    "what is trained": "train lora_rank lora_alpha lora_dropout lora_targets lora_language lora_vision "
    "lora_vision_rank lora_vision_targets dora qlora",
    "length and packing": "max_length packing max_images_per_pack",
    "optimisation": "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate "
    "learning_rates lr_scheduler_type warmup_steps weight_decay seed",
    "precision and memory": "bf16 activation_checkpointing gradient_checkpointing use_liger_kernel compile_decoder_layers "
    "tiled_mlp offload_activations skip_image_queries frozen_precision frozen_precision_keep frozen_precision_report",
    "evaluation": "eval_data eval_share eval_strategy per_device_eval_batch_size eval_exact_match "
    "eval_max_new_tokens early_stopping_patience",
    "saving and publishing": "output_dir overwrite_output resume_from_checkpoint save_strategy save_steps save_total_limit "
    "logging_steps report_to push_to_hub hub_model_id",
    "distributed": "deepspeed fsdp image_parallel lost_process_timeout",
    "recipes": "stage_values keep_stages list_recipes",
}
# The group of fields of the package that are not in GROUPS, by class.
CLASSES = {"ModelArguments": "model", "DataArguments": "data", "DSVLTrainingArguments": "saving and publishing"}
REST = "all other fields of TrainingArguments"
# Help texts that replace those of transformers.
ABOUT = {
    "hub_private_repo": "make the repository private",
    "push_to_hub": "publish the trained model on the Hub when it is complete",
}
REQUIRED = ("model", "data", "output_dir")
SHORT = {"output_dir": "--output", "stage_values": "--stage"}  # flags that differ from the field's name
FEW = 8  # maximum number of choices that are listed
COLUMN, WIDTH = 30, 110


class TrainParser(HfArgumentParser, CommandParser):
    """A parser of dataclasses with grouped help and suggestions for mistyped flags.

    Args:
        types: dataclasses; the last is a subclass of `TrainingArguments`.
        kwargs: see `argparse.ArgumentParser`.
    """

    def __init__(self, types: list[Any], **kwargs: Any) -> None:
        super().__init__(types, **kwargs)  # type: ignore[arg-type]  # mypy resolves it to the wrong base class
        inherited = {name for one in types[-1].__mro__[1:] for name in getattr(one, "__dataclass_fields__", {})}
        self._ours = {
            name: CLASSES[one.__name__]
            for one in types
            for name in one.__dataclass_fields__
            if one is not types[-1] or name not in inherited
        }
        self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every flag and exit")

    def format_help(self, everything: bool = False) -> str:
        """The help text; with `everything`, also the other fields of `TrainingArguments`."""
        lines = [f"usage: {self.usage}", "", *textwrap.wrap(self.description or "", WIDTH)]
        for title, actions in self.groups(everything).items():
            lines += ["", f"{title}:"]
            for action in actions:
                lines += _help_lines(action)
        lines += ["", f"  {'-h, --help':{COLUMN - 2}}show this help and exit"]
        return "\n".join([*lines, f"  {'--help-all':{COLUMN - 2}}also show {REST}, and exit", ""])

    def groups(self, everything: bool = False) -> dict[str, list[argparse.Action]]:
        """Title -> flags of the group; every flag is in one group."""
        flags = {action.dest: action for action in self._flags()}
        named = {name: title for title, names in GROUPS.items() for name in names.split()}
        groups: dict[str, list[argparse.Action]] = {title: [] for title in [*GROUPS, *([REST] if everything else [])]}
        order = [*named, *(name for name in flags if name not in named)]
        for name in order:
            title = named.get(name) or self._ours.get(name) or REST
            if name in flags and title in groups:
                groups[title].append(flags[name])
        return groups

    def _flags(self) -> Iterator[argparse.Action]:
        """The first action of each field, without `--no-` variants and deprecated names."""
        seen = set()
        for action in self._actions:
            deprecated = (action.help or "").startswith("Deprecated")
            if action.dest not in seen and action.dest not in ("help", "help_all") and not deprecated:
                seen.add(action.dest)
                yield action


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        assert isinstance(parser, TrainParser)
        print(parser.format_help(everything=True), end="")
        parser.exit()


def _help_lines(action: argparse.Action) -> list[str]:
    """The lines of a flag: its name, value, help and default."""
    about = " ".join((ABOUT.get(action.dest) or action.help or "").replace("%%", "%").split())
    flag = SHORT.get(action.dest) or "--" + action.dest.replace("_", "-")
    if isinstance(action.default, bool) and action.nargs == "?":
        default = f"default: on; disable with --no-{flag[2:]}" if action.default else "default: off"
    else:
        flag += f" {_metavar(action)}"
        default = "required" if action.dest in REQUIRED else _default(action.default, about)
    if action.choices and len(list(action.choices)) <= FEW:
        about += f" ({', '.join(map(str, action.choices))})" if not all(str(one) in about for one in action.choices) else ""
    about = f"{about.rstrip('.')} [{default}]" if default else about
    wrapped = textwrap.wrap(about, WIDTH - COLUMN, break_long_words=False) or [""]
    head = f"  {flag}"
    first = [f"{head:{COLUMN}}{wrapped.pop(0)}"] if len(head) < COLUMN else [head]
    return first + [" " * COLUMN + line for line in wrapped]


def _metavar(action: argparse.Action) -> str:
    kind = getattr(action.type, "__name__", "")
    name = {"int": "N", "float": "X", "str": "NAME"}.get(kind, "VALUE")
    if action.dest in ("data", "eval_data"):
        name = "FILE"
    elif action.dest in ("model", "output_dir") or action.dest.endswith(("_dir", "_features")):
        name = "DIR"
    return f"{name} ..." if action.nargs in ("+", "*") else name


def _default(value: Any, about: str) -> str:
    if value is None or value == "" or value == []:
        return "" if "default" in about.lower() else "default: none"
    if isinstance(value, Enum):
        value = value.value
    return f"default: {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
