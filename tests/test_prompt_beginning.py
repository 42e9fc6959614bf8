"""`dsvl serve` computes what all prompts begin with once, from the chat template alone; answers do not change."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from model_server import SENTENCES, alone, ask, data_url, draw_image, load_parts, question, served
from test_serving_library import own_messages, with_library
from training_runs import make_checkpoint
from transformers import DynamicCache

import dsvl
from dsvl.serving import prompt_beginning
from dsvl.serving.engine import collate
from dsvl.serving.kept_rows import copy_row, take_rows
from dsvl.serving.prompt_beginning import PromptBeginning


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every KV cache of the beginning that is handed out."""
    rows: list[int] = []
    make = PromptBeginning.cache

    def counted(self: PromptBeginning, number: int) -> DynamicCache:
        rows.append(number)
        return make(self, number)

    monkeypatch.setattr(PromptBeginning, "cache", counted)
    return rows


def test_prompts_with_and_without_the_beginning(parts: Any, prefilled: list[int]) -> None:
    """In one batch: questions of several lengths with images, without, and with a system message of their own."""

    def messages(number: int, own: bool) -> list[dict[str, Any]]:
        seeds = [number] * (number % 3)
        asked = own_messages(SENTENCES[number], *seeds)
        if not own:
            asked = question(SENTENCES[number], *(data_url(draw_image(seed)) for seed in seeds))
        return [{"role": "system", "content": "one two"}, *asked] if number % 4 == 3 else asked

    expected = [alone(parts, messages(number, True)) for number in range(8)]
    for library in (False, True):
        with with_library(parts) if library else served(*parts) as server:
            server.engine.max_steps = 4
            prefilled.clear()
            with ThreadPoolExecutor(8) as pool:
                answers = pool.map(lambda number: ask(server, messages(number, False)).choices[0].message.content, range(8))
                assert list(answers) == expected
        # Six of eight prompts begin with it, and without a library four of these have new images.
        assert sum(prefilled) == (6 if library else 2)


@pytest.mark.parametrize(("attention", "positions"), [("mmca", "image"), ("causal", "token"), ("causal", "image")])
def test_other_attention_and_positions(tmp_path: Path, prefilled: list[int], attention: str, positions: str) -> None:
    make_checkpoint(tmp_path)
    parts = dsvl.compose(tmp_path / "tower", tmp_path / "llama", multimodal_attention=attention, image_positions=positions)
    parts = load_parts(dsvl.save_checkpoint(*parts, tmp_path / "made"))
    seeds = [[1, 2], [], [1]]
    expected = [alone(parts, own_messages(SENTENCES[number], *own)) for number, own in enumerate(seeds)]

    def one(number: int) -> str:
        messages = question(SENTENCES[number], *(data_url(draw_image(seed)) for seed in seeds[number]))
        return ask(server, messages).choices[0].message.content

    with with_library(parts) as server, ThreadPoolExecutor(3) as pool:
        server.engine.max_steps = 5
        assert list(pool.map(one, range(3))) == expected
    assert sum(prefilled) == 3


def test_it_holds_nothing_but_what_the_template_adds(parts: Any) -> None:
    model, processor = parts
    beginning = PromptBeginning(model, processor)
    text = processor.apply_chat_template([{"role": "user", "content": "two"}], tokenize=False)
    assert text.startswith(processor.decode(beginning.ids)) and "two" not in processor.decode(beginning.ids)
    ids = torch.tensor([beginning.ids])
    assert not beginning.begins(ids)
    assert not beginning.begins(torch.cat([ids[:, 1:], ids[:, :3]], dim=1))
    assert beginning.begins(torch.cat([ids, ids[:, :2]], dim=1))


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    parts = load_parts(make_checkpoint(tmp_path))
    beginning = PromptBeginning(*parts)
    first = beginning.cache(2).layers[0].keys
    assert beginning.cache(2).layers[0].keys.equal(first)
    with torch.no_grad():
        parts[0].get_input_embeddings().weight.mul_(2)
        parts[0].model.language_model.layers[0].self_attn.k_proj.weight.mul_(3)
    second = beginning.cache(2).layers[0].keys
    assert not second.allclose(first)
    assert PromptBeginning(*parts).cache(2).layers[0].keys.equal(second)


@pytest.mark.parametrize("cannot", ["mmca_reference", "reversed_images", "compiled", "sliding", "short"])
def test_where_a_prefix_cannot_be_continued_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cannot: str
) -> None:
    make_checkpoint(tmp_path)
    model, processor = dsvl.compose(tmp_path / "tower", tmp_path / "llama")
    assert len(PromptBeginning(model, processor).ids) >= prompt_beginning.LEAST_TOKENS
    if cannot == "mmca_reference":
        model.config.multimodal_attention = cannot
    elif cannot == "reversed_images":
        model.config.reversed_images = True
    elif cannot == "compiled":
        model.compile_text_prefill()
    elif cannot == "sliding":
        model = tiny_model("mistral")
    else:
        monkeypatch.setattr(prompt_beginning, "LEAST_TOKENS", 10_000)
    assert PromptBeginning(model, processor).ids == []


def test_rows_are_kept_without_the_padding_behind_their_beginning() -> None:
    model = tiny_model(image_positions="image")
    rows = [torch.tensor([[1, 5, 6, *rest]]) for rest in ([7, 8, 9, 10], [11, 12])]
    inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": ids * 0} for ids in rows]

    def run(inputs: dict[str, torch.Tensor], cache: DynamicCache) -> DynamicCache:
        model.generate(**inputs, past_key_values=cache, max_new_tokens=1)
        return cache

    beginning = run({name: tensor[:, :3] for name, tensor in inputs[0].items()}, DynamicCache())
    cache = copy_row(take_rows(beginning, {0: 3})[0], 2, model.config.text_config)
    assert all(layer.keys.shape[0] == 2 for layer in cache.layers)
    kept = take_rows(run(collate(inputs, 0, beginning=3), cache), {0: 7, 1: 5}, beginning=3)
    for own, alone_inputs in zip(kept, inputs, strict=True):
        expected = take_rows(run(alone_inputs, DynamicCache()), {0: own.tokens})[0]
        assert own.types.equal(expected.types) and own.positions.equal(expected.positions)
        for states, others in zip(own.layers, expected.layers, strict=True):
            torch.testing.assert_close(states, others)


def test_padding_follows_the_beginning() -> None:
    rows = [
        {name: torch.arange(1, size + 1)[None] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        for size in (3, 5)
    ]
    made = collate(rows, pad_token_id=9, beginning=2)
    assert made["input_ids"].tolist() == [[1, 2, 9, 9, 3], [1, 2, 3, 4, 5]]
    assert made["attention_mask"].tolist() == [[1, 2, 0, 0, 3], [1, 2, 3, 4, 5]]
