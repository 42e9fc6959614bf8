"""Numbers that the released DeepSpeed-VisualChat code produced, and models that carry its weights.

Its quirks, which the comparison undoes: a sample's pictures land in reverse order; samples without a picture are dropped
from a batch; rows are padded on the right to a multiple of 8.
"""

import json
from typing import Any

import torch
from conftest import REFERENCE
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig

from dsvl import DSVLConfig, DSVLForConditionalGeneration
from dsvl.migration import convert_state_dict


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

    def model(self, attention: str, backend: str) -> DSVLForConditionalGeneration:
        source = self.config if "vision" in self.config else ReferenceCase("B_baseline_mmca_on").config
        vision = {k: v for k, v in source["vision"].items() if k != "type"}
        text = {k: v for k, v in source["llama"].items() if k not in ("pretraining_tp", "rope_scaling")}
        config = DSVLConfig(
            CLIPVisionConfig(**vision),
            LlamaConfig(**text),
            projector_type={"baseline": "linear"}.get(source["vis_proj"], source["vis_proj"]),
            multimodal_attention=attention,
            image_token_id=source["tokens"]["image_token_id"],
            attn_implementation=backend,
        )
        model = DSVLForConditionalGeneration(config).eval()
        model.load_state_dict(convert_state_dict(self.weights), strict=True)
        return model

    def batch(self, run: str) -> dict[str, Any]:
        """Our inputs for a run: placeholders expanded, pictures in reading order reversed, pictureless rows dropped."""
        source = self.config if "tokens" in self.config else ReferenceCase("B_baseline_mmca_on").config
        image, pad = source["tokens"]["image_token_id"], source["tokens"]["pad_token_id"]
        per_picture = source["tokens_per_image"]
        ids, pixels = self.inputs[f"{run}.input_ids"], self.inputs[f"{run}.pixel_values"]
        real = self.inputs.get(f"{run}.attention_mask", torch.ones_like(ids))
        labels = self.inputs.get(f"{run}.labels", torch.full_like(ids, -100))
        counts = self.inputs.get(f"{run}.image_num", (ids == image).sum(-1))
        rows, row_labels, row_pixels = [], [], []
        for b, pictures in enumerate(pixels.split(counts.tolist())):
            if not (ids[b] == image).any():
                continue
            row, row_label = [], []
            for token, label in zip(ids[b][real[b] == 1].tolist(), labels[b][real[b] == 1].tolist(), strict=True):
                copies = per_picture if token == image else 1
                row += [token] * copies
                row_label += [-100 if token == image else label] * copies
            rows.append(row)
            row_labels.append(row_label)
            row_pixels.append(pictures.flip(0))
        longest = max(map(len, rows))

        def padded(values: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in values])

        return {
            "input_ids": padded(rows, pad),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
            "labels": padded(row_labels, -100),
            "pixel_values": torch.cat(row_pixels),
        }
