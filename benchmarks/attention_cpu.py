"""One attention layer on a CPU: MMCA beside plain causal sdpa, forward and forward + backward, float32, in turns.

python benchmarks/attention_cpu.py [--tokens 512 1024 2048 4096] [--shares 0.1 0.3 0.5 0.88] [--threads 1] [--out cpu.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsvl.attention_dsvl import routed_name
from dsvl.masks_dsvl import multimodal_mask
from dsvl.visibility_dsvl import visibilities

PER_PICTURE = 64


class Layer(nn.Module):
    """What an attention function wants to know of its module."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.num_key_value_groups = config, 0, True, 1


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(tokens: int, share: float, backward: bool, rounds: int, heads: int = 8, head_dim: int = 64) -> dict[str, float]:
    config = LlamaConfig(hidden_size=heads * head_dim, num_attention_heads=heads, attn_implementation="sdpa")
    layer = Layer(config)
    states = [torch.randn(1, tokens, heads, head_dim).transpose(1, 2).requires_grad_(backward) for _ in range(3)]
    pictures = round(share * tokens / PER_PICTURE)
    types = torch.zeros(1, tokens, dtype=torch.long)
    for number in range(pictures):
        start = 1 + number * (tokens // pictures)
        types[:, start : start + PER_PICTURE] = 1
    visible = visibilities(config, torch.empty(1, tokens, 0), None, None, None)[None]
    masks = {None: multimodal_mask(visible, types, config, torch.float32)}
    codes, gradient = torch.zeros(1, 1, 1, 1, dtype=torch.int8), torch.randn(1, tokens, heads, head_dim)

    def causal() -> torch.Tensor:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](layer, *states, None, scaling=head_dim**-0.5)[0]

    def mmca() -> torch.Tensor:
        function = ALL_ATTENTION_FUNCTIONS[routed_name("sdpa")]
        return function(layer, *states, codes, multimodal_masks=masks, scaling=head_dim**-0.5)[0]

    times: dict[str, list[float]] = {"causal": [], "mmca": []}
    for number in range(rounds + 2):
        for name, forward in (("causal", causal), ("mmca", mmca)):
            took = seconds(lambda f=forward: torch.autograd.grad(f(), states, gradient) if backward else f())
            if number >= 2:
                times[name].append(took)
    ratios = [a / b for a, b in zip(times["causal"], times["mmca"], strict=True)]
    return {
        "causal_ms": 1e3 * statistics.median(times["causal"]),
        "mmca_ms": 1e3 * statistics.median(times["mmca"]),
        "speed": statistics.median(ratios),
        "speed_low": min(ratios),
        "speed_high": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5, 0.88])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    print("speed of MMCA relative to causal sdpa (lowest and highest of the rounds), by the share of image tokens")
    for backward in (False, True):
        for tokens in options.tokens:
            row = {share: measure(tokens, share, backward, options.rounds) for share in options.shares}
            results[f"{'forward + backward' if backward else 'forward'}, {tokens} tokens"] = row
            cells = [
                f"{share:.0%}: {r['speed']:.2f} ({r['speed_low']:.2f} to {r['speed_high']:.2f})" for share, r in row.items()
            ]
            print(f"{'forward + backward' if backward else 'forward':18} {tokens:6} tokens  " + "  ".join(cells), flush=True)
    if options.out is not None:
        Path(options.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
