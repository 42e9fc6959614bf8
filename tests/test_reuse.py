"""Exact image reuse: a prompt over images that were encoded before is the ordinary prefill, wherever they stand."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from conftest import _COMMON, FAMILIES, IMAGE_ID, PER_IMAGE, batch, random_images, tiny_model
from transformers import CompileConfig, DynamicCache, StaticCache

from dsvl import ImageKVCache
from dsvl.acceleration.decoder_run import OwnValueMask, layer_types, run_decoder
from dsvl.cache_dsvl import cached_images, cached_types

ROPES = {
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
# Decoders that rotate in ways of their own: scaled, interleaved, in a part of the layers, after a norm.
MORE = {name: lambda rope=rope: transformers.LlamaConfig(**_COMMON, rope_parameters=rope) for name, rope in ROPES.items()}
MORE |= {
    "cohere2": lambda: transformers.Cohere2Config(
        **_COMMON, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "glm": lambda: transformers.GlmConfig(**_COMMON, head_dim=8),
    "olmo2": lambda: transformers.Olmo2Config(**_COMMON),
    "smollm3": lambda: transformers.SmolLM3Config(**_COMMON, no_rope_layers=[1, 0]),
}
families = pytest.mark.parametrize("family", FAMILIES)
# Images first, last before the question, next to each other, in rows of their own beside text alone.
LAYOUTS = [("tIttt",), ("ttItttIIttttttIttt",), ("IIt", "ttItIItttttttttt", "tttttttttttt", "t"), ("ttIt", "tItt")]


@pytest.fixture
def more_families(monkeypatch):
    for name, config in MORE.items():
        monkeypatch.setitem(FAMILIES, name, config)


def prompt_of(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What is left of a prompt when its images come from a cache, with positions as `generate` counts them."""
    mask = inputs["attention_mask"]
    return {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def prefills(
    model: Any, inputs: dict[str, Any], image_cache: ImageKVCache, make_cache: Any = DynamicCache
) -> tuple[tuple[torch.Tensor, Any], tuple[torch.Tensor, Any]]:
    """(last logits, KV cache) of the ordinary prefill, and of the one over images."""
    results = []
    for extra, run in (
        ({"pixel_values": inputs["pixel_values"], "use_cache": True, "logits_to_keep": 1}, model),
        ({"image_cache": image_cache}, model.prefill),
    ):
        cache = make_cache(config=model.config.text_config)
        with torch.no_grad():
            results.append((run(**prompt_of(inputs), **extra, past_key_values=cache).logits, cache))
    return results[0], results[1]


def assert_same(model: Any, inputs: dict[str, Any], image_cache: ImageKVCache, make_cache: Any = DynamicCache) -> None:
    (logits, cache), (got_logits, got_cache) = prefills(model, inputs, image_cache, make_cache)
    close = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(got_logits, logits, **close)
    assert cached_types(got_cache).equal(cached_types(cache))
    assert cached_images(got_cache) is cached_images(cache) is True  # so that no step asks the device
    for layer, (expected, got) in enumerate(zip(cache.layers, got_cache.layers, strict=True)):
        assert int(got.get_seq_length()) == int(expected.get_seq_length()) == inputs["input_ids"].shape[1]
        tokens = expected.keys.shape[2]
        real = inputs["attention_mask"].bool()  # what padding is worth is nobody's concern
        real = torch.nn.functional.pad(real, (0, max(tokens - real.shape[1], 0)))[:, -tokens:][:, None, :, None]
        for name in ("keys", "values"):
            one, other = getattr(got, name), getattr(expected, name)
            assert one.shape == other.shape
            torch.testing.assert_close(one * real, other * real, **close, msg=lambda m, n=name: f"{n} of {layer}: {m}")  # noqa: B023


def greedy(model: Any, inputs: dict[str, Any], image_cache: ImageKVCache | None = None, **kwargs: Any) -> Any:
    if image_cache is not None:
        inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
        kwargs["image_cache"] = image_cache
    return model.generate(**inputs, **({"max_new_tokens": 8, "do_sample": False} | kwargs))


# ----------------------------------------------------------------------------------------------------------------------
# The same as the ordinary prefill


@families
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_logits_keys_and_values_are_those_of_the_whole_prefill(family, backend, uncompiled):
    if family == "gemma2" and backend == "sdpa":
        pytest.skip("softcapping")
    model = tiny_model(family, backend=backend)
    for layouts in LAYOUTS:
        inputs = batch(*layouts)
        assert_same(model, inputs, model.encode_images(inputs["pixel_values"]))


@pytest.mark.parametrize("family", MORE)
def test_other_ways_to_rotate(more_families, family):
    model, inputs = tiny_model(family), batch(*LAYOUTS[2])
    assert_same(model, inputs, model.encode_images(inputs["pixel_values"]))


@families
@pytest.mark.parametrize("seed", range(4))
def test_rows_at_random(family, seed):
    generator = torch.Generator().manual_seed(seed)

    def some(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    model = tiny_model(family)
    for _ in range(4):
        layouts = ["".join("tttttI"[some(6)] for _ in range(some(30))) + "t" for _ in range(1 + some(4))]
        inputs = batch(*layouts, seed=some(1000))
        if inputs["pixel_values"] is not None:
            assert_same(model, inputs, model.encode_images(inputs["pixel_values"]))


@families
def test_static_caches_are_filled_alike(family):
    model = tiny_model(family)
    for length in (60, 200):  # shorter than some windows need, and longer
        for layouts in LAYOUTS:
            inputs = batch(*layouts)
            cache = model.encode_images(inputs["pixel_values"])
            (logits, expected), (got_logits, got) = prefills(
                model, inputs, cache, lambda config, length=length: StaticCache(config=config, max_cache_len=length)
            )
            torch.testing.assert_close(got_logits, logits, atol=1e-12, rtol=1e-12)
            next_token = torch.full((len(layouts), 1), 7)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            positions = mask.cumsum(-1)[:, -1:] - 1
            with torch.no_grad():  # all that a step may see of them
                steps = [
                    model(next_token, attention_mask=mask, position_ids=positions, past_key_values=c).logits
                    for c in (expected, got)
                ]
            torch.testing.assert_close(steps[1], steps[0], atol=1e-12, rtol=1e-12)


def test_a_quantized_cache_takes_what_it_would_have_taken():
    model = tiny_model(dtype=torch.float32, hidden_size=64, head_dim=16)
    inputs = batch(*LAYOUTS[1], dtype=torch.float32)
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 8, "axis_key": 0, "axis_value": 0}
    kwargs = {"cache_implementation": "quantized", "cache_config": config}
    expected = greedy(model, inputs, **kwargs)
    assert greedy(model, inputs, model.encode_images(inputs["pixel_values"]), **kwargs).equal(expected)


def test_no_row_of_a_mask_is_empty():
    """Which some kernels answer by NaN, and that would spread from the slots that pad a row's text."""
    model, inputs = tiny_model(backend="sdpa").model, batch(*LAYOUTS[2])
    masks = []

    def run(decoder: Any, embeds: Any, positions: Any, attention: dict[Any, Any]) -> Any:
        masks.extend([attention[None].text_mask, attention[None].image_mask])
        return run_decoder(decoder, embeds, positions, attention)

    model.image_reuse.run_decoder = run
    cache = model.encode_images(inputs["pixel_values"])
    model.image_reuse.prefill(inputs["input_ids"], cache, None, inputs["attention_mask"])
    for mask in masks:
        assert mask.isfinite().any(-1).all() and not mask.isfinite().all()


def test_a_row_of_text_beside_images_is_the_row_alone():
    model, inputs = tiny_model(), batch("tIIttItt", "ttttt")
    _, (logits, _) = prefills(model, inputs, model.encode_images(inputs["pixel_values"]))
    with torch.no_grad():
        alone = model(inputs["input_ids"][1:, inputs["attention_mask"][1].bool()]).logits[0, -1]
    torch.testing.assert_close(logits[1, -1], alone, atol=1e-12, rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Any image at any place


@families
def test_images_come_in_any_order_and_more_than_once(family):
    model, seen = tiny_model(family), random_images(4)
    cache = model.encode_images(seen)
    inputs = batch("ttIIIItt")  # the last one in every window
    outcomes = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 0, 1]):
        inputs["pixel_values"] = seen[order]
        assert_same(model, inputs, cache[order])
        outcomes.append(prefills(model, inputs, cache[order])[1][0])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (outcomes[one] - outcomes[other]).abs().max() > 1e-3, "the images make no difference"


def test_a_cache_is_taken_apart_and_joined():
    model, seen = tiny_model(), random_images(3)
    cache = model.encode_images(seen)
    for same in (
        ImageKVCache.cat([cache[2], cache[:2]])[[1, 2, 0]],
        ImageKVCache.cat(list(cache)),
        cache[torch.tensor([0, 1, 2])],
        cache[-3:],
        cache.to("cpu", torch.float64),
    ):
        assert len(same) == 3 and same.keys.equal(cache.keys) and same.values.equal(cache.values)
    layers, heads, width = 2, 2, 8
    assert cache.keys.shape == (layers, 3 * PER_IMAGE, heads, width) and cache.num_tiles == [1, 1, 1]
    assert cache[0].nbytes == 2 * layers * PER_IMAGE * heads * width * 8
    with pytest.raises(ValueError, match="2 image KV caches of 2 different models"):
        ImageKVCache.cat([cache, tiny_model(seed=1).encode_images(seen)])


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_images_may_be_encoded_in_chunks(chunk_size):
    model, seen = tiny_model("gemma3_text"), random_images(5)
    whole, parts = model.encode_images(seen), model.encode_images(seen, chunk_size)
    torch.testing.assert_close(parts.keys, whole.keys, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(parts.values, whole.values, atol=1e-12, rtol=1e-12)


@families
def test_keys_are_turned_to_the_bit_in_bfloat16(family):
    """What is kept at position 0 and turned is what the decoder computes at any other position."""
    model = tiny_model(family, dtype=torch.bfloat16).model
    embeds = torch.stack(model.get_image_features(random_images(2, torch.bfloat16)).pooler_output).detach()
    positions = torch.arange(PER_IMAGE * 2).reshape(2, -1) * 7 + 3
    attention = dict.fromkeys(layer_types(model.language_model), OwnValueMask())
    with torch.no_grad():
        _, keys, values, _ = run_decoder(model.language_model, embeds, positions, attention)
    cache = model.encode_images(random_images(2, torch.bfloat16))
    assert cache.dtype == torch.bfloat16 and cache.values.equal(values.flatten(1, 2))
    turned = model.image_reuse.rotation(cache.device)(cache.keys, positions.flatten())
    assert turned.equal(keys.flatten(1, 2)) and not turned.equal(cache.keys)


def test_rotation_in_parts_is_the_same(monkeypatch):
    model = tiny_model(num_hidden_layers=5).model
    cache = model.encode_images(random_images(2))
    rotation, positions = model.image_reuse.rotation(cache.device), torch.arange(2 * PER_IMAGE)
    whole = rotation(cache.keys, positions)
    monkeypatch.setattr("dsvl.acceleration.attention.key_rotation.ROTATED_AT_ONCE", 2 * cache.keys[0].numel())
    assert rotation(cache.keys, positions).equal(whole)


# ----------------------------------------------------------------------------------------------------------------------
# Generation


@families
@pytest.mark.parametrize("kind", [None, "static"])
def test_the_same_tokens_are_generated(family, kind):
    model = tiny_model(family, seed=1)
    for layouts in LAYOUTS:
        inputs = batch(*layouts)
        kwargs = {"cache_implementation": kind, "disable_compile": True}
        expected = greedy(model, inputs, **kwargs)
        assert greedy(model, inputs, model.encode_images(inputs["pixel_values"]), **kwargs).equal(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 5},
    ],
)
@pytest.mark.parametrize("layouts", LAYOUTS[1:3])
def test_beams_and_samples_are_the_same(options, layouts):
    model, inputs = tiny_model(), batch(*layouts)
    cache = model.encode_images(inputs["pixel_values"])
    results = []
    for image_cache in (None, cache):
        torch.manual_seed(0)
        results.append(greedy(model, inputs, image_cache, **options))
    assert results[0].equal(results[1])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_text_padded_to_a_multiple_gives_the_same(family, monkeypatch):
    """As a compiled decoder has it, lest every length be a graph of its own."""
    model = tiny_model(family)
    monkeypatch.setattr(model.model.image_reuse, "text_multiple", 8)
    for layouts in LAYOUTS:
        inputs = batch(*layouts)
        assert_same(model, inputs, model.encode_images(inputs["pixel_values"]))


@pytest.mark.parametrize(
    ("options", "decoder", "keys"),
    [
        ({}, {"mode": "reduce-overhead"}, {"mode": "default"}),
        ({"mode": "max-autotune"}, {"mode": "max-autotune"}, {"mode": "default"}),
        ({"mode": "default", "dynamic": True}, {"mode": "default", "dynamic": True}, {"mode": "default", "dynamic": True}),
        ({"options": {"max_autotune": True}}, {"options": {"max_autotune": True}}, {"options": {"max_autotune": True}}),
    ],
)
def test_on_a_gpu_no_graph_reads_what_another_one_overwrites(options, decoder, keys, monkeypatch):
    model, asked = tiny_model(), {}
    monkeypatch.setattr(type(model.model.language_model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch, "compile", lambda function, **given: asked.update({function.__name__: given}))
    model.compile_text_prefill(**options)
    assert (asked.pop("run_decoder"), asked.pop("rotate_keys")) == (decoder, keys)
    # Under sdpa a tile and a text are recorded, unless asked for more: what they return is copied before the next graph.
    recorded = options or {"mode": "reduce-overhead"}
    assert asked.pop("encode_tile") == recorded | {"dynamic": False}
    assert asked.pop("run_text_by_address") == {"dynamic": True} | recorded
    assert {"run_text", "run_images"} < asked.keys()
    assert all(given == {"dynamic": True} | options for given in asked.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_text_may_be_computed_by_a_compiled_decoder(family):
    model = tiny_model(family, dtype=torch.float32)
    torch._dynamo.reset()
    model.compile_text_prefill(fullgraph=True)
    for layouts in LAYOUTS:  # other lengths, other numbers of images, batches
        inputs = batch(*layouts, dtype=torch.float32)
        (logits, _), (got, _) = prefills(model, inputs, model.encode_images(inputs["pixel_values"]))
        torch.testing.assert_close(got, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_static_step_goes_on_from_it(static_steps):
    model, inputs = tiny_model(dtype=torch.float32), batch(*LAYOUTS[1], dtype=torch.float32)
    expected = greedy(model, inputs)
    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True
    kwargs = {"cache_implementation": "static", "compile_config": compile_config}
    assert greedy(model, inputs, model.encode_images(inputs["pixel_values"]), **kwargs).equal(expected)
    assert static_steps, "nothing was compiled"


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_conversation_goes_on_with_a_new_image(family):
    model, inputs = tiny_model(family), batch("tIttItt")
    cache = model.encode_images(inputs["pixel_values"])
    answer = greedy(model, inputs, cache, return_dict_in_generate=True)
    second, new = batch("ttIttt", seed=7)["input_ids"], random_images(1, seed=3)
    ids = torch.cat([answer.sequences, second], 1)
    expected = greedy(model, {"input_ids": ids, "pixel_values": torch.cat([inputs["pixel_values"], new])})
    again = {"input_ids": ids, "pixel_values": new}
    assert greedy(model, again, past_key_values=answer.past_key_values).equal(expected)
    joined = ImageKVCache.cat([cache, model.encode_images(new)])
    assert greedy(model, {"input_ids": ids}, joined).equal(expected)


def test_generation_sees_neither_the_tower_nor_an_image_token():
    model, inputs = tiny_model(), batch(*LAYOUTS[1])
    cache = model.encode_images(inputs["pixel_values"])
    lengths: list[int] = []

    def never(*args: Any) -> None:
        raise AssertionError("the tower or the projector ran")

    model.model.vision_tower.register_forward_pre_hook(never)
    model.model.multi_modal_projector.register_forward_pre_hook(never)
    model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    greedy(model, inputs, cache, max_new_tokens=3)
    text = int((inputs["input_ids"] != IMAGE_ID).sum())
    assert lengths == [text, 1, 1]


def test_a_model_that_is_spread_over_devices_and_disk(tmp_path):
    plain, spread = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32)
    parts = ("vision_tower", "language_model.embed_tokens", "language_model.norm", "language_model.rotary_emb")
    device_map = {f"model.{part}": "cpu" for part in (*parts, "language_model.layers.0")}
    device_map |= dict.fromkeys(("model.multi_modal_projector", "model.language_model.layers.1", "lm_head"), "disk")
    spread = dispatch_model(spread, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    inputs = batch(*LAYOUTS[2], dtype=torch.float32)
    expected = greedy(plain, inputs)
    assert greedy(spread, inputs, spread.encode_images(inputs["pixel_values"])).equal(expected)


def test_a_model_that_encoded_images_is_freed_when_it_is_deleted():
    model, inputs = tiny_model(), batch("tItt")
    model.encode_images(inputs["pixel_values"])
    gone = weakref.ref(model.model)
    gc.disable()
    try:
        del model
        assert gone() is None  # without a garbage collection
    finally:
        gc.enable()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_encodes_images_with_its_own_weights(duplicate):
    model, inputs = tiny_model(), batch(*LAYOUTS[1])
    model.encode_images(inputs["pixel_values"])
    other = duplicate(model)
    assert other.model.image_reuse.model is other.model
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.up_proj.weight.mul_(2)
    assert greedy(other, inputs, other.encode_images(inputs["pixel_values"])).equal(greedy(other, inputs))
    assert greedy(model, inputs, model.encode_images(inputs["pixel_values"])).equal(greedy(model, inputs))
