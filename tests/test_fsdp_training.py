"""Two processes that shard a model by FSDP2 (`--fsdp`) train like one process, and like DDP."""

import json
from pathlib import Path

import pytest
import torch
from training_runs import (
    BATCH,
    IN_ORDER,
    STEPS,
    furthest,
    losses,
    make_layout_checkpoint,
    make_training,
    run,
    take_back,
    weights,
)
from transformers import AutoModelForImageTextToText, AutoProcessor

from dsvl.training.arguments import parse
from dsvl.training.run import train as train_here

EVALUATE = ["--eval-exact-match", "--eval-max-new-tokens", "3", "--per-device-eval-batch-size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_training(tmp_path_factory.mktemp("fsdp"))


def train(folder, output, *flags, processes=2, batch=None, model="model", **options):
    """A run of 4 samples a step."""
    base = ["--model", folder / model, "--data", folder / "data.jsonl", "--output", output, *IN_ORDER, *STEPS]
    return run(*base, BATCH, batch or 4 // processes, *flags, processes=processes, **options)


def evaluations(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["eval_loss"], entry["eval_exact_match"]) for entry in history if "eval_loss" in entry]


def shapes_of_states(checkpoint):
    """What distributed checkpointing says of the optimizer's states: name -> shapes of its parts."""
    from torch.distributed.checkpoint import FileSystemReader

    found = FileSystemReader(checkpoint / "optimizer_0").read_metadata().state_dict_metadata
    return {name: [chunk.sizes for chunk in one.chunks] for name, one in found.items() if hasattr(one, "chunks")}


def test_two_shards_train_evaluate_save_and_resume_as_one_process(folder, tmp_path):
    """Where one of them has no images; with activation checkpointing and accumulated gradients."""
    flags = ["--eval-data", folder / "held_out.jsonl", *EVALUATE, *IN_ORDER, *STEPS]
    flags += ["--model", folder / "model", "--data", folder / "data.jsonl"]
    alone, output = tmp_path / "alone", tmp_path / "output"
    train_here(*parse([str(flag) for flag in (*flags, "--output", alone, BATCH, 4)]))
    flags += ["--output", output, BATCH, 1, "--gradient-accumulation-steps", 2, "--activation-checkpointing", "--fsdp"]
    done = run(*flags, processes=2, module=str(Path(__file__).with_name("trained_twice.py")))
    assert "in each of 2 processes (1/2, FSDP2)" in done.stderr
    assert losses(output) == pytest.approx(losses(alone), abs=1e-5) and len(losses(output)) == 4
    for ours, theirs in zip(evaluations(output), evaluations(alone), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)

    # Each process holds half of the states of what is trained, and nothing of the rest.
    parts = shapes_of_states(output / "checkpoint-4")
    trained = weights(folder / "model")["model.language_model.embed_tokens.weight"]
    name = "optimizer.state.model.language_model.embed_tokens.weight.exp_avg"
    assert sorted(map(tuple, parts[name])) == [(len(trained) // 2, trained.shape[1])] * 2
    assert not any("layers" in name for name in parts)

    # One set of weights, which any process loads; what was frozen has not changed by a bit.
    assert not list((output / "checkpoint-4").glob("pytorch_model*"))
    loaded, info = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert loaded.config.architectures == ["DSVLForConditionalGeneration"]
    final, before = weights(output), weights(folder / "model")
    assert furthest(final, weights(alone)) < 1e-5
    changed = {name for name in final if not torch.equal(final[name], before[name])}
    assert changed and all("embed_tokens" in name or "projector" in name for name in changed)

    # The resumed run ended as the first.
    first = output.with_name("output-first")
    assert f"Resuming from {output / 'checkpoint-2'}" in done.stderr
    assert losses(output) == losses(first)
    assert furthest(final, weights(first)) == 0


REFUSED = {
    ("--fsdp", "full_shard"): "--fsdp full_shard: FSDP2 has no strategies; pass --fsdp alone, and settings by --fsdp-config",
    ("--fsdp", "--deepspeed", "zero2"): "--fsdp with --deepspeed: both shard the model; choose one of them.",
    ("--fsdp", "--torch-compile"): "--fsdp with --torch-compile: a graph of the whole model",
    ("--fsdp", "--optim", "adafactor"): "--fsdp with --optim adafactor: it does not know sharded parameters; choose from",
    ("--fsdp", "--fsdp-config", '{"version": 1}'): "--fsdp-config version 1: only FSDP2 is supported; pass 2, or drop it.",
    ("--fsdp", "--fsdp-config", '{"fsdp_cpu_offload": true}'): "--fsdp-config cpu_offload is not supported (only version, "
    "reshard_after_forward are); pass --deepspeed zero3-offload instead of --fsdp.",
    ("--fsdp", "--fsdp-config", "missing.json"): "--fsdp-config missing.json is neither a file nor a mapping in JSON",
    ("--fsdp-config", '{"version": 2}'): """--fsdp-config {"version": 2} without --fsdp; pass both.""",
}


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_what_cannot_be_sharded_is_refused(folder, tmp_path, monkeypatch, flags):
    monkeypatch.setenv("WORLD_SIZE", "2")
    base = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", tmp_path, *flags]
    with pytest.raises(ValueError) as refusal:
        parse(list(map(str, base)))
    assert str(refusal.value).startswith(REFUSED[flags])


def test_a_single_process_has_nothing_to_shard(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="start several, for example by torchrun --nproc-per-node 2 -m dsvl.training"):
        parse(["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--output", str(tmp_path), "--fsdp"])


FROZEN = ["--frozen-precision-keep", "none", "--frozen-precision"]
EVERYTHING = ["--train", "projector", "embeddings", "vision", "language", "head"]
SETUPS = {
    "all parts": EVERYTHING,
    "all parts, checkpointed": [*EVERYTHING, "--activation-checkpointing"],
    "reentrant checkpoints": [*EVERYTHING, "--activation-checkpointing", "--activation-checkpointing-kwargs", "REENTRANT"],
    "adapters": ["--lora-rank", "4", "--lora-vision", "--activation-checkpointing"],
    "dora": ["--lora-rank", "4", "--dora"],
    "adapters alone": ["--lora-rank", "4", "--train"],
    "sharded in forward alone": [*EVERYTHING, "--fsdp-config", '{"reshard_after_forward": false}'],
    "less memory": [
        *("--train", "projector", "embeddings", "language", "--tiled-mlp", "8", "--skip-image-queries"),
        *("--offload-activations", "--activation-checkpointing"),
    ],
    "compiled layers": [*EVERYTHING, "--compile-decoder-layers"],
    "sgd": [*EVERYTHING, "--optim", "sgd"],
    "fp8": [*FROZEN, "fp8", "--activation-checkpointing"],
    "fp8, compiled layers": [*FROZEN, "fp8", "--compile-decoder-layers"],
    "int8, adapters": [*FROZEN, "int8", "--lora-rank", "4", "--lora-vision"],
}
SAME_ALONE = {"--fsdp-config": 2, "--tiled-mlp": 2, "--skip-image-queries": 1, "--offload-activations": 1}


def alone_flags(flags):
    """The flags without those that change where and when something is computed, but not what."""
    kept, skip = [], 0
    for flag in flags:
        skip = SAME_ALONE.get(flag, skip)
        if not skip:
            kept.append(flag)
        skip = max(skip - 1, 0)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
def test_shards_train_and_resume_in_every_setup(folder, tmp_path, setup):
    flags = ['{"use_reentrant": true}' if flag == "REENTRANT" else flag for flag in SETUPS[setup]]
    output = tmp_path / "output"
    train(folder, tmp_path / "alone", *alone_flags(flags), processes=1)
    train(folder, output, "--fsdp", *flags)
    assert losses(output) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    if "projector" in flags and "--optim" not in flags:  # AdamW multiplies rounding in so many weights
        assert furthest(weights(output), weights(tmp_path / "alone")) < 1e-2
    else:
        assert furthest(weights(output), weights(tmp_path / "alone")) < 1e-5
    final, kept = weights(output), losses(output)
    take_back(output)
    train(folder, output, "--fsdp", *flags)
    assert losses(output) == kept
    assert furthest(weights(output), final) == 0


@pytest.mark.slow
@pytest.mark.parametrize("packing", [[], ["--packing", "--max-length", "256"]], ids=["rows", "packs"])
@pytest.mark.parametrize("layout", ["pad", "tiles", "native"])
def test_shards_train_images_of_any_length(folder, tmp_path, layout, packing):
    if not (folder / layout).exists():
        make_layout_checkpoint(folder, layout)
    flags = [*packing, "--eval-data", folder / "held_out.jsonl", *EVALUATE]
    train(folder, tmp_path / "alone", *flags, processes=1, model=layout)
    train(folder, tmp_path / "output", "--fsdp", *flags, model=layout)
    assert losses(tmp_path / "output") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    for ours, theirs in zip(evaluations(tmp_path / "output"), evaluations(tmp_path / "alone"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_sixteen_bits_multiply_in_them_and_sum_in_float32(folder, tmp_path):
    """Near DDP, whose weights are trained in float32 too, and saved in 16 bits; frozen ones unchanged."""
    flags = ["--bf16", "--train", "projector", "embeddings", "language"]
    train(folder, tmp_path / "ddp", *flags)
    train(folder, tmp_path / "fsdp", "--fsdp", *flags)
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), abs=0.02)
    ours, theirs = weights(tmp_path / "fsdp"), weights(tmp_path / "ddp")
    assert {name: one.dtype for name, one in ours.items()} == {name: one.dtype for name, one in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "vision_tower" in name or "lm_head" in name)
    assert weights(tmp_path / "fsdp" / "checkpoint-4")["model.language_model.norm.weight"].dtype == torch.float32


@pytest.mark.slow
def test_frozen_weights_in_8_bits_are_saved_to_the_byte(folder, tmp_path):
    """In bf16, with a source in float32: all frozen weights keep its dtype."""
    output, source = tmp_path / "output", weights(folder / "model")
    train(folder, output, "--fsdp", "--bf16", "--frozen-precision-keep", "none", "--frozen-precision", "fp8")
    for path in (output, output / "checkpoint-4"):
        saved = weights(path)
        assert saved.keys() == source.keys()
        changed = {name for name, one in saved.items() if one.dtype != source[name].dtype or not one.equal(source[name])}
        assert changed and all("embed_tokens" in name or "projector" in name for name in changed)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_shards(folder, tmp_path):
    output = tmp_path / "output"
    train(folder, output, "--fsdp")
    final, kept = weights(output), losses(output)
    take_back(output)
    train(folder, output, "--fsdp", processes=4)
    assert losses(output) == pytest.approx(kept, abs=1e-5)
    assert furthest(weights(output), final) < 1e-5
