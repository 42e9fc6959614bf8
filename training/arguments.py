"""The arguments of `dsvl train`: as flags, or from a YAML file whose values flags override."""

import importlib.util
import json
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..data.commands import MAX_BAD_SAMPLES_HELP
from ..data.sample_errors import MAX_BAD_SAMPLES
from ..utils.local_paths import check_exists
from ..utils.transformers_names import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from ..utils.yaml_files import read_yaml
from .help import TrainParser
from .model_states import ZERO
from .parts import PARTS
from .training_arguments_table import check_training_arguments

logger = logging.getLogger(__name__)

TOKENS_SEEN = ("all", "non_padding", "no")


@dataclass
class ModelArguments:
    """What learns, and how."""

    model: str = field(metadata={"help": "directory or Hub name of a DSVL checkpoint"})
    train: list[str] = field(
        default_factory=lambda: ["projector", "embeddings"], metadata={"help": f"what learns: {', '.join(PARTS)}"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "the decoder's attention: sdpa, eager or flex_attention"}
    )
    compile_decoder_layers: bool = field(
        default=False, metadata={"help": "torch.compile for each decoder layer; --torch-compile has the whole model instead"}
    )
    lora_rank: int = field(default=0, metadata={"help": "rank of LoRA adapters; 0 for none"})
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "adapters are scaled by alpha / rank. Default: twice the rank; DeepSpeed-VisualChat's scale is 1"},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "in front of the adapters"})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "last names of the linear layers to adapt, q_proj and so on. Default: all of them"}
    )
    lora_language: bool = field(default=True, metadata={"help": "adapt the decoder"})
    lora_vision: bool = field(default=False, metadata={"help": "adapt the vision tower"})
    dora: bool = field(default=False, metadata={"help": "weight-decomposed adapters"})
    qlora: bool = field(default=False, metadata={"help": "load the frozen weights in 4 bits (needs bitsandbytes)"})


@dataclass
class DataArguments:
    """What it learns from."""

    data: str = field(
        metadata={
            "help": "conversations: a file (.jsonl, .ndjson, .json, also .gz; .csv, .parquet, .tar), a directory, a name on "
            "the Hub; a YAML file of a mixture; "
            "with --dataset-names, the folder of their files"
        }
    )
    dataset_names: list[str] | None = field(
        default=None, metadata={"help": "blend these: NAME.jsonl in the folder --data, as dsvl data convert writes them"}
    )
    dataset_samples: list[str] | None = field(
        default=None, metadata={"help": "conversations of each, or all; one for every name. Default: all"}
    )
    dataset_concatenate_samples: list[int] | None = field(
        default=None, metadata={"help": "up to so many of each make one conversation; one for every name. Default: 1"}
    )
    max_num_image_per_sample: int | None = field(
        default=None, metadata={"help": "images of a conversation in a blend; those with more are left out, counted"}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "read --data from beginning to end, again and again, instead of opening it; needs --max-steps"},
    )
    packing: bool = field(
        default=False, metadata={"help": "several conversations share a row of --max-length tokens, and none sees another"}
    )
    max_images_per_pack: int | None = field(default=None, metadata={"help": "bounds the memory of the vision tower"})
    cache_image_features: str | None = field(
        default=None,
        metadata={
            "help": "directory in which the frozen tower's features of each image are kept, computed once and read back "
            "(0.5 MiB an image for CLIP ViT-L/14 in 16 bits)"
        },
    )
    eval_data: str | None = field(default=None, metadata={"help": "held-out conversations, of the same forms"})
    eval_share: float | None = field(
        default=None, metadata={"help": "hold out this share of --data instead, chosen by the seed"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of a conversation, images included; whole rounds beyond it are left out"}
    )
    on_bad_sample: str = field(
        default="error", metadata={"help": "error or skip: a broken line, a missing image, a first round that is too long"}
    )
    max_bad_samples: float = field(default=MAX_BAD_SAMPLES, metadata={"help": MAX_BAD_SAMPLES_HELP})
    allow_urls: bool = field(
        default=False, metadata={"help": "images may be http(s) addresses, which are fetched, in every epoch again"}
    )


@dataclass
class DSVLTrainingArguments(TrainingArguments):
    """`TrainingArguments` with this model's defaults, and what they do not know."""

    output_dir: str | None = field(default=None, metadata={"help": "for the trained model", "aliases": ["--output"]})
    deepspeed: dict | str | None = field(
        default=None, metadata={"help": f"{', '.join(ZERO)}, or a DeepSpeed configuration: its path, or a mapping in YAML"}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "the learning rate's course"})
    warmup_steps: float = field(default=0.03, metadata={"help": "steps, or a share of all if less than 1"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "the collator reads the conversations themselves"})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "log the mean of the others for a loss that is no number; the device is waited for at every step"},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "steps between two lines of the log, or a share of all if less than 1"}
    )
    include_num_input_tokens_seen: str = field(
        default="no",
        metadata={
            "help": "log the number of tokens: all, non_padding or no; every step waits for the device. Tokens per second "
            "are logged without it",
            "nargs": "?",
            "const": "all",
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "the directory of a checkpoint, whatever run wrote it; last; or no. Default: the last complete "
            "checkpoint of the same run, if --output holds one",
            "aliases": ["--resume-from"],
        },
    )
    overwrite_output: bool = field(
        default=False, metadata={"help": "delete what an earlier run wrote to --output, and start over"}
    )
    accelerator_config: dict | str | None = field(
        default=None,
        metadata={"help": "accelerate's: a mapping, or a JSON file of one. Default: batches are copied without waiting"},
    )
    embeddings_learning_rate: float | None = field(
        default=None, metadata={"help": "of the token embeddings (learning_rate_pretraining_components). Default: the same"}
    )
    eval_exact_match: bool = field(
        default=False, metadata={"help": "answer each held-out question, and count the exact answers (eval_exact_match)"}
    )
    eval_max_new_tokens: int = field(default=64, metadata={"help": "of such an answer"})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better metric_for_best_model"}
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("No output directory; pass --output DIR.")
        # As transformers takes it from Python, and YAML gives it as truth values.
        seen = str(self.include_num_input_tokens_seen).lower()
        self.include_num_input_tokens_seen = {"true": "all", "false": "no"}.get(seen, seen)
        if self.include_num_input_tokens_seen not in TOKENS_SEEN:
            raise ValueError(f"--include-num-input-tokens-seen {seen} is unknown; choose from {', '.join(TOKENS_SEEN)}.")
        if self.resume_from_checkpoint is not None:
            resume = str(self.resume_from_checkpoint)
            self.resume_from_checkpoint = {"true": "last", "false": "no"}.get(resume.lower(), resume)
        if isinstance(self.deepspeed, str) and not self.deepspeed.startswith("{"):
            self.deepspeed = str(zero_configuration(self.deepspeed))
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.accelerator_config is None and self.dataloader_pin_memory:
            # Batches are copied behind the step before them, instead of after it.
            self.accelerator_config = {"non_blocking": True}
        if self.deepspeed is not None:
            _start_deepspeed(on_cpu=self.use_cpu)
        super().__post_init__()
        if self.n_gpu > 1:
            # The Trainer would choose DataParallel, which hands out images as if each conversation had one.
            logger.warning(
                "%d GPUs, but no launcher: one of them trains. torchrun --nproc-per-node %d -m dsvl.training uses all.",
                self.n_gpu,
                self.n_gpu,
            )
            self._n_gpu = 1


def zero_configuration(name: str) -> Path:
    """The DeepSpeed configuration of this name, or at this path.

    Raises:
        ValueError: if there is neither.
    """
    path = Path(__file__).with_name(f"{name}.json") if name in ZERO else Path(name)
    if not path.is_file():
        raise ValueError(f"--deepspeed {name} is no file; choose from {', '.join(ZERO)}, or pass the path of one.")
    return path


def _start_deepspeed(on_cpu: bool) -> None:
    """Start DeepSpeed's communication; without a launcher, for one process."""
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
        # With it accelerate would choose DDP, without a word.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        try:
            import deepspeed
        except ImportError as error:
            raise ValueError("--deepspeed needs DeepSpeed; pip install 'dsvl[train]'.") from error
        # Before accelerate does, which would not know that the processes have no accelerator.
        deepspeed.init_distributed(dist_backend="gloo")


def build_parser() -> TrainParser:
    """The parser of `dsvl train`; its flags are the fields of three dataclasses."""
    types: list[Any] = [ModelArguments, DataArguments, DSVLTrainingArguments]
    parser = TrainParser(
        types,
        prog="dsvl train",
        description="Fine-tune a DSVL checkpoint. RUN.yaml holds flags without their dashes; every field of "
        "TrainingArguments is one as well.",
        usage="dsvl train [RUN.yaml] --model DIR --data FILE --output DIR [flags]",
        allow_abbrev=False,
    )
    next(action for action in parser._actions if action.dest == "train").nargs = "*"  # adapters may learn alone
    return parser


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, DSVLTrainingArguments]:
    """Read the arguments.

    Args:
        argv: flags; a YAML file of them may stand first.

    Raises:
        ValueError: if they do not go together, before anything is loaded.
        FileNotFoundError: for a model or data that look like a path and do not exist.
        SystemExit: for an unknown flag.
    """
    argv = list(argv)
    # The launcher of DeepSpeed puts --local_rank=N before everything.
    place = 1 if argv[:1] and argv[0].startswith("--local_rank") else 0
    if argv[place : place + 1] and argv[place].endswith((".yaml", ".yml")):
        argv[place : place + 1] = _flags(Path(argv[place]))
    parser = build_parser()
    values = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    if values.get("eval_data") or values.get("eval_share"):
        # Evaluate whenever a checkpoint is written, and keep the best: what held-out data is for.
        given = {flag.lstrip("-").split("=")[0].replace("-", "_") for flag in argv if flag.startswith("--")}
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
    _check_device(values)
    _check_reports(values.get("report_to"))
    for name in ("model", "data", "eval_data"):
        if values.get(name):
            check_exists(values[name])
    return parser.parse_dict(values)


def _check_device(values: dict[str, Any]) -> None:
    if values.get("fp16") and (values.get("use_cpu") or not torch.accelerator.is_available()):
        raise ValueError("--fp16 on a CPU: its products are not computed in float16; pass --bf16, or neither.")


def _check_reports(asked: str | list[str] | None) -> None:
    """Refuse what would write reports and is not installed, before anything is loaded."""
    names = [asked] if isinstance(asked, str) else list(asked or [])
    installed = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"--report-to {name} is unknown; choose from none, all, {known}.")
        if name not in installed and name not in ("azure_ml", "flyte"):  # of which transformers does not tell
            remedy = "pip install 'dsvl[train]'" if name == "tensorboard" else f"pip install {name}"
            raise ValueError(f"--report-to {name} needs the package {name}, which is not installed; {remedy}.")


def _flags(path: Path) -> list[str]:
    """A YAML file's values as flags."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected lines such as `model: my-model`.")
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


def check_options(values: dict[str, Any]) -> None:
    """Refuse arguments that do not go together.

    Args:
        values: the fields of the three argument classes, by name.

    Raises:
        ValueError: naming the arguments and the remedy.
    """
    unknown = [part for part in values["train"] if part not in PARTS]
    if unknown:
        raise ValueError(f"--train {' '.join(unknown)}: there is no such part; choose from {', '.join(PARTS)}.")
    rank, adapters = values["lora_rank"], values["lora_rank"] > 0
    if rank < 0:
        raise ValueError(f"--lora-rank {rank}: pass a positive rank, or 0 for no adapters.")
    asked = [name for name in ("lora_vision", "dora", "qlora", "lora_targets", "lora_alpha") if values.get(name)]
    if asked and not adapters:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ValueError(f"{flags} without adapters; pass --lora-rank too (16, say).")
    for part, flag in (("language", "lora_language"), ("vision", "lora_vision")):
        if adapters and part in values["train"] and values[flag]:
            remedy = f"leave {part} out of --train, or pass --{flag.replace('_', '-')} false"
            raise ValueError(f"--train {part} learns in full what --lora-rank would freeze and adapt; {remedy}.")
    if adapters and not (values["lora_language"] or values["lora_vision"]):
        raise ValueError("--lora-rank with nothing to adapt; leave --lora-language on, or pass --lora-vision.")
    if not adapters and not values["train"]:
        raise ValueError("--train names nothing to learn.")
    stage = zero_stage(values.get("deepspeed"))
    if values["qlora"] and stage == 3:
        raise ValueError("--qlora with ZeRO-3: 4-bit weights cannot be partitioned; choose --deepspeed zero2.")
    if values["qlora"] and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--qlora needs bitsandbytes, which is not installed; pip install bitsandbytes, or leave it out.")
    if stage is not None and values.get("torch_compile"):
        raise ValueError("--torch-compile with --deepspeed: their hooks do not go together; choose one of them.")
    if values.get("compile_decoder_layers"):
        _check_compilation(values, stage)
    held_out = values.get("eval_data") or values.get("eval_share")
    if values.get("early_stopping_patience") and not held_out:
        raise ValueError("--early-stopping-patience has nothing to watch; pass --eval-data.")
    if values["eval_exact_match"] and not held_out:
        raise ValueError("--eval-exact-match has no questions; pass --eval-data.")
    if values.get("cache_image_features") and ("vision" in values["train"] or values["lora_vision"]):
        raise ValueError(
            "--cache-image-features with a vision tower that learns: its features change; leave one of them out."
        )
    _check_data_options(values)


def _check_compilation(values: dict[str, Any], stage: int | None) -> None:
    if values.get("torch_compile") or values.get("torch_compile_backend") or values.get("torch_compile_mode"):
        raise ValueError(
            "--compile-decoder-layers with --torch-compile: the layers would be compiled twice; choose one of them."
        )
    if stage == 3:
        raise ValueError(
            "--compile-decoder-layers with ZeRO-3: it fetches weights inside of the layers, where a graph would break; "
            "choose --deepspeed zero2."
        )


def _check_data_options(values: dict[str, Any]) -> None:
    names = values.get("dataset_names") or []
    for option in ("dataset_samples", "dataset_concatenate_samples"):
        given, flag = values.get(option), f"--{option.replace('_', '-')}"
        if given and not names:
            raise ValueError(f"{flag} without --dataset-names; pass those, or a YAML file of a mixture as --data.")
        if given and len(given) != len(names):
            raise ValueError(f"{flag} has {len(given)} values for {len(names)} names; pass one for each.")
    for number in values.get("dataset_samples") or []:
        if number != "all" and not (number.isdigit() and int(number) > 0):
            raise ValueError(f"--dataset-samples {number}: expected a number of conversations, or all.")
    if values.get("max_num_image_per_sample") is not None and not names:
        raise ValueError("--max-num-image-per-sample goes with --dataset-names; a YAML file of a mixture has it inside.")
    if values.get("streaming"):
        _check_streaming(values)
    share = values.get("eval_share")
    if share is not None and (values.get("eval_data") or not 0 < share < 1):
        raise ValueError(f"--eval-share {share}: expected a number between 0 and 1, and no --eval-data beside it.")
    if values.get("packing") and not values.get("max_length"):
        raise ValueError("--packing needs the length of a pack; pass --max-length (4096, say).")
    if values.get("max_images_per_pack") is not None and not values.get("packing"):
        raise ValueError("--max-images-per-pack without --packing; pass both.")


def _check_streaming(values: dict[str, Any]) -> None:
    if values["max_steps"] <= 0:
        raise ValueError("--streaming has no end; pass --max-steps.")
    if values.get("dataset_names") or str(values["data"]).endswith((".yaml", ".yml")):
        raise ValueError("--streaming reads one data set, not a blend; leave one of them out, or blend it beforehand.")
    for option, why in (("eval_share", "cannot be shared out"), ("cache_image_features", "has images nobody knows yet")):
        if values.get(option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} with --streaming: a stream {why}; leave one of them out.")


def zero_stage(deepspeed: Any) -> int | None:
    """The ZeRO stage of a `--deepspeed` argument; None without DeepSpeed."""
    if deepspeed is None:
        return None
    if isinstance(deepspeed, str):
        written = deepspeed if deepspeed.startswith("{") else zero_configuration(deepspeed).read_text(encoding="utf-8")
        try:
            deepspeed = json.loads(written)
        except json.JSONDecodeError as error:
            raise ValueError(f"--deepspeed {deepspeed} is not JSON: {error}.") from error
    return int(deepspeed.get("zero_optimization", {}).get("stage", 0))
