"""Speculative decoding gives the tokens of greedy search, in fewer steps where drafts are right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, batch, run_uncompiled, tiny_model
from test_decoding import Collector
from transformers import CompileConfig, DynamicCache, StaticCache, StoppingCriteria

from dsvl.acceleration.decoding.decode_steps import DecodeSteps
from dsvl.acceleration.decoding.speculative_decoding import PromptLookup
from dsvl.acceleration.decoding.static_steps import StaticSteps
from dsvl.cache_dsvl import cached_types
from dsvl.image_library import ImageLibrary

LAYOUT = "ttItttIIttttttIttt"
OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """The model of each step of our own, and its number of tokens."""
    made: list[tuple[Any, int]] = []

    def watch(kind: Any) -> None:
        step = kind.__call__

        def watched(self: Any, tokens: torch.Tensor) -> torch.Tensor:
            made.append((self._model, tokens.shape[1]))
            return step(self, tokens)

        monkeypatch.setattr(kind, "__call__", watched)

    for kind in (DecodeSteps, StaticSteps):
        watch(kind)
    return made


def draft_model(layers: int = 1, tokens: int = 4, confidence: float = 0.0, **overrides: Any) -> Any:
    """A model that drafts `tokens` tokens."""
    model = tiny_model(num_hidden_layers=layers, **overrides)
    model.generation_config.update(num_assistant_tokens=tokens, assistant_confidence_threshold=confidence)
    return model


def new_cache(model: Any, static: bool) -> Any:
    config = model.config.text_config
    return StaticCache(config=config, max_cache_len=96) if static else DynamicCache(config=config)


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_gives_the_tokens_of_greedy_search(
    monkeypatch: pytest.MonkeyPatch, steps: list, family: str, static: bool, attention: str, positions: str
) -> None:
    model, inputs = tiny_model(family, attention, image_positions=positions), batch(LAYOUT)
    known, cache = DynamicCache(config=model.config.text_config), new_cache(model, static)
    expected = model.generate(**inputs, **OPTIONS, past_key_values=known)
    steps.clear()
    has_windows = any(layer.is_sliding for layer in cache.layers)
    if static:
        if has_windows:
            pytest.skip("transformers cannot step back in a static window")
        run_uncompiled(monkeypatch, model)
    got = model.generate(**inputs, **OPTIONS, prompt_lookup_num_tokens=4, past_key_values=cache)
    assert got.equal(expected)
    if has_windows:
        assert not steps
        return
    sizes = {size for _, size in steps}
    assert 1 in sizes and (sizes <= {1, 5} if static else max(sizes) <= 5) and len(sizes) > 1
    assert int(cache.get_seq_length()) == expected.shape[1] - 1
    types = cached_types(cache), cached_types(known)
    assert (types[0] is None) == (types[1] is None)
    assert types[0] is None or types[0].equal(types[1].to(types[0].dtype))


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_draft_model_gives_the_tokens_of_greedy_search(
    monkeypatch: pytest.MonkeyPatch, steps: list, layers: int, static: bool, positions: str
) -> None:
    """With one layer it is mostly wrong; with both it is the model itself, and always right."""
    model, inputs = tiny_model(image_positions=positions), batch(LAYOUT)
    assistant = draft_model(layers, image_positions=positions)
    expected = model.generate(**inputs, **OPTIONS)
    steps.clear()
    if static:
        run_uncompiled(monkeypatch, model)
    options = {"past_key_values": new_cache(model, static), "assistant_model": assistant}
    assert model.generate(**inputs, **OPTIONS, **options).equal(expected)
    own = [size for one, size in steps if one is model]
    assert set(own) <= {1, 2, 3, 4, 5} and len(own) < 40
    if layers == 2:  # 39 tokens after the first, five at a time
        assert own == ([5] * 7 + [4 if not static else 5])


def test_an_unsure_draft_model_stops_early(steps: list) -> None:
    model, inputs, assistant = tiny_model(), batch(LAYOUT), draft_model(2, confidence=2.0)
    expected = model.generate(**inputs, **OPTIONS)
    steps.clear()
    assert model.generate(**inputs, **OPTIONS, assistant_model=assistant).equal(expected)
    assert [size for one, size in steps if one is model] == [1] * 39


def another_turn(model: Any, layout: str) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """The KV cache of a turn, the tokens of the conversation with the next question, and its answer."""
    inputs, cache = batch(layout), DynamicCache(config=model.config.text_config)
    first = model.generate(**inputs, **OPTIONS | {"max_new_tokens": 4}, past_key_values=cache)
    more = torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1)
    return cache, more, model.generate(more, pixel_values=inputs["pixel_values"], **OPTIONS)


@pytest.mark.parametrize("layout", ["tttttt", LAYOUT])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompt_lookup_in_a_conversation_that_goes_on(family: str, layout: str) -> None:
    """Where a window keeps the loop from stepping back, without drafts: transformers' loop gives other tokens."""
    model = tiny_model(family)
    cache, more, expected = another_turn(model, layout)
    assert model.generate(more, **OPTIONS, past_key_values=cache, prompt_lookup_num_tokens=4).equal(expected)


def test_a_draft_model_in_a_conversation_that_goes_on(steps: list) -> None:
    """The draft model starts from an empty KV cache, and so needs the images of earlier turns too."""
    model, assistant = tiny_model(), draft_model(2)
    cache, more, expected = another_turn(model, "tttttt")
    steps.clear()
    assert model.generate(more, **OPTIONS, past_key_values=cache, assistant_model=assistant).equal(expected)
    assert len([size for one, size in steps if one is model]) == 8
    cache, more, _ = another_turn(model, LAYOUT)
    with pytest.raises(ValueError, match="A draft model needs the whole conversation"):
        model.generate(more, **OPTIONS, past_key_values=cache, assistant_model=assistant)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("way", ["image KV cache", "library"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_over_encoded_images(monkeypatch: pytest.MonkeyPatch, steps: list, family: str, way: str, static: bool) -> None:
    """Where a window keeps the loop from stepping back, without drafts."""
    model, inputs = tiny_model(family), batch(LAYOUT)
    expected = model.generate(**inputs, **OPTIONS)
    if static:
        run_uncompiled(monkeypatch, model)
    if way == "library":
        model.image_library = ImageLibrary(model, 2**20)
    else:
        inputs["image_cache"] = model.encode_images(inputs.pop("pixel_values"))
    for _ in range(2):
        steps.clear()
        options = {"past_key_values": new_cache(model, static), "prompt_lookup_num_tokens": 4}
        assert model.generate(**inputs, **OPTIONS, **options).equal(expected)
        assert any(size > 1 for _, size in steps) == (family == "llama")
    if way == "library":
        assert model.image_library.counts.hits == 4


class Asked(StoppingCriteria):
    """Ends at a length, and keeps what it was asked about."""

    def __init__(self, length: int) -> None:
        self.length, self.lengths = length, list[int]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return torch.tensor([input_ids.shape[1] >= self.length])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("new_tokens", [1, 2, 3, 11, 13])
@pytest.mark.parametrize("ending", ["eos", "criterion", "length"])
def test_an_answer_ends_within_a_draft(monkeypatch: pytest.MonkeyPatch, ending: str, new_tokens: int, static: bool) -> None:
    """The answer, what is streamed, and the KV cache end where greedy search ends."""
    model, inputs = tiny_model(), batch(LAYOUT)
    prompt = inputs["input_ids"].shape[1]
    whole = model.generate(**inputs, **OPTIONS)[0].tolist()
    end = whole.index(whole[prompt + new_tokens - 1], prompt) + 1 if ending == "eos" else prompt + new_tokens
    if static:
        run_uncompiled(monkeypatch, model)
    cache, streamer, criterion = new_cache(model, static), Collector(), Asked(end)
    ends: dict[str, dict[str, Any]] = {
        "eos": {"eos_token_id": whole[end - 1]},
        "criterion": {"stopping_criteria": [criterion]},
        "length": {"max_new_tokens": new_tokens},
    }
    options = OPTIONS | {"past_key_values": cache, "streamer": streamer} | ends[ending]
    got = model.generate(**inputs, **options, assistant_model=draft_model(2))
    assert got[0].tolist() == whole[:end] == sum(streamer.tokens, []) and streamer.ended
    assert int(cache.get_seq_length()) == end - 1
    if ending == "criterion":
        assert criterion.lengths == list(range(prompt + 1, end + 1))
    more = torch.cat([got, torch.tensor([[5, 6, 7]])], dim=1)
    expected = model.generate(more, pixel_values=inputs["pixel_values"], max_new_tokens=8, do_sample=False)
    assert model.generate(more, past_key_values=cache, max_new_tokens=8, do_sample=False).equal(expected)


def test_a_static_cache_that_is_filled_to_its_end(monkeypatch: pytest.MonkeyPatch, steps: list) -> None:
    """The longest draft does not fit any more: the last steps have one token."""
    model, inputs = tiny_model(), batch(LAYOUT)
    expected = model.generate(**inputs, **OPTIONS)
    run_uncompiled(monkeypatch, model)
    steps.clear()
    cache = StaticCache(config=model.config.text_config, max_cache_len=expected.shape[1] - 1)
    got = model.generate(**inputs, **OPTIONS, past_key_values=cache, assistant_model=draft_model(2, tokens=6))
    assert got.equal(expected)
    assert [size for one, size in steps if one is model] == [7] * 5 + [1] * 4


@pytest.mark.parametrize("drafts", ["lookup", "model"])
def test_a_static_cache_without_compiled_steps_is_filled_to_its_end(drafts: str) -> None:
    """As on a CPU."""
    model, inputs = tiny_model(), batch(LAYOUT)
    how = {"prompt_lookup_num_tokens": 4} if drafts == "lookup" else {"assistant_model": draft_model(2)}
    for tokens in range(2, 12):
        options = OPTIONS | {"max_new_tokens": tokens}
        expected = model.generate(**inputs, **options)
        assert model.generate(**inputs, **options, **how, cache_implementation="static").equal(expected)


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"do_sample": True, "top_k": 1}]
)
def test_scores_are_processed_as_without_drafts(options: dict[str, Any]) -> None:
    model, inputs = tiny_model(), batch(LAYOUT)
    expected = model.generate(**inputs, **OPTIONS | options)
    assert model.generate(**inputs, **OPTIONS | options, prompt_lookup_num_tokens=4).equal(expected)


def test_samples_have_the_models_probabilities() -> None:
    """A sampled token is accepted where it equals the draft's: over many seeds, each pair of tokens is as frequent."""
    model, inputs = tiny_model(), batch("tIttttttt")
    model.generation_config.eos_token_id = None
    options = dict(do_sample=True, top_k=3, max_new_tokens=3)
    counts: list[dict[tuple[int, ...], int]] = []
    for drafts in ({}, {"prompt_lookup_num_tokens": 2}):
        seen: dict[tuple[int, ...], int] = {}
        for seed in range(300):
            torch.manual_seed(seed)
            answer = tuple(model.generate(**inputs, **options, **drafts)[0, -3:].tolist()[:1])
            seen[answer] = seen.get(answer, 0) + 1
        counts.append(seen)
    assert counts[0].keys() == counts[1].keys()
    for answer, count in counts[0].items():
        assert abs(counts[1][answer] - count) < 60, (answer, counts)  # five standard deviations at most


def test_one_graph_for_one_token_and_one_for_the_longest_draft() -> None:
    model, inputs = tiny_model(dtype=torch.float32), batch(LAYOUT, dtype=torch.float32)
    expected = model.generate(**inputs, **OPTIONS)
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: Any, examples: Any) -> Callable:
        graphs.append(len(examples))
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compile_config}
    assert model.generate(**inputs, **OPTIONS, **static, prompt_lookup_num_tokens=3).equal(expected)
    assert len(graphs) == 2


def test_a_batch_is_refused() -> None:
    model, inputs = tiny_model(), batch(LAYOUT, "tItt")
    with pytest.raises(ValueError, match="for a batch of 2 rows"):
        model.generate(**inputs, **OPTIONS, prompt_lookup_num_tokens=4)


def test_prompt_lookup_takes_what_followed_the_latest_time() -> None:
    lookup = PromptLookup(longest=3, ngram=2, never=90)
    assert lookup.propose([1, 2, 3, 1, 2, 4, 5, 6, 1, 2], most=3) == [4, 5, 6]
    assert lookup.propose([1, 2, 3, 1, 2, 4, 5, 6, 1, 2, 9], most=3) == []  # 9 is new
    assert lookup.propose([1, 2, 3, 1, 2, 4, 5, 6, 1, 2, 9, 4], most=2) == [5, 6]  # one token alone
    again = PromptLookup(longest=3, ngram=2, never=90)
    assert again.propose([1, 2, 3, 1, 2, 4, 5, 6, 1, 2, 9, 4], most=2) == [5, 6]
    assert PromptLookup(3, 2, never=90).propose([1, 2, 90, 90, 1, 2], most=3) == []
    assert PromptLookup(3, 2, never=90).propose([1, 2, 7, 90, 1, 2], most=3) == [7]
    assert PromptLookup(3, 2, never=90).propose([1, 2, 7, 1], most=0) == []
