"""The vision tower of all arms, trained from scratch to classify what the cell of each patch shows."""

import random
from typing import Any

import numpy as np
import torch
from measure import device_type
from torch import nn
from trained_tasks import Parts, as_pixels, fit, precision, random_tower
from transformers import CLIPVisionModel, set_seed
from transformers.modeling_outputs import CausalLMOutputWithPast

from attention_quality.scenes import SIZES, Sprites, World, cells_of, draw_scene, labels_of
from attention_quality.sizes import Size


class Classifier(nn.Module):
    """Linear heads on a tower's patches, which say what the cell of each patch shows. They train the tower, and are dropped.

    Args:
        tower: the tower.
        world: what there is to see.
    """

    def __init__(self, tower: CLIPVisionModel, world: World) -> None:
        super().__init__()
        self.tower, self.world = tower, world
        self.classes = (world.colours, world.shapes, len(SIZES), 10, 10)
        self.head = nn.Linear(tower.config.hidden_size, sum(self.classes) + len(self.classes))

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor, use_cache: bool = False) -> CausalLMOutputWithPast:
        """The loss, and as `logits` whether each label that is not -1 was right. Labels are (images, cells, 5)."""
        patches = self.tower(pixels).last_hidden_state[:, 1:]  # as the projector gets them
        per_side = self.tower.config.image_size // self.tower.config.patch_size
        cells = torch.arange(per_side, device=pixels.device) * self.world.grid // per_side
        labels = labels[:, (cells[:, None] * self.world.grid + cells).flatten()]
        parts = self.head(patches).float().split([count + 1 for count in self.classes], -1)
        loss, right = torch.zeros((), device=pixels.device), []
        for scores, wanted in zip(parts, labels.unbind(-1), strict=True):
            full = wanted >= 0
            losses = nn.functional.cross_entropy(
                scores.flatten(0, 1), torch.where(full, wanted, scores.shape[-1] - 1).flatten(), reduction="none"
            ).view_as(wanted)
            # The few patches that show something count as much as all others.
            loss = (
                loss + (losses * full).sum() / full.sum().clamp(min=1) + (losses * ~full).sum() / (~full).sum().clamp(min=1)
            )
            right.append(scores.argmax(-1)[full] == wanted[full])
        return CausalLMOutputWithPast(loss=loss, logits=torch.cat(right))


def train_tower(size: Size, sprites: Sprites, seed: int) -> tuple[CLIPVisionModel, dict[str, Any]]:
    """Train the tower; returns it with figures of its training, and its accuracy on cells of held-out scenes."""
    set_seed(seed)
    tower = random_tower(
        Parts(size.world.image_size, size.patch_size, size.tower_width, size.tower_layers)
    )  # fmt: skip
    classifier = Classifier(tower, size.world).to(device_type())
    drawn = np.random.Generator(np.random.PCG64(seed))

    def make_batch(done: float) -> dict[str, torch.Tensor]:
        return _tower_batch(size, sprites, random.Random(int(drawn.integers(2**62))), "train")

    @torch.inference_mode()
    def right() -> float:
        with precision():
            held_out = _tower_batch(size, sprites, random.Random("tower"), "held out")
            return float(classifier(**held_out).logits.float().mean())

    training = fit(
        classifier, make_batch, size.tower_steps, None, size.tower_learning_rate, "tower   ", lambda: f"cells {right():.1%}"
    )
    return tower, training | {"accuracy": right()}


def _tower_batch(size: Size, sprites: Sprites, rng: random.Random, split: Any) -> dict[str, torch.Tensor]:
    scenes = [draw_scene(size.world, rng, split) for _ in range(size.tower_images)]
    cells = torch.from_numpy(cells_of(size.world, scenes, split, rng)).to(device_type())
    return {"pixels": as_pixels(sprites.images(cells)), "labels": labels_of(size.world, cells)}
