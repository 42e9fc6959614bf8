"""The fingerprint of a run: everything that determines its result, to detect output directories of other runs.

It does not depend on the machine (number of processes, absolute paths), so that a run can be moved.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from transformers import PreTrainedConfig

from ..utils.atomic_files import write_atomically
from ..utils.image_loading import IMAGE_SUFFIXES
from ..utils.video_loading import VIDEO_SUFFIXES
from ..utils.yaml_files import read_yaml
from .arguments import DataArguments, DSVLTrainingArguments, ModelArguments
from .batch_division import BatchDivision
from .checkpoints import RECORD

STAGE_FACTS = "stage.json"  # in the directory of an earlier stage: what the model card of the finished model says about it
RENAMED_FIELDS = {"max_pictures_per_pack": "max_images_per_pack"}  # name in records of dsvl 0.1 -> name

NOT_RECORDED = object()

# Fields of the argument classes that change the result. Other fields change its location, speed or rounding.
MODEL_FIELDS = ("train", "frozen_precision", "frozen_precision_keep")
ADAPTER_FIELDS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "lora_language",
    "lora_vision",
    "lora_vision_rank",
    "lora_vision_targets",
    "dora",
    "qlora",
)
DATA_FIELDS = (
    "dataset_names",
    "dataset_samples",
    "dataset_concatenate_samples",
    "max_num_image_per_sample",
    "streaming",
    "packing",
    "video_fps",
    "max_frames",
    "max_images_per_pack",
    "eval_share",
    "max_length",
    "on_bad_sample",
)
TRAINING_FIELDS = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "learning_rates",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "load_best_model_at_end",
    "metric_for_best_model",
    "early_stopping_patience",
)

# Files of a checkpoint directory that change neither the model nor its processor.
UNRELATED = {"README.md", "trainer_state.json", "generation_config.json", RECORD, STAGE_FACTS}
MEDIA = {*IMAGE_SUFFIXES, *VIDEO_SUFFIXES}

LARGE = 1 << 30  # bytes; of larger files, BLOCKS evenly spaced blocks are read
BLOCKS, BLOCK = 4096, 1 << 16


@dataclass
class RunRecord:
    """The content of `run.json`.

    Attributes:
        settings: the fingerprint, field -> value; the value of `model`, `data` and `eval_data` is `{"name", "digest"}`.
        files: file name -> its digest, size and modification time.
        finished: whether the trained model is complete.
        batch: how the flags divide the batch among processes; None in records of earlier releases.
    """

    settings: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    finished: bool = False
    batch: BatchDivision | None = None

    def write(self, output: Path) -> None:
        """Write the record into the output directory, atomically."""
        output.mkdir(parents=True, exist_ok=True)
        content = vars(self) | {"batch": None if self.batch is None else self.batch.to_dict()}
        write_atomically(output / RECORD, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_record(output: Path) -> RunRecord | None:
    """The record of the run in an output directory; None if there is none.

    Raises:
        ValueError: if the file is not a record.
    """
    path = output / RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = {RENAMED_FIELDS.get(name, name): value for name, value in content["settings"].items()}
        if (rate := settings.pop("embeddings_learning_rate", NOT_RECORDED)) is not NOT_RECORDED:  # dsvl 0.2
            settings["learning_rates"] = None if rate is None else {"embeddings": rate}
        batch = BatchDivision.read(content.get("batch"))
        return RunRecord(settings, dict(content["files"]), bool(content["finished"]), batch)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not the record of a run ({error!r}); delete it, or pass --overwrite-output.") from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Descriptions of the fields in which two fingerprints differ; fields that only one of them has are ignored."""
    found = []
    for name in before.keys() & now.keys():
        if _comparable(before[name]) != _comparable(now[name]):
            found.append(f"{name} ({_shown(before[name])} before, {_shown(now[name])} now)")
    return sorted(found)


def _comparable(value: Any) -> Any:
    return value["digest"] if isinstance(value, dict) and "digest" in value else value


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "digest" in value:
        return f"{value['name']}, {value['digest'][:12]}"
    return json.dumps(value)


def take_fingerprint(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: DSVLTrainingArguments,
    known: Mapping[str, dict[str, Any]] | None = None,
    with_model: bool = True,
) -> RunRecord:
    """Compute the fingerprint of a run.

    Args:
        model_arguments, data_arguments, arguments: arguments of the run.
        known: `RunRecord.files` of an earlier start, *optional*; files of the same size and modification time are not read.
        with_model: whether the model is part of it, *optional*, defaults to True; the model of a later stage of a recipe may
            not exist yet (see `add_model`).

    Returns:
        A record with `finished=False`.
    """
    digests = _Digests(known or {})
    settings: dict[str, Any] = {"model": _model(model_arguments.model, digests)} if with_model else {}
    settings["data"] = _data(data_arguments, digests)
    if data_arguments.eval_data is not None:
        settings["eval_data"] = _source(data_arguments.eval_data, digests)
    settings |= {name: getattr(model_arguments, name) for name in MODEL_FIELDS}
    settings |= {name: getattr(model_arguments, name) for name in ADAPTER_FIELDS if model_arguments.lora_rank > 0}
    settings.setdefault("lora_rank", 0)
    settings |= {name: getattr(data_arguments, name) for name in DATA_FIELDS}
    settings |= {name: getattr(arguments, name) for name in TRAINING_FIELDS}
    settings["train"] = sorted(settings["train"])
    settings["batch_size"] = BatchDivision.of(arguments).batch_size
    if arguments.max_steps > 0:  # overrides num_train_epochs
        del settings["num_train_epochs"]
    # Normalized as JSON returns them: enumerations as values, tuples as lists.
    settings = json.loads(json.dumps(settings, default=lambda value: getattr(value, "value", str(value))))
    return RunRecord(settings, digests.files, batch=BatchDivision.of(arguments))


def add_model(record: RunRecord, name: str, field: str = "model") -> None:
    """Add a model to a fingerprint.

    Args:
        record: the fingerprint, which is changed.
        name: directory or Hub name of the model.
        field: the name of the field, *optional*, defaults to "model".
    """
    digests = _Digests(record.files)
    record.settings[field] = _model(name, digests)
    record.files |= digests.files


def _model(name: str, digests: "_Digests") -> dict[str, str]:
    folder = Path(name)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in UNRELATED)
        # Without code, which changes with every release and is taken from the package.
        return digests.together(name, [path for path in files if path.suffix != ".py" and not path.name.startswith(".")])
    config, _ = PreTrainedConfig.get_config_dict(name)
    return {"name": name, "digest": f"{name}@{config.get('_commit_hash')}"}


def _data(arguments: DataArguments, digests: "_Digests") -> dict[str, str]:
    if arguments.dataset_names:
        files = [Path(arguments.data) / f"{name}.jsonl" for name in arguments.dataset_names]
        return digests.together(arguments.data, files)
    if not arguments.data.endswith((".yaml", ".yml")):
        return _source(arguments.data, digests)
    path = Path(arguments.data)
    content, parts = read_yaml(path), []
    for entry in content["datasets"]:  # valid: the mixture was opened before
        local = path.parent / str(entry.pop("path"))
        parts.append(_source(str(local), digests)["digest"] if local.exists() else str(local.name))
    return {"name": path.name, "digest": _hash([json.dumps(content, sort_keys=True), *parts])}


def _source(source: str, digests: "_Digests") -> dict[str, str]:
    """The fingerprint of a source of `load_conversations`."""
    path = Path(source)
    if path.is_file():
        return digests.together(source, [path])
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.is_file() and file.suffix.lower() not in MEDIA)
        return digests.together(source, sorted(files), path)
    if path.is_absolute():
        return {"name": path.name, "digest": path.name}
    commit = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="dataset") / "refs" / "main"
    return {"name": source, "digest": f"{source}@{commit.read_text().strip() if commit.is_file() else None}"}


class _Digests:
    """Computes digests of files; each file is read once."""

    def __init__(self, known: Mapping[str, dict[str, Any]]) -> None:
        self.known, self.files = known, dict[str, dict[str, Any]]()

    def together(self, source: str, paths: list[Path], root: Path | None = None) -> dict[str, str]:
        """The combined digest of several files; with `root`, their relative paths are included."""
        lines = [self._one(path) + (path.relative_to(root).as_posix() if root else "") for path in paths]
        return {"name": Path(source).name or "data", "digest": _hash(lines)}

    def _one(self, path: Path) -> str:
        status = path.stat()
        stat = {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        # Without the directory, so that a run can be moved; copies with the same modification time count as equal.
        key = path.name if path.name not in self.files else f"{path.parent.name}/{path.name}"
        before = self.known.get(key, {})
        same = all(before.get(name) == value for name, value in stat.items())
        self.files[key] = stat | {"digest": before["digest"] if same else file_digest(path)}
        return self.files[key]["digest"]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's size and content; of a file beyond 1 GiB, of 4,096 evenly spaced blocks of 64 KiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= LARGE:
            while block := file.read(BLOCK):
                digest.update(block)
        else:
            for number in range(BLOCKS):
                file.seek((size - BLOCK) * number // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
