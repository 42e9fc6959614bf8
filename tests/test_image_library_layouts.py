"""The image library with every image layout, and KV caches that are taken out of batches and joined again."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import FAMILIES, batch, tiny_model
from layout_models import CASES, SIZES, layout_parts, model_inputs, noise
from layout_models import question as about
from model_server import alone, ask, data_url, question, served
from transformers import DynamicCache, StaticCache

from dsvl.cache_dsvl import cached_positions, cached_types
from dsvl.image_library import ImageLibrary
from dsvl.serving.kept_rows import can_take, join_rows, take_rows

SIZE = 2**26


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("case", CASES)
def test_every_layout(case: str, positions: str) -> None:
    model, processor = layout_parts(case, image_positions=positions)
    images = [noise(size, seed) for seed, size in enumerate(SIZES)]
    asked = (([0, 1], "one"), ([], "two three"), ([0, 2, 0], "four"), ([3, 4], "five"))
    inputs = model_inputs(processor, [about([images[n] for n in own], text) for own, text in asked], dtype=model.dtype)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    model.image_library = library = ImageLibrary(model, SIZE)
    for _ in range(2):
        assert model.generate(**inputs, max_new_tokens=6, do_sample=False).equal(expected)
    tiles = len(inputs["pixel_values"])
    assert library.counts.hits + library.counts.misses == 2 * tiles
    again = len(processor.tile_lengths(images[0].height, images[0].width))  # image 0 twice at the first place
    assert library.counts.misses == len(library.tiers.memory) == tiles - again
    assert all(name.startswith("keys-") for name in library.tiers.memory.names())


@pytest.mark.parametrize("case", ["tiles", "native"])
def test_a_server_of_every_layout(case: str) -> None:
    parts = layout_parts(case)
    model, processor = parts
    model.generation_config.suppress_tokens = [i for word, i in processor.tokenizer.get_vocab().items() if word[:3] == "<0x"]
    asked = [[0], [1, 2], [], [3, 0], [4]]
    expected = [
        alone(
            parts,
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": noise(SIZES[n], n)} for n in own),
                        {"type": "text", "text": f"question {number}"},
                    ],
                }
            ],
        )
        for number, own in enumerate(asked)
    ]
    with served(*parts, library=ImageLibrary(model, SIZE)) as server:
        server.engine.max_steps = 4

        def one(number: int) -> str:
            messages = question(f"question {number}", *(data_url(noise(SIZES[n], n)) for n in asked[number]))
            return ask(server, messages).choices[0].message.content

        for _ in range(2):
            with ThreadPoolExecutor(5) as pool:
                assert list(pool.map(one, range(5))) == expected
        assert server.engine.library.counts.hits > 0


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_are_taken_out_and_joined_go_on_alike(family: str, attention: str, positions: str) -> None:
    """Grouped heads, sliding windows, softcapping: rows of two batches, in another order, with other padding."""
    if family == "gemma2" and attention == "causal":
        pytest.skip("transformers' eager attention returns NaN where padding is longer than a window, without pauses too")
    model = tiny_model(family, attention, image_positions=positions)
    layouts = ["ttIttt", "tIItttttttttttt", "tt", "IIIt" + "t" * 9]
    kept, expected = {}, {}
    for chosen in ([0, 1], [2, 3]):
        inputs = batch(*(layouts[number] for number in chosen), seed=chosen[0])
        cache = DynamicCache(config=model.config.text_config)
        whole = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert can_take(cache)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        rows = take_rows(cache, {row: length + 4 for row, length in enumerate(lengths)})
        assert int(cache.get_seq_length()) == 0
        for row, number in enumerate(chosen):
            kept[number] = rows[row], ids[row, -lengths[row] - 5 :]
            expected[number] = whole[row, -7:]
    for order in ([3, 0, 2], [1]):
        rows = [kept[number][0] for number in order]
        sizes = [len(kept[number][1]) for number in order]
        cache = join_rows(rows, model.config.text_config)
        padded = [
            torch.nn.functional.pad(kept[number][1], (max(sizes) - size, 0))
            for number, size in zip(order, sizes, strict=True)
        ]
        mask = [torch.arange(max(sizes)) >= max(sizes) - size for size in sizes]
        ids = torch.stack(padded)
        assert int(cache.get_seq_length()) == ids.shape[1] - 1
        known = cached_types(cache)
        if attention == "mmca":
            assert known.equal((ids[:, :-1] == model.config.image_token_id).long())
        assert (cached_positions(cache) is not None) == (positions == "image")
        types = (ids == model.config.image_token_id).long()
        went_on = model.generate(
            ids,
            attention_mask=torch.stack(mask).long(),
            mm_token_type_ids=types,
            past_key_values=cache,
            max_new_tokens=7,
            do_sample=False,
        )
        for row, number in enumerate(order):
            assert went_on[row, -7:].equal(expected[number]), number


def test_rows_of_other_caches_cannot_be_taken() -> None:
    model, inputs = tiny_model(), batch("tIt")
    static = StaticCache(config=model.config.text_config, max_cache_len=64)
    model.generate(**inputs, past_key_values=static, max_new_tokens=2, do_sample=False)
    assert not can_take(static)
    images = model.encode_images(inputs["pixel_values"], quantize=True)
    shared = DynamicCache(config=model.config.text_config)
    model.prefill(inputs["input_ids"], images, shared)
    assert not can_take(shared)


def test_a_checkpoint_with_another_kind_of_cache_is_served_without_keeping(monkeypatch: Any) -> None:
    parts = layout_parts("crop")
    model, processor = parts
    model.generation_config.suppress_tokens = [i for word, i in processor.tokenizer.get_vocab().items() if word[:3] == "<0x"]

    def own(number: int) -> list[dict[str, Any]]:
        images = [{"type": "image", "image": noise(SIZES[0], number % 2)}] * (number % 3)
        return [{"role": "user", "content": [*images, {"type": "text", "text": f"question {number}"}]}]

    expected = [alone(parts, own(number)) for number in range(5)]
    model.generation_config.cache_implementation = "static"
    takes = ImageLibrary.takes

    def takes_one(self: Any, model: Any, ids: list[int], lengths: Any) -> bool:
        return len(lengths) < 2 and takes(self, model, ids, lengths)

    monkeypatch.setattr(ImageLibrary, "takes", takes_one)  # pixels beside images of the library
    with served(*parts, library=ImageLibrary(model, SIZE)) as server:
        server.engine.max_steps = 4

        def one(number: int) -> str:
            urls = [data_url(noise(SIZES[0], number % 2))] * (number % 3)
            return ask(server, question(f"question {number}", *urls)).choices[0].message.content

        with ThreadPoolExecutor(5) as pool:
            assert list(pool.map(one, range(5))) == expected
