"""Which linear layers adapters are put on: names, paths, ranges, and ranks of their own for the vision tower."""

import json
import re

import peft
import pytest
import torch
from conftest import batch, tiny_model
from huggingface_hub import ModelCard
from torch import nn
from training_runs import furthest, make_checkpoint, make_conversations, weights

from dsvl import DSVLForConditionalGeneration
from dsvl.cli import main
from dsvl.training.adapters import describe_adapters, lora_config, merge_adapters
from dsvl.training.memory_plan import plan

DECODER, TOWER = "model.language_model.", "model.vision_tower."


def adapted(model):
    """The paths of a PEFT model's adapted layers -> their rank."""
    found = {name: module.r["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {name.removeprefix("base_model.model."): rank for name, rank in found.items()}


def with_adapters(rank=4, **options):
    model = tiny_model(dtype=torch.float32)
    return peft.get_peft_model(model, lora_config(model, rank, **options))


def linear_layers(prefix):
    named = tiny_model(dtype=torch.float32).named_modules()
    return {name for name, module in named if isinstance(module, nn.Linear) and name.startswith(prefix)}


@pytest.mark.parametrize(
    ("targets", "selected"),
    [
        (["q_proj"], lambda n: n.endswith(".q_proj")),
        (["mlp"], lambda n: ".mlp." in n),
        (["layers.1"], lambda n: ".layers.1." in n),
        (["layers.0-1"], lambda n: True),
        (["layers.0-1.*.q_proj", "layers.0.mlp.*_proj"], lambda n: n.endswith(".q_proj") or ".layers.0.mlp." in n),
        (["language_model.layers.0.self_attn.k_proj"], lambda n: n == f"{DECODER}layers.0.self_attn.k_proj"),
        (["self_attn.q_proj", "down_proj"], lambda n: n.endswith((".q_proj", ".down_proj"))),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_target_selects_layers_at_and_below_its_path(targets, selected):
    model = with_adapters(targets=targets)
    assert set(adapted(model)) == {name for name in linear_layers(DECODER) if selected(name)}


def test_a_name_is_not_a_part_of_another():
    """Layer 1 is not layer 10 to 11, and `proj` is not `q_proj`."""
    found = adapted(
        peft.get_peft_model(model := tiny_model(num_hidden_layers=12), lora_config(model, 2, targets=["layers.1"]))
    )
    assert found and all(".layers.1." in name for name in found)
    with pytest.raises(
        ValueError, match="--lora-targets proj: no linear layer matches proj; choose from down_proj, gate_proj"
    ):
        lora_config(tiny_model(), 2, targets=["proj"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(targets=["layers.0-15"]),
            "--lora-targets layers.0-15: no linear layer matches layers.2; layers is followed by 0-1",
        ),
        (
            dict(targets=["q_proj", "layers.7"]),
            "--lora-targets layers.7: no linear layer matches layers.7; layers is followed by",
        ),
        (
            dict(targets=["layers.0.attn"]),
            "--lora-targets layers.0.attn: no linear layer matches layers.0.attn; layers.0 is followed by mlp, self_attn.",
        ),
        (dict(targets=["q_proj.weight"]), "no linear layer matches q_proj.weight; q_proj is followed by nothing."),
        (dict(targets=["layers.3-1"]), "--lora-targets layers.3-1: the range 3-1 is empty; expected names joined by dots"),
        (dict(targets=["layers..q_proj"]), "--lora-targets layers..q_proj: a name between dots is missing; expected names"),
        (
            dict(targets=["fc1"]),
            "no linear layer matches fc1; choose from down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or a",
        ),
        (
            dict(targets=["gate_proj"], vision=True),
            "--lora-targets gate_proj: no linear layer of the vision tower matches; choose from fc1, fc2, k_proj, out_proj",
        ),
        (
            dict(vision=True, vision_targets=["gate_proj"]),
            "--lora-vision-targets gate_proj: no linear layer matches gate_proj; choose from fc1, fc2, k_proj, out_proj",
        ),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_what_exists(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_config(tiny_model(), 4, **options)


def test_the_tower_has_a_rank_and_targets_of_its_own():
    model = with_adapters(rank=4, targets=["layers.0"], vision=True, vision_rank=2, vision_targets=["self_attn"])
    ranks = adapted(model)
    assert {name for name, rank in ranks.items() if rank == 4} == {n for n in linear_layers(DECODER) if ".layers.0." in n}
    assert {name for name, rank in ranks.items() if rank == 2} == {n for n in linear_layers(TOWER) if ".self_attn." in n}
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    scales = {module.r["default"]: module.scaling["default"] for module in layers}
    assert scales == {4: 2.0, 2: 2.0}  # alpha is twice the rank of either
    assert describe_adapters(model) == (
        "LoRA: decoder rank 4, alpha 8 (7 of 14 linear layers); vision tower rank 2, alpha 4 (8 of 12 linear layers)"
    )


def test_a_given_alpha_is_that_of_both_parts():
    model = with_adapters(rank=4, alpha=1, vision=True, vision_rank=2)
    assert describe_adapters(model) == (
        "LoRA: decoder rank 4, alpha 1 (14 of 14 linear layers); vision tower rank 2, alpha 1 (12 of 12 linear layers)"
    )


def test_without_a_rank_of_its_own_the_tower_has_the_decoders():
    assert set(adapted(with_adapters(rank=3, vision=True)).values()) == {3}
    assert set(adapted(with_adapters(rank=3, vision=True)).keys()) > linear_layers(DECODER)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_of_two_ranks_are_saved_loaded_by_peft_and_merged(tmp_path, dora):
    model = with_adapters(rank=4, targets=["layers.1"], vision=True, vision_rank=2, vision_targets=["mlp"], dora=dora).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        inputs = batch("ttItIt", "ttt", dtype=torch.float32)
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path).eval()
        assert adapted(again) == adapted(model)
        assert again(**inputs).logits.equal(expected)
        plain = tiny_model(dtype=torch.float32)(**inputs).logits
        merged = again.merge_and_unload()(**inputs).logits
    assert (plain - expected).abs().max() > 0.01
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)


def test_plan_counts_the_adapters_of_both_parts():
    config = tiny_model().config
    options = dict(sequence_length=64, train=["projector"], dtype="float32")
    plain = plan(config, **options)
    decoder = plan(config, lora_rank=4, lora=dict(targets=["layers.0.self_attn.q_proj"]), **options)
    assert decoder.trained - plain.trained == 4 * (32 + 32)
    both = plan(
        config,
        lora_rank=4,
        lora=dict(targets=["layers.0.self_attn.q_proj"], vision=True, vision_rank=2, vision_targets=["fc1"]),
        **options,
    )
    assert both.trained - decoder.trained == 2 * 2 * (16 + 24)  # two layers of the tower
    assert both.forward_backward.activations > decoder.forward_backward.activations  # the tower keeps a graph
    with pytest.raises(ValueError, match="lora={'vision': True} without adapters; also pass a lora_rank"):
        plan(config, lora=dict(vision=True), **options)
    with pytest.raises(
        ValueError, match="lora_rank=4 freezes the vision tower's layers and adapts them, but train contains 'vision'"
    ):
        plan(config, lora_rank=4, lora=dict(vision=True), train=["vision"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    make_checkpoint(folder)
    make_conversations(folder, layout="ptppt")
    return folder


def train(folder, output, *flags):
    argv = ["train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, "--max-steps", 2]
    argv += ["--per-device-train-batch-size", 2, "--learning-rate", "1e-2", "--report-to", "none", "--train", "projector"]
    return main(list(map(str, [*argv, *flags])))


FLAGS = ["--lora-rank", 4, "--lora-targets", "layers.0.*.q_proj", "--lora-vision", "--lora-vision-rank", 2]
FLAGS += ["--lora-vision-targets", "layers.1.mlp"]


def test_the_command_trains_its_targets_alone_and_says_so(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    output = tmp_path / "output"
    assert train(folder, output, *FLAGS) == 0
    before, after = weights(folder / "model"), weights(output)
    changed = {name for name in before if not before[name].equal(after[name]) and "multi_modal_projector" not in name}
    tower = {f"{TOWER}encoder.layers.1.mlp.{name}.weight" for name in ("fc1", "fc2")}
    assert changed == {f"{DECODER}layers.0.self_attn.q_proj.weight"} | tower

    # Plain PEFT reads the adapters; what it merges is what was saved.
    base = DSVLForConditionalGeneration.from_pretrained(folder / "model")
    merged = peft.PeftModel.from_pretrained(base, output / "adapters").merge_and_unload()
    assert furthest(dict(merged.state_dict()), dict(merge_adapters(folder / "model", output / "adapters").state_dict())) == 0
    assert all(merged.state_dict()[name].equal(after[name]) for name in changed)

    settings = json.loads((output / "run.json").read_text())["settings"]
    assert settings["lora_vision_rank"] == 2 and settings["lora_vision_targets"] == ["layers.1.mlp"]
    card = ModelCard.load(output / "README.md").text
    assert (
        "LoRA: decoder rank 4, alpha 8 (1 of 14 linear layers); vision tower rank 2, alpha 4 (2 of 12 linear layers)" in card
    )

    capsys.readouterr()
    assert train(folder, output, *FLAGS[:-3], 3, *FLAGS[-2:]) == 1
    assert "belongs to another run: lora_vision_rank (2 before, 3 now)" in capsys.readouterr().err


def test_the_plan_command_takes_the_flags_of_training(folder, capsys):
    argv = ["plan", "--model", folder / "model", "--sequence-length", 64, "--gpu-memory", 2.2]
    assert main(list(map(str, [*argv, "--train", "projector", *FLAGS]))) == 0
    said = capsys.readouterr().out
    adapters = 4 * (64 + 64) + 2 * 2 * (32 + 48)
    projector = (32 + 1) * 64
    assert f"{(adapters + projector) / 1e6:,.2f} million of them trained" in said
    assert main(list(map(str, [*argv, "--lora-vision-rank", 2, "--lora-rank", 4]))) == 1
    assert "--lora-vision-rank without --lora-vision; pass both." in capsys.readouterr().err


# -- adapters of another model -----------------------------------------------------------------------------------------


def with_projector(projector_type):
    config = tiny_model().config
    config.projector_type = projector_type
    return DSVLForConditionalGeneration(config).float()


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            dict(num_hidden_layers=4),
            "model.language_model.layers.2.mlp.down_proj.lora_A.weight is (4, 48) in the adapters, and",
        ),
        (dict(num_hidden_layers=1), "model.language_model.layers.1.mlp.down_proj.lora_A.weight is missing in the adapters"),
        (dict(projector_type="mlp"), "model.multi_modal_projector."),
        (dict(intermediate_size=96), "model.language_model.layers.0.mlp.down_proj.lora_A.weight is (4, 96) in the adapters"),
    ],
    ids=str,
)
def test_adapters_of_another_model_are_not_merged(tmp_path, other, difference):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    model = tiny_model(dtype=torch.float32, **other) if "projector_type" not in other else with_projector(**other)
    peft.get_peft_model(model, lora_config(model, 4, train=["projector"])).save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match="these adapters were trained on another model than .*; pass the one") as error:
        merge_adapters(tmp_path / "model", tmp_path / "adapters")
    assert difference in str(error.value)


def test_adapters_of_layers_with_other_names_are_not_merged(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    peft.get_peft_model(model, lora_config(model, 4)).save_pretrained(tmp_path / "adapters")
    path = tmp_path / "adapters/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["query_key_value"]}))
    with pytest.raises(ValueError, match="these adapters were trained on another model than .*No modules were targeted"):
        merge_adapters(tmp_path / "model", tmp_path / "adapters")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(vision_rank=2), "vision_rank=2 without vision=True has no effect; pass both, or omit it."),
        (dict(vision_targets=["fc1"]), "vision_targets=['fc1'] without vision=True has no effect; pass both, or omit it."),
        (dict(targets="q_proj"), "targets='q_proj' is a text; pass a list of names, such as ['q_proj']."),
        (dict(train="projector"), "train='projector' is a text; pass a list of names, such as ['projector']."),
    ],
)
def test_arguments_that_would_be_ignored_or_misread_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_config(tiny_model(), 8, **options)
