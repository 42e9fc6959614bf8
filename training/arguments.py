"""The arguments of `dsvl train`: its flags, their checks, and a YAML file whose values are overridden by flags."""

import argparse
import json
import logging
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..acceleration.memory.frozen_linear import PRECISIONS
from ..data.commands import MAX_BAD_SAMPLES_HELP
from ..data.sample_errors import MAX_BAD_SAMPLES
from ..utils.deprecation import RenamedFlag
from ..utils.local_paths import check_exists
from ..utils.yaml_files import read_yaml
from .argument_checks import check_options
from .argument_parser import TrainParser
from .deepspeed_config import ZERO, zero_configuration
from .frozen_precision import KEEP_NONE
from .fsdp import SETTINGS, check_fsdp, check_processes, fsdp_config
from .image_groups import check_divides
from .learning_rates import RATED_PARTS, parse_learning_rates
from .trainable_parts import PARTS
from .training_arguments_table import check_training_arguments

logger = logging.getLogger(__name__)

TOKENS_SEEN = ("all", "non_padding", "no")
STAGE_VALUES = "stage_values"  # dest of --stage
EMBEDDINGS_RATE = "embeddings_learning_rate"  # dest of a flag of dsvl 0.2


@dataclass
class ModelArguments:
    """The model, and which of its parts are trained."""

    model: str = field(metadata={"help": "directory or Hub name of a DSVL checkpoint"})
    train: list[str] = field(
        default_factory=lambda: ["projector", "embeddings"], metadata={"help": f"parts to train: {', '.join(PARTS)}"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention implementation of the decoder: sdpa, eager or flex_attention"}
    )
    compile_decoder_layers: bool = field(
        default=False, metadata={"help": "compile each decoder layer; --torch-compile compiles the whole model instead"}
    )
    tiled_mlp: int | None = field(
        default=None,
        metadata={
            "help": "run the decoder's MLPs over tiles of this number of tokens (for example 8192), which saves memory with "
            "many images. Default: over all tokens at once"
        },
    )
    offload_activations: bool = field(
        default=False,
        metadata={"help": "with --activation-checkpointing, keep the inputs of the decoder's layers in main memory"},
    )
    skip_image_queries: bool = field(
        default=False,
        metadata={
            "help": "do not project the queries of image tokens, which mmca does not use; saves time with many images"
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "rank of LoRA adapters; 0 for none"})
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "adapters are scaled by alpha / rank. Default: twice the rank; DeepSpeed-VisualChat uses 1"},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout in front of the adapters"})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "linear layers to adapt, by name (q_proj) or path (layers.0-15, layers.0-15.*.q_proj). Default: all "
            "linear layers"
        },
    )
    lora_language: bool = field(default=True, metadata={"help": "adapt the decoder"})
    lora_vision: bool = field(default=False, metadata={"help": "adapt the vision tower"})
    lora_vision_rank: int | None = field(
        default=None, metadata={"help": "rank of the vision tower's adapters. Default: --lora-rank"}
    )
    lora_vision_targets: list[str] | None = field(
        default=None,
        metadata={"help": "linear layers of the vision tower to adapt, as for --lora-targets. Default: --lora-targets"},
    )
    dora: bool = field(default=False, metadata={"help": "use DoRA (weight-decomposed) adapters"})
    qlora: bool = field(default=False, metadata={"help": "load the frozen weights in 4 bits (needs bitsandbytes)"})
    frozen_precision: str | None = field(
        default=None,
        metadata={
            "help": f"keep the frozen linear layers of decoder and vision tower in 8 bits: {' or '.join(PRECISIONS)}. Saved "
            "models have the original weights"
        },
    )
    frozen_precision_keep: list[str] | None = field(
        default=None,
        metadata={
            "help": "linear layers that --frozen-precision leaves as they are, by name or path as for --lora-targets, or "
            f"{KEEP_NONE}. Default: the first and the last layer of the decoder"
        },
    )
    frozen_precision_report: bool = field(
        default=False,
        metadata={
            "help": "before training, measure the error of each 8-bit layer and of the logits on the first samples, and "
            "write it to frozen_precision.json in --output"
        },
    )


@dataclass
class DataArguments:
    """The training and evaluation data."""

    data: str = field(
        metadata={
            "help": "conversations: a file (.jsonl, .ndjson, .json, also .gz; .csv, .parquet, .tar), a directory, a name on "
            "the Hub; a YAML file of a mixture; "
            "with --dataset-names, the folder of their files"
        }
    )
    dataset_names: list[str] | None = field(
        default=None,
        metadata={"help": "mix these data sets: NAME.jsonl in the folder --data, as written by dsvl data convert"},
    )
    dataset_samples: list[str] | None = field(
        default=None,
        metadata={
            "help": "number of conversations of each data set, or all; one value for each name, or one for all. Default: all"
        },
    )
    dataset_concatenate_samples: list[int] | None = field(
        default=None,
        metadata={
            "help": "concatenate up to this number of samples to one conversation; one value for each name, or one for all. "
            "Default: 1"
        },
    )
    max_num_image_per_sample: int | None = field(
        default=None,
        metadata={"help": "maximum number of images per conversation of a mixture; conversations with more are skipped"},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "read --data sequentially and repeatedly instead of loading it; needs --max-steps"},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "pack several conversations into a row of --max-length tokens; they do not attend to each other"},
    )
    video_fps: float | None = field(
        default=None, metadata={"help": "frames of a second of video that are read (default: the checkpoint's, 2.0)"}
    )
    max_frames: int | None = field(
        default=None,
        metadata={
            "help": "maximum number of frames of a video; each takes an image's tokens (default: the checkpoint's, 64)"
        },
    )
    max_images_per_pack: int | None = field(
        default=None,
        metadata={
            "help": "maximum number of images and frames (with the image layout tiles: of tiles) per row of --packing; "
            "limits the memory of the vision tower"
        },
    )
    cache_image_features: str | None = field(
        default=None,
        metadata={
            "help": "directory of a cache of the frozen vision tower's features, computed once for each image (0.5 MiB per "
            "image or tile for CLIP ViT-L/14 in 16 bits)"
        },
    )
    eval_data: str | None = field(default=None, metadata={"help": "held-out conversations, in the formats of --data"})
    eval_share: float | None = field(
        default=None, metadata={"help": "hold out this fraction of --data instead, chosen by the seed"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "maximum tokens per conversation, images included; turns beyond it are dropped"}
    )
    on_bad_sample: str = field(
        default="error",
        metadata={"help": "what to do with a broken line, a missing image or a first turn that is too long: error or skip"},
    )
    max_bad_samples: float = field(default=MAX_BAD_SAMPLES, metadata={"help": MAX_BAD_SAMPLES_HELP})
    allow_urls: bool = field(
        default=False, metadata={"help": "allow images and videos to be http(s) URLs; they are fetched again in every epoch"}
    )


@dataclass
class DSVLTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this model and additional fields."""

    output_dir: str | None = field(
        default=None, metadata={"help": "directory of the trained model and its checkpoints", "aliases": ["--output"]}
    )
    deepspeed: dict | str | None = field(
        default=None,
        metadata={"help": f"{', '.join(ZERO)}, or a DeepSpeed configuration: the path of a JSON file, or a mapping in YAML"},
    )
    fsdp: str | None = field(
        default=None,
        metadata={
            "help": "shard weights, gradients and optimizer states over the processes by FSDP2, without DeepSpeed",
            "nargs": "?",
            "const": True,
        },
    )
    fsdp_config: dict | str | None = field(
        default=None,
        metadata={
            "help": f"settings of --fsdp: a mapping in YAML or JSON, or a JSON file. Keys: {', '.join(SETTINGS)}. Default: "
            "weights are released after forward, and gathered again in backward"
        },
    )
    image_parallel: int = field(
        default=1,
        metadata={
            "help": "spread the images of a batch, and long texts, over this number of processes, which read the same "
            "batches; for mmca with many images"
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(default=0.03, metadata={"help": "warm-up steps, or a fraction of all steps if less than 1"})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must be false: the collator reads the conversations"}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "leave NaN and infinite losses out of the logged mean; synchronizes with the device at every step"
        },
    )
    logging_steps: float = field(
        default=10, metadata={"help": "steps between two log entries, or a fraction of all steps if less than 1"}
    )
    include_num_input_tokens_seen: str = field(
        default="no",
        metadata={
            "help": "log the number of tokens: all, non_padding or no; synchronizes with the device at every step. Tokens "
            "per second are always logged",
            "nargs": "?",
            "const": "all",
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "directory of a checkpoint of any run; last; or no. Default: the last complete checkpoint of the same "
            "run, if --output has one",
            "aliases": ["--resume-from"],
        },
    )
    overwrite_output: bool = field(
        default=False, metadata={"help": "delete the files of an earlier run in --output, and start over"}
    )
    accelerator_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "configuration of accelerate: a mapping, or a JSON file. Default: batches are copied asynchronously"
        },
    )
    learning_rates: dict | str | None = field(
        default=None,
        metadata={
            "help": "learning rates of parts, such as projector=1e-3,vision=2e-6, or a mapping in YAML; the parts are "
            f"{', '.join(RATED_PARTS)}. Default: --learning-rate"
        },
    )
    eval_exact_match: bool = field(
        default=False,
        metadata={"help": "generate an answer to each held-out question, and report the fraction of exact matches"},
    )
    eval_max_new_tokens: int = field(default=64, metadata={"help": "maximum tokens of an answer of --eval-exact-match"})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "stop after this number of evaluations without an improvement of metric_for_best_model"},
    )
    lost_process_timeout: float = field(
        default=40,
        metadata={
            "help": "seconds without a sign of life of a process after which all others end, with a message that names "
            "it; 0 waits for --ddp-timeout instead"
        },
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("No output directory; pass --output DIR.")
        # transformers also accepts booleans, and YAML reads "no" as one.
        seen = str(self.include_num_input_tokens_seen).lower()
        self.include_num_input_tokens_seen = {"true": "all", "false": "no"}.get(seen, seen)
        if self.include_num_input_tokens_seen not in TOKENS_SEEN:
            raise ValueError(f"--include-num-input-tokens-seen {seen} is unknown; choose from {', '.join(TOKENS_SEEN)}.")
        if self.resume_from_checkpoint is not None:
            resume = str(self.resume_from_checkpoint)
            self.resume_from_checkpoint = {"true": "last", "false": "no"}.get(resume.lower(), resume)
        self.learning_rates = parse_learning_rates(self.learning_rates) or None
        if isinstance(self.deepspeed, str) and not self.deepspeed.startswith("{"):
            self.deepspeed = str(zero_configuration(self.deepspeed))
        if isinstance(self.fsdp, str) and self.fsdp.lower() in ("true", "false", "1", "0"):  # as YAML files give it
            self.fsdp = self.fsdp.lower() in ("true", "1") or None  # type: ignore[assignment]
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        check_fsdp(values)
        if self.fsdp:
            check_processes(values["use_cpu"])
        self.fsdp_config = fsdp_config(self.fsdp_config) if self.fsdp else None
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.accelerator_config is None and self.dataloader_pin_memory:
            # Batches are copied while the device computes the previous step.
            self.accelerator_config = {"non_blocking": True}
        if self.deepspeed is not None:
            _start_deepspeed(on_cpu=self.use_cpu, timeout=self.ddp_timeout_delta)
        super().__post_init__()
        if self.fsdp:
            # Gradients of several micro-batches are summed in shards, not whole.
            config: Any = self.accelerator_config
            given = config.gradient_accumulation_kwargs or {}
            config.gradient_accumulation_kwargs = {"sync_each_batch": True} | given
        check_divides(self.image_parallel, self.world_size)
        if self.n_gpu > 1:
            # The Trainer would choose DataParallel, which splits images as if each conversation had one.
            logger.warning(
                "%d GPUs but no launcher: only one is used. To use all: torchrun --nproc-per-node %d -m dsvl.training.",
                self.n_gpu,
                self.n_gpu,
            )
            self._n_gpu = 1


def _start_deepspeed(on_cpu: bool, timeout: timedelta) -> None:
    """Initialize DeepSpeed's communication; without a launcher, for a single process."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # With this variable accelerate would silently choose DDP.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        try:
            import deepspeed
        except ImportError as error:
            raise ValueError("--deepspeed needs DeepSpeed; pip install 'dsvl[train]'.") from error
        # accelerate would initialize it for an accelerator that the processes do not have.
        deepspeed.init_distributed(dist_backend="gloo", timeout=timeout)


def build_parser(kind: type[TrainParser] = TrainParser) -> TrainParser:
    """The parser of `dsvl train`; its flags are the fields of three dataclasses, and those of recipes.

    Args:
        kind: class of the parser, *optional*.
    """
    types: list[Any] = [ModelArguments, DataArguments, DSVLTrainingArguments]
    parser = kind(
        types,
        prog="dsvl train",
        description="Fine-tune a DSVL checkpoint. RUN.yaml contains flags without their dashes; every field of "
        "TrainingArguments is a flag. A file with `stages:`, or a RECIPE of the package, trains in several stages.",
        usage="dsvl train [RUN.yaml | RECIPE] --model DIR --data FILE --output DIR [flags]",
        allow_abbrev=False,
    )
    next(action for action in parser._actions if action.dest == "train").nargs = "*"  # adapters may be trained alone
    parser.add_argument(
        "--stage",
        dest=STAGE_VALUES,
        action="append",
        metavar="NAME.KEY=VALUE",
        help="a value of one stage of a recipe, such as align.data=FILE; can be repeated, and overrides all other values",
    )
    parser.add_argument(
        "--keep-stages",
        action="store_true",
        help="keep the models and checkpoints of earlier stages; by default they are deleted when they are not needed",
    )
    parser.add_argument("--list-recipes", action="store_true", help="list the recipes of the package and exit")
    # Flags of earlier releases.
    parser.add_argument(
        "--max-pictures-per-pack", "--max_pictures_per_pack", dest="max_images_per_pack", type=int, action=RenamedFlag
    )
    parser.add_argument(
        "--embeddings-learning-rate", "--embeddings_learning_rate", dest=EMBEDDINGS_RATE, type=float, action=FormerRate
    )
    return parser


class FormerRate(RenamedFlag):
    """The action of `--embeddings-learning-rate`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        logger.warning(
            "%s is deprecated and will be removed in dsvl 0.4; use --learning-rates embeddings=%g.", option_string, values
        )
        setattr(namespace, self.dest, values)


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, DSVLTrainingArguments]:
    """Parse and check the arguments of a training without stages; nothing is loaded.

    Args:
        argv: flags; the first argument may be a YAML file of them.

    Raises:
        ValueError: if the arguments do not go together.
        FileNotFoundError: if the model or data look like a path and do not exist.
        SystemExit: for an unknown flag.
    """
    argv = list(argv)
    # DeepSpeed's launcher prepends --local_rank=N.
    first = 1 if argv[:1] and argv[0].startswith("--local_rank") else 0
    if argv[first : first + 1] and argv[first].endswith((".yaml", ".yml")):
        argv[first : first + 1] = yaml_flags(read_mapping(Path(argv[first])))
    parser = build_parser()
    values = vars(parser.parse_args(argv))
    given = {flag.lstrip("-").split("=")[0].replace("-", "_") for flag in argv if flag.startswith("--")}
    if values[STAGE_VALUES] or values["keep_stages"]:
        flag = f"--stage {values[STAGE_VALUES][0]}" if values[STAGE_VALUES] else "--keep-stages"
        raise ValueError(f"{flag} without a recipe; pass a YAML file with `stages:` (or a name of --list-recipes) first.")
    return build_arguments(check_values(values, given))


def check_values(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Check the values of a training, and add the defaults that depend on other values.

    Args:
        values: dest of a flag -> value; None is not given.
        given: names of the fields that have no default value.

    Returns:
        The values for `build_arguments`.

    Raises:
        ValueError: if the values do not go together.
        FileNotFoundError: if the data looks like a path and does not exist.
    """
    values = {key: value for key, value in values.items() if value is not None}
    rates = parse_learning_rates(values.get("learning_rates"))
    former = values.pop(EMBEDDINGS_RATE, None)
    if former is not None:
        if "embeddings" in rates:
            raise ValueError("--embeddings-learning-rate is --learning-rates embeddings=RATE, which is passed too; drop it.")
        rates["embeddings"] = former
    if rates:
        values["learning_rates"] = rates
    if values.get("eval_data") or values.get("eval_share"):
        # With held-out data, evaluate whenever a checkpoint is written, and keep the best checkpoint.
        values |= {} if "eval_strategy" in given else {"eval_strategy": values["save_strategy"]}
        values |= {} if "eval_steps" in given else {"eval_steps": values["save_steps"]}
        if "load_best_model_at_end" not in given and values["save_strategy"] != "no":
            values["load_best_model_at_end"] = values["eval_strategy"] == values["save_strategy"]
    check_options(values)
    defaults = {one.name: one.default for one in fields(DSVLTrainingArguments) if one.default is not MISSING}
    defaults["include_for_metrics"] = []
    own = {name: value for name, value in values.items() if name in {one.name for one in fields(DSVLTrainingArguments)}}
    for note in check_training_arguments(own, defaults):
        logger.warning(note)
    for name in ("model", "data", "eval_data"):
        if values.get(name):
            check_exists(values[name])
    return values


def build_arguments(values: Mapping[str, Any]) -> tuple[ModelArguments, DataArguments, DSVLTrainingArguments]:
    """The three argument objects of checked values. The last initializes the devices and process groups."""
    types = (ModelArguments, DataArguments, DSVLTrainingArguments)
    model, data, training = (
        kind(**{one.name: values[one.name] for one in fields(kind) if one.init and one.name in values}) for kind in types
    )
    return model, data, training  # type: ignore[return-value]


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of flags.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a mapping in YAML.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} contains a value of type {type(values).__name__}; expected lines such as `model: my-model`."
        )
    return values


def yaml_flags(values: Mapping[str, Any]) -> list[str]:
    """The values of a YAML file as flags; null is not given."""
    flags = []
    for key, value in values.items():
        if value is None:
            continue
        flags.append(f"--{key}")
        if isinstance(value, list):
            flags += [str(element) for element in value]
        else:
            flags.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return flags
