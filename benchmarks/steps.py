"""Training steps as users would have them: plain, with compiled layers, with a loss in chunks, with Liger's kernels."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from flops import step_flops, supervised_tokens
from measure import Table, utilise
from models import Shape, dsvl, inputs, llava, twin
from torch.utils.checkpoint import checkpoint

from dsvl.training.kernels import use_liger

Step = Callable[[], torch.Tensor]

# Positions whose logits the chunked loss holds at once.
CHUNK = 1024
# Small enough to be compiled and run on a CPU.
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
    """The same of transformers' Llava, with logits of supervised positions only, `CHUNK` of them at a time.

    The best that a user gets out of it with a few lines, which are here.
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
    """Another model of the same weights, whose decoder's layers are compiled."""
    fast = twin(model)
    if hasattr(fast, "compile_decoder_layers"):
        fast.compile_decoder_layers(backend=compiler)
    else:
        for layer in fast.model.language_model.layers:
            layer.compile(backend=compiler)
    return fast


def compiled_and_recomputed(model: Any, compiler: str, every: int) -> Any:
    """The same, with every so many of its layers recomputed in the backward pass."""
    fast = compiled(model, compiler)
    fast.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    return fast


def compiled_steps(ours: Any, theirs: Any, batch: dict[str, torch.Tensor], compiler: str) -> dict[str, Step]:
    """The steps of both models with their layers compiled."""
    fast = compiled(theirs, compiler)
    return {
        "Llava, compiled layers": step(fast, batch),
        "Llava, compiled, chunked loss": supervised_step(fast, batch),
        "DSVL mmca, compiled layers": step(compiled(ours, compiler), batch),
    }


def liger_steps(ours: Any, theirs: Any, batch: dict[str, torch.Tensor], compiler: str | None) -> dict[str, Step]:
    """The steps of both models with Liger's kernels, which replace functions of transformers: to be measured last."""
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
    """Add to each alternative's figures what a step comes to: tokens and operations a second, memory in all.

    Args:
        table: of `in_turns`.
        shape: of models and batch.
        batch: whose labels say what is supervised.
        weights_gib: of one model, which `peak_gib` leaves out.
        peak: TFLOP/s that the step's are held against, if any.
    """
    for figures in table.values():
        if "ms" in figures:
            figures["tokens_per_s"] = 1000 * shape.batch * shape.tokens / figures["ms"]
        if "peak_gib" in figures:
            figures["total_gib"] = weights_gib + figures["peak_gib"]
    worth = step_flops(shape, supervised_tokens(batch["labels"]))
    utilise(table, dict.fromkeys(table, worth), peak)


def weights_gib(model: Any) -> float:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**30


def check(compiler: str, device: str) -> dict[str, float]:
    """Run every row once at a tiny size, without a clock, and hold the losses of each model against each other.

    Returns:
        The rows' losses.

    Raises:
        AssertionError: if a row's loss is not its model's.
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
        assert abs(loss - expected) < 1e-4 * expected, f"{name}: {loss}, but plain {expected}"
    return losses
