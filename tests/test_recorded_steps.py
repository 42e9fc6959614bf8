"""Recorded decode steps over a dynamic KV cache give what plain ones give. What a GPU records is emulated here: a recording
is a function that computes in the same memory again."""

import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from conftest import FAMILIES, batch, run_uncompiled, tiny_model
from test_decode_steps import assert_same_cache
from test_decoding import Collector, endings
from transformers import DynamicCache

from dsvl.acceleration.decoding import decoding_loop, recorded_steps
from dsvl.acceleration.decoding.recorded_steps import can_record
from dsvl.acceleration.decoding.static_steps import run_step
from dsvl.acceleration.recording import WaitsForDevice
from dsvl.cache_dsvl import cached_types
from dsvl.transformers_dsvl import CACHE
from dsvl.utils.transformers_names import DynamicLayer, StaticLayer

# A row without an image, padded rows, an image at the end of what is seen first.
LAYOUTS = ("ttItttIIttttttIttt", "tttItt", "tttt")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Decode steps as on a GPU; the replays of each recording."""
    made: list[int] = []

    class Emulation:
        def __init__(self, run: Callable[[], torch.Tensor], device: torch.device) -> None:
            self.run, self.output, self.number = run, run().fill_(torch.nan), len(made)
            made.append(0)

        def replay(self) -> None:
            made[self.number] += 1
            self.output.copy_(self.run())

    monkeypatch.setattr(recorded_steps, "Recording", Emulation)
    monkeypatch.setattr(recorded_steps, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(decoding_loop, "waits", lambda tokens: True)
    return made


def both_ways(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> tuple[Any, Any]:
    """The results of `run` by plain steps and by recorded ones."""
    with monkeypatch.context() as patch:
        patch.setattr(decoding_loop, "can_record", lambda *args: False)
        expected = run()
    return expected, run()


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("layouts", [LAYOUTS, LAYOUTS[:1], ("tttt", "tt")])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_in_every_decoder(
    monkeypatch: pytest.MonkeyPatch, replays: list[int], family: str, layouts: tuple, attention: str, positions: str
) -> None:
    """Also where the room is filled, and made anew."""
    if family == "gemma2" and (attention == "causal" or "I" not in "".join(layouts)):
        pytest.skip("transformers' eager attention returns NaN where padding is longer than a window")
    monkeypatch.setattr(recorded_steps, "RESERVED", 8)
    model, inputs = tiny_model(family, attention, image_positions=positions), batch(*layouts)
    caches: list[DynamicCache] = []

    def run() -> torch.Tensor:
        caches.append(DynamicCache(config=model.config.text_config))
        options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
        return model.generate(**inputs, past_key_values=caches[-1], **options)

    expected, got = both_ways(monkeypatch, run)
    assert got.equal(expected)
    has_windows = any(layer.is_sliding for layer in caches[0].layers)
    assert replays == ([] if has_windows else [6, 9])  # of 19 steps
    assert_same_cache(caches[1], caches[0])
    for layer in caches[1].layers:
        assert has_windows or layer.keys.untyped_storage().nbytes() == layer.keys.nbytes  # no room is left


@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 2.0}, {"repetition_penalty": 1.5}, {}])
@pytest.mark.parametrize("layouts", [LAYOUTS, ("tttt", "tt"), ("tItt",)])
def test_answers_that_end_and_the_next_turn(
    monkeypatch: pytest.MonkeyPatch, replays: list[int], options: dict, layouts: tuple[str, ...]
) -> None:
    model, inputs = tiny_model(), batch(*layouts)
    options = {"do_sample": False} | options
    torch.manual_seed(0)
    eos = endings(model, inputs, **options)
    replays.clear()

    def run() -> tuple[Any, ...]:
        torch.manual_seed(0)
        streamer = Collector() if len(layouts) == 1 else None
        cache = DynamicCache(config=model.config.text_config)
        how = options | {"past_key_values": cache}
        made = model.generate(**inputs, max_new_tokens=40, eos_token_id=eos, streamer=streamer, **how)
        held = int(cache.get_seq_length())
        more = torch.cat([made, torch.full((len(made), 2), 5)], dim=1)
        new = more.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
        answer = model.generate(input_ids=more, attention_mask=mask, max_new_tokens=8, eos_token_id=None, **how)
        return made, held, streamer and streamer.tokens, answer, cached_types(cache)

    expected, got = both_ways(monkeypatch, run)
    assert got[0].equal(expected[0]) and got[0].shape[1] < inputs["input_ids"].shape[1] + 40
    assert got[1] == expected[1] == got[0].shape[1] - 1
    assert got[2] == expected[2]
    assert got[3].equal(expected[3]) and got[4].equal(expected[4])
    assert len(replays) == 2 and all(replays)


@pytest.mark.parametrize("how", ["item", "nonzero", "mask", "unseen"])
def test_steps_that_wait_for_the_gpu_stay_plain(
    monkeypatch: pytest.MonkeyPatch, replays: list[int], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """They are found before they are recorded, or when a recording fails; and told once for a model."""
    model, inputs = tiny_model(), batch(*LAYOUTS)
    mlp = type(model.model.language_model.layers[0].mlp)
    forward = mlp.forward

    def waiting(self: Any, states: torch.Tensor) -> torch.Tensor:
        if how == "item":
            states = states * float(states.sum().item() is not None)
        elif how == "nonzero":
            states = states + states.new_zeros(()) * len(states.nonzero())
        elif how == "mask":
            states = states + states.new_zeros(()) * len(states[states > 0])
        return forward(self, states)

    def fail(*args: Any) -> Any:
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    attempts: list[int] = []
    reason = "a layer waits for the GPU"
    if how == "unseen":
        monkeypatch.setattr(recorded_steps, "Recording", fail)
        reason = "operation not permitted"
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", waiting)
        for _ in range(2):
            expected, got = both_ways(
                monkeypatch, lambda: model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
            )
            assert got.equal(expected)
    assert caplog.text.count(f"Decode steps of this model are not recorded, and slower: {reason}") == 1
    assert not replays and len(attempts) == (how == "unseen")


def test_one_layer_is_twice_in_memory(monkeypatch: pytest.MonkeyPatch, replays: list[int]) -> None:
    """Where the room is made anew, and where it is given back."""
    monkeypatch.setattr(recorded_steps, "RESERVED", 8)
    model, inputs = tiny_model(), batch(*LAYOUTS)
    rooms: list[weakref.ref] = []
    alive: list[int] = []
    update, clone = StaticLayer.update, torch.Tensor.clone

    def count() -> None:
        alive.append(sum(one() is not None for one in rooms))

    def updated(self: Any, *states: torch.Tensor, **options: Any) -> Any:
        is_first = not self.is_initialized
        made = update(self, *states, **options)
        if is_first:
            rooms.append(weakref.ref(self.keys))
            count()
        return made

    def cloned(self: torch.Tensor, **options: Any) -> torch.Tensor:
        made = clone(self, **options)
        if self.ndim == 4:
            count()
        return made

    monkeypatch.setattr(StaticLayer, "update", updated)
    monkeypatch.setattr(torch.Tensor, "clone", cloned)
    cache = DynamicCache(config=model.config.text_config)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False, eos_token_id=None)
    layers = model.config.text_config.num_hidden_layers
    assert len(rooms) == 2 * layers and max(alive) == layers + 1
    assert not any(one() is not None for one in rooms)


def test_a_generation_that_fails_leaves_a_cache_that_goes_on(monkeypatch: pytest.MonkeyPatch, replays: list[int]) -> None:
    model, inputs = tiny_model(), batch(LAYOUTS[0])
    inputs.pop("mm_token_type_ids")

    class Failing(Collector):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.tokens) == 8:
                raise OSError("no reader")

    def run() -> tuple[torch.Tensor, bool]:
        cache = DynamicCache(config=model.config.text_config)
        how = {"past_key_values": cache, "do_sample": False, "eos_token_id": None}
        with pytest.raises(OSError, match="no reader"):
            model.generate(**inputs, **how, max_new_tokens=20, streamer=Failing())
        held = int(cache.get_seq_length())
        ids = torch.nn.functional.pad(inputs["input_ids"], (0, held + 3 - inputs["input_ids"].shape[1]), value=5)
        how |= {"attention_mask": torch.ones_like(ids)}
        is_small = cache.layers[0].keys.untyped_storage().nbytes() == cache.layers[0].keys.nbytes
        return model.generate(ids, **how, pixel_values=inputs["pixel_values"], max_new_tokens=5), is_small

    expected, got = both_ways(monkeypatch, run)
    assert got[0].equal(expected[0]) and got[1]
    assert replays


def test_two_steps_are_plain_and_the_third_is_recorded(monkeypatch: pytest.MonkeyPatch, replays: list[int]) -> None:
    model, inputs = tiny_model(), batch(*LAYOUTS)
    calls: list[int] = []
    monkeypatch.setattr(recorded_steps, "run_step", lambda *args: (calls.append(1), run_step(*args))[1])
    model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert replays == [17] and len(calls) == 2 + 1 + 17  # the emulation runs it to replay it


def test_a_lack_of_memory_ends_the_recording_of_one_answer_alone(
    monkeypatch: pytest.MonkeyPatch, replays: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = tiny_model(), batch(*LAYOUTS)
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(recorded_steps, "Recording", fail)
        first = model.generate(**inputs, **options)
    assert "Decode steps of this answer are not recorded, and slower: CUDA out of memory." in caplog.text
    assert model.generate(**inputs, **options).equal(first) and replays == [17]


class OtherLayer(DynamicLayer):
    def update(self, *args: Any, **kwargs: Any) -> Any:
        return super().update(*args, **kwargs)


class OtherCache(DynamicCache):
    def update(self, *args: Any, **kwargs: Any) -> Any:
        return super().update(*args, **kwargs)


@pytest.mark.parametrize(
    "case", ["plain", "few", "training", "autocast", "hook", "every", "cpu", "layer", "cache", "backend"]
)
def test_what_is_recorded(monkeypatch: pytest.MonkeyPatch, replays: list[int], case: str) -> None:
    model = tiny_model(backend="flex_attention" if case == "backend" else "sdpa")
    cache = (OtherCache if case == "cache" else DynamicCache)(config=model.config.text_config)
    if case == "training":
        model.train()
    elif case == "hook":
        model.model.language_model.layers[1].mlp.register_forward_hook(lambda *args: None)
    elif case == "cpu":
        monkeypatch.setattr(recorded_steps, "on_gpu", lambda tensor: tensor.is_cuda)
    elif case == "layer":
        cache.layers[0] = OtherLayer()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *args: None) if case == "every" else None
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            assert can_record(model, {CACHE: cache}, 5 if case == "few" else 6) == (case == "plain")
    finally:
        if hook is not None:
            hook.remove()


def test_a_static_cache_is_not_recorded(monkeypatch: pytest.MonkeyPatch, replays: list[int]) -> None:
    model, inputs = tiny_model(), batch(*LAYOUTS)
    run_uncompiled(monkeypatch, model)
    model.generate(**inputs, max_new_tokens=12, do_sample=False, cache_implementation="static")
    assert not replays


@torch.library.custom_op("dsvl_test::attend", mutates_args=())
def attend(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As torch's attention on a GPU: the state of the random numbers of its dropout is in main memory."""
    return states.clone(), torch.empty((), dtype=torch.long)


@attend.register_fake
def _(states):
    return torch.empty_like(states), torch.empty((), dtype=torch.long, device="cpu")


WAITING = {
    "a number": lambda x: x.sum().item(),
    "a decision": lambda x: bool((x > 0).all()),
    "a mask": lambda x: x[x > 0],
    "positions": lambda x: x.nonzero(),
    "a copy to main memory": lambda x: x.cpu(),
    "a copy into main memory": lambda x: torch.empty(x.shape).copy_(x),
    "a copy from main memory": lambda x: x.copy_(torch.ones(x.shape)),
    "a new copy of main memory": lambda x: torch.ones(x.shape).to(x),
}
GOING_ON = {
    "a sum": lambda x: x + 1,
    "an index": lambda x: x[torch.zeros(3, dtype=torch.long, device=x.device)],
    "a product with a number in main memory": lambda x: x * torch.ones(()),
    "copies on the device": lambda x: torch.empty_like(x).copy_(x).to(torch.float16),
    "attention": attend,
}


@pytest.mark.parametrize("what", [*WAITING, *GOING_ON])
def test_what_waits_for_a_device_is_found(what):
    """Here the device is one without values, on which some operations that would wait fail."""
    states = torch.empty(4, 4, device="meta")
    with suppress(RuntimeError) if what in WAITING else nullcontext(), WaitsForDevice() as waits:
        (WAITING | GOING_ON)[what](states)
    assert waits.found == (what in WAITING)
