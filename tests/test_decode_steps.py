"""Decode steps over a dynamic KV cache give what transformers' own steps give, and are not taken where they would not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, batch, tiny_model
from test_decoding import Collector, endings
from transformers import DynamicCache, StoppingCriteria

from dsvl.acceleration.decoding import decode_steps, decoding_loop
from dsvl.acceleration.decoding.decode_steps import DecodeSteps, StepMask
from dsvl.cache_dsvl import cached_positions, cached_types
from dsvl.masks_dsvl import DecodeMask

# A row without an image, padded rows, an image at the end of what is seen first.
LAYOUTS = ("ttItttIIttttttIttt", "tttItt", "tttt")


def both_ways(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> tuple[Any, Any, int]:
    """The results of `run` by transformers' steps and by ours, and the number of ours."""
    with monkeypatch.context() as patch:
        patch.setattr(decoding_loop, "can_step", lambda *args: False)
        expected = run()
    steps: list[int] = []
    step = DecodeSteps.__call__

    def counted(self: DecodeSteps, tokens: torch.Tensor) -> torch.Tensor:
        steps.append(len(tokens))
        return step(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(DecodeSteps, "__call__", counted)
        got = run()
    return expected, got, len(steps)


def assert_same_cache(cache: DynamicCache, expected: DynamicCache) -> None:
    for known in (cached_types, cached_positions):
        one, other = known(expected), known(cache)
        assert (one is None) == (other is None)
        assert one is None or one.equal(other.to(one.dtype))
    for layer, other in zip(expected.layers, cache.layers, strict=True):
        torch.testing.assert_close(other.keys, layer.keys)
        torch.testing.assert_close(other.values, layer.values)


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_in_every_decoder(
    monkeypatch: pytest.MonkeyPatch, family: str, attention: str, positions: str
) -> None:
    model, inputs = tiny_model(family, attention, image_positions=positions), batch(*LAYOUTS)
    caches: list[DynamicCache] = []

    def run() -> torch.Tensor:
        caches.append(DynamicCache(config=model.config.text_config))
        return model.generate(**inputs, past_key_values=caches[-1], max_new_tokens=12, do_sample=False)

    if family == "gemma2" and attention == "causal":
        pytest.skip("transformers' eager attention returns NaN where padding is longer than a window")
    expected, got, steps = both_ways(monkeypatch, run)
    assert got.equal(expected)
    is_sliding = any(layer.is_sliding for layer in caches[0].layers)
    assert steps == (0 if is_sliding else 11)
    assert_same_cache(caches[1], caches[0])


@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 2.0}, {"repetition_penalty": 1.5}, {}])
@pytest.mark.parametrize("layouts", [LAYOUTS, ("tttt", "tt"), ("tItt",)])
@pytest.mark.parametrize("is_late", [False, True])
def test_answers_that_end(monkeypatch: pytest.MonkeyPatch, options: dict, layouts: tuple[str, ...], is_late: bool) -> None:
    """Also where the host sees the end a step late, as on a GPU."""
    monkeypatch.setattr(decoding_loop, "waits", lambda tokens: is_late)
    model, inputs = tiny_model(), batch(*layouts)
    options = {"do_sample": False} | options
    torch.manual_seed(0)
    eos = endings(model, inputs, **options)
    streamers: list[Collector] = []
    caches: list[DynamicCache] = []

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        streamers.append(Collector())
        caches.append(DynamicCache(config=model.config.text_config))
        streamer = streamers[-1] if len(layouts) == 1 else None
        return model.generate(
            **inputs, max_new_tokens=40, eos_token_id=eos, streamer=streamer, past_key_values=caches[-1], **options
        )

    expected, got, steps = both_ways(monkeypatch, run)
    new = got.shape[1] - inputs["input_ids"].shape[1]
    assert got.equal(expected) and new < 40
    assert steps == new - 1 + is_late
    assert streamers[0].tokens == streamers[1].tokens
    assert [int(cache.get_seq_length()) for cache in caches] == [got.shape[1] - 1] * 2
    assert cached_types(caches[0]).equal(cached_types(caches[1]))
    more = torch.cat([got, torch.full((len(got), 2), 5)], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new + 2), value=1)
    answers = [
        model.generate(input_ids=more, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)
        for cache in caches
    ]
    assert answers[0].equal(answers[1])


def test_a_criterion_of_ones_own_is_asked_about_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may do something with them, as the server's does."""
    monkeypatch.setattr(decoding_loop, "waits", lambda tokens: True)
    model, inputs = tiny_model(), batch(LAYOUTS[0])
    seen: list[int] = []

    class Fourth(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(int(input_ids[0, -1]))
            return torch.tensor([len(seen) == 4])

    got = model.generate(**inputs, max_new_tokens=20, do_sample=False, stopping_criteria=[Fourth()])
    assert got[0, inputs["input_ids"].shape[1] :].tolist() == seen


def test_longer_answers_than_are_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_steps, "RESERVED", 8)
    model, inputs = tiny_model(image_positions="image"), batch(*LAYOUTS)
    expected, got, steps = both_ways(
        monkeypatch, lambda: model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None)
    )
    assert got.equal(expected) and steps == 29


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("everyone_sees", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_fewer_operations_are_the_same_attention(
    dtype: torch.dtype, kv_heads: int, everyone_sees: bool, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, tokens, 8, generator=generator).to(dtype)
        for heads, tokens in ((4, 1), (kv_heads, 20), (kv_heads, 20))
    )
    members = torch.rand(2, 2, 1, 32, generator=generator) < 0.5  # more keys are reserved than there are
    members[:, 0, 0, 19], members[0, 1, 0, 3], members[1, 1, 0, 4] = True, True, True
    members[1, 1] &= everyone_sees
    sees = members.any(-1, keepdim=True)
    exact = torch.promote_types(dtype, torch.float32)
    bias = torch.zeros(members.shape, dtype=exact).masked_fill(~members & sees, -torch.inf)
    mask = StepMask(bias, None if everyone_sees else sees.to(exact))
    plain = DecodeMask(bias[:, :, None, None], sees[:, :, None, None].to(exact))
    got, expected = (one.attend("sdpa", None, query, key, value, scaling=0.3, softcap=softcap)[0] for one in (mask, plain))
    assert got.shape == expected.shape == (2, 1, 4, 8)
    torch.testing.assert_close(got, expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_other_backends(monkeypatch: pytest.MonkeyPatch, uncompiled: None, backend: str) -> None:
    model, inputs = tiny_model(), batch(*LAYOUTS)
    model.set_attn_implementation({"text_config": backend})
    expected, got, steps = both_ways(monkeypatch, lambda: model.generate(**inputs, max_new_tokens=6, do_sample=False))
    assert got.equal(expected) and steps == 5


def test_a_hooked_model_takes_transformers_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model(), batch(*LAYOUTS)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *args: calls.append(1))
    expected, got, steps = both_ways(monkeypatch, lambda: model.generate(**inputs, max_new_tokens=6, do_sample=False))
    handle.remove()
    assert got.equal(expected) and steps == 0 and len(calls) == 12


def test_images_in_8_bits_take_transformers_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model(), batch("tItt")
    images = model.encode_images(inputs.pop("pixel_values"), quantize=True)
    expected, got, steps = both_ways(
        monkeypatch, lambda: model.generate(**inputs, image_cache=images, max_new_tokens=6, do_sample=False)
    )
    assert got.equal(expected) and steps == 0
