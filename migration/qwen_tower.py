"""Extracting Qwen-VL's vision tower from its checkpoint."""

from pathlib import Path
from typing import Any

import torch

from ..composition.towers import clip_image_processor
from ..configuration_dsvl import DSVLQwenVisionConfig
from ..utils.atomic_files import atomic_directory, check_new_directory
from ..vision_dsvl import DSVLQwenVisionModel
from .compare_shapes import compare_shapes
from .read_weights import read_json, read_tensors, weight_files
from .state_dict_names import QWEN_TOWER, translate_by

PREFIX = "transformer.visual."
# Qwen-VL's values, which cannot be derived from the weights.
HEADS, IMAGE_SIZE, MLP_RATIO = 16, 448, 4.9231
SIZES = ("width", "mlp_ratio", "mlp_size", "layers", "heads", "image_size", "patch_size", "output_dim", "n_queries")


def migrate_qwen_tower(source: str | Path, out: str | Path, *, max_shard_size: str = "5GB") -> DSVLQwenVisionConfig:
    """Save the vision tower of a Qwen-VL checkpoint as a `DSVLQwenVisionModel`, with its image processor.

    Shards are mapped into memory one at a time; only the tower's weights are kept.

    Args:
        source: directory of Qwen-VL or Qwen-VL-Chat with safetensors or .bin files, one of these files, or the output of
            DeepSpeed-VisualChat's `extract_qwen_vl.py`.
        out: a new directory.
        max_shard_size: maximum size of a safetensors file.

    Returns:
        The tower's configuration.

    Raises:
        FileNotFoundError: if there are no weights.
        FileExistsError: if `out` is not empty.
        ValueError: if the tower is missing or incomplete, or its shapes do not match config.json.
    """
    check_new_directory(out)
    files = weight_files(source, wanted=PREFIX)
    if not files:
        raise ValueError(f"{source} names no weights {PREFIX}* in its index; pass the directory of Qwen-VL.")
    original: dict[str, torch.Tensor] = {}
    seen = []
    for name, tensor in read_tensors(files):
        seen.append(name)
        if name.startswith(PREFIX) and name != f"{PREFIX}proj":
            original[name.removeprefix(PREFIX)] = tensor.clone()  # so that the shard can be freed
        elif name in ("conv1.weight", "positional_embedding") or name.startswith(("ln_", "transformer.resb", "attn_pool.")):
            original[name] = tensor.clone()
    if not original:
        raise ValueError(
            f"{source} holds no weights {PREFIX}* (but {', '.join(sorted(seen)[:3])}, ...); pass the directory of Qwen-VL."
        )
    translated = translate_by(QWEN_TOWER, original, "the vision tower of Qwen-VL")
    if translated.absent:
        raise ValueError(f"The tower in {source} lacks its position tables, {', '.join(translated.absent)}.")
    config = _config(_visual(source), translated.tensors)
    with torch.device("meta"):
        tower = DSVLQwenVisionModel(config)
    expected = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    compare_shapes(translated, expected, str(source), lambda ours: "config.json there")
    tower.load_state_dict(translated.tensors, strict=True, assign=True)
    with atomic_directory(out) as partial:
        tower.save_pretrained(partial, max_shard_size=max_shard_size)
        clip_image_processor(config.image_size).save_pretrained(partial)
    return config


def _visual(source: str | Path) -> dict[str, Any]:
    """The tower's part of Qwen-VL's config.json, read without running Qwen-VL's code."""
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source).with_name("config.json")
    visual = read_json(path).get("visual", {}) if path.is_file() else {}
    if not isinstance(visual, dict) or not all(type(visual.get(name, 1)) in (int, float) for name in SIZES):
        raise ValueError(
            f"{path}: visual is {str(visual)[:200]}; expected the sizes of Qwen-VL's tower ({', '.join(SIZES)})."
        )
    return visual


def _config(visual: dict[str, Any], tensors: dict[str, torch.Tensor]) -> DSVLQwenVisionConfig:
    """The configuration by config.json, or else by the shapes of the tensors."""
    for name, dimensions in (("embeddings.patch_embedding.weight", 4), ("resampler.query", 2)):
        if tensors[name].ndim != dimensions:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; expected {dimensions} dimensions.")
    width, _, patch_size, _ = tensors["embeddings.patch_embedding.weight"].shape
    num_queries, output_dim = tensors["resampler.query"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    width = visual.get("width", width)
    mlp = int(width * visual.get("mlp_ratio", MLP_RATIO)) if visual else len(tensors["layers.0.mlp.fc1.weight"])
    return DSVLQwenVisionConfig(
        hidden_size=width,
        intermediate_size=visual.get("mlp_size", mlp),
        num_hidden_layers=visual.get("layers", layers),
        num_attention_heads=visual.get("heads", HEADS),
        image_size=visual.get("image_size", IMAGE_SIZE),
        patch_size=visual.get("patch_size", patch_size),
        num_positions=len(tensors["embeddings.position_embedding.weight"]),
        output_dim=visual.get("output_dim", output_dim),
        num_queries=visual.get("n_queries", num_queries),
        dtype=tensors["resampler.query"].dtype,
    )
