"""MMCA by padded heads in vLLM's Triton attention kernel: checked against the definition, and timed beside the same kernel
without padding.

    python benchmarks/padded_heads.py VLLM [--check-only] [--head-dims 64 128] [--out FILE]

VLLM is the folder of vLLM's Python files; two of them are read, `v1/attention/ops/triton_unified_attention.py` and
`triton_attention_helpers.py`, and vLLM need not be installed. On a GPU in bf16: 32 query heads, 8 of keys and values, half
of the tokens in images; a prompt of 4,096 tokens, and a decode step of 16 sequences with 4,096 tokens each in the KV cache.
With TRITON_INTERPRET=1 and --check-only it runs on a CPU, at a small size, in float32 and float16: Triton's interpreter
computes wrongly in bfloat16, with or without padding.
"""

import argparse
import enum
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import describe_device, device_type, report, time_interleaved, write

from dsvl.serving.vllm_plugin.padded_heads import branch_marks, merge_heads, pad_heads

OPS = "vllm.v1.attention.ops"
BLOCK, SEGMENTS = 16, 16  # tokens of a block of the KV cache; parts in which a decode step reads it


def load_kernel(folder: Path) -> Callable[..., None]:
    """vLLM's `unified_attention`, from its files alone; of the modules that they import they need a few names."""
    import triton
    import triton.language as tl

    platform = types.SimpleNamespace(
        fp8_dtype=lambda: torch.float8_e4m3fn, is_device_capability_family=lambda family: False, is_xpu=lambda: False
    )
    modes = enum.IntEnum(  # type: ignore[misc]
        "KVQuantMode",
        ["NONE", "FP8_PER_TENSOR", "INT8_PER_TOKEN_HEAD", "FP8_PER_TOKEN_HEAD", "INT4_PER_TOKEN_HEAD"],
        start=0,
    )
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.logger": {"init_logger": lambda name: None},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.v1.kv_cache_interface": {"KVQuantMode": modes},
    }
    for name, names in contents.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(names)
    sys.modules["vllm"].envs = sys.modules["vllm.envs"]  # type: ignore[attr-defined]
    for name in ("triton_attention_helpers", "triton_unified_attention"):
        specification = importlib.util.spec_from_file_location(f"{OPS}.{name}", folder / "v1/attention/ops" / f"{name}.py")
        if specification is None or specification.loader is None:
            raise FileNotFoundError(f"{folder} holds no {OPS}.{name}; pass the folder of vLLM's Python files.")
        module = importlib.util.module_from_spec(specification)
        sys.modules[specification.name] = module
        specification.loader.exec_module(module)
    return module.unified_attention


class Batch:
    """Sequences in a paged KV cache, and their last tokens as queries.

    Args:
        unified_attention: vLLM's kernel.
        queries, context: of every sequence: new tokens, and all tokens.
        head_dim: of the model, and `padded`, of the padded heads.
    """

    def __init__(
        self,
        unified_attention: Callable[..., None],
        sequences: int,
        queries: int,
        context: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        padded: int,
        dtype: torch.dtype,
    ) -> None:
        self.unified_attention, self.padded, self.scale = unified_attention, padded, head_dim**-0.5
        self.sequences, self.queries, self.context = sequences, queries, context
        self.device = device_type()
        torch.manual_seed(0)
        tokens = sequences * context
        make = partial(torch.randn, device=self.device)
        self.query, self.key, self.value = (make(tokens, count, head_dim).to(dtype) for count in (heads, kv_heads, kv_heads))
        # Images of 9 tokens with as much text before each; a sequence begins with text.
        self.is_image = (torch.arange(context, device=self.device) // 9 % 2 == 1).repeat(sequences)
        blocks = -(-context // BLOCK)
        self.table = torch.randperm(sequences * blocks, device=self.device).view(sequences, blocks).int()
        self.last = torch.arange(tokens, device=self.device).view(sequences, context)[:, -queries:].flatten()
        self.marks = branch_marks(self.scale)
        self.plain_cache = [self.paged(states) for states in (self.key, self.value)]
        padded_states = pad_heads(self.query, self.key, self.value, self.is_image, padded, self.marks)
        self.padded_cache = [self.paged(states) for states in padded_states[1:]]
        self.padded_query = padded_states[0][self.last].contiguous()

    def paged(self, states: torch.Tensor) -> torch.Tensor:
        """(blocks, tokens of a block, heads, head_dim)"""
        cache = states.new_zeros(self.table.numel(), BLOCK, *states.shape[1:])
        positions = torch.arange(self.context, device=self.device)
        rows = states.view(self.sequences, self.context, *states.shape[1:])
        for sequence, row in enumerate(rows):
            cache[self.table[sequence][positions // BLOCK].long(), positions % BLOCK] = row
        return cache

    def attend(self, query: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
        count = self.sequences
        output = torch.empty_like(query)
        size = 1 << (query.shape[2] - 1).bit_length()
        parts = torch.empty if self.queries == 1 else (lambda *shape, **options: None)
        options: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        self.unified_attention(
            q=query,
            k=cache[0],
            v=cache[1],
            out=output,
            cu_seqlens_q=torch.arange(0, (count + 1) * self.queries, self.queries, device=self.device).int(),
            max_seqlen_q=self.queries,
            seqused_k=torch.full((count,), self.context, device=self.device).int(),
            max_seqlen_k=self.context,
            softmax_scale=self.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=self.table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=128 // cache[0].shape[2] if self.queries == 1 else None,
            num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=parts(len(query), query.shape[1], SEGMENTS, size, **options),
            softmax_segm_max=parts(len(query), query.shape[1], SEGMENTS, **options),
            softmax_segm_expsum=parts(len(query), query.shape[1], SEGMENTS, **options),
        )
        return output

    def plain(self) -> torch.Tensor:
        """Causal attention of the same queries and keys."""
        return self.attend(self.query[self.last], self.plain_cache)

    def kernel(self) -> torch.Tensor:
        """The kernel alone, with padded heads."""
        return self.attend(self.padded_query, self.padded_cache)

    def mmca(self) -> torch.Tensor:
        """All that a layer does: heads of new tokens are padded, and the branches merged."""
        query, key, value, is_image = (one[self.last] for one in (self.query, self.key, self.value, self.is_image))
        padded = pad_heads(query, key, value, is_image, self.padded, self.marks)
        return merge_heads(self.attend(padded[0], self.padded_cache), value, is_image)

    def definition(self) -> torch.Tensor:
        """MMCA of attention_dsvl.py in float64, query by query."""
        groups = self.query.shape[1] // self.key.shape[1]
        output = []
        for index in self.last.tolist():
            begin = index - index % self.context
            value = self.value[begin : index + 1].double().repeat_interleave(groups, 1)
            if self.is_image[index]:
                output.append(value[-1])
                continue
            key = self.key[begin : index + 1].double().repeat_interleave(groups, 1)
            scores = torch.einsum("hd,khd->hk", self.query[index].double(), key) * self.scale
            total = torch.zeros_like(value[-1])
            for modality in (False, True):
                members = self.is_image[begin : index + 1] == modality
                if members.any():
                    total += torch.einsum("hk,khd->hd", scores[:, members].softmax(-1), value[members])
            output.append(total)
        return torch.stack(output)

    def difference(self) -> float:
        """The largest difference of padded heads from the definition."""
        return (self.mmca().double() - self.definition()).abs().max().item()


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vllm", metavar="VLLM", help="the folder of vLLM's Python files")
    parser.add_argument("--check-only", action="store_true", help="compare, and time nothing")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128], help="head sizes; %(default)s by default")
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds; %(default)s by default")
    parser.add_argument("--out", help="a JSON file for the results")
    options = parser.parse_args(words)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and not options.check_only:
        parser.error("TRITON_INTERPRET=1 runs on a CPU, whose times say nothing; add --check-only.")
    unified_attention = load_kernel(Path(options.vllm))
    print(describe_device())
    results: dict[str, Any] = {"differences": {}, "times": {}}
    for head_dim in options.head_dims:
        make = partial(Batch, unified_attention, head_dim=head_dim, padded=head_dim + 8)
        for dtype in (torch.float32 if interpreted else torch.bfloat16, torch.float16):
            for name, batch in (
                ("prefill", make(sequences=2, queries=40, context=60, heads=4, kv_heads=2, dtype=dtype)),
                ("decode", make(sequences=3, queries=1, context=60, heads=4, kv_heads=2, dtype=dtype)),
            ):
                results["differences"][f"{name}, head_dim {head_dim}, {dtype}"] = batch.difference()
        if options.check_only:
            continue
        large = partial(make, context=4096, heads=32, kv_heads=8, dtype=torch.bfloat16)
        for name, batch in (
            ("a prompt of 4,096 tokens", large(sequences=1, queries=4096)),
            ("16 decode steps over 4,096 tokens", large(sequences=16, queries=1)),
        ):
            ways = {"plain": batch.plain, "padded, kernel": batch.kernel, "padded, layer": batch.mmca}
            table = time_interleaved(ways, rounds=options.rounds)
            results["times"][f"{name}, head_dim {head_dim}"] = table
            report(f"{name}, head_dim {head_dim}", table)
    for name, difference in results["differences"].items():
        print(f"{name}: largest difference from the definition {difference:.2g}")
    write(options.out, options, results)
    return results


if __name__ == "__main__":
    main()
