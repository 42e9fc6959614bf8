"""`compile_text_prefill`: the compiled functions compute the ordinary prefill, and nothing is compiled from turn to turn."""

from typing import Any

import pytest
import torch
from conftest import FAMILIES, IMAGE_ID, batch, random_images, tiny_model
from plain_kernels import use_plain_few_queries
from transformers import Cache, DynamicCache, StaticCache

from dsvl.acceleration.reuse import compiled_prefill
from dsvl.cache_dsvl import cached_images, cached_positions, cached_types

KINDS = ("dynamic", "static")
CAUSAL = [name for name in FAMILIES if not getattr(FAMILIES[name](), "sliding_window", None)]
EXACT = {"atol": 1e-11, "rtol": 1e-11}


class Graphs:
    """A backend of `torch.compile` that counts its graphs."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs() -> Graphs:
    torch._dynamo.reset()
    return Graphs()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions without a compiler: what is tested is what they compute."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def new_cache(model: Any, kind: str, length: int = 512) -> Cache:
    config = model.config.text_config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=length)


def turn(text: str, cache: Cache, model: Any, before: torch.Tensor, seed: int) -> tuple[torch.Tensor, Any]:
    """The ids of a conversation with a new turn, and the pixels of its images."""
    made = batch(text, seed=seed)
    pixels = None if made["pixel_values"] is None else random_images(text.count("I"), seed=seed)
    return torch.cat([before, made["input_ids"]], 1), pixels


def assert_same_cache(got: Cache, expected: Cache, positions: bool) -> None:
    tokens = int(expected.get_seq_length())
    assert int(got.get_seq_length()) == tokens
    assert cached_types(got)[:, :tokens].equal(cached_types(expected)[:, :tokens])
    assert cached_images(got) == cached_images(expected)
    if positions:
        assert cached_positions(got)[:, :tokens].equal(cached_positions(expected)[:, :tokens])
    for layer, other in zip(got.layers, expected.layers, strict=True):
        for name in ("keys", "values"):
            one, two = getattr(layer, name)[:, :, :tokens], getattr(other, name)[:, :, :tokens]
            torch.testing.assert_close(one, two, **EXACT)


@pytest.mark.parametrize("in_kernel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("family", CAUSAL)
def test_every_turn_is_the_ordinary_one(
    family: str, positions: str, kind: str, in_kernel: bool, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first turn over encoded images, new images in later turns, text alone, and a text of more than `FEW_QUERIES`; with
    the kernels' definition in their place, or as it is on other devices."""
    if family == "gemma2":
        pytest.skip("softcapping, which sdpa does not take")
    model, fast = (tiny_model(family, backend="sdpa", image_positions=positions) for _ in range(2))
    fast.compile_text_prefill()
    launched = use_plain_few_queries(monkeypatch) if in_kernel else []
    used = []
    run = fast.model.image_reuse.compiled.prefill
    monkeypatch.setattr(
        fast.model.image_reuse.compiled, "prefill", lambda *a, **k: (used.append(a[1] is not None), run(*a, **k))[1]
    )
    monkeypatch.setattr(compiled_prefill, "FEW_QUERIES", 32)
    caches = [new_cache(one, kind) for one in (model, fast)]
    ids, shown = torch.empty((1, 0), dtype=torch.long), []
    for number, text in enumerate(("ttIttIttt", "ItttttItt", "ttttt", "t" * 60 + "It", "tt" * 20)):
        ids, pixels = turn(text, caches[0], model, ids, seed=number + 3)
        how = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        given = {} if pixels is None else {"pixel_values": pixels}
        answers = []
        for one, cache in zip((model, fast), caches, strict=True):
            images = given
            if one is fast and number == 0:
                images = {"image_cache": one.encode_images(pixels)}
            answers.append(one.generate(ids, past_key_values=cache, **images, **how))
        assert answers[1].equal(answers[0])
        assert_same_cache(caches[1], caches[0], positions == "image")
        ids = answers[0]
        shown.append(pixels is not None)
    # With a static cache that is not compiled, text alone is a turn of transformers' own loop.
    assert used == [images for images in shown if images or kind == "dynamic"], (
        "some turn was not computed by the compiled functions"
    )
    assert any(queries > 1 for queries in launched) == in_kernel


@pytest.mark.parametrize("in_kernel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [1, 2])
def test_batches_with_padding_are_the_ordinary_prefill(
    kind: str, copies: int, in_kernel: bool, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast = (tiny_model(backend="sdpa") for _ in range(2))
    fast.compile_text_prefill()
    launched = use_plain_few_queries(monkeypatch) if in_kernel else []
    rows = ("ttItttIIttttttIttt", "tIt", "IIt", "ttttttttttttt")
    inputs = batch(*rows)
    pixels = inputs.pop("pixel_values")
    how = {"max_new_tokens": 6, "do_sample": copies > 1, "num_return_sequences": copies}
    answers, caches = [], []
    for one, images in ((model, {"pixel_values": pixels}), (fast, {"image_cache": fast.encode_images(pixels)})):
        torch.manual_seed(0)
        cache = new_cache(one, kind)
        answers.append(one.generate(**inputs, **images, **how, past_key_values=cache))
        caches.append(cache)
    assert answers[1].equal(answers[0])
    types = [cached_types(cache)[:, : int(caches[0].get_seq_length())] for cache in caches]
    assert types[1].equal(types[0])
    assert any(queries > 1 for queries in launched) == in_kernel


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_decoders_and_caches_of_other_kinds_are_computed_as_before(family: str, plain: None) -> None:
    model, fast = (tiny_model(family, backend="sdpa") for _ in range(2))
    fast.compile_text_prefill()
    inputs = batch("ttIttttItttttttttttt")
    pixels = inputs.pop("pixel_values")
    images = fast.encode_images(pixels)
    quantized = images.quantize()
    for options, own in (({}, images), ({"cache_implementation": "static"}, images), ({}, quantized)):
        how = {"max_new_tokens": 6, "do_sample": False} | options
        expected = model.generate(**inputs, image_cache=own, **how)
        assert fast.generate(**inputs, image_cache=own, **how).equal(expected)


def test_a_static_cache_that_a_prompt_fills_to_its_end(plain: None) -> None:
    model, fast = (tiny_model(backend="sdpa") for _ in range(2))
    fast.compile_text_prefill()
    inputs = batch("ttIttttItttttttttttt")
    pixels = inputs.pop("pixel_values")
    length = inputs["input_ids"].shape[1]
    answers = [
        one.generate(
            **inputs,
            image_cache=one.encode_images(pixels),
            past_key_values=new_cache(one, "static", length),
            max_new_tokens=1,
        )
        for one in (model, fast)
    ]
    assert answers[0].equal(answers[1])


def test_what_cannot_be_reused_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="multimodal_attention='causal'"):
        tiny_model(attention="causal").compile_text_prefill()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_compiled_from_turn_to_turn(kind: str, graphs: Graphs) -> None:
    model = tiny_model(backend="sdpa", dtype=torch.float32)
    model.compile_text_prefill(backend=graphs)
    counts = []
    for conversation in range(2):
        cache, ids = new_cache(model, kind, 256 + 64 * conversation), torch.empty((1, 0), dtype=torch.long)
        for number, text in enumerate(("ttIttIttt", "Ittt", "tIIItttt", "t" * 40 + "It", "ttttttt", "IIIIII" + "t" * 9)):
            ids, pixels = turn(text, cache, model, ids, seed=10 * conversation + number)
            images = {}
            if pixels is not None:
                pixels = pixels.float()
                images = {"image_cache": model.encode_images(pixels)} if number == 0 else {"pixel_values": pixels}
            how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 3, "disable_compile": True}
            ids = model.generate(ids, past_key_values=cache, **images, **how)
            counts.append(graphs.count)
    # Tower and projector, the decoder over images, what puts them into slots, and the decoder over text.
    assert counts[0] == 4
    assert counts[-1] == 4, f"graphs after each turn: {counts}"


def test_options_reach_every_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` takes some of them out of the dict that it gets."""
    given: dict[str, Any] = {}

    def compile(function: Any, options: dict[str, Any], **others: Any) -> Any:
        given[function.__name__] = options.pop("guard_filter_fn", None)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    model = tiny_model(backend="sdpa")
    model.compile_text_prefill(options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe})
    expected = {"run_text", "run_text_by_address", "run_images", "place_images", "encode_tile", "run_decoder", "rotate_keys"}
    assert {name for name, one in given.items() if one is not None} == expected


def test_single_prompts_and_batches_are_a_graph_each(graphs: Graphs) -> None:
    model = tiny_model(backend="sdpa", dtype=torch.float32)
    model.compile_text_prefill(backend=graphs)
    for rows in (("ttIttIttt", "It"), ("tIt",), ("tIt", "It", "IItttt"), ("t" * 40 + "It",), ("tIt", "tt", "IItttt", "It")):
        inputs = batch(*rows, dtype=torch.float32)
        images = model.encode_images(inputs.pop("pixel_values"))
        model.generate(**inputs, image_cache=images, max_new_tokens=1)
    assert graphs.count == 6


def test_an_image_that_came_with_a_later_turn_goes_through_the_compiled_functions_once(
    plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(backend="sdpa")
    model.compile_text_prefill()
    tiles: list[int] = []
    run = model.model.image_reuse.compiled.tile
    monkeypatch.setattr(model.model.image_reuse.compiled, "tile", lambda *a: (tiles.append(len(a[1])), run(*a))[1])
    cache = new_cache(model, "dynamic")
    ids = model.generate(**batch("ttItt"), past_key_values=cache, max_new_tokens=2)
    assert tiles == []  # a first turn with pixels is the ordinary prefill
    ids, pixels = turn("tIIt", cache, model, ids, seed=5)
    ids = model.generate(ids, pixel_values=pixels, past_key_values=cache, max_new_tokens=2)
    assert tiles == [1, 1]
    ids, pixels = turn("tIt" + "I" * 5 + "t", cache, model, ids, seed=6)
    model.generate(ids, pixel_values=pixels, past_key_values=cache, max_new_tokens=2)
    assert tiles == [1, 1]  # many are encoded together


@pytest.mark.parametrize("new_alone", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_new_tokens_may_come_alone_with_the_mask_of_all(compiled: bool, new_alone: bool, plain: None) -> None:
    """transformers drops a mask of ones, so positions tell."""
    model = tiny_model(backend="sdpa")
    if compiled:
        model.compile_text_prefill()
    answers = []
    for reused in (False, True):
        cache = new_cache(model, "dynamic")
        first = model.generate(**batch("ttItt"), past_key_values=cache, max_new_tokens=3, do_sample=False)
        ids, pixels = turn("t" * 30 + "tItt", cache, model, first, seed=5)
        mask = torch.ones_like(ids)
        images = {"image_cache": model.encode_images(pixels)} if reused else {"pixel_values": pixels}
        ids = ids[:, int(cache.get_seq_length()) :] if new_alone and reused else ids
        made = model.generate(ids, attention_mask=mask, **images, past_key_values=cache, max_new_tokens=5, do_sample=False)
        answers.append(made[:, -5:])
    assert answers[1].equal(answers[0])


def test_an_image_in_a_text_without_its_pixels_is_still_refused(plain: None) -> None:
    model = tiny_model(backend="sdpa")
    model.compile_text_prefill()
    cache = new_cache(model, "dynamic")
    ids = model.generate(**batch("ttItt"), past_key_values=cache, max_new_tokens=2)
    wrong = torch.cat([ids, torch.full((1, 5), IMAGE_ID), torch.tensor([[5, 6]])], 1)
    with pytest.raises(ValueError, match="image tokens"):
        model.generate(wrong, past_key_values=cache, max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_compiler_of_a_cpu_computes_the_same(family: str) -> None:
    torch._dynamo.reset()
    model, fast = (tiny_model(family, backend="sdpa", dtype=torch.float32) for _ in range(2))
    fast.compile_text_prefill(fullgraph=True)
    caches, ids = [new_cache(one, "dynamic") for one in (model, fast)], torch.empty((1, 0), dtype=torch.long)
    for number, text in enumerate(("ttIttIttt", "Ittt", "tIIItttt", "t" * 200 + "It" + "t" * 60, "ttttttt")):
        ids, pixels = turn(text, caches[0], model, ids, seed=number)
        images = {} if pixels is None else {"pixel_values": pixels.float()}
        how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 3}
        answers = [
            one.generate(ids, past_key_values=cache, **images, **how)
            for one, cache in zip((model, fast), caches, strict=True)
        ]
        assert answers[0].equal(answers[1])
        ids = answers[0]
