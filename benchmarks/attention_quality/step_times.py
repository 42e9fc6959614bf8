"""The time of a training step of each arm, measured with nothing else on the device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import device_type, report, time_interleaved
from trained_tasks import precision

from attention_quality.parts import load_parts
from attention_quality.runs import Batches, compose_arm, fingerprints
from attention_quality.scenes import Sprites, training_conversation


def measure_steps(parts_folder: Path, arms: Sequence[str], rounds: int) -> dict[str, Any]:
    """Forward, backward and optimizer step in the mode "frozen", on a batch of the middle number of images.

    Args:
        parts_folder: of the parts.
        arms: of `ARMS`.
        rounds: that are timed.

    Returns:
        `arms`, the figures of each as `measure.compared` gives them; `image_share`, the fraction of image tokens;
        `tokens` of the batch; and the fingerprints of data, code and parts.
    """
    steps, image_share, tokens = {}, 0.0, 0
    for arm in arms:
        parts = load_parts(parts_folder)  # each model has its own
        size = parts.size
        model, _ = compose_arm(parts, arm, seed=0)
        batches = Batches(size, parts.tokenizer, Sprites(size.world).to(device_type()))
        asked = range(size.batch)
        drawn = [training_conversation(size.world, 0, index, size.asked_images, size.questions) for index in asked]
        inputs, answers = batches.make(drawn)
        inputs["labels"] = inputs["input_ids"].masked_fill(~answers.to(device_type()), -100)
        is_image = inputs["input_ids"] == model.config.image_token_id
        image_share, tokens = float(is_image.float().mean()), is_image.numel()
        steps[arm] = step_of(model, inputs)
    table = time_interleaved(steps, rounds)
    report(f"Training steps, {tokens:,} tokens, {image_share:.0%} of them in images", table)
    return {"arms": table, "image_share": image_share, "tokens": tokens} | fingerprints(parts.record)


def step_of(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """A function that does a step of the training."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    model.train()

    def step() -> None:
        with precision():
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
