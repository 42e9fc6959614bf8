"""The parts that all arms share: a language model that was trained on text, and a vision tower that was trained to classify.

Both are trained from scratch by `make_parts`, from a seed, and are stored where the caller says, never in the repository.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import device_name, device_type
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM

from attention_quality.language import make_tokenizer, train_language_model
from attention_quality.scenes import IMAGE_KINDS, Sprites, generator_hash
from attention_quality.sizes import SIZES_OF_EXPERIMENT, Size
from attention_quality.tower import train_tower


def make_parts(size_name: str, folder: Path, seed: int, workers: int) -> dict[str, Any]:
    """Train both parts and save them in a folder. The language model is saved first: if the command was stopped after that,
    the next one goes on with the tower.

    Args:
        size_name: of `SIZES_OF_EXPERIMENT`.
        folder: the output directory, complete exactly if it holds `parts.json`.
        seed: of weights and data.
        workers: processes that draw documents.

    Returns:
        What `parts.json` holds: figures of both trainings, and a hash of all weights.
    """
    size, started = SIZES_OF_EXPERIMENT[size_name], time.monotonic()
    tokenizer, path = make_tokenizer(size.world), folder / "language"
    mark = {"size": size_name, "seed": seed, "generator": generator_hash(size.world)}
    with deterministic():
        if (path / "figures.json").exists():
            saved = json.loads((path / "figures.json").read_text())
            if saved["of"] != mark:
                raise ValueError(f"{path} holds the language model of {saved['of']}, not of {mark}; pass another --parts.")
            language, language_figures = LlamaForCausalLM.from_pretrained(path), saved["figures"]
        else:
            language, language_figures = train_language_model(size, tokenizer, seed, workers)
            language.save_pretrained(path)
            tokenizer.save_pretrained(path)
            _write_json(path / "figures.json", {"of": mark, "figures": language_figures})
        tower, tower_figures = train_tower(size, Sprites(size.world).to(device_type()), seed)
    record = mark | {
        "device": device_name(),
        "torch": torch.__version__,
        "weights": weights_hash(language, tower),
        "language": language_figures,
        "tower": tower_figures,
        "seconds": time.monotonic() - started,
    }
    tower.save_pretrained(folder / "tower")
    _write_json(folder / "parts.json", record)
    return record


def _write_json(path: Path, record: dict[str, Any]) -> None:
    """The file is complete if it exists."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.rename(path)


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, so that one seed gives the same weights again on the same device with the same releases.

    An operation that has no deterministic algorithm raises a RuntimeError: with warnings alone, attention would choose
    another one. From torch 2.10, compiled kernels are not chosen by their times then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins
    before, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would be chosen, and is not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


def weights_hash(*modules: nn.Module) -> str:
    """Of all weights and buffers."""
    digest = hashlib.sha256()
    for module in modules:
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class SharedParts:
    """The parts as they are loaded for a run: `language` and `tower` belong to the model that they are composed to."""

    record: dict[str, Any]
    size: Size
    tokenizer: Any
    language: LlamaForCausalLM
    tower: CLIPVisionModel
    image_processor: CLIPImageProcessor


def read_record(folder: Path) -> dict[str, Any]:
    """The `parts.json` of a folder.

    Raises:
        ValueError: if the folder has none, or if it was made by another generator, or if the language model does not answer
            well enough in text.
    """
    path = folder / "parts.json"
    if not path.exists():
        raise ValueError(
            f"{folder} holds no parts.json; make the parts first: python -m attention_quality parts --parts {folder}"
        )
    record = json.loads(path.read_text())
    size = SIZES_OF_EXPERIMENT[record["size"]]
    if (now := generator_hash(size.world)) != record["generator"]:
        raise ValueError(f"{path} is of the generator {record['generator']}, but this one is {now}; make the parts again.")
    accuracy = record["language"]["accuracy"]
    weak = {kind: accuracy[kind] for kind in IMAGE_KINDS if accuracy[kind] < size.enough}
    if weak:
        told = ", ".join(f"{kind} {value:.1%}" for kind, value in weak.items())
        raise ValueError(
            f"The language model of {folder} answers too little in text ({told}; expected {size.enough:.0%}), so images "
            "would tell nothing about attention; raise language_steps in sizes.py and make the parts again."
        )
    return record


def load_parts(folder: Path) -> SharedParts:
    """Parts of `make_parts`, on the device.

    Raises:
        ValueError: as `read_record`.
    """
    record = read_record(folder)
    size = SIZES_OF_EXPERIMENT[record["size"]]
    side = {"height": size.world.image_size, "width": size.world.image_size}
    return SharedParts(
        record=record,
        size=size,
        tokenizer=AutoTokenizer.from_pretrained(folder / "language"),
        language=LlamaForCausalLM.from_pretrained(folder / "language").to(device_type()),
        tower=CLIPVisionModel.from_pretrained(folder / "tower").to(device_type()),
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": size.world.image_size}, crop_size=side, image_mean=[1.0] * 3, image_std=[0.5] * 3
        ),
    )
