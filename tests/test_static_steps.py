"""Steps over a static KV cache give what steps over a dynamic one give, a token or several at a time."""

from typing import Any

import pytest
import torch
from conftest import FAMILIES, batch, run_uncompiled, tiny_model
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig, DynamicCache, StaticCache

from dsvl.acceleration.decoding.decode_steps import DecodeSteps
from dsvl.acceleration.decoding.static_steps import StaticSteps
from dsvl.cache_dsvl import cached_positions, cached_types
from dsvl.transformers_dsvl import CACHE

# A row without an image, padded rows, an image at the end of what is seen first.
LAYOUTS = ("ttItttIIttttttIttt", "tttItt", "tttt")


@pytest.mark.parametrize("layouts", [LAYOUTS, LAYOUTS[:1], ("tttt", "tt")])
@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_in_every_decoder(
    monkeypatch: pytest.MonkeyPatch, static_steps: list[int], family: str, attention: str, positions: str, layouts: tuple
) -> None:
    """Where layers have windows, by the steps of transformers."""
    if family == "gemma2" and attention == "causal":
        pytest.skip("transformers' eager attention returns NaN where padding is longer than a window")
    model, inputs = tiny_model(family, attention, image_positions=positions), batch(*layouts)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    known = DynamicCache(config=model.config.text_config)
    expected = model.generate(**inputs, past_key_values=known, **options)
    run_uncompiled(monkeypatch, model)
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    assert model.generate(**inputs, past_key_values=cache, **options).equal(expected)
    has_windows = any(layer.is_sliding for layer in cache.layers)
    assert static_steps == ([] if has_windows else [1] * 11)
    if has_windows:
        return
    for kept in (cached_types, cached_positions):
        one, other = kept(known), kept(cache)
        assert (one is None) == (other is None)
        assert one is None or one.equal(other.to(one.dtype))
    held = int(cache.get_seq_length())
    assert held == expected.shape[1] - 1
    for layer, other in zip(cache.layers, known.layers, strict=True):
        torch.testing.assert_close(layer.keys[:, :, :held], other.keys)


def steps_after_prefill(model: Any, inputs: dict[str, Any], static: bool) -> Any:
    """The steps of a generation whose prompt is computed."""
    length = inputs["input_ids"].shape[1]
    config = model.config.text_config
    cache = StaticCache(config=config, max_cache_len=length + 40) if static else DynamicCache(config=config)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if model.config.image_positions == "image":
        pixels = inputs["pixel_values"]
        images = None if pixels is None else model.model.get_image_features(pixels)
        positions = model.model.make_position_ids(inputs["mm_token_type_ids"], length, images, inputs["attention_mask"])
    with torch.no_grad():
        model(**inputs, position_ids=positions, **{CACHE: cache})
    kept = {CACHE: cache, "attention_mask": inputs["attention_mask"], "position_ids": positions}
    compile_config = CompileConfig(backend="eager", mode="default")
    return StaticSteps.compiled(model, kept, compile_config) if static else DecodeSteps(model, kept)


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("layouts", [LAYOUTS, ("tttt",)])
@pytest.mark.parametrize("static", [True, False])
@torch.no_grad()
def test_several_tokens_at_once_and_steps_back(static: bool, layouts: tuple, attention: str, positions: str) -> None:
    model, inputs = tiny_model(attention=attention, image_positions=positions), batch(*layouts)
    tokens = torch.randint(3, 80, (len(layouts), 9), generator=torch.Generator().manual_seed(0))
    one_by_one, together = (steps_after_prefill(model, inputs, static) for _ in range(2))
    expected = torch.cat([one_by_one(tokens[:, [number]]) for number in range(9)], dim=1)
    first = together(tokens[:, :1])
    wrong = torch.cat([tokens[:, 1:4], tokens[:, :2]], dim=1)
    right = together(wrong)[:, :3]  # the last two tokens are others than were to come
    together.rewind(2)
    alone = together(tokens[:, 4:5])
    together(wrong)
    together.rewind(5)
    last = together(tokens[:, 5:])
    torch.testing.assert_close(torch.cat([first, right, alone, last], dim=1), expected)
    assert together.held == one_by_one.held == inputs["input_ids"].shape[1] + 9
    caches = [steps._cache for steps in (one_by_one, together)]
    assert [int(cache.get_seq_length()) for cache in caches] == [together.held] * 2
    for kept in (cached_types, cached_positions):
        one, other = map(kept, caches)
        assert (one is None and other is None) or one.equal(other)


def test_other_lengths_and_batches_are_compiled_for_their_shape(static_steps: list[int]) -> None:
    """No size is a symbol, which would cost speed."""
    model = tiny_model(dtype=torch.float32)
    graphs: list[Any] = []
    torch._dynamo.reset()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([one for one in inputs if not isinstance(one, torch.Tensor)])
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    for layouts in (LAYOUTS[:1], LAYOUTS, LAYOUTS[:2]):
        inputs = batch(*layouts, dtype=torch.float32)
        options = dict(max_new_tokens=4, do_sample=False)
        expected = model.generate(**inputs, **options)
        got = model.generate(**inputs, **options, cache_implementation="static", compile_config=compile_config)
        assert got.equal(expected)
    assert graphs == [[]] * 3 and len(static_steps) == 9


def test_the_rotation_of_a_query_is_computed_once() -> None:
    """And not again for each key, where the compiler writes the product of the query itself."""
    model = tiny_model(dtype=torch.float32, num_key_value_heads=4)  # a row for each key-value head
    inputs = batch(LAYOUTS[0], dtype=torch.float32)
    torch._dynamo.reset()
    compile_config = CompileConfig(mode="default")
    compile_config._compile_all_devices = True
    options = dict(max_new_tokens=3, do_sample=False, cache_implementation="static", compile_config=compile_config)
    _, codes = run_and_get_code(lambda: model.generate(**inputs, **options))
    loops = [loop for code in codes for loop in code.split("#pragma GCC ivdep") if "tmp_acc0" in loop]
    assert loops, "no sum was written by the compiler"
    assert not any(".cos()" in loop for loop in loops)
