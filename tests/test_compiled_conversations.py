"""Chat and server after `compile_text_prefill`: the same answers, by the compiled functions."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from model_server import SENTENCES, alone, ask, data_url, question, served
from model_server import draw_image as draw_for_server
from test_chat import NEW, TURNS, draw_image, make_model
from test_serving_library import own_messages, with_library
from training_runs import make_checkpoint
from transformers import StaticCache

from dsvl import ImageLibrary
from dsvl.acceleration.reuse.compiled_prefill import CompiledPrefill
from dsvl.chat import DSVLChat
from dsvl.chat.terminal import Terminal
from dsvl.cli import main
from dsvl.transformers_dsvl import CACHE


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The functions without a compiler. The rows and new tokens of their calls."""
    calls: list[tuple[int, int]] = []
    run = CompiledPrefill.prefill

    def counted(self: CompiledPrefill, decoder: Any, images: Any, cache: Any, past: int, slots: int, *rest: Any) -> Any:
        calls.append((rest[0].shape[0], rest[0].shape[1]))
        return run(self, decoder, images, cache, past, slots, *rest)

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(CompiledPrefill, "prefill", counted)
    return calls


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static", "static, a step ahead"])
@pytest.mark.parametrize(("family", "positions"), [("llama", "image"), ("qwen3", "token")])
def test_a_chat_answers_alike(
    processor: Any,
    monkeypatch: pytest.MonkeyPatch,
    compiled: list[tuple[int, int]],
    family: str,
    positions: str,
    cache: str,
    library: bool,
) -> None:
    answers, costs = [], []
    for compiles in (False, True):
        model = make_model(processor, family, "mmca", positions)
        model.set_attn_implementation({"text_config": "sdpa"})
        kind = cache
        if cache == "static, a step ahead":  # as on an accelerator, without compilation
            kind = "static"
            monkeypatch.setattr(
                model, "_valid_auto_compile_criteria", lambda inputs, config: isinstance(inputs[CACHE], StaticCache)
            )
            monkeypatch.setattr(model, "get_compiled_call", lambda config, model=model: model.__call__)
        if compiles:
            model.compile_text_prefill()
        if library:
            model.image_library = ImageLibrary(model, 2**24)
        chat = DSVLChat(model, processor, max_new_tokens=NEW, do_sample=False, cache_implementation=kind)
        compiled.clear()
        answers.append([chat.ask(text, [draw_image(number) for number in numbers]) for text, numbers in TURNS])
        costs.append((chat.last_turn.prompt_tokens, chat.last_turn.reused_tokens, chat.last_turn.encoded_images))
        if not compiles:
            assert not compiled
    assert answers[1] == answers[0] and costs[1] == costs[0]
    # A first turn with pixels is the ordinary prefill, and so is text alone with a static cache on a CPU.
    expected = len(TURNS) - (not library) - (2 if cache == "static" else 0)
    assert len(compiled) == expected


@pytest.mark.parametrize("library", [False, True])
def test_a_server_answers_alike(parts: Any, compiled: list[tuple[int, int]], library: bool) -> None:
    model, processor = parts

    def messages(number: int, own: bool) -> list[dict[str, Any]]:
        seeds = [number] * (number % 3)
        if own:
            return own_messages(SENTENCES[number], *seeds)
        return question(SENTENCES[number], *(data_url(draw_for_server(seed)) for seed in seeds))

    expected = [alone(parts, messages(number, True)) for number in range(8)]
    reuse = model.model.image_reuse
    try:
        model.compile_text_prefill()
        with with_library(parts) if library else served(*parts) as server, ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda number: ask(server, messages(number, False)).choices[0].message.content, range(8))
            assert list(answers) == expected
    finally:
        reuse.compiled, reuse.text_multiple = None, 1
    assert bool(compiled) == library


@pytest.mark.parametrize("flag", [[], ["--compile-text-prefill"]])
def test_the_flag_of_the_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: list[str]) -> None:
    checkpoint, seen = make_checkpoint(tmp_path), []
    monkeypatch.setattr(Terminal, "run", lambda self: seen.append(self.chat.model.model.image_reuse.compiled))
    assert main(["chat", str(checkpoint), "--device", "cpu", *flag]) == 0
    assert [compiled is not None for compiled in seen] == [bool(flag)]


def test_the_flag_is_refused_where_images_cannot_be_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Terminal, "run", lambda self: None)
    checkpoint = make_checkpoint(tmp_path)
    config = json.loads((checkpoint / "config.json").read_text()) | {"multimodal_attention": "causal"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert main(["chat", str(checkpoint), "--device", "cpu", "--compile-text-prefill"]) == 1
    assert "multimodal_attention='causal'" in capsys.readouterr().err
