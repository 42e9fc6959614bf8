"""Padded heads: one ordinary causal attention call computes MMCA, in every data type that engines serve in."""

import math

import pytest
import torch
from plain_loop import PlainLoop

from dsvl.serving.vllm_plugin.padded_heads import LEAST_SOFTCAP, branch_marks, merge_heads, pad_heads

HEADS, KV_HEADS, HEAD_DIM, PADDED = 6, 2, 16, 24
LAYOUT = "ttIIIttIIIIIIttttItt"  # two images that touch, and one of a token
# Queries, keys and values (tokens, heads, head_dim), and which tokens are image tokens.
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def states(dtype: torch.dtype, size: float = 3.0) -> States:
    """Random ones of the layout."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(LAYOUT), heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = ((size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes)
    return query, key, value, torch.tensor([symbol == "I" for symbol in LAYOUT])


def ordinary_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of (tokens, heads, head_dim), as an engine's kernel computes it: sums and softmax in float32."""
    groups, tokens = query.shape[1] // key.shape[1], torch.arange(len(query))
    rows = torch.promote_types(query.dtype, torch.float32)
    key, value = (one.repeat_interleave(groups, 1).to(rows) for one in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.to(rows), key) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    distance = tokens[:, None] - tokens
    visible = (distance >= 0) & (distance < (window or len(query)))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(query.dtype).to(rows)
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)


def by_padded_heads(inputs: States, scale: float, softcap: float | None = None, window: int | None = None) -> torch.Tensor:
    padded = pad_heads(*inputs, PADDED, branch_marks(scale, softcap))
    return merge_heads(ordinary_attention(*padded, scale, softcap, window), *inputs[2:])


def by_definition(inputs: States, scale: float, softcap: float | None = None, window: int | None = None) -> torch.Tensor:
    loop = PlainLoop(inputs[3].long()[None])
    batched = (one.transpose(0, 1)[None] for one in inputs[:3])
    return loop(None, *batched, None, scale, softcap, window)[0][0]


# A cap of 50 with scores of about 10 and 0.1, as Gemma 2 has them.
CASES = [(HEAD_DIM**-0.5, None), (1.0, None), (1 / 128, None), (HEAD_DIM**-0.5, 50.0), (1 / 128, 50.0)]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("scale", "softcap"), CASES)
def test_padded_heads_are_the_definition(scale: float, softcap: float | None, window: int | None) -> None:
    """With grouped heads; queries before, between and behind images; windows that hold no image, or images alone."""
    inputs = states(torch.float64)
    ours, expected = (compute(inputs, scale, softcap, window) for compute in (by_padded_heads, by_definition))
    # A cap leaves a weight of exp(-50 - score) to each key of the other modality, relative to the best of the branch's own.
    assert (ours - expected).abs().max() < (1e-12 if softcap is None else 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_adds_no_rounding_to_a_data_type(dtype: torch.dtype) -> None:
    """Each branch is attention over its keys alone, in 16 bits bit for bit: marks are powers of two that add exactly 0."""
    query, key, value, is_image = states(dtype)
    scale = HEAD_DIM**-0.5
    output = by_padded_heads((query, key, value, is_image), scale)
    for index in range(len(LAYOUT)):
        if is_image[index]:
            assert torch.equal(output[index], value[index].repeat_interleave(HEADS // KV_HEADS, 0))
            continue
        expected = torch.zeros(HEADS, HEAD_DIM, dtype=dtype)
        for modality in (False, True):
            kept = (is_image[: index + 1] == modality).nonzero()[:, 0]
            keys, values = (one[kept].repeat_interleave(HEADS // KV_HEADS, 1).float() for one in (key, value))
            weights = (torch.einsum("hd,khd->hk", query[index].float(), keys) * scale).softmax(-1).to(dtype)
            expected += torch.einsum("hk,khd->hd", weights.float(), values).to(dtype)
        # float32 sums over a padded head in another order.
        torch.testing.assert_close(output[index], expected, rtol=0, atol=2e-5 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_do_not_reach_the_other_modality(dtype: torch.dtype) -> None:
    """Scores of several hundreds, as some decoders' first layers have them."""
    inputs = query, key, value, is_image = states(dtype, size=12.0)
    ours = by_padded_heads(inputs, 1.0).float()
    expected = by_definition((query.double(), key.double(), value.double(), is_image), 1.0).float()
    scores = torch.einsum("qd,kd->qk", query[:, 0].double(), key[:, 0].double())
    assert scores.abs().max() > 500
    # Rounding of outputs of about 12 to 8 bits: the ordinary kernel's own.
    assert (ours - expected)[~is_image].abs().max() < 12 * 2**-6


@pytest.mark.parametrize("scale", [128**-0.5, 256**-0.5, 1 / 128, 1.0, 1 / 512])
@pytest.mark.parametrize("softcap", [None, 30.0, 50.0])
def test_marks_are_exact_and_finite_in_every_data_type(scale: float, softcap: float | None) -> None:
    query_mark, key_mark = branch_marks(scale, softcap)
    for mark in (query_mark, key_mark):
        assert math.log2(mark).is_integer()
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert torch.tensor(mark, dtype=dtype).item() == mark
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):  # of KV caches
        assert torch.tensor(key_mark).to(dtype).float() == key_mark
    marked = query_mark * key_mark * scale
    if softcap is None:
        assert 2048 <= marked < 4096
    else:
        assert 8 * softcap <= marked < 16 * softcap


def test_a_small_softcap_leaks_and_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=5.0 is too small .* expected at least 30"):
        branch_marks(0.25, 5.0)
    inputs = states(torch.float64)
    marks = 2.0**3, 2.0**3
    padded = pad_heads(*inputs, PADDED, marks)
    leaked = merge_heads(ordinary_attention(*padded, 0.25, 5.0), inputs[2], inputs[3])
    assert (leaked - by_definition(inputs, 0.25, 5.0)).abs().max() > 1e-3
    assert LEAST_SOFTCAP == 30.0


def test_a_prompt_in_chunks_is_the_prompt() -> None:
    """Keys and values carry the mask: later queries need no knowledge of earlier tokens' modality."""
    query, key, value, is_image = states(torch.float64)
    scale = HEAD_DIM**-0.5
    whole = by_padded_heads((query, key, value, is_image), scale)
    cached: list[torch.Tensor] = []
    for start in range(0, len(LAYOUT), 7):
        chunk = slice(start, start + 7)
        padded = pad_heads(query[chunk], key[chunk], value[chunk], is_image[chunk], PADDED, branch_marks(scale))
        cached = [torch.cat(pair) for pair in zip(cached, padded[1:], strict=True)] if cached else list(padded[1:])
        queries = torch.cat([padded[0].new_zeros(start, *padded[0].shape[1:]), padded[0]])
        output = ordinary_attention(queries, *cached, scale)[start:]
        torch.testing.assert_close(merge_heads(output, value[chunk], is_image[chunk]), whole[chunk])
