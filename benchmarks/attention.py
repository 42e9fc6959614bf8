"""One attention layer: MMCA, causal sdpa and the released computation, forward and forward + backward, interleaved.

    python benchmarks/attention.py [--shapes 2x4096 1x32768] [--shares 0 0.5 0.88] [--ways fused released] [--out FILE]

On a GPU it is a layer of a 7B decoder in bf16 (32 heads of 128, images of 257 tokens), on a CPU a small one in float32 (8
heads of 64, images of 64). "causal sdpa" is the call of transformers for a text decoder, with the kernel that PyTorch
selects. On a GPU each step is a CUDA graph (except flex_attention, which cannot be captured), so that times do not include
launches; the table "as called" includes them. TFLOP/s count the pairs of a row's own definition of attention.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from flops import attention_flops, attention_pairs
from measure import Table, describe_device, device_type, graphed, peak_gib_and_ms, report, time_interleaved, utilise, write
from released_attention import additive_masks, free_bytes, needed_bytes, released_attention
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsvl.acceleration import build_mask
from dsvl.acceleration.attention.gathered_mask import GatheredMask
from dsvl.acceleration.attention.kernel_choice import can_fuse, decision
from dsvl.attention_dsvl import routed_name
from dsvl.masks_dsvl import visibilities

WAYS = ("fused", "gathered sdpa", "flex_attention", "released")
BASE = "causal sdpa"
NO_GRAPH_ABOVE = 100.0  # ms of a step
FORWARD, BOTH = "forward", "forward + backward"
Step = Callable[[], object]


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer, and the number of tokens per image."""

    heads: int
    key_value_heads: int
    head_dim: int
    per_image: int
    dtype: torch.dtype

    def __str__(self) -> str:
        grouped = "" if self.heads == self.key_value_heads else f" ({self.key_value_heads} of keys and values)"
        return f"{self.heads} heads{grouped} of {self.head_dim}, {str(self.dtype).removeprefix('torch.')}"


HEADS = {"cuda": Heads(32, 32, 128, 257, torch.bfloat16), "cpu": Heads(8, 8, 64, 64, torch.float32)}


class Layer(nn.Module):
    """The attributes that attention functions read from their module."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, 0, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads


def token_types(batch: int, tokens: int, images: int, per_image: int) -> torch.Tensor:
    """Token types (batch, tokens) with evenly spaced images, 1 = image."""
    types = torch.zeros(batch, tokens, dtype=torch.long)
    for number in range(images):
        start = 1 + number * (tokens // images)
        types[:, start : start + per_image] = 1
    if types.sum() != batch * images * per_image:
        raise ValueError(f"{images} images of {per_image} tokens do not fit into {tokens} tokens; pass a lower number.")
    return types


class Attention:
    """The inputs of a layer, and the implementations of its attention.

    Args:
        size: of the layer.
        batch: number of samples.
        tokens, images: numbers per sample.
    """

    def __init__(self, size: Heads, batch: int, tokens: int, images: int) -> None:
        self.size, self.images, self.device = size, images, device_type()
        self.config = LlamaConfig(
            hidden_size=size.heads * size.head_dim,
            num_attention_heads=size.heads,
            num_key_value_heads=size.key_value_heads,
            head_dim=size.head_dim,
            attn_implementation="sdpa",
        )
        self.layer, self.scaling = Layer(self.config), size.head_dim**-0.5

        def states(heads: int) -> torch.Tensor:  # memory layout of a decoder's projections
            return torch.randn(batch, tokens, heads, size.head_dim, device=self.device, dtype=size.dtype)

        self.gradient = states(size.heads)
        self.states = [
            states(heads).transpose(1, 2).requires_grad_()
            for heads in (size.heads, size.key_value_heads, size.key_value_heads)
        ]
        self.types = token_types(batch, tokens, images, size.per_image).to(self.device)

    def __str__(self) -> str:
        batch, tokens = self.types.shape
        share = self.images * self.size.per_image / tokens
        return f"{batch} x {tokens} tokens, {self.images} images of {self.size.per_image} ({share:.0%}), {self.size}"

    def skip_reason(self, way: str, backward: bool = True) -> str | None:
        """Why an implementation cannot run here; None if it can."""
        if way == "fused":
            decided = decision(self.config, self.size.dtype, torch.device(self.device))
            if not decided.use:
                return f"no fused kernels: {decided.reason}"
        if way == "flex_attention" and self.device == "cpu":
            return "flex_attention has no backward on a CPU"
        if way == "released":
            needed = needed_bytes(len(self.types), self.size.heads, self.types.shape[1], self.size.dtype, backward)
            # With a margin for other allocations.
            if 1.5 * needed > free_bytes():
                return f"its matrices take {needed / 2**30:.1f} GiB, of {free_bytes() / 2**30:.1f} GiB free"
        return None

    def masks(self, way: str) -> Any:
        """Build the masks, as a model does once per step for all layers."""
        if way == "released":
            return additive_masks(self.types, self.size.dtype)
        self.config._attn_implementation = "flex_attention" if way == "flex_attention" else "sdpa"
        batch, tokens = self.types.shape
        embeds = torch.empty(batch, tokens, 0, device=self.device, dtype=self.size.dtype)
        visible = visibilities(self.config, embeds, None, None, None)[None]
        in_images = batch * self.images * self.size.per_image
        if way == "gathered sdpa":
            return GatheredMask.build(visible, self.types, self.config, self.size.dtype)
        return build_mask(visible, self.types, self.config, self.size.dtype, image_queries=in_images)

    def causal(self) -> torch.Tensor:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](self.layer, *self.states, None, scaling=self.scaling)[0]

    def forward(self, way: str) -> Callable[[], torch.Tensor]:
        """The forward pass of an implementation with prebuilt masks; returns (batch, tokens, heads, head_dim)."""
        masks = self.masks(way)
        if way == "released":
            return partial(released_attention, *self.states, masks, self.scaling)
        function = ALL_ATTENTION_FUNCTIONS[routed_name("flex_attention" if way == "flex_attention" else "sdpa")]
        by_type = {None: masks} if self.images else None
        return lambda: function(self.layer, *self.states, None, multimodal_masks=by_type, scaling=self.scaling)[0]

    def flops(self, backward: bool) -> dict[str, float]:
        """FLOPs of each row."""
        kinds = {BASE: "causal"} | {row(way): "mmca_reference" if way == "released" else "mmca" for way in WAYS}
        pairs = {kind: attention_pairs(self.types, kind) for kind in set(kinds.values())}
        size = self.size.heads, self.size.head_dim, backward
        return {name: attention_flops(pairs[kind], *size) for name, kind in kinds.items()}

    def step(self, run: Callable[[], torch.Tensor], backward: bool) -> Step:
        def forward_only() -> torch.Tensor:
            with torch.no_grad():
                return run()

        return (lambda: torch.autograd.grad(run(), self.states, self.gradient)) if backward else forward_only


def row(way: str) -> str:
    """The name of an implementation in a table."""
    return "released computation" if way == "released" else f"mmca {way}"


def default_ways() -> list[str]:
    """The implementation that "sdpa" selects here, and the others that run."""
    device = device_type()
    fused = can_fuse(LlamaConfig(), HEADS[device].dtype, torch.device(device))
    ours = "fused" if fused else "gathered sdpa"
    return [ours, "flex_attention", "released"] if device == "cuda" else [ours, "released"]


def compare(attention: Attention, ways: list[str], backward: bool, timing: dict[str, Any]) -> tuple[Table, dict[str, Step]]:
    """Time each implementation on the device, without building masks; returns the table and the steps.

    Args:
        attention: layer and inputs.
        ways: implementations of `WAYS`, in addition to causal attention.
        backward: whether a step has a backward pass.
        timing: arguments of `time_interleaved`.
    """
    reasons = {way: attention.skip_reason(way, backward) for way in ways}
    forwards = {BASE: attention.causal} | {row(way): attention.forward(way) for way in ways if reasons[way] is None}
    steps = {name: attention.step(run, backward) for name, run in forwards.items()}
    if attention.device == "cuda":
        captured = {name: step for name, step in steps.items() if name != row("flex_attention")}
        peaks = {name: peak_gib_and_ms(step) for name, step in captured.items()}
        # Of a long step launches do not count anyway, and a graph would take four more runs.
        timed = {name: step if peaks[name][1] > NO_GRAPH_ABOVE else graphed(step) for name, step in captured.items()}
        table = time_interleaved(timed, **timing)
        for name, figures in table.items():
            figures["peak_gib"] = peaks[name][0]  # the memory of a graph is allocated at capture
        if "flex_attention" in ways:
            reasons["flex_attention"] = "flex_attention cannot be captured in a CUDA graph"
    else:
        table = time_interleaved(steps, **timing)
    utilise(table, attention.flops(backward))
    table |= {row(way): {"skipped": reason} for way, reason in reasons.items() if reason is not None}
    return table, steps


def free_memory() -> None:
    """Free the memory of graphs and N x N matrices."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(attention: Attention, ways: list[str], timing: dict[str, Any]) -> dict[str, Table]:
    """Measure and print all tables of a shape."""
    results: dict[str, Table] = {}

    def add(what: str, table: Table) -> None:
        results[what] = table
        report(f"{what}: {attention}", table)

    for backward in (False, True):
        table, steps = compare(attention, ways, backward, timing)
        add(BOTH if backward else FORWARD, table)
        free_memory()
    if attention.device == "cuda":
        add(f"{BOTH}, as called", time_interleaved(steps, **timing))
    steps.clear()
    free_memory()
    can = [way for way in ways if attention.skip_reason(way) is None]
    if can:
        add("masks, once per step", time_interleaved({row(way): partial(attention.masks, way) for way in can}, **timing))
    return results


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the layer and the timing, which attention.py and growth.py share."""
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, help="in addition to causal sdpa (default: what sdpa selects here, and others)"
    )
    parser.add_argument("--heads", type=int)
    parser.add_argument("--key-value-heads", type=int)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--per-image", type=int, help="tokens of an image")
    parser.add_argument("--threads", type=int, default=1, help="threads of a CPU (default 1)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 20 on a GPU, 15 on a CPU)")
    parser.add_argument("--budget", type=float, help="maximum seconds for each row (default 10 on a GPU, 3 on a CPU)")
    parser.add_argument("--out", help="JSON file for the results")


def layer_options(options: argparse.Namespace) -> tuple[Heads, list[str], dict[str, Any]]:
    """The layer, the implementations, and the arguments of `time_interleaved`."""
    on_gpu = device_type() == "cuda"
    if not on_gpu:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    usual = HEADS[device_type()]
    size = Heads(
        heads=options.heads or usual.heads,
        key_value_heads=options.key_value_heads or options.heads or usual.key_value_heads,
        head_dim=options.head_dim or usual.head_dim,
        per_image=options.per_image or usual.per_image,
        dtype=usual.dtype,
    )
    timing = {
        "rounds": options.rounds or (20 if on_gpu else 15),
        "warm_up": 5 if on_gpu else 1,
        "budget": options.budget or (10.0 if on_gpu else 3.0),
    }
    ways = options.ways or default_ways()
    vars(options).update(asdict(size), dtype=str(size.dtype).removeprefix("torch."), ways=ways)  # recorded in the JSON file
    return size, ways, timing


def main(argv: list[str] | None = None) -> None:
    on_gpu = device_type() == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", default=["2x4096", "1x32768"] if on_gpu else ["1x512", "1x2048"], help="batch x tokens"
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0, 0.5, 0.88] if on_gpu else [0.1, 0.3, 0.5, 0.88],
        help="fraction of image tokens",
    )
    add_layer_options(parser)
    options = parser.parse_args(argv)
    size, ways, timing = layer_options(options)
    print(describe_device())
    results = {}
    for shape in options.shapes:
        batch, tokens = map(int, shape.split("x"))
        for share in options.shares:
            images = round(share * tokens / size.per_image)
            results[f"{shape}, {images} images"] = measure(Attention(size, batch, tokens, images), ways, timing)
    write(options.out, options, results)


if __name__ == "__main__":
    main()
