"""What the GPU benchmarks are made of, as far as a CPU can tell."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from dsvl.training.kernels import use_liger


@pytest.fixture
def fine_tuning(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("fine_tuning")


@pytest.mark.parametrize("rank", [0, 16])
def test_a_steps_operations_are_those_that_torch_counts(fine_tuning, rank):
    if rank:
        pytest.importorskip("peft")
    shape = replace(fine_tuning.TINY, tokens=64, layers=2)
    row = fine_tuning.Row.parse("lora/dsvl" if rank else "dsvl")
    model = fine_tuning.build(row, shape, "eager")
    model.config.multimodal_attention = "causal"
    model.set_attn_implementation("eager")  # matrix products, which the counter knows
    batch = fine_tuning.inputs(shape, fine_tuning.device_type())
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).loss.backward()
    worth = fine_tuning.step_flops(shape, fine_tuning.supervised_tokens(batch["labels"]), rank)
    # Eager attention computes the pairs that causality hides, too.
    hidden_pairs = shape.batch * shape.tokens * (shape.tokens - 1) // 2
    assert counter.get_total_flops() == worth + 2 * 3 * shape.layers * hidden_pairs * 2 * shape.hidden


def test_a_row_is_named_by_what_it_is(fine_tuning):
    row = fine_tuning.Row.parse("lora/zero2/dsvl+liger+every4")
    assert row == fine_tuning.Row("dsvl", True, 2, 4, True, False, baseline="lora/zero2/llava")
    assert fine_tuning.Row.parse("dsvl+liger+cached").cached
    assert fine_tuning.Row.parse("checkpointing/llava").checkpoint_every == 1
    with pytest.raises(ValueError, match="'zero1/llava' names no row"):
        fine_tuning.Row.parse("zero1/llava")


def test_every_baseline_comes_before_its_rows(fine_tuning):
    for position, name in enumerate(fine_tuning.ROWS):
        assert fine_tuning.Row.parse(name).baseline in fine_tuning.ROWS[: position + 1]


def test_liger_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        use_liger(tiny_model())


def test_a_late_answer_is_compared_with_the_whole_conversation_run_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    flags = ["--rounds", "3", "--answer-tokens", "4", "--repeats", "2", "--out", str(tmp_path / "chat.json")]
    importlib.import_module("chat").main(flags)
    pictured, text = json.loads((tmp_path / "chat.json").read_text())["results"].values()
    assert (pictured["pictures_encoded"], text["pictures_encoded"]) == (1, 0)
    assert 0 < pictured["reused"] < pictured["tokens"] < text["reused"] + 100
    assert pictured["same_first_token"] == text["same_first_token"] == 1


def test_a_prompt_over_known_pictures_is_compared_with_the_whole_prefill(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    flags = ["--pictures", "2", "--text", "20", "--repeats", "2", "--out", str(tmp_path / "reuse.json")]
    importlib.import_module("reuse").main(flags)
    results = json.loads((tmp_path / "reuse.json").read_text())["results"]
    assert results["comparison"]["same_token"] and results["comparison"]["speed"] > 1
    assert results["comparison"]["mib_a_picture"] == 2 * 8 * 257 * 512 * 4 / 2**20


def test_every_training_step_that_is_measured_computes_its_models_loss(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    torch._dynamo.reset()
    steps = importlib.import_module("steps")
    losses = steps.check("aot_eager", "cpu")
    assert len({round(loss, 3) for loss in losses.values()}) == 2 < len(losses)
    table = {name: {"ms": 10.0, "peak_gib": 1.0} for name in losses}
    steps.add_rates(table, steps.TINY, steps.inputs(steps.TINY, "cpu"), 2.0)
    for figures in table.values():
        assert (figures["tokens_per_s"], figures["total_gib"]) == (12800, 3)
    assert "Llava, compiled, chunked loss" in capsys.readouterr().out


def test_a_compiled_twin_shares_the_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    model = tiny_model()
    twin = importlib.import_module("steps").compiled(model, "aot_eager")
    assert all(one is other for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    assert twin.train().model.compiles_layers and not model.train().model.compiles_layers
