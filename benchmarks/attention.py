"""One attention layer of a 7B decoder on a GPU: MMCA beside plain causal sdpa, forward and forward + backward.

python benchmarks/attention.py [--tokens 4096] [--batch 2] [--out attention.json]
"""

import argparse

import torch
from measure import in_turns, report, write
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsvl.attention_dsvl import BACKENDS, multimodal_mask, routed_name, visibilities

PER_PICTURE = 257


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


def measure(batch: int, tokens: int, pictures: int, backends: list[str]) -> dict:
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, attn_implementation="sdpa")
    layer = Layer(config)
    shape = (batch, tokens, config.num_attention_heads, 128)  # in memory, as a decoder's projections leave them
    states = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)]
    query, key, value = states
    gradient = torch.randn(batch, tokens, config.num_attention_heads, 128, device="cuda", dtype=torch.bfloat16)
    embeds = torch.empty(batch, tokens, 0, device="cuda", dtype=torch.bfloat16)
    types = token_types(batch, tokens, pictures)
    codes = torch.zeros(1, 1, 1, 1, dtype=torch.int8, device="cuda")

    def causal() -> torch.Tensor:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, value, None, scaling=128**-0.5)[0]

    def mmca(backend: str):
        visible = visibilities(config, embeds, None, None, None)
        masks = {None: multimodal_mask(visible[None], types, backend, torch.bfloat16)}
        function = ALL_ATTENTION_FUNCTIONS[routed_name(backend)]
        # As in the model, the masks are built once for all layers and are not part of a layer's time.
        return lambda: function(layer, query, key, value, codes, multimodal_masks=masks, scaling=128**-0.5)[0]

    def build(backend: str):
        def run():
            return multimodal_mask(visibilities(config, embeds, None, None, None)[None], types, backend, torch.bfloat16)

        return run

    forwards = {"causal sdpa": causal} | {f"mmca {backend}": mmca(backend) for backend in backends}

    def without_graph(run):
        def step():
            with torch.no_grad():
                run()

        return step

    def with_backward(run):
        def step():
            torch.autograd.grad(run(), (query, key, value), gradient)

        return step

    results = {
        "forward": in_turns({name: without_graph(run) for name, run in forwards.items()}),
        "forward + backward": in_turns({name: with_backward(run) for name, run in forwards.items()}),
        "masks, once a step": in_turns({f"mmca {backend}": build(backend) for backend in backends}),
    }
    share = pictures * PER_PICTURE / tokens
    for what, table in results.items():
        title = (
            f"{what}: {batch} x {tokens} tokens, {pictures} pictures of {PER_PICTURE} ({share:.0%}), 32 heads of 128, bf16"
        )
        report(title, table, base="causal sdpa" if "causal sdpa" in table else f"mmca {backends[0]}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pictures", type=int, nargs="+", default=[8, 14])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["sdpa", "flex_attention"])
    parser.add_argument("--out", help="write the figures as JSON")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    results = {}
    for pictures in options.pictures:
        results[f"{pictures} pictures"] = measure(options.batch, options.tokens, pictures, options.backends)
    write(options.out, results)


if __name__ == "__main__":
    main()
