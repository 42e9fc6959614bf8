"""Numbers that the released DeepSpeed-VisualChat code produced, and its weights as checkpoints of ours on the disk.

Its quirks, which the comparison undoes: samples without an image are dropped from a batch; rows are padded on the right to
a multiple of 8. That a sample's images land in reverse order, a migrated checkpoint knows.
"""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import REFERENCE
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from dsvl import DSVLForConditionalGeneration, migration

_ROOT = tempfile.TemporaryDirectory(prefix="dsvl-reference-")
QWEN_PREFIX = "transformer.visual."


class ReferenceCase:
    """One folder of reference data."""

    def __init__(self, name: str) -> None:
        self.name = name
        folder = REFERENCE / name
        self.config = json.loads((folder / "config.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")
        weights = folder / "weights.safetensors"
        # Cases A and H have B's weights.
        self.weights = load_file(weights if weights.exists() else REFERENCE / "B_baseline_mmca_on/weights.safetensors")

    @property
    def parts(self) -> dict[str, Any]:
        """The configuration of what it was trained from."""
        return self.config if "vision" in self.config else ReferenceCase("B_baseline_mmca_on").config

    def model(self, attention: str, backend: str, keep_adapter: bool = False) -> DSVLForConditionalGeneration:
        """Loaded from a migrated checkpoint on the disk; `attention` is "mmca_reference" or "causal"."""
        directory = migrated(self.name, attention == "mmca_reference", keep_adapter)
        return DSVLForConditionalGeneration.from_pretrained(directory, attn_implementation=backend)

    def batch(self, run: str) -> dict[str, Any]:
        """Our inputs for a run: placeholders expanded, images in reading order, imageless rows dropped."""
        source = self.parts
        image, pad = source["tokens"]["image_token_id"], source["tokens"]["pad_token_id"]
        per_image = source["tokens_per_image"]
        ids, pixels = self.inputs[f"{run}.input_ids"], self.inputs[f"{run}.pixel_values"]
        real = self.inputs.get(f"{run}.attention_mask", torch.ones_like(ids))
        labels = self.inputs.get(f"{run}.labels", torch.full_like(ids, -100))
        counts = self.inputs.get(f"{run}.image_num", (ids == image).sum(-1))
        rows, row_labels, row_pixels = [], [], []
        for b, images in enumerate(pixels.split(counts.tolist())):
            if not (ids[b] == image).any():
                continue
            row, row_label = [], []
            for token, label in zip(ids[b][real[b] == 1].tolist(), labels[b][real[b] == 1].tolist(), strict=True):
                copies = per_image if token == image else 1
                row += [token] * copies
                row_label += [-100 if token == image else label] * copies
            rows.append(row)
            row_labels.append(row_label)
            row_pixels.append(images)
        longest = max(map(len, rows))

        def padded(values: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in values])

        return {
            "input_ids": padded(rows, pad),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
            "labels": padded(row_labels, -100),
            "pixel_values": torch.cat(row_pixels),
        }


def language_folder(case: ReferenceCase, folder: Path) -> Path:
    """The language model that a case was trained from: its configuration, its weights, a tokenizer of 400 tokens."""
    text = {k: v for k, v in case.parts["llama"].items() if k not in ("pretraining_tp", "rope_scaling")}
    LlamaConfig(**(text | {"vocab_size": 400})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE / "tokenizer").save_pretrained(folder)
    prefix = "lang_decoder."
    weights = {n.removeprefix(prefix): t for n, t in case.weights.items() if n.startswith(prefix) and "lora" not in n}
    save_file(weights, folder / "model.safetensors")
    return folder


def vision_folder(case: ReferenceCase, folder: Path) -> Path:
    """The vision tower that a case was trained from, with its image processor."""
    vision = {k: v for k, v in case.parts["vision"].items() if k != "type"}
    if case.parts["vision"]["type"] == "qwen":
        return qwen_vl_folder(case, folder)
    tower = CLIPVisionModel(CLIPVisionConfig(**vision))
    prefix = "vis_encoder.vision_model."
    tower.load_state_dict({n.removeprefix(prefix): t for n, t in case.weights.items() if n.startswith(prefix)})
    tower.save_pretrained(folder)
    size = vision["image_size"]
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def qwen_vl_folder(case: ReferenceCase, folder: Path) -> Path:
    """The tower out of a Qwen-VL in two shards."""
    source = folder.with_name(f"{folder.name}-source")
    source.mkdir(parents=True)
    visual = case.parts["vision"]
    visual = {k: v for k, v in visual.items() if k != "type"}
    (source / "config.json").write_text(json.dumps({"model_type": "qwen", "visual": visual}))
    prefix = "vis_encoder."
    tower = {QWEN_PREFIX + n.removeprefix(prefix): t for n, t in case.weights.items() if n.startswith(prefix)}
    others = {"transformer.wte.weight": torch.zeros(3, 2), f"{QWEN_PREFIX}proj": torch.zeros(2, 2)}
    shards = {"a.safetensors": dict(list(tower.items())[:9]) | others, "b.safetensors": dict(list(tower.items())[9:])}
    for name, tensors in shards.items():
        save_file(tensors, source / name)
    places = {key: name for name, tensors in shards.items() for key in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    migration.migrate_qwen_tower(source, folder)
    return folder


@cache
def parts_of(name: str) -> tuple[Path, Path]:
    """The folders of a case's vision tower and language model."""
    case, folder = ReferenceCase(name), Path(_ROOT.name) / name
    return vision_folder(case, folder / "vision"), language_folder(case, folder / "language")


@cache
def migrated(name: str, mmca: bool, keep_adapter: bool = False) -> Path:
    """A case's weights, written as the original's training writes them, as a checkpoint of ours."""
    case, folder = ReferenceCase(name), Path(tempfile.mkdtemp(dir=_ROOT.name))
    torch.save(case.weights, folder / "pytorch_model.bin")
    vision, language = parts_of(name)
    migration.migrate_checkpoint(folder, vision, language, folder / "out", mmca=mmca, keep_adapter=keep_adapter)
    return folder / "out"
