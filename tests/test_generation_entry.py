"""`acceleration/decoding/generation_entry.py`: the decode loop gets what transformers' own `generate` would hand it."""

import copy
from typing import Any

import pytest
import torch
from conftest import batch, tiny_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from dsvl import acceleration
from dsvl.image_library import ImageLibrary

LAYOUTS = {"one": ("ttIttIttt",), "padded": ("ttIttIttt", "tIt")}
OPTIONS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "ends": {"do_sample": False, "eos_token_id": [3, 7], "pad_token_id": 0},
    "static": {"do_sample": False, "cache_implementation": "static"},
}


class _Shift(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.roll(input_ids.shape[1] % 5, dims=-1)


class _Third(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % self.token == 0


class _Kept(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append("end")


def without_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(acceleration, "generate")


def described(value: Any) -> Any:
    """Something that compares by value."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.tolist()
    if isinstance(value, (DynamicCache, StaticCache)):
        return type(value), [type(one) for one in value.layers], vars(value).keys()
    if isinstance(value, list):
        return type(value), [described(one) for one in value]
    if isinstance(value, (GenerationConfig, LogitsProcessor, StoppingCriteria)):
        return type(value), {name: described(one) for name, one in vars(value).items()}
    return value


def handed_on(model: Any, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> dict[str, Any]:
    """The arguments of the decode loop."""
    seen: dict[str, Any] = {}

    def sample(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.update(kwargs, input_ids=input_ids)
        return input_ids

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_sample", sample)
        model.generate(**arguments)
    if not seen.get("mm_encoder_outputs"):  # transformers makes an empty dict, which says nothing
        seen.pop("mm_encoder_outputs", None)
    return {name: described(value) for name, value in seen.items() if not isinstance(value, BaseStreamer)}


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_the_loop_gets_what_transformers_would_hand_it(
    layouts: str, options: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_model(image_positions=positions), batch(*LAYOUTS[layouts])
    images = model.encode_images(inputs.pop("pixel_values"))
    own = {"logits_processor": LogitsProcessorList([_Shift()]), "stopping_criteria": StoppingCriteriaList([_Third(5)])}
    for more in ({}, own, {"streamer": _Kept()}):
        arguments = dict(inputs, image_cache=images, max_new_tokens=5, **OPTIONS[options], **more)
        got = [handed_on(model, monkeypatch, **arguments) for _ in range(2)]
        with monkeypatch.context() as patch:
            without_entry(patch)
            expected = handed_on(model, monkeypatch, **arguments)
        for one in got:
            assert one.keys() == expected.keys()
            for name, value in expected.items():
                assert one[name] == value, name


@pytest.mark.parametrize("numbered_images", [0, 3])
def test_prompts_of_text_and_over_image_caches_begin_here(numbered_images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model(numbered_images=numbered_images), batch("ttItt")
    images = model.encode_images(inputs.pop("pixel_values"))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("left to transformers")

    monkeypatch.setattr(GenerationMixin, "generate", refuse)
    options = {"max_new_tokens": 3, "do_sample": False}
    model.generate(**inputs, image_cache=images, num_tiles=torch.ones(1, dtype=torch.long), **options)
    text = torch.tensor([[3, 4, 5]])
    model.generate(text, attention_mask=torch.ones_like(text), **options)
    model.image_library = ImageLibrary(model, 2**24)
    model.generate(**batch("ttItt"), **options)


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_later_turns_are_handed_on_alike(kind: Any, positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, first, second = tiny_model(image_positions=positions), batch("ttItt"), batch("tIttt", seed=4)
    config = model.config.text_config
    cache = kind(config=config, **({"max_cache_len": 64} if kind is StaticCache else {}))
    ids = model.generate(**first, past_key_values=cache, max_new_tokens=3, do_sample=False)
    whole = torch.cat([ids, second["input_ids"]], 1)
    mask = torch.ones_like(whole)
    images = model.encode_images(second["pixel_values"])
    for inputs in (
        {"input_ids": whole, "attention_mask": mask, "image_cache": images},
        {"input_ids": whole[:, ids.shape[1] - 1 :], "attention_mask": mask, "image_cache": images},
        {"input_ids": torch.cat([ids, second["input_ids"][:, -3:]], 1), "attention_mask": mask[:, : ids.shape[1] + 3]},
    ):
        arguments = {**inputs, "past_key_values": cache, "max_new_tokens": 4, "use_cache": True, "do_sample": False}
        got = handed_on(model, monkeypatch, **arguments)
        with monkeypatch.context() as patch:
            without_entry(patch)
            assert got == handed_on(model, monkeypatch, **arguments)


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_tokens_are_generated_and_streamed(layouts: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model(seed=1), batch(*LAYOUTS[layouts])
    images = model.encode_images(inputs.pop("pixel_values"))

    def answers() -> list[Any]:
        made = []
        for seed in range(3):
            torch.manual_seed(seed)
            streamer = _Kept() if layouts == "one" else None
            own = {"logits_processor": LogitsProcessorList([_Shift()]), "stopping_criteria": [_Third(11)]}
            given = own | {"max_new_tokens": 9, "streamer": streamer} | OPTIONS[options]
            made.append(model.generate(**inputs, image_cache=images, **given).tolist())
            made.append(streamer and streamer.values)
        return made

    got = answers()
    without_entry(monkeypatch)
    assert got == answers()


def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is filled by calls of transformers' `generate`."""
    calls, run = [], GenerationMixin.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("transformers")
        return run(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", counted)
    return calls


@pytest.mark.parametrize(
    "other",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
        {"max_length": 40, "max_new_tokens": None},
        {"min_new_tokens": 2},
        {"prompt_lookup_num_tokens": 2},
        {"max_new_tokens": None},
        {"use_cache": False},
        {"bad_words_ids": [[5]]},
        {"generation_config": GenerationConfig(num_beams=2)},
    ],
)
def test_everything_else_is_left_to_transformers(other: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, calls = tiny_model(), batch("ttttt"), called(monkeypatch)
    del inputs["pixel_values"]
    arguments = {"max_new_tokens": 3, "do_sample": False} | other
    model.generate(**inputs, **arguments)
    assert calls == ["transformers"]
    model.generate(**inputs, **arguments)
    assert len(calls) == 2


def test_pixels_and_right_padding_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model(), called(monkeypatch)
    model.generate(**batch("tItt"), max_new_tokens=2)
    assert len(calls) == 1
    inputs = batch("ttttt", "ttt")
    inputs.pop("pixel_values")
    model.generate(**inputs, max_new_tokens=2)
    assert len(calls) == 1
    model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"].flip(-1), max_new_tokens=2)
    assert len(calls) == 2


def test_an_unknown_argument_is_refused_every_time() -> None:
    model, inputs = tiny_model(), batch("ttttt")
    for _ in range(2):
        with pytest.raises(ValueError, match="maximum_tokens"):
            model.generate(**inputs, max_new_tokens=2, maximum_tokens=3)


def test_changed_defaults_are_noticed() -> None:
    model, inputs = tiny_model(seed=1), batch("ttttt")
    inputs.pop("pixel_values")
    ids = model.generate(**inputs, max_new_tokens=8)
    model.generation_config.eos_token_id = [int(ids[0, 7])]
    shorter = model.generate(**inputs, max_new_tokens=8)
    assert shorter.tolist() == ids[:, : shorter.shape[1]].tolist() and shorter.shape[1] <= 8
    model.generation_config.eos_token_id.clear()  # in place
    model.generation_config.eos_token_id.append(10**6)
    assert model.generate(**inputs, max_new_tokens=8).equal(ids)
    own = GenerationConfig(max_new_tokens=2)
    assert model.generate(**inputs, generation_config=own).shape[1] == ids.shape[1] - 6
    own.max_new_tokens = 3
    assert model.generate(**inputs, generation_config=own).shape[1] == ids.shape[1] - 5


def test_calls_share_no_cache_and_copies_of_a_model_nothing() -> None:
    model, inputs = tiny_model(seed=1), batch("ttItt")
    images = model.encode_images(inputs.pop("pixel_values"))
    arguments = dict(inputs, image_cache=images, max_new_tokens=6, do_sample=False)
    first = model.generate(**arguments)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    assert model.generate(**arguments).equal(first)
    assert not other.generate(**arguments).equal(first)
    assert model.generate(**arguments).equal(first)
