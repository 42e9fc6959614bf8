"""Images in 8 bits, on the host, or shared by a KV cache: exact where nothing is rounded, and close where it is."""

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import FAMILIES, batch, random_images, tiny_model
from layout_models import SIZES, VARYING, layout_parts, model_inputs, noise, question
from test_reuse import LAYOUTS, greedy
from transformers import QuantizedCache

from dsvl import DSVLModel, ImageKVCache, SharedImagesCache
from dsvl.acceleration.attention import image_states
from dsvl.acceleration.int8 import dequantize, quantize
from dsvl.acceleration.reuse import shared_images
from dsvl.acceleration.reuse.shared_images import SharedImagesLayer

IMAGE_DETAILS = ("num_tiles", "pixel_attention_mask", "spatial_shapes")
# How a KV cache comes to share images without rounding them.
WAYS = ("shared", "offloaded")


def of_kind(model: Any, images: ImageKVCache, way: str) -> dict[str, Any]:
    """The arguments of `generate` for images that are shared in some way."""
    if way == "shared":
        return {"image_cache": images, "past_key_values": SharedImagesCache(config=model.config)}
    return {"image_cache": {"offloaded": images.offload, "8 bits": images.quantize}[way]()}


def answer(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    """Tokens, logits of each step, and the KV cache."""
    inputs = {name: value for name, value in inputs.items() if name != "pixel_values" or "image_cache" not in kwargs}
    return greedy(model, inputs, **({"return_dict_in_generate": True, "output_logits": True} | kwargs))


def assert_same(one: Any, other: Any) -> None:
    assert other.sequences.equal(one.sequences)
    torch.testing.assert_close(torch.stack(other.logits), torch.stack(one.logits), atol=1e-11, rtol=1e-11)


# ----------------------------------------------------------------------------------------------------------------------
# Exact


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_an_ordinary_cache(family, way, monkeypatch):
    """Left-padded rows, with and without images, and sliding windows; keys in several blocks."""
    monkeypatch.setattr(image_states, "BLOCK_BYTES", 2**11)
    model = tiny_model(family)
    for layouts in LAYOUTS:
        inputs = batch(*layouts)
        images = model.encode_images(inputs["pixel_values"])
        got = answer(model, inputs, **of_kind(model, images, way))
        assert_same(answer(model, inputs), got)
        layers = got.past_key_values.layers
        assert all(isinstance(layer, SharedImagesLayer) for layer in layers)
        assert got.past_key_values.get_seq_length() == got.sequences.shape[1] - 1
        text = int((inputs["attention_mask"] - inputs["mm_token_type_ids"]).sum(-1).max())
        assert layers[0].keys.shape[2] == text + 7  # no image among them


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("image_positions", ["token", "image"])
@pytest.mark.parametrize("case", VARYING)
def test_images_of_any_size_and_positions(case, image_positions, way):
    """Rows of images with several tiles, or of native size; a conversation that goes on by text."""
    model, processor = layout_parts(case, image_positions=image_positions)
    sizes = [[SIZES[1], SIZES[2]], [SIZES[0]]]
    inputs = model_inputs(processor, [question([noise(size, n) for n, size in enumerate(row)]) for row in sizes])
    pixels = {name: inputs[name] for name in ("pixel_values", *IMAGE_DETAILS) if name in inputs}
    images = model.encode_images(**pixels, image_numbers=[1, 2, 1])
    assert len(images) == 3
    text = {name: value for name, value in inputs.items() if name not in pixels}
    first, expected = answer(model, text, **of_kind(model, images, way)), answer(model, dict(inputs))
    assert_same(expected, first)
    ids = torch.cat([first.sequences, torch.full((2, 3), 9)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["attention_mask"].shape[1]), value=1)
    more = {"input_ids": ids, "attention_mask": mask}
    one, other = (answer(model, more, past_key_values=made.past_key_values) for made in (expected, first))
    assert_same(one, other)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_every_backend_computes_the_prompt_over_them(backend, way, uncompiled):
    model, inputs = tiny_model(backend=backend), batch(*LAYOUTS[2])
    images = model.encode_images(inputs["pixel_values"])
    assert_same(answer(tiny_model(), inputs), answer(model, inputs, **of_kind(model, images, way)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True}])
@pytest.mark.parametrize("layouts", LAYOUTS[1:3])
def test_beams_and_samples_are_the_same(layouts, options, way):
    """Beams of one prompt read its images once; several prompts are told apart after their beams have moved."""
    model, inputs = tiny_model(), batch(*layouts)
    torch.manual_seed(0)
    expected = greedy(model, inputs, **options)
    torch.manual_seed(0)
    images = of_kind(model, model.encode_images(inputs["pixel_values"]), way)
    assert greedy(model, {k: v for k, v in inputs.items() if k != "pixel_values"}, **images, **options).equal(expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_conversation_goes_on_with_a_new_image(family, way, monkeypatch):
    monkeypatch.setattr(shared_images, "QUERIES_AT_ONCE", 3)
    model, inputs = tiny_model(family), batch("tIttItt")
    images = model.encode_images(inputs["pixel_values"])
    first = answer(model, inputs, **of_kind(model, images, way))
    second, new = batch("ttIttt", seed=7)["input_ids"], random_images(1, seed=3)
    ids = torch.cat([first.sequences, second], 1)
    expected = answer(model, {"input_ids": ids, "pixel_values": torch.cat([inputs["pixel_values"], new])})
    got = answer(model, {"input_ids": ids, "pixel_values": new}, past_key_values=first.past_key_values)
    assert_same(expected, got)
    # And with text alone, which still sees the images of both turns.
    ids = torch.cat([got.sequences, batch("ttt", seed=8)["input_ids"]], 1)
    expected = answer(model, {"input_ids": ids, "pixel_values": torch.cat([inputs["pixel_values"], new])})
    assert_same(expected, answer(model, {"input_ids": ids}, past_key_values=got.past_key_values))


CHANGES = {
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "reordered twice": lambda cache: [cache.reorder_cache(torch.tensor(order)) for order in ([1, 0], [1, 1])],
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "moved and repeated": lambda cache: (cache.reorder_cache(torch.tensor([1, 0])), cache.batch_repeat_interleave(2)),
    "cropped": lambda cache: cache.crop(-2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_operations_of_a_cache_move_its_images(change, way):
    model, inputs = tiny_model(), batch("ttItItt", "tIttItt")
    images = model.encode_images(inputs["pixel_values"])
    results = []
    for kwargs in ({}, of_kind(model, images, way)):
        made = answer(model, inputs, **kwargs)
        cache = made.past_key_values
        CHANGES[change](cache)
        rows, past = cache.layers[0].keys.shape[0], cache.get_seq_length()
        with torch.no_grad():
            step = model(
                torch.full((rows, 1), 7), position_ids=torch.full((rows, 1), past), past_key_values=cache, use_cache=True
            )
        results.append(step.logits)
    torch.testing.assert_close(results[1], results[0], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("way", [*WAYS, "8 bits"])
def test_a_copy_goes_on_as_the_cache_would(way, duplicate):
    model, inputs = tiny_model(), batch("tIttItt")
    made = answer(model, inputs, **of_kind(model, model.encode_images(inputs["pixel_values"]), way))
    twin = duplicate(made.past_key_values)
    one, other = (
        answer(model, {"input_ids": made.sequences}, past_key_values=kept) for kept in (made.past_key_values, twin)
    )
    assert_same(one, other)


def test_a_cache_that_was_reset_is_an_ordinary_one():
    model, inputs = tiny_model(), batch("tIttItt")
    made = answer(model, inputs, **of_kind(model, model.encode_images(inputs["pixel_values"]), "8 bits"))
    made.past_key_values.reset()
    assert made.past_key_values.get_seq_length() == 0
    assert_same(answer(model, inputs), answer(model, inputs, past_key_values=made.past_key_values))


def test_images_are_not_copied():
    """Values are those of the image KV cache; the rotated keys of 8 bits have 8 bits."""
    model, inputs = tiny_model(), batch(*LAYOUTS[1])
    images = model.encode_images(inputs["pixel_values"])
    for way in ("shared", "8 bits"):
        kwargs = of_kind(model, images, way)
        source, layers = kwargs["image_cache"], answer(model, inputs, **kwargs).past_key_values.layers
        for number, layer in enumerate(layers):
            assert layer.states.values.data_ptr() == source.values[number].data_ptr()
            assert layer.states.keys.dtype == source.dtype
    offloaded = images.offload()
    for layer in answer(model, inputs, image_cache=offloaded).past_key_values.layers:
        assert layer.states.tensors["keys"] is offloaded.keys and layer.states.tensors["values"] is offloaded.values


# ----------------------------------------------------------------------------------------------------------------------
# 8 bits


def test_a_number_of_8_bits_is_the_nearest_of_its_scale():
    states = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states[0, 1, 2] = 0
    numbers, scales = quantize(states)
    assert numbers.dtype == torch.int8 and scales.shape == states.shape[:-1]
    largest = states.abs().amax(-1)
    assert numbers.abs().amax(-1).equal(torch.where(largest > 0, 127, 0).to(torch.int8))
    error = (dequantize(numbers, scales, torch.float64) - states).abs()
    assert bool((error <= largest[..., None] / 254 * (1 + 1e-9)).all()) and error.max() > 0
    half = dequantize(*quantize(states.to(torch.bfloat16)), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), states, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_offloaded_8_bits_are_what_their_numbers_say(family):
    """On the host keys are not rounded again after their rotation."""
    model, inputs = tiny_model(family), batch(*LAYOUTS[1])
    images = model.encode_images(inputs["pixel_values"]).quantize()
    expected = answer(model, inputs, image_cache=images.to(torch.float64))
    assert_same(expected, answer(model, inputs, image_cache=images.offload()))


@pytest.mark.parametrize("family", FAMILIES)
def test_8_bits_change_probabilities_little(family):
    """The largest difference of any token's log-probability, over the steps of the same answer."""
    model = tiny_model(family)
    for layouts in LAYOUTS[:3]:
        inputs = batch(*layouts)
        expected = answer(model, inputs)
        got = answer(model, inputs, **of_kind(model, model.encode_images(inputs["pixel_values"]), "8 bits"))
        assert got.sequences.equal(expected.sequences)
        one, other = (torch.stack(made.logits).log_softmax(-1) for made in (expected, got))
        assert 0 < float((one - other)[torch.isfinite(one)].abs().max()) < 0.1


def test_a_cache_of_8_bits_is_taken_apart_joined_moved_and_saved(tmp_path):
    model, inputs = tiny_model(dtype=torch.float32), batch(*LAYOUTS[1], dtype=torch.float32)
    whole = model.encode_images(inputs["pixel_values"])
    images = whole.quantize()
    assert images.quantize() is images and images.is_quantized and not whole.is_quantized
    assert images.nbytes * 8 == whole.nbytes * 3  # head_dim 8: 8 + 4 bytes instead of 32
    again = ImageKVCache.cat([images[2:], images[[1, 0]]])[[3, 2, 0, 1, *range(4, len(images))][: len(images)]]
    images.save(tmp_path / "images.safetensors")
    for other in (ImageKVCache.load(tmp_path / "images.safetensors"), whole.to(torch.int8), images.to("cpu")):
        assert all(other.tensors[name].equal(tensor) for name, tensor in images.tensors.items())
    assert again.is_quantized and again.tile_lengths == images.tile_lengths
    assert "int8" in repr(images) and "offloaded" in repr(images.offload())
    back = images.to(torch.float32)
    assert not back.is_quantized and greedy(model, inputs, back).equal(greedy(model, inputs, images.offload()))
    joined = ImageKVCache.cat([images[:1].offload(), images[1:].offload()])
    assert joined.is_offloaded and joined.is_quantized and joined.values.equal(images.values)


@pytest.mark.parametrize("options", [{"quantize": True}, {"offload": True}, {"quantize": True, "offload": True}])
def test_images_are_encoded_as_they_are_kept(options):
    model, inputs = tiny_model(), batch(*LAYOUTS[1])
    images = expected = model.encode_images(inputs["pixel_values"])
    for option in options:
        expected = getattr(expected, option)()
    for chunk_size in (1, 2, 16):
        got = model.encode_images(inputs["pixel_values"], chunk_size, **options)
        assert (got.is_quantized, got.is_offloaded) == ("quantize" in options, "offload" in options)
        assert got.tile_lengths == images.tile_lengths
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(got.tensors[name].double(), tensor.double(), atol=1e-12, rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("way", [*WAYS[1:], "8 bits"])
def test_a_cache_that_would_copy_them_is_refused(way):
    model, inputs = tiny_model(), batch("tItt")
    images = of_kind(model, model.encode_images(inputs["pixel_values"]), way)
    with pytest.raises(
        ValueError, match="a StaticCache would hold a copy of them in 16 bits on the device; omit cache_impl"
    ):
        answer(model, inputs, **images, cache_implementation="static", disable_compile=True)
    cache = QuantizedCache("quanto", model.config.text_config, nbits=4)
    with pytest.raises(ValueError, match=r"a QuantizedCache would .* or pass image_cache.to\(model.device, model.dtype\)"):
        answer(model, inputs, **images, past_key_values=cache)


def test_code_of_a_checkpoint_that_does_not_know_them_is_refused(monkeypatch):
    monkeypatch.delattr(DSVLModel, "takes_masks_of_caches")
    model, inputs = tiny_model(), batch("tItt")
    images = model.encode_images(inputs["pixel_values"])
    with pytest.raises(ValueError, match="the code of this checkpoint does not know; refresh it"):
        answer(model, inputs, image_cache=images.quantize())
    answer(model, inputs, image_cache=images.quantize().to(torch.float64))


def test_tokens_of_the_prompt_are_not_cropped():
    model, inputs = tiny_model(), batch("tItt")
    made = answer(model, inputs, **of_kind(model, model.encode_images(inputs["pixel_values"]), "8 bits"))
    with pytest.raises(ValueError, match="only the 7 tokens after it can be removed, not 8"):
        made.past_key_values.crop(-8)


def test_what_8_bits_cannot_hold_is_refused():
    model, inputs = tiny_model(), batch("tItItt")
    images = model.encode_images(inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"cannot be torch.int64; pass a float dtype or torch.int8"):
        images.to(torch.long)
    with pytest.raises(ValueError, match=r"of torch.float64 and torch.int8 cannot be joined; convert them by `to` first"):
        ImageKVCache.cat([images, images.quantize()])
    images.values[1, 2] = torch.inf
    with pytest.raises(ValueError, match="The values of the images hold infinities or NaN"):
        images.quantize()


def test_training_over_shared_images_is_refused():
    model, inputs = tiny_model(attention_dropout=0.5), batch("tItt")
    made = answer(model, inputs, **of_kind(model, model.encode_images(inputs["pixel_values"]), "8 bits"))
    model.train()
    with pytest.raises(ValueError, match=r"takes no attention dropout, but it is 0.5; call eval\(\)"):
        model(torch.tensor([[7]]), past_key_values=made.past_key_values, use_cache=True)
