"""A KV cache knows the modality of what it holds, whatever is done to it.

The truth is the model itself without a cache, over whole sequences whose modality is known, in float64.
"""

import copy
import pickle
import textwrap
from typing import Any

import pytest
import torch
from conftest import IMAGE_ID, batch, tiny_model
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer

from dsvl.cache_dsvl import cached_types
from dsvl.utils.cache_cropping import can_crop, crop

# Row 0 holds two images, row 1 none, row 2 one.
LAYOUTS = ("ttItIt", "ttt", "tItt")
NEXT = torch.tensor([[7], [8], [9]])
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "without layers": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=32),
    "quantized": lambda config: QuantizedCache(
        "quanto", config, nbits=4, axis_key=0, axis_value=0, q_group_size=8, residual_length=128
    ),
}
FAMILIES = ("llama", "mistral", "gemma3_text")  # full, sliding, and both


def prompts() -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of three rows, and the same without their types."""
    inputs = batch(*LAYOUTS)
    return inputs, {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}


def images_of(order: list[int]) -> list[int]:
    """Which of the batch's images belong to rows in this order."""
    counts, owned, first = [layout.count("I") for layout in LAYOUTS], [], 0
    for count in counts:
        owned.append(list(range(first, first + count)))
        first += count
    return sum((owned[row] for row in order), [])


def whole(model: Any, order: list[int], new: torch.Tensor) -> torch.Tensor:
    """The last logits of rows in some order with new tokens behind them, without a cache."""
    inputs, _ = prompts()
    ids = torch.cat([inputs["input_ids"][order], new], 1)
    mask = torch.cat([inputs["attention_mask"][order], torch.ones_like(new)], 1)
    with torch.no_grad():
        return model(
            input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"][images_of(order)], use_cache=False
        ).logits[:, -1]


def step(model: Any, cache: Any, order: list[int], new: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The last logits of new tokens over a cache whose rows are in some order."""
    mask = torch.cat([prompts()[0]["attention_mask"][order], torch.ones_like(new)], 1)
    with torch.no_grad():
        return model(input_ids=new, attention_mask=mask, past_key_values=cache, **kwargs).logits[:, -1]


def filled(model: Any, kind: str, **kwargs: Any) -> Any:
    cache = CACHES[kind](model.config.text_config)
    with torch.no_grad():
        model(**(prompts()[1] | kwargs), past_key_values=cache)
    return cache


def reordered(cache: Any) -> list[int]:
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    return [2, 0, 0]


def selected(cache: Any) -> list[int]:
    cache.batch_select_indices(torch.tensor([2, 0]))
    return [2, 0]


def repeated(cache: Any) -> list[int]:
    cache.batch_repeat_interleave(2)
    return [0, 0, 1, 1, 2, 2]


def twice(cache: Any) -> list[int]:
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 0, 3]))
    return [2, 0, 1]


MOVES = {"reorder": reordered, "select": selected, "repeat": repeated, "repeat and reorder": twice}


# A static cache has a fixed number of rows, which can be reordered; without a configuration all layers are full ones.
COMBINATIONS = [(family, "dynamic", move) for family in FAMILIES for move in MOVES]
COMBINATIONS += [(family, "static", "reorder") for family in FAMILIES]
COMBINATIONS += [("llama", "without layers", move) for move in MOVES]


@pytest.mark.parametrize(("family", "kind", "move"), COMBINATIONS)
def test_modality_moves_with_the_rows(family, kind, move):
    model = tiny_model(family)
    cache = filled(model, kind)
    order = MOVES[move](cache)
    new = NEXT.repeat(2, 1)[: len(order)]
    torch.testing.assert_close(step(model, cache, order, new), whole(model, order, new), atol=1e-9, rtol=1e-9)


def test_modality_moves_with_the_rows_of_a_quantized_cache():
    """Its keys are not exact: held against the same cache whose rows stay, with all types passed."""
    model = tiny_model(head_dim=16)
    moved, still = filled(model, "quantized"), filled(model, "quantized")
    order, new = reordered(moved), torch.tensor([[7], [7], [7]])
    types = torch.cat([prompts()[0]["mm_token_type_ids"], torch.zeros_like(new)], 1)
    expected = step(model, still, [0, 1, 2], new, mm_token_type_ids=types)[order]
    torch.testing.assert_close(step(model, moved, order, new), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_copies_of_a_cache_know_it_too(kind, duplicate):
    model = tiny_model()
    cache = filled(model, kind)
    twin = duplicate(cache)
    reordered(cache)  # the copy is its own
    got = step(model, twin, [0, 1, 2], NEXT)
    torch.testing.assert_close(got, whole(model, [0, 1, 2], NEXT), atol=1e-9, rtol=1e-9)
    assert all(isinstance(layer, type(other)) for layer, other in zip(twin.layers, cache.layers, strict=True))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_reset_starts_afresh(kind):
    model = tiny_model()
    cache = filled(model, kind)
    cache.reset()
    assert cached_types(cache) is None
    texts = batch("ttt", "ttttt", "tt")
    with torch.no_grad():
        model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], past_key_values=cache)
        mask = torch.cat([texts["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        got = model(input_ids=NEXT, attention_mask=mask, past_key_values=cache).logits[:, -1]
        ids = torch.cat([texts["input_ids"], NEXT], 1)
        torch.testing.assert_close(got, model(input_ids=ids, attention_mask=mask).logits[:, -1], atol=1e-9, rtol=1e-9)


def test_a_cropped_cache_forgets_the_modality_of_what_it_forgets():
    model = tiny_model()
    cache = filled(model, "dynamic")
    step(model, cache, [0, 1, 2], NEXT)
    cache.crop(-1)
    other = NEXT + 20
    torch.testing.assert_close(step(model, cache, [0, 1, 2], other), whole(model, [0, 1, 2], other), atol=1e-9, rtol=1e-9)
    cache.crop(-3)
    assert cached_types(cache).shape == (3, int(cache.get_seq_length()))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_loop_goes_on_with_the_cache_that_the_model_made(name):
    model, (_, bare) = tiny_model(), prompts()
    with torch.no_grad():
        outputs = model(**bare)
    cache = getattr(outputs, name)
    assert outputs.past_key_values is cache
    mask = torch.cat([bare["attention_mask"], torch.ones_like(NEXT)], 1)
    with torch.no_grad():
        got = model(input_ids=NEXT, attention_mask=mask, **{name: cache}).logits[:, -1]
    torch.testing.assert_close(got, whole(model, [0, 1, 2], NEXT), atol=1e-9, rtol=1e-9)


def test_a_loop_over_texts_alone_goes_on_with_the_cache_that_the_model_made():
    model = tiny_model()
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[5, 6, 7]]))
        got = model(input_ids=torch.tensor([[8]]), past_key_values=first.past_key_values).logits[:, -1]
        expected = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_images_can_follow_texts_in_a_cache():
    model = tiny_model()
    new = batch("tIt")
    text = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        cache = model(input_ids=text).past_key_values
        got = model(input_ids=new["input_ids"], pixel_values=new["pixel_values"], past_key_values=cache).logits[:, -1]
        got_next = model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits[:, -1]
        ids = torch.cat([text, new["input_ids"], torch.tensor([[9]])], 1)
        expected = model(input_ids=ids, pixel_values=new["pixel_values"]).logits
    torch.testing.assert_close(got, expected[:, -2], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(got_next, expected[:, -1], atol=1e-9, rtol=1e-9)


def test_both_names_of_a_cache_at_once_are_refused():
    model, (_, bare) = tiny_model(), prompts()
    cache = DynamicCache(config=model.config.text_config)
    for call in (model, model.model, model.generate, model.prepare_inputs_for_generation):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(bare["input_ids"], cache=cache, past_key_values=cache)


def test_every_layer_of_a_cache_holds_keys():
    model = tiny_model()
    for kind in CACHES:
        if kind == "quantized":
            continue
        cache = filled(model, kind)
        assert len(cache.layers) == model.config.text_config.num_hidden_layers
        for layer in cache.layers:
            assert layer.keys.shape[0] == 3 and layer.keys.shape == layer.values.shape
        assert cache.is_compileable == (kind == "static")
    assert isinstance(filled(model, "dynamic").layers[0], DynamicLayer)


def test_offloaded_layers_keep_it():
    """As an offloaded cache does with its layers between their turns."""
    model = tiny_model()
    cache = filled(model, "dynamic")
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    got = step(model, cache, [0, 1, 2], NEXT)
    torch.testing.assert_close(got, whole(model, [0, 1, 2], NEXT), atol=1e-9, rtol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Ways of decoding that make or move caches by themselves


def test_classifier_free_guidance():
    model, inputs = tiny_model(), batch("tItt")
    scale, new = 1.5, 4
    got = model.generate(**inputs, guidance_scale=scale, max_new_tokens=new, do_sample=False)
    ids, unconditional = inputs["input_ids"], inputs["input_ids"][:, -1:]
    for _ in range(new):
        with torch.no_grad():
            seen = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1].log_softmax(-1)
            unseen = model(input_ids=unconditional).logits[:, -1].log_softmax(-1)
        scores = scale * (seen - unseen) + unseen
        scores[:, IMAGE_ID] = -torch.inf
        token = scores.argmax(-1, keepdim=True)
        ids, unconditional = torch.cat([ids, token], 1), torch.cat([unconditional, token], 1)
    assert got.equal(ids)


def test_a_custom_generate_directory(tmp_path):
    """A loop of somebody's own, which repeats and selects rows of the cache as contrastive search does."""
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        textwrap.dedent(
            """
            import torch

            def generate(model, input_ids, attention_mask=None, candidates=3, steps=3, **kwargs):
                kwargs = {k: v for k, v in kwargs.items() if k in ("pixel_values", "mm_token_type_ids")}
                out = model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
                for _ in range(steps):
                    cache = out.past_key_values
                    top = out.logits[:, -1].topk(candidates).indices
                    cache.batch_repeat_interleave(candidates)
                    mask = attention_mask.repeat_interleave(candidates, 0)
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                    out = model(input_ids=top.flatten()[:, None], attention_mask=mask, past_key_values=cache)
                    # The candidate after which the model is most certain.
                    best = out.logits[:, -1].amax(-1).unflatten(0, (-1, candidates)).argmax(-1)
                    rows = best + torch.arange(len(best)) * candidates
                    cache.batch_select_indices(rows)
                    out.logits = out.logits[rows]
                    input_ids = torch.cat([input_ids, top.gather(1, best[:, None])], 1)
                    attention_mask = mask[rows]
                return input_ids
            """
        )
    )
    model, inputs = tiny_model(), batch("ttItIt", "ttt")
    got = model.generate(**inputs, custom_generate=str(tmp_path), trust_remote_code=True, candidates=3, steps=3)

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(3):
        with torch.no_grad():
            top = (
                model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -1].topk(3).indices
            )
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            certain = torch.stack(
                [
                    model(
                        input_ids=torch.cat([ids, top[:, [n]]], 1), attention_mask=mask, pixel_values=inputs["pixel_values"]
                    )
                    .logits[:, -1]
                    .amax(-1)
                    for n in range(3)
                ],
                1,
            )
        ids = torch.cat([ids, top.gather(1, certain.argmax(-1, keepdim=True))], 1)
    assert got.equal(ids)


# ----------------------------------------------------------------------------------------------------------------------
# What a caller says of what a cache holds


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("said", [lambda types: types * 0, lambda types: 1 - types], ids=["all text", "all turned round"])
def test_a_cache_knows_its_own_tokens_better_than_a_caller(kind, said):
    """The keys were computed with what it knows."""
    model = tiny_model()
    cache = filled(model, kind)
    types = torch.cat([said(prompts()[0]["mm_token_type_ids"]), torch.zeros_like(NEXT)], 1)
    got = step(model, cache, [0, 1, 2], NEXT, mm_token_type_ids=types)
    torch.testing.assert_close(got, whole(model, [0, 1, 2], NEXT), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("wrong", [1, 2, -1])
def test_the_type_of_a_single_new_token_is_checked_too(wrong):
    model = tiny_model()
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        step(model, filled(model, "dynamic"), [0, 1, 2], NEXT, mm_token_type_ids=torch.full_like(NEXT, wrong))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool])
def test_types_of_any_whole_numbers(dtype):
    model = tiny_model()
    types = torch.cat([prompts()[0]["mm_token_type_ids"], torch.zeros_like(NEXT)], 1).to(dtype)
    for kind in ("dynamic", "static"):
        got = step(model, filled(model, kind), [0, 1, 2], NEXT, mm_token_type_ids=types)
        torch.testing.assert_close(got, whole(model, [0, 1, 2], NEXT), atol=1e-9, rtol=1e-9)


def test_types_that_are_no_tensor_are_refused():
    with pytest.raises(TypeError, match="mm_token_type_ids is a list; pass a tensor"):
        tiny_model()(input_ids=torch.tensor([[5, 6]]), mm_token_type_ids=[[0, 0]])


def test_a_prefill_in_chunks_is_refused_where_text_sees_later_images():
    model = tiny_model(attention="mmca_reference")
    with pytest.raises(ValueError, match="prefill_chunk_size does not go with multimodal_attention='mmca_reference'"):
        model.generate(**batch("ttIt"), prefill_chunk_size=3, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_conversation_continues_whatever_is_said_of_its_beginning(kind):
    model, first = tiny_model(), batch("ttIt")
    new = torch.tensor([[7, 8]])
    ids = torch.cat([first["input_ids"], new], 1)
    expected = model.generate(input_ids=ids, pixel_values=first["pixel_values"], max_new_tokens=4, do_sample=False)
    cache = CACHES[kind](model.config.text_config)
    with torch.no_grad():
        model(**first, past_key_values=cache)
    wrong = torch.zeros_like(ids)
    got = model.generate(
        input_ids=ids,
        mm_token_type_ids=wrong,
        past_key_values=cache,
        max_new_tokens=4,
        do_sample=False,
        disable_compile=True,
    )
    assert got.equal(expected)


def test_a_callers_image_outputs_are_left_as_they_are():
    model, inputs = tiny_model(), batch("tIt", "ttIt", seed=7)
    with torch.no_grad():
        images = model.get_image_features(inputs.pop("pixel_values"))
    options = {"mm_encoder_outputs": {"image": images}, "num_beams": 2, "do_sample": False, "max_new_tokens": 4}
    first = model.generate(**inputs, **options)
    assert len(images.pooler_output) == 2 and model.generate(**inputs, **options).equal(first)


def test_a_static_cache_that_was_used_is_cropped_in_every_release():
    """transformers itself crops static layers from 5.24 on alone."""
    model = tiny_model()
    cache = filled(model, "static")
    length = int(cache.get_seq_length())
    step(model, cache, [0, 1, 2], NEXT)
    assert can_crop(cache)
    crop(cache, length)
    assert int(cache.get_seq_length()) == length == cached_types(cache).shape[1]
    other = NEXT + 20
    torch.testing.assert_close(step(model, cache, [0, 1, 2], other), whole(model, [0, 1, 2], other), atol=1e-9, rtol=1e-9)
