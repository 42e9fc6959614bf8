"""Images of an image KV cache behind the tokens of earlier turns: the ordinary forward call over their pixels."""

from typing import Any

import pytest
import torch
from conftest import FAMILIES, batch, random_images, tiny_model
from transformers import DynamicCache, StaticCache

from dsvl.cache_dsvl import cached_positions, cached_types

FULL_ATTENTION = [name for name in FAMILIES if not getattr(FAMILIES[name](), "sliding_window", None)]
TURNS = [("ttIttIttt", "tItt", 2), ("tttIt", "tIItIttt", 1), ("ttt", "Itt", 0)]


def both_turns(
    model: Any, first: tuple[str, ...], second: tuple[str, ...], **options: Any
) -> tuple[tuple[torch.Tensor, Any], tuple[torch.Tensor, Any]]:
    """The last logits and the cache of a second turn, from pixels and from an image KV cache."""
    one, two = batch(*first), batch(*second, seed=5)
    if two["pixel_values"] is not None:
        two["pixel_values"] = random_images(len(two["pixel_values"]), seed=9)
    ids = torch.cat([one["input_ids"], two["input_ids"]], 1)
    mask = torch.cat([one["attention_mask"], torch.ones_like(two["input_ids"])], 1)
    positions = None if model.config.image_positions == "image" else (mask.cumsum(-1) - 1).clamp(min=0)
    results = []
    for reused in (False, True):
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            own = None if positions is None else positions[:, : one["input_ids"].shape[1]]
            model(**one, position_ids=own, past_key_values=cache)
            if reused:
                images = model.encode_images(two["pixel_values"])
                output = model.prefill(ids, images, cache, attention_mask=mask, position_ids=positions)
            else:
                own = None if positions is None else positions[:, one["input_ids"].shape[1] :]
                new = {"input_ids": two["input_ids"], "pixel_values": two["pixel_values"], "position_ids": own}
                output = model(**new, attention_mask=mask, past_key_values=cache)
        results.append((output.logits[:, -1], cache))
    return results[0], results[1]


@pytest.mark.parametrize("family", FULL_ATTENTION)
@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_later_turn_is_the_one_from_pixels(family: str, positions: str, backend: str) -> None:
    model = tiny_model(family, backend=backend, image_positions=positions)
    for first, second in (
        (("ttIttIttt",), ("tItt",)),
        (("tttIt", "tIt"), ("tIItIttt", "ttttIttttttttt")),  # rows of several lengths: padding in both turns
        (("ttt",), ("Itt",)),
        (("IIt", "ttt"), ("tIt", "It" + "t" * 5)),
    ):
        if len({len(row) + 4 * row.count("I") for row in second}) > 1:
            continue  # padding between turns is not what generate() makes
        (logits, cache), (got, got_cache) = both_turns(model, first, second)
        torch.testing.assert_close(got, logits, atol=1e-11, rtol=1e-11)
        assert cached_types(got_cache).equal(cached_types(cache))
        if positions == "image":
            assert cached_positions(got_cache).equal(cached_positions(cache))
        for layer, other in zip(got_cache.layers, cache.layers, strict=True):
            real = cached_types(cache).new_ones(1).bool() if len(first) == 1 else None
            if real is not None:
                torch.testing.assert_close(layer.keys, other.keys, atol=1e-11, rtol=1e-11)
                torch.testing.assert_close(layer.values, other.values, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("rows", [("ttIttIttt", "tIt"), ("ttttttttttttt", "tI")])
def test_rows_with_padding(rows: tuple[str, str]) -> None:
    model = tiny_model()
    (logits, _), (got, _) = both_turns(model, rows, ("tIIt", "IttIt"[0:1] + "tIt"))
    torch.testing.assert_close(got, logits, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("positions", ["token", "image"])
def test_generate_goes_on_with_encoded_images(positions: str) -> None:
    model = tiny_model(image_positions=positions)
    first, second = batch("ttItt"), batch("tIIttt", seed=3)
    second["pixel_values"] = random_images(2, seed=4)
    answers = []
    for reused in (False, True):
        cache = DynamicCache(config=model.config.text_config)
        kept = {name: first[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        ids = model.generate(**kept, past_key_values=cache, max_new_tokens=3, do_sample=False)
        whole = torch.cat([ids, second["input_ids"]], 1)
        images = (
            {"image_cache": model.encode_images(second["pixel_values"])}
            if reused
            else {"pixel_values": second["pixel_values"]}
        )
        answers.append(model.generate(whole, **images, past_key_values=cache, max_new_tokens=12, do_sample=False))
    assert answers[0].equal(answers[1])


def test_other_caches_with_tokens_are_refused() -> None:
    model, inputs = tiny_model("mistral"), batch("ttItt")
    images = model.encode_images(inputs["pixel_values"])
    for cache in (
        DynamicCache(config=model.config.text_config),
        StaticCache(config=model.config.text_config, max_cache_len=64),
    ):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
        with pytest.raises(ValueError, match="which images of an image KV cache cannot follow"):
            model.prefill(torch.cat([inputs["input_ids"]] * 2, 1), images, cache)
    model = tiny_model()
    cache = DynamicCache(config=model.config.text_config)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
    small = model.encode_images(inputs["pixel_values"], quantize=True)
    with pytest.raises(ValueError, match="cannot share images in 8 bits"):
        model.prefill(torch.cat([inputs["input_ids"]] * 2, 1), small, cache)
