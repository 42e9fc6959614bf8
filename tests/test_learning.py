"""Trained parts and results of `dsvl train`: adapters, precision, activation checkpointing, evaluation."""

import json
import logging
import re

import pytest
import torch
from reference_data import ReferenceCase
from training_runs import BATCH, STEPS, furthest, losses, make_checkpoint, make_conversations, weights
from transformers import AutoProcessor

import dsvl
from dsvl import DSVLForConditionalGeneration
from dsvl.cli import main
from dsvl.training import ConversationCollator, lora_config, merge_adapters
from dsvl.training.arguments import parse
from dsvl.training.model_loading import load_model

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning")
    make_checkpoint(folder)
    make_checkpoint(folder / "tied", tie_word_embeddings=True)
    make_conversations(folder)
    make_conversations(folder, "texts.jsonl", layout="tttt")
    make_conversations(folder, "held_out.jsonl", layout="ptppt")
    return folder


def train(folder, output, *flags, model="model"):
    argv = [
        "train",
        "--model",
        folder / model,
        "--data",
        folder / "data.jsonl",
        "--output",
        output,
        BATCH,
        4,
        *STEPS,
        *flags,
    ]
    assert main(list(map(str, argv))) == 0
    return output


def batch_of(folder, name="data.jsonl", size=4):
    from dsvl.data import load_conversations

    conversations = load_conversations(folder / name)
    collator = ConversationCollator(AutoProcessor.from_pretrained(folder / "model"))
    return collator([conversations[index] for index in range(size)])


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in named.values())
    return loss.detach(), named


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


@pytest.fixture
def reference():
    """The adapters of the released code loaded into PEFT, with its scale of 1 / rank."""
    case = ReferenceCase("G_lora")
    adapters = {key: value for key, value in case.weights.items() if "lora_" in key}
    model = case.model("mmca_reference", "eager", keep_adapter=True)  # without them
    model = peft.get_peft_model(model, lora_config(model, rank=4, alpha=1))
    modules = dict(model.named_modules())
    for key, value in adapters.items():
        name, side = key.removeprefix("lang_decoder.model.").rsplit(".", 1)
        module = modules[f"base_model.model.model.language_model.{name}"]
        # W x + (x right) left: right is A transposed, left is B transposed.
        linear = module.lora_A if side == "lora_right_weight" else module.lora_B
        linear["default"].weight.data = value.T.clone()
    return case, model


def test_adapters_have_the_outputs_and_gradients_of_the_released_code(reference):
    case, model = reference
    batch = case.batch("batch")
    output = model(**batch)
    real = batch["attention_mask"].bool()
    expected = case.outputs["unfused.batch.logits"][:, : real.shape[1]]
    torch.testing.assert_close(output.logits[real], expected[real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.loss.detach()[None], case.outputs["unfused.batch.loss"], atol=1e-5, rtol=0)
    output.loss.backward()
    modules, compared = dict(model.named_modules()), 0
    for key, expected in case.outputs.items():
        if not key.startswith("unfused.batch.grad.lang_decoder.model.layers"):
            continue
        name, side = key.removeprefix("unfused.batch.grad.lang_decoder.model.").rsplit(".", 1)
        module = modules[f"base_model.model.model.language_model.{name}"]
        linear = module.lora_A if side == "lora_right_weight" else module.lora_B
        torch.testing.assert_close(linear["default"].weight.grad.T, expected, atol=1e-5, rtol=0)
        compared += 1
    assert compared == 3 * 7 * 2  # layers, linear maps, sides


def test_merged_adapters_are_the_released_codes_fused_ones(reference):
    from conftest import REFERENCE
    from safetensors.torch import load_file

    case, model = reference
    merged = model.merge_and_unload()
    fused = load_file(REFERENCE / "G_lora/weights_fused.safetensors")
    own = dict(merged.named_parameters())
    for key, expected in fused.items():
        name = "model.language_model." + key.removeprefix("lang_decoder.model.")
        torch.testing.assert_close(own[name].data, expected, atol=1e-6, rtol=1e-5)
    for run in ("single", "batch"):
        batch = case.batch(run)
        with torch.no_grad():
            output = merged(**batch)
        real = batch["attention_mask"].bool()
        expected = case.outputs[f"fused.{run}.logits"][:, : real.shape[1]]
        torch.testing.assert_close(output.logits[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_are_saved_loaded_and_merged(folder, tmp_path, dora):
    flags = ["--dora", "true"] if dora else []
    output = train(folder, tmp_path / "output", "--lora-rank", "4", "--lora-vision", *flags)
    batch = batch_of(folder)
    base = DSVLForConditionalGeneration.from_pretrained(folder / "model")
    adapted = peft.PeftModel.from_pretrained(base, output / "adapters").eval()
    merged = DSVLForConditionalGeneration.from_pretrained(output).eval()
    untrained = DSVLForConditionalGeneration.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        expected, got, before = (model(**batch).loss for model in (adapted, merged, untrained))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert got < before - 0.1

    assert main(f"merge --model {folder}/model --adapters {output}/adapters --out {tmp_path}/merged".split()) == 0
    assert furthest(weights(tmp_path / "merged"), weights(output)) == 0
    again = merge_adapters(folder / "model", output / "adapters")
    assert furthest(dict(again.state_dict()), dict(merged.state_dict())) == 0


def test_adapters_change_only_their_targets(folder, tmp_path):
    flags = ["--lora-rank", "4", "--lora-targets", "q_proj", "v_proj", "--train", "projector"]
    before, after = weights(folder / "model"), weights(train(folder, tmp_path / "output", *flags))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert {name.split(".")[-2] for name in changed if "language_model" in name} == {"q_proj", "v_proj"}
    assert not any("embed" in name or "vision_tower" in name or "lm_head" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)


def test_adapters_on_the_tower_alone(folder, tmp_path):
    flags = ["--lora-rank", "4", "--lora-vision", "--no-lora-language"]
    before, after = weights(folder / "model"), weights(train(folder, tmp_path / "output", *flags))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert any("vision_tower" in name for name in changed)
    assert not any("language_model.layers" in name for name in changed)


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "4"]], ids=["in full", "adapters"])
def test_a_tied_head_stays_tied(folder, tmp_path, flags):
    output = train(folder / "tied", tmp_path / "output", "--data", folder / "data.jsonl", *flags)
    trained = DSVLForConditionalGeneration.from_pretrained(output)
    untrained = DSVLForConditionalGeneration.from_pretrained(folder / "tied/model")
    assert trained.lm_head.weight is trained.get_input_embeddings().weight
    assert not trained.lm_head.weight.equal(untrained.lm_head.weight)


def test_unknown_targets_are_named(folder):
    model = DSVLForConditionalGeneration.from_pretrained(folder / "model")
    with pytest.raises(ValueError, match=r"query_key_value.*choose from down_proj, gate_proj"):
        lora_config(model, 4, targets=["query_key_value"])


def test_quantized_weights_carry_adapters(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    output = train(folder, tmp_path / "output", "--lora-rank", "4", "--qlora")
    assert losses(output)[-1] < losses(output)[0] - 0.1
    merged = DSVLForConditionalGeneration.from_pretrained(output)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("data", ["data.jsonl", "texts.jsonl"])
@pytest.mark.parametrize("parts", ["projector", "embeddings", "projector embeddings", "vision_tower", "adapters"])
def test_checkpointed_activations_give_the_same_gradients(folder, parts, data, reentrant):
    batch = batch_of(folder, data)
    results = []
    for checkpointed in (False, True):
        model = DSVLForConditionalGeneration.from_pretrained(folder / "model").train()
        if parts == "adapters":
            torch.manual_seed(0)
            model = peft.get_peft_model(model, lora_config(model, 4))
        else:
            everything = ("projector", "embeddings", "vision_tower", "language_model", "lm_head")
            model.set_trainable(**{part: part in parts.split() for part in everything})
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        results.append(gradients(model, batch))
    (loss, plain), (again, recomputed) = results
    assert loss == again
    assert plain.keys() == recomputed.keys() and plain
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], atol=1e-6, rtol=1e-5)
    trained_on_texts = parts not in ("projector", "vision_tower")
    assert any(gradient.abs().max() > 0 for gradient in plain.values()) == (data == "data.jsonl" or trained_on_texts)


def test_a_batch_of_texts_gives_the_projector_zero_gradients_and_the_same_loss(folder):
    batch = batch_of(folder, "texts.jsonl")
    model = DSVLForConditionalGeneration.from_pretrained(folder / "model").set_trainable()
    training, named = gradients(model.train(), batch)
    assert "pixel_values" not in batch
    assert all(named[name].abs().max() == 0 for name in named if "projector" in name)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).loss, training, atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Precision, evaluation, reports


def test_in_bfloat16_trainable_weights_are_float32_and_saved_ones_are_not(folder, tmp_path):
    argv = ["--model", str(folder / "model"), "--data", "x", "--output", str(tmp_path / "x"), "--bf16"]
    model_arguments, _, arguments = parse(argv)
    model = load_model(model_arguments, arguments)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert model.get_input_embeddings()(torch.tensor([[1]])).dtype == torch.bfloat16

    output = train(folder, tmp_path / "output", "--bf16", "--eval-data", folder / "held_out.jsonl", "--eval-exact-match")
    assert {value.dtype for value in weights(output).values()} == {torch.bfloat16}
    assert losses(output)[-1] < losses(output)[0] - 0.1


def test_the_best_checkpoint_is_kept_and_training_stops_early(folder, tmp_path):
    # Training makes these answers less likely, so the first evaluation is the best.
    held_out = (folder / "held_out.jsonl").read_text().splitlines()
    conversations = [json.loads(line) for line in held_out]
    for conversation in conversations:
        for message in conversation["messages"][1::2]:
            message["content"] = "Xylophones quiz us vexingly, 0123456789"
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, conversations)))
    flags = ["--eval-data", folder / "other.jsonl", "--max-steps", "20", "--learning-rate", "3e-2", "--warmup-steps", "0"]
    flags += ["--early-stopping-patience", "2", "--save-total-limit", "1", "--lr-scheduler-type", "constant"]
    output = train(folder, tmp_path / "output", *flags)
    state = json.loads((output / "trainer_state.json").read_text())
    evaluations = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(evaluations, key=evaluations.get)
    assert state["best_global_step"] == best < state["global_step"] < 20
    kept = sorted(path.name for path in output.glob("checkpoint-*"))
    assert kept == sorted({f"checkpoint-{best}", f"checkpoint-{state['global_step']}"})
    assert furthest(weights(output), weights(output / f"checkpoint-{best}")) == 0


def test_a_run_logs_what_it_trains_and_skips(folder, tmp_path, caplog):
    lines = (folder / "data.jsonl").read_text().splitlines()
    lines[3:3] = ["{broken", json.dumps({"messages": [{"role": "user", "content": "no answer"}]})]
    (folder / "broken.jsonl").write_text("\n".join(lines))
    flags = ["--data", folder / "broken.jsonl", "--on-bad-sample", "skip", "--max-length", "130", "--max-bad-samples", "1"]
    with caplog.at_level(logging.INFO, logger="dsvl"):
        output = train(folder, tmp_path / "output", *flags)
    said = caplog.text
    assert re.search(r"Model: loaded in 0:00:\d\d\.", said)
    assert "Parameters: 30,912 of 155,488 are trained (19.88%)." in said
    assert "Data: 10 conversations, 10 turns, 4 images, 1,226 tokens, 81 trained." in said
    assert "Optimizer: 0.000 GiB in each of 1 processes (not partitioned)." in said
    assert "Attention: under 'mmca' without numbered images a decoder whose layers are frozen hardly tells" in said
    assert "compose again with --numbered-images 1024, or with --multimodal-attention causal" in said
    assert "line 4: is not JSON" in said and "line 5: the last message is the user's" in said
    assert "2 of 20 samples are broken and were skipped" in said
    assert "2 samples of" in said and "lost turns beyond the maximum length" in said
    card = (output / "README.md").read_text()
    assert "| broken.jsonl | 18 |" in card and "| learning rate | 0.01 |" in card
    assert "last logged training loss" in card


@pytest.mark.parametrize("trained", [["--lora-rank", "2"], ["--train", "projector", "language"]])
def test_a_decoder_that_is_trained_may_tell_images_apart(folder, tmp_path, caplog, trained):
    with caplog.at_level(logging.INFO, logger="dsvl"):
        train(folder, tmp_path / "output", *trained, "--max-steps", "1")
    assert "Parameters: " in caplog.text and "Attention: " not in caplog.text


@pytest.mark.parametrize("options", [{"numbered_images": 8}, {"multimodal_attention": "causal"}], ids=["numbered", "causal"])
def test_a_frozen_decoder_may_tell_images_apart_by_their_numbers(folder, tmp_path, caplog, options):
    model, processor = dsvl.compose(folder / "tower", folder / "llama", **options)
    dsvl.save_checkpoint(model, processor, tmp_path / "model")
    with caplog.at_level(logging.INFO, logger="dsvl"):
        train(folder, tmp_path / "output", "--max-steps", "1", model=tmp_path / "model")
    assert "Parameters: " in caplog.text and "Attention: " not in caplog.text


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_every_trainable_part_of_the_tower_gets_a_gradient(layer):
    """DDP waits for the gradients of all of them."""
    from conftest import batch, tiny_model

    model = tiny_model(dtype=torch.float32)
    model.config.vision_feature_layer = layer
    model.set_trainable(vision_tower=True)
    _, named = gradients(model.train(), batch("tIt", dtype=torch.float32) | {"labels": torch.full((1, 7), 3)})
    layers = {name.split("layers.")[1][0] for name in named if "vision_tower.encoder.layers" in name}
    assert layers == ({"0", "1"} if layer == -1 else {"0"})
    assert not any("post_layernorm" in name for name in named)
