"""Weights of a checkpoint on disk: a part of them alone, all of them though ZeRO-3 is on, and whether they are complete."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel
from transformers.utils import logging

from ..configuration_dsvl import DSVLConfig
from ..transformers_dsvl import is_deepspeed_zero3_enabled
from ..utils.transformers_names import set_hf_deepspeed_config, unset_hf_deepspeed_config


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Load weights as they are, though ZeRO-3 is on."""
    from ..utils.transformers_names import _hf_deepspeed_config_weak_ref as config_in_force

    kept = config_in_force() if is_deepspeed_zero3_enabled() else None
    if kept is not None:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            set_hf_deepspeed_config(kept)


def load_tower(name: str, config: DSVLConfig, dtype: torch.dtype) -> Any:
    """Load the vision tower of a DSVL checkpoint, in evaluation mode, without reading the rest.

    Args:
        name: directory or Hub name of the checkpoint.
        config: its configuration.

    Raises:
        ValueError: if the checkpoint does not hold the whole tower.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the rest is reported as unexpected
    try:
        with whole_weights():
            tower, info = AutoModel.from_pretrained(
                name,
                config=config.vision_config,
                dtype=dtype,
                key_mapping={r"^model\.vision_tower\.": ""},
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks weights of its vision tower ({sorted(info['missing_keys'])[:3]}); compose it anew.")
    return tower.eval()


def check_keys(model: Any, directory: Path) -> None:
    """Hold the keys of saved weights against the model's own.

    Raises:
        RuntimeError: if they differ; the directory would load with parts made up at random.
    """
    from safetensors import safe_open

    saved: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved |= set(file.keys())
    own = set(model.state_dict())
    tied = set(model._tied_weights_keys) if model.config.tie_word_embeddings else set()
    if saved - own or own - saved - tied:
        raise RuntimeError(
            f"The saved weights are not the model's own: unknown are {sorted(saved - own)[:3]}, missing "
            f"{sorted(own - saved - tied)[:3]}."
        )
