"""Variants of a training step: plain, with compiled layers, a chunked loss, Liger's kernels, frozen weights in 8 bits."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from flops import step_flops, supervised_tokens
from measure import Table, utilise
from models import Shape, dsvl, inputs, llava, twin
from torch.utils.checkpoint import checkpoint

from dsvl.acceleration.decoder_layers import compile_8_bit_tower, parts_in_8_bits
from dsvl.acceleration.memory.frozen_linear import PRECISIONS
from dsvl.training.frozen_precision import freeze_in_8_bits
from dsvl.training.liger import use_liger

Step = Callable[[], torch.Tensor]

# Number of positions whose logits are computed at once in the chunked loss.
CHUNK = 1024
# Small enough to compile and run on a CPU.
TINY = Shape(
    tokens=64,
    images=2,
    layers=4,  # of which the first and the last stay as they are beside 8-bit ones
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
    """A second model with the same weights, whose decoder layers are compiled, and what is in 8 bits in its tower."""
    fast = twin(model)
    if hasattr(fast, "compile_decoder_layers"):
        fast.compile_decoder_layers(backend=compiler)
        compile_8_bit_tower(fast)
    else:
        for module in (*fast.model.language_model.layers, *parts_in_8_bits(fast.model.vision_tower)):
            module.compile(backend=compiler)
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


def in_8_bits(model: Any, precision: str) -> Any:
    """A second model with the same weights, of which frozen linear layers are copied to 8 bits."""
    frozen = twin(model)
    freeze_in_8_bits(frozen, precision)
    return frozen


def frozen_steps(
    ours: Any, theirs: Any, batch: dict[str, torch.Tensor], compiler: str
) -> tuple[dict[str, Step], dict[str, float]]:
    """Steps of both models with the same frozen linear layers in 8 bits and compiled layers.

    Returns:
        The steps, and the GiB of weights of the model of each.
    """
    fp8, theirs_fp8, int8 = in_8_bits(ours, "fp8"), in_8_bits(theirs, "fp8"), in_8_bits(ours, "int8")
    steps = {
        "Llava, fp8, compiled, chunked loss": supervised_step(compiled(theirs_fp8, compiler), batch),
        "DSVL mmca, fp8, compiled layers": step(compiled(fp8, compiler), batch),
        "DSVL mmca, fp8, recomputing 1/16": step(compiled_and_recomputed(fp8, compiler, every=16), batch),
        "DSVL mmca, int8, compiled layers": step(compiled(int8, compiler), batch),
    }
    models = {"Llava, fp8": theirs_fp8, "DSVL mmca, fp8": fp8, "DSVL mmca, int8": int8}
    weights = {name: weights_gib(next(m for start, m in models.items() if name.startswith(start))) for name in steps}
    return steps, weights


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
    table: Table,
    shape: Shape,
    batch: dict[str, torch.Tensor],
    weights_gib: float,
    peak: float | None = None,
    other_weights: Mapping[str, float] | None = None,
) -> None:
    """Add tokens and TFLOP per second and total memory to a table.

    Args:
        table: of `time_interleaved`.
        shape: of model and batch.
        batch: its labels determine the number of supervised tokens.
        weights_gib: size of one model, which `peak_gib` does not include.
        peak: *optional*, TFLOP/s for the utilisation.
        other_weights: *optional*, sizes of the models of some rows, by their names.
    """
    for name, figures in table.items():
        if "ms" in figures:
            figures["tokens_per_s"] = 1000 * shape.batch * shape.tokens / figures["ms"]
        if "peak_gib" in figures:
            figures["total_gib"] = (other_weights or {}).get(name, weights_gib) + figures["peak_gib"]
    flops = step_flops(shape, supervised_tokens(batch["labels"]))
    utilise(table, dict.fromkeys(table, flops), peak)


def weights_gib(model: Any) -> float:
    """Size of a model; weights in 8 bits are buffers."""
    return sum(weight.nbytes for weight in (*model.parameters(), *model.buffers())) / 2**30


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
    expected = {name: losses["Llava, sdpa" if name.startswith("Llava") else "DSVL mmca, sdpa"] for name in losses}
    # In 8 bits, those of the same rounded numbers without a compiler.
    in_8_bit_steps = frozen_steps(ours, theirs, batch, compiler)[0]
    plain = {
        f"{model}, {precision}": run(in_8_bits(original, precision), batch)().item()
        for model, original, run in (("Llava", theirs, supervised_step), ("DSVL mmca", ours, step))
        for precision in PRECISIONS
    }
    for name, run in in_8_bit_steps.items():
        losses[name], expected[name] = run().item(), plain[", ".join(name.split(", ")[:2])]
    for name, loss in losses.items():
        print(f"{name:34}{loss:10.6f}")
        assert abs(loss - expected[name]) < 1e-4 * expected[name], f"{name}: {loss}, expected {expected[name]}"
    return losses
