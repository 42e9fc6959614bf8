"""The error of 8-bit frozen layers on samples of a training: of each layer's output, and of the logits."""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..acceleration.memory.frozen_linear import FrozenLinear
from ..utils.atomic_files import write_atomically
from .frozen_precision import frozen_linears, saved_name

logger = logging.getLogger(__name__)

REPORT = "frozen_precision.json"  # in the output directory
LISTED = 5  # layers with the largest errors, in the log


@dataclass
class FrozenErrors:
    """Relative errors: the norm of the difference, divided by the norm of what the original weights give.

    Attributes:
        precision: "fp8" or "int8".
        layers: path of a layer -> error of its output, for the inputs that it has in the 8-bit model.
        logits: error of the logits of supervised tokens, through all layers.
        same_token: fraction of supervised tokens for which both models find the same token most likely.
        loss: mean loss of the 8-bit model.
        original_loss: mean loss with the original weights.
    """

    precision: str
    layers: dict[str, float] = field(default_factory=dict)
    logits: float = 0.0
    same_token: float = 0.0
    loss: float = 0.0
    original_loss: float = 0.0

    def lines(self) -> list[str]:
        """The summary for a log."""
        ranked = sorted(self.layers.items(), key=lambda one: one[1], reverse=True)
        errors = [error for _, error in ranked]
        return [
            f"Error of {self.precision}: {errors[len(errors) // 2]:.2%} of the output of a layer (median of {len(errors)}), "
            f"{self.logits:.2%} of the logits; the same token is most likely for {self.same_token:.1%} of the supervised "
            f"tokens; loss {self.loss:.4f}, with the original weights {self.original_loss:.4f}.",
            "Largest errors: " + ", ".join(f"{name} {error:.2%}" for name, error in ranked[:LISTED]) + ".",
        ]

    def to_json(self) -> str:
        """All figures, as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"


def measure_errors(model: Any, batch: dict[str, Any]) -> FrozenErrors:
    """Compare a model with 8-bit layers with the same model and its original weights.

    Args:
        model: the model, with or without adapters, in any mode, which is kept.
        batch: inputs with `labels`, on the model's device.

    Raises:
        ValueError: if no layer is in 8 bits, or no token has a label.
    """
    layers = {saved_name(name): layer for name, layer in frozen_linears(model)}
    if not layers:
        raise ValueError("The model has no 8-bit layer to measure; call freeze_in_8_bits first.")
    labels = batch["labels"][:, 1:]
    supervised = labels != -100
    if not supervised.any():
        raise ValueError("No token of the batch has a label, so no logits can be compared; pass other samples.")
    errors = FrozenErrors(next(iter(layers.values())).precision)
    # Before hooks that change the output, such as those of `skip_image_queries`.
    hooks = [layer.register_forward_hook(_measure(name, errors.layers), prepend=True) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            try:
                ours = model(**batch).logits[:, :-1][supervised].float()
            finally:
                for hook in hooks:
                    hook.remove()
            with _originals(layers):
                theirs = model(**batch).logits[:, :-1][supervised].float()
    finally:
        model.train(training)
    targets = labels[supervised]
    errors.logits = _relative(ours, theirs)
    errors.same_token = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    errors.loss, errors.original_loss = (nn.functional.cross_entropy(one, targets).item() for one in (ours, theirs))
    return errors


def report_errors(trainer: Any, directory: Path) -> None:
    """Measure the errors on the first samples of a training, log them, and write them to `frozen_precision.json`.

    Args:
        trainer: the trainer, whose data set is not a stream.
        directory: the output directory.
    """
    number = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(number)])
    trainer.model.to(trainer.args.device)  # DeepSpeed moves it later
    batch = {name: one.to(trainer.args.device) if torch.is_tensor(one) else one for name, one in batch.items()}
    with trainer.accelerator.autocast():
        errors = measure_errors(trainer.model, batch)
    for line in errors.lines():
        logger.info(line)
    if trainer.is_world_process_zero():
        write_atomically(directory / REPORT, errors.to_json())


def _measure(name: str, errors: dict[str, float]) -> Any:
    """A hook that adds the error of a layer's output."""

    def hook(layer: FrozenLinear, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        (states,) = args
        expected = _original_output(layer, states)
        # A layer that runs several times, as over tiles, has its largest error.
        errors[name] = max(errors.get(name, 0.0), _relative(output.float(), expected.float()))

    return hook


@contextlib.contextmanager
def _originals(layers: dict[str, FrozenLinear]) -> Iterator[None]:
    """Compute layers with their original weights, of which one at a time is on the device."""
    hooks = [
        layer.register_forward_hook(lambda layer, args, output: _original_output(layer, args[0]), prepend=True)
        for layer in layers.values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _original_output(layer: FrozenLinear, states: torch.Tensor) -> torch.Tensor:
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return nn.functional.linear(states.to(dtype), layer.original().to(states.device, dtype), bias)


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()
