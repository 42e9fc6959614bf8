"""Two processes train like one: DDP, every ZeRO stage, and the settings in which they differ."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from training_runs import (
    BATCH,
    IN_ORDER,
    STEPS,
    furthest,
    losses,
    make_checkpoint,
    make_conversations,
    make_layout_checkpoint,
    make_training,
    run,
    runs_once,
    take_back,
    weights,
)
from transformers import AutoModelForImageTextToText, AutoProcessor

import dsvl.training
from dsvl.training import deepspeed_config, model_loading, zero3
from dsvl.training.adapters import base_model
from dsvl.training.arguments import parse
from dsvl.training.deepspeed_config import zero_configuration
from dsvl.training.model_loading import load_model

pytest.importorskip("deepspeed")

ZERO = {"ddp": [], "zero1": ["--deepspeed", "zero1"], "zero2": ["--deepspeed", "zero2"], "zero3": ["--deepspeed", "zero3"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_training(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def alone(folder):
    """Runs of one process, by their flags; each is run once."""
    base = ["--model", folder / "model", "--data", folder / "data.jsonl", BATCH, 4, *STEPS]
    return runs_once(folder, lambda output, *flags: run(*base, "--output", output, *flags))


def train_by_two(folder, output, *flags, **start):
    base = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, BATCH, 2, *STEPS]
    return run(*base, *flags, processes=2, **start)


def assert_as_alone(output, single):
    assert losses(output) == pytest.approx(losses(single), abs=1e-5)
    assert len(losses(output)) == 4
    assert furthest(weights(output), weights(single)) < 1e-5


@pytest.mark.parametrize("stage", ZERO)
def test_two_processes_equal_one_where_one_of_them_has_no_images(folder, tmp_path, alone, stage):
    """With activation checkpointing, evaluation, saving, loading and resuming."""
    evaluate = ["--eval-data", folder / "held_out.jsonl", "--eval-exact-match", "--eval-max-new-tokens", "3"]
    flags = [*IN_ORDER, "--activation-checkpointing", "true"]
    output = tmp_path / "output"
    train_by_two(folder, output, *ZERO[stage], *flags, *evaluate)
    single = alone(*IN_ORDER)
    assert_as_alone(output, single)

    loaded, info = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    AutoProcessor.from_pretrained(output, trust_remote_code=True)
    composed = AutoModelForImageTextToText.from_pretrained(folder / "model", trust_remote_code=True)
    trained, before = loaded.model.multi_modal_projector.linear.weight, composed.model.multi_modal_projector.linear.weight
    assert not torch.equal(trained, before)

    learning = {name for name in composed.state_dict() if "multi_modal_projector" in name or "embed_tokens" in name}
    states = list((output / "checkpoint-2").glob("global_step2/*model_states.pt"))
    assert len(states) == {"ddp": 0, "zero3": 2}.get(stage, 1)
    for file in states:  # of what is frozen, the weights of the composed model are those of the run
        state = torch.load(file, weights_only=False)
        assert set(state["module"]) == learning and state["frozen_param_fragments"] is None

    final, kept = weights(output), losses(output)
    take_back(output)
    resumed = train_by_two(folder, output, *ZERO[stage], *flags, *evaluate)
    assert f"Resuming from {output / 'checkpoint-2'}" in resumed.stderr
    assert losses(output) == kept
    assert furthest(weights(output), final) == 0


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_evaluations_of_two_processes_equal_those_of_one(folder, tmp_path, stage):
    flags = ["--eval-data", folder / "held_out.jsonl", "--eval-exact-match", "--eval-max-new-tokens", "3"]
    flags += ["--per-device-eval-batch-size", "2", *IN_ORDER]
    base = ["--model", folder / "model", "--data", folder / "data.jsonl", *STEPS, *flags]
    run(*base, "--output", tmp_path / "one", BATCH, 4)
    run(*base, "--output", tmp_path / "two", BATCH, 2, *ZERO[stage], processes=2)

    def evaluations(output):
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        return [(entry["eval_loss"], entry["eval_exact_match"]) for entry in history if "eval_loss" in entry]

    one, two = evaluations(tmp_path / "one"), evaluations(tmp_path / "two")
    assert len(one) == len(two) >= 2
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        pytest.param("zero2", [], id="zero2"),
        pytest.param("zero3", [], id="zero3"),
        # Nothing before the first layers that have adapters is trained.
        pytest.param("zero3", ["--train"], id="zero3, adapters alone", marks=pytest.mark.slow),
    ],
)
def test_adapters_train_the_same_in_two_processes(folder, tmp_path, alone, stage, more):
    flags = [*IN_ORDER, "--lora-rank", "4", "--lora-vision", *more]
    output = tmp_path / "output"
    train_by_two(folder, output, *ZERO[stage], *flags)
    assert_as_alone(output, alone(*flags))
    final = weights(output)
    take_back(output)
    train_by_two(folder, output, *ZERO[stage], *flags)
    assert furthest(weights(output), final) == 0


def test_zero3_with_everything_offloaded_equals_one_process(folder, tmp_path, alone):
    output = tmp_path / "output"
    train_by_two(folder, output, "--deepspeed", "zero3-offload", *IN_ORDER)
    assert_as_alone(output, alone(*IN_ORDER))


@pytest.mark.parametrize("stage", ["ddp", "zero2", "zero3"])
def test_many_images_in_less_memory_train_the_same_in_two_processes(folder, tmp_path, alone, stage):
    """Tiles of MLPs whose weights are gathered and reduced, no queries of images, and inputs of layers in main memory."""
    flags = [*IN_ORDER, "--train", "projector", "embeddings", "language"]
    reduced = ["--tiled-mlp", "8", "--skip-image-queries", "--offload-activations", "--activation-checkpointing", "true"]
    output = tmp_path / "output"
    train_by_two(folder, output, *ZERO[stage], *flags, *reduced)
    assert_as_alone(output, alone(*flags))


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [[], ["--tiled-mlp", "8", "--skip-image-queries"]], ids=" ".join)
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_compiled_layers_train_the_same_under_zero3(folder, tmp_path, alone, checkpointing, reduced):
    """With an evaluation, which is not compiled, after every second step."""
    output = tmp_path / "output"
    flags = [*IN_ORDER, "--compile-decoder-layers", "--activation-checkpointing", checkpointing, *reduced]
    evaluate = ["--eval-data", folder / "held_out.jsonl", "--eval-exact-match", "--eval-max-new-tokens", "3"]
    train_by_two(folder, output, *ZERO["zero3"], *flags, *evaluate)
    assert_as_alone(output, alone(*IN_ORDER))


def test_what_zero_to_fp32_makes_of_partitions_is_what_was_trained(folder, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    output = tmp_path / "output"
    train_by_two(folder, output, "--deepspeed", "zero3")
    consolidated = weights(output / "checkpoint-4")
    gathered = get_fp32_state_dict_from_zero_checkpoint(str(output / "checkpoint-4"))
    assert set(gathered) == {name for name in consolidated if "multi_modal_projector" in name or "embed_tokens" in name}
    assert furthest({key: gathered[key] for key in gathered}, {key: consolidated[key] for key in gathered}) == 0
    assert furthest(weights(output), consolidated) == 0


def test_the_deepspeed_launcher_starts_it_from_a_file(folder, tmp_path, alone):
    output = tmp_path / "output"
    zero2 = json.loads((Path(dsvl.training.__file__).with_name("zero2.json")).read_text())
    values = {"model": str(folder / "model"), "data": str(folder / "data.jsonl"), "output": str(output), "deepspeed": zero2}
    values |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": "1e-2"}
    values |= {"per_device_train_batch_size": 16, "train_sampling_strategy": "sequential"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    run(tmp_path / "run.yaml", BATCH, 2, processes=2, launcher="deepspeed")  # a flag overrides the file
    assert_as_alone(output, alone(*IN_ORDER))


def test_accelerate_launch_starts_it(folder, tmp_path, alone):
    """A single process, as accelerate needs MPI for several on CPUs; its environment must not disable DeepSpeed."""
    output = tmp_path / "output"
    base = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, BATCH, 4, *STEPS, *IN_ORDER]
    run(*base, "--deepspeed", "zero2", launcher="accelerate")
    assert (output / "checkpoint-4" / "latest").is_file()  # DeepSpeed's
    assert_as_alone(output, alone(*IN_ORDER))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--lora-rank", "4"], ["--activation-checkpointing", "true"]], ids=" ".join)
@pytest.mark.parametrize("train", ["projector", "projector embeddings vision language head"])
@pytest.mark.parametrize("stage", [*ZERO, "zero3-offload"])
def test_the_whole_matrix(folder, tmp_path, alone, stage, train, flags):
    if flags[:1] == ["--lora-rank"] and "language" in train:
        train = "projector embeddings vision head"
    chosen = [*IN_ORDER, *flags, "--train", *train.split()]
    output = tmp_path / "output"
    train_by_two(folder, output, *ZERO.get(stage, ["--deepspeed", stage]), *chosen)
    assert losses(output) == pytest.approx(losses(alone(*chosen)), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind"),
    [("ddp", "images"), ("zero2", "images"), ("zero3", "images"), ("zero3", "features"), ("zero3", "tower")],
)
@pytest.mark.parametrize("layout", ["tiles", "native"])
def test_two_processes_equal_one_with_images_of_different_lengths(folder, tmp_path, layout, stage, kind):
    """One of them has only texts in every other step; with evaluation and resuming, cached features, a trained tower."""
    if not (folder / layout).exists():
        make_layout_checkpoint(folder, layout)
    flags = [*IN_ORDER, "--eval-data", folder / "held_out.jsonl", "--eval-exact-match", "--eval-max-new-tokens", "3"]
    flags += ["--cache-image-features", tmp_path / "features"] if kind == "features" else []
    flags += ["--train", "projector", "embeddings", "language", "vision"] if kind == "tower" else []
    base = ["--model", folder / layout, "--data", folder / "data.jsonl", *STEPS, *flags]
    run(*base, "--output", tmp_path / "one", BATCH, 4)
    run(*base, "--output", tmp_path / "two", BATCH, 2, *ZERO[stage], processes=2)
    if kind == "tower":  # AdamW multiplies rounding in so many weights
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    else:
        assert_as_alone(tmp_path / "two", tmp_path / "one")
    final = weights(tmp_path / "two")
    take_back(tmp_path / "two")
    run(*base, "--output", tmp_path / "two", BATCH, 2, *ZERO[stage], processes=2)
    assert furthest(weights(tmp_path / "two"), final) == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero3", "fsdp", "fsdp in 8 bits"])
def test_a_checkpoint_is_read_into_main_memory_once(way, tmp_path, monkeypatch):
    """The processes map its files, so that they share the pages, and copy what they keep; or make it in 8 bits."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # gathered weights are in main memory here, and given back
    heads = dict(num_attention_heads=8, num_key_value_heads=8)
    make_checkpoint(tmp_path, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, **heads)
    make_conversations(tmp_path, layout="tt")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size > 600e6
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "output", BATCH, 1]
    script = str(Path(__file__).with_name("loading_memory.py"))
    fsdp = {"fsdp": ["--fsdp"], "fsdp in 8 bits": ["--fsdp", "--frozen-precision", "fp8", "--frozen-precision-keep", "none"]}
    run(tmp_path, *flags, "--max-steps", "1", *(ZERO | fsdp)[way], processes=2, module=script)
    loaded, until_a_step = torch.tensor([json.loads((tmp_path / rank).read_text()) for rank in "01"]).sum(0).tolist()
    copied = loaded if way == "zero3" else until_a_step  # FSDP shards what is loaded
    kept = size / 4 if "8 bits" in way else size  # of float32
    assert 0.95 * kept < copied < kept + 0.1 * size  # their shards, in main memory here too
    assert loaded < 0.05 * size or way == "zero3"


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map-style", "streamed"])
@pytest.mark.parametrize("layout", ["tiles", "native"])
def test_packs_of_tiles_train_and_resume(folder, tmp_path, layout, streaming):
    if not (folder / layout).exists():
        make_layout_checkpoint(folder, layout)
    flags = ["--packing", "--max-length", "256", "--max-images-per-pack", "12", "--dataloader-num-workers", "1", *streaming]
    flags += ["--max-bad-samples", "1", "--on-bad-sample", "skip", BATCH, "1", "--output", tmp_path / "output"]
    base = ["--model", folder / layout, "--data", folder / "data.jsonl", *STEPS, *flags]
    run(*base)
    final, kept = weights(tmp_path / "output"), losses(tmp_path / "output")
    take_back(tmp_path / "output")
    assert "Resuming from" in run(*base).stderr
    assert losses(tmp_path / "output") == kept and len(kept) == 4
    assert furthest(weights(tmp_path / "output"), final) == 0


@pytest.mark.parametrize("own", [None, 10])
def test_zero3_gathers_two_layers_in_advance(own, folder, tmp_path, monkeypatch):
    """Unless the configuration has a number of its own."""
    monkeypatch.setattr(model_loading, "is_deepspeed_zero3_enabled", lambda: True)
    configuration = json.loads(zero_configuration("zero3").read_text())
    zero = configuration["zero_optimization"]
    zero["stage3_prefetch_bucket_size"] = own or zero["stage3_prefetch_bucket_size"]
    argv = ["--model", str(folder / "model"), "--data", "x", "--output", str(tmp_path / "x"), "--use-cpu"]
    model_arguments, _, arguments = parse(argv)
    monkeypatch.setattr(zero3, "_zero3_configuration", lambda: SimpleNamespace(config=configuration))
    layers = load_model(model_arguments, arguments).model.language_model.layers
    two = sum(parameter.numel() for layer in layers[:2] for parameter in layer.parameters())
    assert zero["stage3_prefetch_bucket_size"] == (own or two)


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "2"]], ids=["", "lora"])
@pytest.mark.parametrize(
    ("train", "most", "at_once"),
    [(["projector"], 10**9, True), (["projector"], 10, False), (["projector", "vision"], 10**9, False)],
    ids=["frozen", "large", "trained"],
)
def test_zero3_gathers_a_frozen_tower_at_once(train, most, at_once, lora, folder, tmp_path, monkeypatch):
    from deepspeed.utils import z3_leaf_module

    monkeypatch.setattr(deepspeed_config, "MAX_LIVE_PARAMETERS", most)
    monkeypatch.setattr(model_loading, "is_deepspeed_zero3_enabled", lambda: True)
    argv = ["--model", str(folder / "model"), "--data", "x", "--output", str(tmp_path / "x"), "--use-cpu"]
    model_arguments, _, arguments = parse([*argv, "--train", *train, *lora])
    monkeypatch.setattr(zero3, "_zero3_configuration", lambda: None)
    model = base_model(load_model(model_arguments, arguments)).model
    assert z3_leaf_module(model.vision_tower) == at_once
    assert all(map(z3_leaf_module, [*model.vision_tower.encoder.layers, *model.language_model.layers]))
