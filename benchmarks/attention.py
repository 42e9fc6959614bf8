"""One attention layer of a 7B decoder on a GPU: MMCA beside plain causal sdpa, forward and forward + backward.

python benchmarks/attention.py [--shapes 2x4096 1x32768] [--shares 0 0.5 0.88] [--out attention.json]

"causal sdpa" is what transformers calls for a plain decoder, with the kernel that PyTorch itself picks. Times are the
device's: each step is a CUDA graph (but flex_attention's, which cannot be one). What Python needs to launch it is in the
table "as called".
"""

import argparse

import torch
from measure import graphed, in_turns, report, write
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsvl.attention_dsvl import routed_name
from dsvl.masks_dsvl import multimodal_mask
from dsvl.visibility_dsvl import visibilities

PER_PICTURE = 257
WAYS = ("fused", "gathered sdpa", "flex_attention")


class Layer(nn.Module):
    """What an attention function wants to know of its module."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, 0, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads


def token_types(batch: int, tokens: int, pictures: int) -> torch.Tensor:
    """Pictures spread evenly over the sequence."""
    types = torch.zeros(batch, tokens, dtype=torch.long)
    for number in range(pictures):
        start = 1 + number * (tokens // pictures)
        types[:, start : start + PER_PICTURE] = 1
    assert types.sum() == batch * pictures * PER_PICTURE
    return types.cuda()


def measure(batch: int, tokens: int, pictures: int, ways: list[str], heads: int = 32) -> dict:
    config = LlamaConfig(hidden_size=4096, num_attention_heads=heads, num_key_value_heads=heads, head_dim=128)
    layer = Layer(config)
    shape = (batch, tokens, heads, 128)  # in memory, as a decoder's projections leave them
    states = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)]
    query, key, value = states
    gradient = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    embeds = torch.empty(batch, tokens, 0, device="cuda", dtype=torch.bfloat16)
    types = token_types(batch, tokens, pictures)
    codes = torch.zeros(1, 1, 1, 1, dtype=torch.int8, device="cuda") if pictures else None

    def causal() -> torch.Tensor:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, value, None, scaling=128**-0.5)[0]

    def build(way: str):
        config._attn_implementation = "flex_attention" if way == "flex_attention" else "sdpa"
        # Dropout is one of the things that the fused kernels leave to the others.
        config.attention_dropout = 0.1 if way == "gathered sdpa" else 0.0
        visible = visibilities(config, embeds, None, None, None)[None]
        return multimodal_mask(
            visible, types, config, torch.bfloat16, way == "gathered sdpa", batch * pictures * PER_PICTURE
        )

    def mmca(way: str):
        masks = {None: build(way)}
        function = ALL_ATTENTION_FUNCTIONS[routed_name("flex_attention" if way == "flex_attention" else "sdpa")]
        # As in the model, the masks are built once for all layers and are not part of a layer's time.
        return lambda: function(layer, query, key, value, codes, multimodal_masks=masks, scaling=128**-0.5)[0]

    forwards = {"causal sdpa": causal} | {f"mmca {way}": mmca(way) for way in ways}

    def without_graph(run):
        def step():
            with torch.no_grad():
                return run()

        return step

    def with_backward(run):
        def step():
            return torch.autograd.grad(run(), (query, key, value), gradient)

        return step

    def on_device(steps):  # flex_attention cannot be captured
        return in_turns({name: graphed(step) for name, step in steps.items() if "flex" not in name})

    results = {
        "forward": on_device({name: without_graph(run) for name, run in forwards.items()}),
        "forward + backward": on_device({name: with_backward(run) for name, run in forwards.items()}),
        "forward + backward, as called": in_turns({name: with_backward(run) for name, run in forwards.items()}),
        "masks, once a step": in_turns({f"mmca {way}": lambda way=way: build(way) for way in ways}),
    }
    share = pictures * PER_PICTURE / tokens
    for what, table in results.items():
        size = f"{batch} x {tokens} tokens, {pictures} pictures of {PER_PICTURE} ({share:.0%})"
        title = f"{what}: {size}, {heads} heads of 128, bf16"
        report(title, table, base="causal sdpa" if "causal sdpa" in table else f"mmca {ways[0]}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["2x4096", "1x32768"], help="batch x tokens")
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.5, 0.88], help="how much is pictures")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["fused", "flex_attention"])
    parser.add_argument("--out", help="write the figures as JSON")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    results = {}
    for shape in options.shapes:
        batch, tokens = map(int, shape.split("x"))
        for share in options.shares:
            pictures = round(share * tokens / PER_PICTURE)
            results[f"{shape}, {pictures} pictures"] = measure(batch, tokens, pictures, options.ways)
    write(options.out, results)


if __name__ == "__main__":
    main()
