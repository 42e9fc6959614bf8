"""Variants of a training step: plain, with compiled layers, with a chunked loss, with Liger's kernels."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from flops import step_flops, supervised_tokens
from measure import Table, utilise
from models import Shape, dsvl, inputs, llava, twin
from torch.utils.checkpoint import checkpoint

from dsvl.training.liger import use_liger

Step = Callable[[], torch.Tensor]

# Number of positions whose logits are computed at once in the chunked loss.
CHUNK = 1024
# Small enough to compile and run on a CPU.
TINY = Shape(
    tokens=64,
    images=2,
    layers=2,
    hidden=64,
    intermediate=96,
    heads=4,
    vocabulary=320,
    vision_layers=2,
    vision_hidden=32,
    vision_intermediate=48,
    vision_heads=2,
    image_size=42,
)


def step(model: Any, batch: dict[str, torch.Tensor]) -> Step:
    """Forward and backward of one batch."""

    def run() -> torch.Tensor:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def supervised_step(model: Any, batch: dict[str, torch.Tensor]) -> Step:
    """A step of transformers' Llava with logits of supervised positions only, `CHUNK` of them at a time.

    It is the fastest step of Llava that a user can write in a few lines.
    """
    rest = {key: tensor for key, tensor in batch.items() if key != "labels"}

    def part(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")

    def run() -> torch.Tensor:
        targets = batch["labels"][:, 1:].flatten()
        rows = (targets != -100).nonzero()[:, 0]
        hidden = model.model(**rest, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)[rows]
        pairs = zip(hidden.split(CHUNK), targets[rows].split(CHUNK), strict=True)
        loss = sum(checkpoint(part, *pair, use_reentrant=False) for pair in pairs) / len(rows)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def compiled(model: Any, compiler: str) -> Any:
    """A second model with the same weights, whose decoder layers are compiled."""
    fast = twin(model)
    if hasattr(fast, "compile_decoder_layers"):
        fast.compile_decoder_layers(backend=compiler)
    else:
        for layer in fast.model.language_model.layers:
            layer.compile(backend=compiler)
    return fast


def compiled_and_recomputed(model: Any, compiler: str, every: int) -> Any:
    """The same with gradient checkpointing of every `every`-th layer."""
    fast = compiled(model, compiler)
    fast.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    return fast


def compiled_steps(ours: Any, theirs: Any, batch: dict[str, torch.Tensor], compiler: str) -> dict[str, Step]:
    """Steps of both models with compiled layers."""
    fast = compiled(theirs, compiler)
    return {
        "Llava, compiled layers": step(fast, batch),
        "Llava, compiled, chunked loss": supervised_step(fast, batch),
        "DSVL mmca, compiled layers": step(compiled(ours, compiler), batch),
    }


def liger_steps(ours: Any, theirs: Any, batch: dict[str, torch.Tensor], compiler: str | None) -> dict[str, Step]:
    """Steps of both models with Liger's kernels. Liger patches transformers, so these must be measured last."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=theirs)
    use_liger(ours)
    steps = {"Llava, Liger": step(theirs, batch), "DSVL mmca, Liger": step(ours, batch)}
    if compiler is not None:
        steps["DSVL mmca, Liger, compiled layers"] = step(compiled(ours, compiler), batch)
    return steps


def has_liger() -> bool:
    return find_spec("liger_kernel") is not None


def add_rates(
    table: Table, shape: Shape, batch: dict[str, torch.Tensor], weights_gib: float, peak: float | None = None
) -> None:
    """Add tokens and TFLOP per second and total memory to a table.

    Args:
        table: of `time_interleaved`.
        shape: of model and batch.
        batch: its labels determine the number of supervised tokens.
        weights_gib: size of one model, which `peak_gib` does not include.
        peak: *optional*, TFLOP/s for the utilisation.
    """
    for figures in table.values():
        if "ms" in figures:
            figures["tokens_per_s"] = 1000 * shape.batch * shape.tokens / figures["ms"]
        if "peak_gib" in figures:
            figures["total_gib"] = weights_gib + figures["peak_gib"]
    flops = step_flops(shape, supervised_tokens(batch["labels"]))
    utilise(table, dict.fromkeys(table, flops), peak)


def weights_gib(model: Any) -> float:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**30


def check(compiler: str, device: str) -> dict[str, float]:
    """Run every row once at a tiny size, and compare the losses of each model.

    Returns:
        The losses of the rows.

    Raises:
        AssertionError: if the losses of a model differ.
    """
    batch = inputs(TINY, device)
    batch["pixel_values"] = batch["pixel_values"].float()
    ours, theirs = dsvl(TINY, "mmca", "sdpa", device).float(), llava(TINY, device).float()
    steps = {"Llava, sdpa": step(theirs, batch), "DSVL mmca, sdpa": step(ours, batch)}
    steps |= compiled_steps(ours, theirs, batch, compiler)
    losses = {name: run().item() for name, run in steps.items()}
    if has_liger() and device == "cuda":
        losses |= {name: run().item() for name, run in liger_steps(ours, theirs, batch, compiler).items()}
    for name, loss in losses.items():
        print(f"{name:34}{loss:10.6f}")
        expected = losses["Llava, sdpa" if name.startswith("Llava") else "DSVL mmca, sdpa"]
        assert abs(loss - expected) < 1e-4 * expected, f"{name}: {loss}, expected {expected}"
    return losses
