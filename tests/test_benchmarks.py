"""The benchmarks run, at the tiniest size that a CPU has time for, and count and compare what they say."""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from plain_loop import PlainLoop
from torch.utils.flop_counter import FlopCounterMode
from training_runs import environment, free_port

from dsvl import save_checkpoint
from dsvl.attention_dsvl import routed_name
from dsvl.image_reading_dsvl import image_size
from dsvl.masks_dsvl import (
    IN_IMAGE,
    IN_TEXT,
    UNIFORM_IMAGE,
    UNIFORM_TEXT,
    CodedMask,
    mmca_codes,
    mmca_reference_codes,
    visibilities,
)
from dsvl.training.liger import use_liger
from dsvl.utils.urls import decode_data_url


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark by name, as it is run on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def fine_tuning(load):
    return load("fine_tuning")


# ----------------------------------------------------------------------------------------------------------------------
# What is counted


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


# An image at the start, at the end and none: rows of the same length.
TYPES = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1], [0] * 11])


def test_the_pairs_of_an_attention_are_those_of_its_codes(load):
    config = tiny_model().config.text_config
    visible = visibilities(config, torch.empty(*TYPES.shape, 0), None, None, None)[None]
    pairs, images = load("flops").attention_pairs, int(TYPES.sum())
    assert pairs(TYPES, "causal") == visible.dense().expand(len(TYPES), -1, -1, -1).sum()
    assert pairs(TYPES, "mmca") == mmca_codes(visible, TYPES).bool().sum() - images  # its own value is no product
    codes, is_text_query = mmca_reference_codes(visible, TYPES), (TYPES == 0)[:, None, :, None]
    in_text = (codes & (IN_TEXT | UNIFORM_TEXT)) == IN_TEXT  # uniform rows are not counted
    in_image = ((codes & (IN_IMAGE | UNIFORM_IMAGE)) == IN_IMAGE) & is_text_query
    assert pairs(TYPES, "mmca_reference") == in_text.sum() + in_image.sum()


def test_alternatives_take_turns_and_the_slow_ones_leave_early(load):
    measure = load("measure")
    said = []
    alternatives = {name: lambda name=name: said.append(name) for name in ("base", "slow", "fast")}
    took = {"base": 10.0, "slow": 400.0, "fast": 5.0}

    def clock(run):
        run()
        return took[said[-1]] * (1 + 0.1 * (said.count("base") % 2))  # every other round all are slower

    table = measure.time_interleaved(alternatives, rounds=6, warm_up=2, clock=clock, budget=0.5)
    assert said[:3] == ["base", "slow", "fast"] and said.count("slow") == 2 + measure.LEAST_ROUNDS
    assert [figures["rounds"] for figures in table.values()] == [6, 3, 6]
    assert table["fast"]["speed_low"] == pytest.approx(2) == table["fast"]["speed_high"]
    assert table["slow"]["speed"] == pytest.approx(1 / 40) and table["slow"]["ms"] == pytest.approx(400, rel=0.11)
    measure.utilise(table, {"base": 2e9}, peak=1.0)
    assert table["base"]["tflop_per_s"] == pytest.approx(2e9 / table["base"]["ms"] / 1e9)
    assert table["base"]["utilisation"] == table["base"]["tflop_per_s"] and "utilisation" not in table["fast"]


# ----------------------------------------------------------------------------------------------------------------------
# Attention: every row computes what it is called


def layer_over(load, types, heads=4, key_value_heads=2):
    """The benchmark's layer, with tokens as they are given."""
    benchmark = load("attention")
    attention = benchmark.Attention(benchmark.Heads(heads, key_value_heads, 8, 3, torch.float32), *types.shape, 0)
    attention.types, attention.images = types, int(types[0].sum()) // 3
    return attention


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_the_released_arithmetic_is_the_reference(load, key_value_heads):
    attention = layer_over(load, TYPES, key_value_heads=key_value_heads)
    visible = visibilities(attention.config, torch.empty(*TYPES.shape, 0), None, None, None)[None]
    codes = mmca_reference_codes(visible, TYPES)
    wide = [state.detach().double().requires_grad_() for state in attention.states]
    reference = load("attention").ALL_ATTENTION_FUNCTIONS[routed_name("eager")]
    masks = {None: CodedMask(codes)}
    expected = reference(attention.layer, *wide, None, multimodal_masks=masks, scaling=attention.scaling)[0]
    got = attention.forward("released")()
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)
    ours = torch.autograd.grad(got, attention.states, attention.gradient)
    theirs = torch.autograd.grad(expected, wide, attention.gradient.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


def test_the_row_of_gathered_sdpa_is_mmca(load):
    attention = layer_over(load, TYPES)
    got = attention.forward("gathered sdpa")()
    expected, _ = PlainLoop(TYPES)(attention.layer, *attention.states, None, scaling=attention.scaling)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_what_does_not_fit_is_skipped_with_its_reason(load, monkeypatch):
    benchmark = load("attention")
    attention = benchmark.Attention(benchmark.Heads(2, 2, 8, 4, torch.float32), 1, 64, 4)
    assert attention.skip_reason("released") is None
    monkeypatch.setattr(benchmark, "free_bytes", lambda: 2**18)
    table, _ = benchmark.compare(attention, ["gathered sdpa", "released"], True, {"rounds": 1, "warm_up": 0})
    assert table["released computation"]["skipped"].startswith("its matrices take 0.0 GiB, of 0.0 GiB free")
    assert table["mmca gathered sdpa"]["ms"] > 0
    assert "NVIDIA GPU" in attention.skip_reason("fused") and "backward" in attention.skip_reason("flex_attention")
    with pytest.raises(ValueError, match="17 images of 4 tokens do not fit into 64 tokens"):
        benchmark.token_types(1, 64, 17, 4)


# ----------------------------------------------------------------------------------------------------------------------
# Every script, from its flags to its file and its plot

LAYER = ["--heads", "2", "--head-dim", "8", "--per-image", "8", "--rounds", "1"]


def results(path):
    record = json.loads(path.read_text())
    assert record["device"] and record["torch"] == torch.__version__ and "out" not in record["options"]
    return record["results"]


@pytest.fixture
def drawn(load, tmp_path, capsys):
    """Draw what a benchmark wrote; every row of it must be in the plot's legend or beside its bars."""

    def draw(name, *texts):
        plots = load("plots")
        with plots.matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
            assert plots.main([str(tmp_path), "--out", str(tmp_path / "plots")]) == 0
        svg = (tmp_path / "plots" / f"{name}.svg").read_text()
        for text in (*texts, f"torch {torch.__version__}"):
            assert text in svg, text
        return capsys.readouterr().out

    return draw


def test_attention(load, tmp_path, drawn, capsys):
    load("attention").main([*LAYER, "--shapes", "1x48", "--shares", "0", "0.5", "--out", str(tmp_path / "attention.json")])
    tables = results(tmp_path / "attention.json")
    assert list(tables) == ["1x48, 0 images", "1x48, 3 images"]
    table = tables["1x48, 3 images"]["forward + backward"]
    assert list(table) == ["causal sdpa", "mmca gathered sdpa", "released computation"]
    assert all(figures["ms"] > 0 and figures["tflop_per_s"] > 0 for figures in table.values())
    assert "forward + backward: 1 x 48 tokens, 3 images of 8 (50%), 2 heads of 8, float32" in capsys.readouterr().out
    said = drawn("attention", "causal sdpa", "mmca gathered sdpa", "released computation", "48 tokens, forward + backward")
    assert "decoding.json is missing, so decoding.svg is not drawn: python benchmarks/decoding.py" in said


def test_growth(load, tmp_path, drawn, monkeypatch):
    growth = load("growth")
    monkeypatch.setitem(growth.SHAPES, "small", load("fine_tuning").TINY)
    sizes = {"length": [32, 64], "images": [0, 3], "batch": [1, 2]}
    for what in ("attention", "prefill"):
        monkeypatch.setitem(growth.DEFAULTS, (load("measure").device_type(), what), sizes)
    flags = ["--tokens", "64", "--text", "16", "--out", str(tmp_path / "growth.json")]
    growth.main([*LAYER, *flags])
    sweeps = results(tmp_path / "growth.json")
    assert list(sweeps) == ["length", "images", "batch"]
    for sweep, values in sizes.items():
        for tables in sweeps[sweep].values():
            assert list(map(int, tables)) == values
            assert all(figures["ms"] > 0 for table in tables.values() for figures in table.values())
    assert "DSVL mmca, encoded images" in sweeps["images"]["prefill"]["3"]
    assert "DSVL mmca, encoded images" not in sweeps["images"]["prefill"]["0"]
    drawn("growth", "Llava, sdpa", "DSVL mmca, encoded images", "released computation", "prefill", "in 16 tokens of text")


def test_a_way_that_grew_too_slow_is_skipped_of_larger_sizes(load):
    growth, heads = load("growth"), load("attention").Heads(2, 2, 8, 8, torch.float32)
    points = {tokens: growth.Point(1, tokens, 1) for tokens in (32, 64)}
    tables = growth.sweep_attention(points, heads, ["released"], False, {"rounds": 1, "warm_up": 0}, patience=1e-9)
    assert "ms" in tables[32]["released computation"] and "ms" in tables[64]["causal sdpa"]
    assert tables[64]["released computation"]["skipped"].startswith("one run would take about")
    with pytest.raises(SystemExit):
        growth.main(["--values", "32"])


def test_training_step(load, tmp_path, drawn):
    flags = ["--tokens", "264", "--layers", "1", "--rounds", "1", "--out", str(tmp_path / "training_step.json")]
    load("training_step").main(flags)
    tables = results(tmp_path / "training_step.json")
    assert list(tables) == ["plain", "checkpointing"]
    work = [figures["tflop_per_s"] * figures["ms"] for figures in tables["plain"].values() if "ms" in figures]
    assert len(work) >= 3 and work == pytest.approx([work[0]] * len(work))  # every step is counted as the same products
    drawn("training_step", "Llava, sdpa", "DSVL mmca, sdpa, checkpointing", "ms per step")


def test_training_steps_in_8_bits(load, tmp_path, drawn, monkeypatch):
    module = load("training_step")
    monkeypatch.setitem(module.SHAPES, "small", load("steps").TINY)
    flags = ["--modes", "frozen", "--compiler", "aot_eager", "--tokens", "64", "--images", "2", "--rounds", "1"]
    module.main([*flags, "--out", str(tmp_path / "training_step.json")])
    (table,) = results(tmp_path / "training_step.json").values()
    assert list(table)[0] == "Llava, compiled, chunked loss" and len(table) == 6
    assert all(figures["ms"] > 0 for figures in table.values())
    drawn("training_step", "Llava, fp8, compiled, chunked loss", "DSVL mmca, int8, compiled layers", "ms per step")


def test_every_training_step_that_is_measured_computes_its_models_loss(load, capsys):
    torch._dynamo.reset()
    steps = load("steps")
    losses = steps.check("aot_eager", "cpu")
    in_8_bits = {name: loss for name, loss in losses.items() if "8" in name}
    others = {name: loss for name, loss in losses.items() if name not in in_8_bits}
    assert len({round(loss, 3) for loss in others.values()}) == 2 < len(others)
    assert len(in_8_bits) == 4 and not set(in_8_bits.values()).intersection(others.values())
    table = {name: {"ms": 10.0, "peak_gib": 1.0} for name in losses}
    steps.add_rates(table, steps.TINY, steps.inputs(steps.TINY, "cpu"), 2.0)
    for figures in table.values():
        assert (figures["tokens_per_s"], figures["total_gib"]) == (12800, 3)
    steps.add_rates(table, steps.TINY, steps.inputs(steps.TINY, "cpu"), 2.0, other_weights={next(iter(table)): 1.0})
    assert [figures["total_gib"] for figures in table.values()] == [2, *[3] * (len(table) - 1)]
    assert "Llava, compiled, chunked loss" in capsys.readouterr().out


def test_a_compiled_twin_shares_the_weights(load):
    model = tiny_model()
    twin = load("steps").compiled(model, "aot_eager")
    assert all(one is other for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    assert twin.train().model.compiles_layers and not model.train().model.compiles_layers


def test_fine_tuning(fine_tuning, tmp_path, drawn, monkeypatch):
    shape = replace(fine_tuning.TINY, tokens=64)
    monkeypatch.setattr(fine_tuning, "in_own_process", lambda name, timeout: fine_tuning.measure(name, shape, "sdpa", 1))
    flags = ["--tiny", "--rows", "llava", "dsvl", "--out", str(tmp_path / "fine_tuning.json")]
    monkeypatch.setattr(sys, "argv", ["fine_tuning.py", *flags])
    with pytest.raises(SystemExit) as ended:
        fine_tuning.main()
    assert ended.value.code == 0
    assert list(results(tmp_path / "fine_tuning.json")) == ["llava", "dsvl", "llava (again)"]
    drawn("fine_tuning", "dsvl", "llava (again)", "2 x 128 tokens")


def test_a_row_is_named_by_what_it_is(fine_tuning):
    row = fine_tuning.Row.parse("lora/zero2/dsvl+liger+every4")
    assert row == fine_tuning.Row("dsvl", True, 2, 4, liger=True, compiled=False, cached=False, baseline="lora/zero2/llava")
    assert fine_tuning.Row.parse("dsvl+liger+cached").cached
    assert fine_tuning.Row.parse("zero2/dsvl+compiled").compiled
    assert fine_tuning.Row.parse("checkpointing/llava").checkpoint_every == 1
    for wrong in ("zero1/llava", "llava+compiled"):
        with pytest.raises(ValueError, match=f"'{re.escape(wrong)}' is not a row"):
            fine_tuning.Row.parse(wrong)


def test_every_baseline_comes_before_its_rows(fine_tuning):
    for position, name in enumerate(fine_tuning.ROWS):
        assert fine_tuning.Row.parse(name).baseline in fine_tuning.ROWS[: position + 1]


def test_liger_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        use_liger(tiny_model())


def test_every_turns_answer_is_compared_with_the_whole_conversation_run_again(load, tmp_path, drawn):
    flags = ["--turns", "3", "--answer-tokens", "4", "--repeats", "2", "--out", str(tmp_path / "chat.json")]
    load("chat").main(flags)
    turns = results(tmp_path / "chat.json")
    assert list(turns) == [*(f"turn {n}, with an image" for n in (1, 2, 3)), "turn 4, text only"]
    first, *_, with_image, text = turns.values()
    assert (first["images_encoded"], with_image["images_encoded"], text["images_encoded"]) == (1, 1, 0)
    assert first["reused"] == 0 < with_image["reused"] < with_image["tokens"] < text["reused"] + 100
    assert all(table["same_first_token"] == 1 and table["incremental"]["ms"] > 0 for table in turns.values())
    drawn("chat", "run again", "incremental", "text only")


def test_a_prompt_over_known_images_is_compared_with_the_whole_prefill(load, tmp_path):
    flags = ["--images", "2", "--text", "20", "--repeats", "2", "--out", str(tmp_path / "reuse.json")]
    load("reuse").main(flags)
    tables = results(tmp_path / "reuse.json")
    assert tables["images"]["same_token"] and tables["image KV cache"]["speed"] > 1
    assert tables["images"]["mib_per_image"] == 2 * 8 * 257 * 512 * 4 / 2**20
    assert tables["images"]["same_token_in_later_turn"] and tables["later turn: over its KV cache"]["speed"] > 1


@pytest.mark.slow
def test_a_server_with_a_library_is_compared_with_one_without(load, tmp_path):
    flags = ["--images", "2", "--answer-tokens", "2", "--clients", "2", "--requests", "4", "--repeats", "1"]
    load("image_library").main([*flags, "--out", str(tmp_path / "library.json")])
    table = results(tmp_path / "library.json")
    assert table["equal_answers"] == table["answers"] == 4
    assert table["image library"]["answers_per_s"] > 0 and table["image library"]["speed"] > 0


@pytest.mark.parametrize("bits", ["8", "16"])
def test_the_first_token_over_a_large_library(load, tmp_path, bits):
    flags = ["--first-token", "--library", "20", "--images", "3", "--bits", bits, "--key-value-heads", "2", "--repeats", "2"]
    load("image_library").main([*flags, "--out", str(tmp_path / "library.json")])
    table = results(tmp_path / "library.json")
    assert table["mib_per_image"] == 5 * 2 * 3 * 2 * (32 + 4 if bits == "8" else 32 * 4) / 2**20
    assert table["transfer alone"]["ms"] < table["from main memory"]["ms"]


def test_data_loading(load, capsys):
    load("data_loading").main(["--samples", "4", "--batch-size", "2", "--rounds", "1", "--workers", "0"])
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["workers", "llava", "dsvl"] and all(float(cell) >= 0 for cell in row.split())


def test_image_processing(load, tmp_path, capsys):
    flags = ["--size", "16", "--max-tiles", "4", "--scale", "0.1", "--rounds", "1", "--out", str(tmp_path / "out.json")]
    load("image_processing").main(flags)
    table = results(tmp_path / "out.json")
    assert list(table)[:3] == ["LLaVA-NeXT", "SmolVLM (Idefics 3)", "DSVL tiles"]
    assert table["DSVL crop"]["tiles"] == table["DSVL pad"]["tiles"] == table["DSVL native"]["tiles"] == 5
    assert all(figures["tiles"] > 5 for name, figures in list(table.items())[:3])
    assert all(figures["images_per_second"] > 0 for figures in table.values())
    assert "LLaVA-NeXT" in capsys.readouterr().out


def test_decoding(load, tmp_path, drawn, monkeypatch, uncompiled):
    monkeypatch.setitem(load("decoding").SHAPES, "small", load("fine_tuning").TINY)
    flags = ["--batches", "1", "2", "--text", "8", "--new-tokens", "12", "--rounds", "1"]
    load("decoding").main([*flags, "--out", str(tmp_path / "decoding.json")])
    assert len(results(tmp_path / "decoding.json")) == 8  # two models, two caches, two batches
    drawn("decoding", "Llava, static, compiled", "DSVL, dynamic", "tokens/s", "batch size")


@pytest.fixture
def demo_checkpoint(load, tmp_path):
    """A checkpoint like the demo's, with random weights."""
    chat = load("chat")
    save_checkpoint(*chat.build_parts(chat.DEMO, "sdpa", "cpu", torch.float32), tmp_path / "demo")
    return tmp_path / "demo"


def test_weight_precision(load, demo_checkpoint, tmp_path, capsys):
    flags = ["--precisions", "float32", "bfloat16", "--conversations", "3", "--out", str(tmp_path / "out.json")]
    load("weight_precision").main([str(demo_checkpoint), *flags])
    table = results(tmp_path / "out.json")
    assert list(table) == ["float32", "bfloat16"] and table["float32"]["as_reference"] == 1
    assert all(row["perplexity"] > 1 and row["answers"] == table["float32"]["answers"] for row in table.values())
    assert "exact of" in capsys.readouterr().out


def test_speculative_decoding(load, demo_checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("One and two and three and four. " * 20)
    flags = ["--draft", str(demo_checkpoint), "--lookup", "3", "--caches", "dynamic", "--conversations", "3"]
    flags += ["--texts", str(text), "--vocabulary", "300", "--new-tokens", "12", "--out", str(tmp_path / "out.json")]
    load("speculative_decoding").main([str(demo_checkpoint), *flags])
    table = results(tmp_path / "out.json")
    answers = {name: row for name, row in table.items() if "same_tokens" in row}
    assert len(answers) == 3 and all(row["same_tokens"] for row in answers.values())
    assert table["dynamic, greedy"]["tokens_per_step"] == 1
    assert table["texts, lookup 3"]["tokens_per_step"] > 3  # the text repeats itself
    assert "OTHER TOKENS" not in capsys.readouterr().out


def test_nothing_to_draw_is_an_error(load, tmp_path, capsys):
    assert load("plots").main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert all(f"{name} is missing" in said for name in ("attention.json", "growth.json", "chat.json", "training_step.json"))


def test_many_images(load, tmp_path, monkeypatch, capsys):
    """Rows compute their model's loss, whatever their levers, and a row that runs out of memory keeps what it measured."""
    many = load("many_images")
    measure = many.measure

    def in_this_process(name, numbers, timeout):
        out = tmp_path / "row.json"
        many.main(["--tiny", "--row", name, "--row-images", *map(str, numbers), "--out", str(out)])
        return json.loads(out.read_text())

    def limited(row, model, shape, *rest):
        if row.levers == {"tiles"} and shape.images > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return measure(row, model, shape, *rest)

    monkeypatch.setattr(many, "in_own_process", in_this_process)
    monkeypatch.setattr(many, "measure", limited)
    rows = ["llava", "dsvl", "dsvl+tiles", "dsvl+tiles+queries+offload"]
    with pytest.raises(SystemExit) as ended:
        many.main(["--tiny", "--rows", *rows, "--out", str(tmp_path / "many_images.json")])
    assert ended.value.code == 0
    record = json.loads((tmp_path / "many_images.json").read_text())["results"]
    assert list(record) == rows and all(list(row) == ["3", "6"] for row in record.values())
    assert record["dsvl+tiles"]["6"]["error"].startswith("out of memory")
    losses = [record[row]["3"]["loss"] for row in rows]
    assert losses[0] != losses[1] == pytest.approx(losses[2], abs=1e-2) == pytest.approx(losses[3], abs=1e-2)
    assert "dsvl+tiles+queries+offload" in capsys.readouterr().out
    for wrong in ("llava+tiles", "dsvl+fast", "dsvl+tiles+tiles"):
        with pytest.raises(ValueError, match="is not a row"):
            many.Row.parse(wrong)


@pytest.mark.slow
def test_image_parallelism(tmp_path):
    """One process and two have the same loss, up to rounding in bfloat16."""
    script, out = Path(__file__).parents[1] / "benchmarks" / "image_parallel.py", tmp_path / "image_parallel.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", script]
    command += ["--tiny", "--tokens", "128", "256", "--rounds", "1", "--out", out]
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())["results"]
    assert [one["processes"] for one in results] == [1, 2, 1, 2]
    for alone, split in zip(results[::2], results[1::2], strict=True):
        assert split["loss"] == pytest.approx(alone["loss"], abs=1e-2)
        assert alone["ceiling"] == 1 < split["ceiling"] <= 2


def test_answers_over_many_images(load, tmp_path, monkeypatch, capsys):
    many, answers = load("many_images"), load("answer_many_images")

    def in_this_process(name, numbers, timeout):
        out = tmp_path / "row.json"
        flags = ["--tiny", "--what", "answer", "--row", name, "--row-images", *map(str, numbers)]
        many.main([*flags, "--out", str(out)])
        return json.loads(out.read_text())

    monkeypatch.setattr(many, "in_own_process", in_this_process)
    rows = ["16bit", "16bit+kv8+shared", "8bit+shared", "8bit+offloaded"]
    with pytest.raises(SystemExit) as ended:
        many.main(["--tiny", "--what", "answer", "--rows", *rows, "--out", str(tmp_path / "answers.json")])
    assert ended.value.code == 0
    record = json.loads((tmp_path / "answers.json").read_text())["results"]
    assert list(record) == rows and all(list(row) == ["3", "6"] for row in record.values())
    figures = [figures for row in record.values() for figures in row.values()]
    assert all(one["first_token_ms"] > 0 and one["tokens_per_s"] > 0 and one["encoding_s"] > 0 for one in figures)
    whole, few_heads, small, offloaded = (record[row]["6"]["images_gib"] for row in rows)
    head_dim = 64 / 4
    assert few_heads == whole / 2 and small == offloaded == pytest.approx(whole * (head_dim + 4) / (2 * head_dim))
    said = capsys.readouterr().out
    assert "tokens/s" in said and "8bit+offloaded" in said
    for wrong in ("8bit", "4bit+shared", "16bit+shared+offloaded", "16bit+kv8+kv8"):
        with pytest.raises(ValueError, match="is not a row"):
            answers.parse(wrong)


@pytest.fixture
def small_servers(load, monkeypatch):
    """The servers of `benchmarks/servers.py` with a tiny model."""
    servers = load("servers")
    shape = replace(servers.SHAPE, layers=1, hidden=64, intermediate=64, heads=2, key_value_heads=1)
    shape = replace(shape, vision_layers=2, vision_hidden=32, vision_intermediate=32, vision_heads=2, image_size=28)
    save_models = servers.save_models
    for name in ("serving", "soak"):
        monkeypatch.setattr(load(name), "save_models", lambda folder: save_models(folder, shape))
    return servers


@pytest.mark.slow  # a server in a process of its own
def test_serving(load, small_servers, tmp_path, capsys):
    flags = ["--engines", "transformers", "--clients", "1", "3", "--rounds", "2", "--tokens", "8"]
    load("serving").main([*flags, "--out", str(tmp_path / "serving.json")])
    tables = results(tmp_path / "serving.json")
    assert list(tables) == [f"{kind}, {n}" for kind in ("new images", "repeated images") for n in ("1 client", "3 clients")]
    for table in tables.values():
        (figures,) = table.values()
        assert figures["speed"] == figures["same_answers"] == 1 and figures["rounds"] == 2
        assert figures["requests_per_s"] > 0 and 0 < figures["first_token_ms"] <= figures["last_token_p95_ms"]
    assert "requests/s" in capsys.readouterr().out


@pytest.mark.slow  # a server in a process of its own
def test_soak(load, small_servers, tmp_path):
    soak, out = load("soak"), tmp_path / "soak.json"
    flags = ["--engine", "transformers", "--minutes", "0.15", "--clients", "4", "--out", str(out)]
    assert soak.main([*flags, "--arguments", "--image-cache", "16MiB"]) == 0
    (figures,) = results(out).values()
    assert figures["answers"] > figures["compared"] > 0 and figures["vanished"] > 0
    assert figures["errors"] == figures["different"] == 0 and figures["released_after_s"] is not None
    assert figures["memory_mib_late"] > 100 and len(figures["memory"]) >= 2


@pytest.mark.slow  # a server in a process of its own
def test_a_soak_counts_the_errors_of_those_who_stay(load, small_servers, tmp_path):
    soak, out = load("soak"), tmp_path / "soak.json"
    flags = ["--engine", "transformers", "--minutes", "0.1", "--clients", "8", "--out", str(out)]
    assert soak.main([*flags, "--arguments", "--max-requests", "1", "--image-cache", "off"]) == 1
    (figures,) = results(out).values()
    assert figures["errors"] > 0 and "status 429" in figures["first_errors"][0]


def test_memory_counts_after_the_caches_are_full(load):
    soak = load("soak")
    filled = [(float(second), 100.0 + min(second, 60)) for second in range(0, 120, 5)]
    flat = soak.memory_figures(filled, 120)
    assert flat["memory_mib_early"] == flat["memory_mib_late"] == 160 and abs(flat["memory_mib_per_minute"]) < 1e-6
    leaking = soak.memory_figures([(second, mib + second) for second, mib in filled], 120)
    assert leaking["memory_mib_per_minute"] == pytest.approx(60)
    assert leaking["memory_mib_late"] > leaking["memory_mib_early"] + 30


def test_the_commands_of_the_servers(load):
    servers = load("servers")
    folder = Path("models")
    built_in = servers.server_command("transformers", folder, 1, None, ["--image-cache", "off"])
    assert built_in[0] == sys.executable and built_in[-2:] == ["--image-cache", "off"] and "--" not in built_in
    vllm = servers.server_command("vllm", folder, 1, "python-of-vllm", ["--enforce-eager"])
    assert vllm[0] == "python-of-vllm" and vllm[-2:] == ["--", "--enforce-eager"]
    llava = servers.server_command("llava", folder, 1, "python-of-vllm", [])
    assert "vllm.entrypoints.openai.api_server" in llava and str(folder / "llava") in llava


def test_an_image_of_the_servers_needs_no_resizing(load):
    servers = load("servers")
    url = servers.draw_url(3)
    assert url == servers.draw_url(3) != servers.draw_url(4)
    assert image_size(decode_data_url(url)) == (servers.SHAPE.image_size,) * 2
