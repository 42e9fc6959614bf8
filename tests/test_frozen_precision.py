"""Training with frozen weights in 8 bits: which layers, original weights in all that is saved, adapters, and the command."""

import copy
import json
import re

import peft
import pytest
import torch
from conftest import IMAGE_ID, batch, tiny_model
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import STEPS, losses, make_checkpoint, make_conversations, take_back, weights

from dsvl import DSVLForConditionalGeneration
from dsvl.acceleration.decoder_layers import compile_8_bit_tower
from dsvl.acceleration.memory import frozen_linear
from dsvl.acceleration.memory.activation_offloading import offload_activations
from dsvl.acceleration.memory.frozen_linear import PRECISIONS, FrozenLinear, quantize_weight
from dsvl.cli import main
from dsvl.training import freeze_in_8_bits, lora_config, measure_errors, merge_adapters
from dsvl.training.frozen_precision import describe_frozen_weights, describe_products, frozen_linears, saved_name
from dsvl.training.memory_plan import Planner, plan
from dsvl.training.source_weights import SourceWeights
from dsvl.training.trainer import count_parameters

pytestmark = pytest.mark.usefixtures("fresh_log")

DECODER, TOWER = "model.language_model.", "model.vision_tower."
LAYOUT = "ppt" * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    make_checkpoint(folder, num_hidden_layers=4)
    make_conversations(folder, layout=LAYOUT)
    make_conversations(folder, "held_out.jsonl", layout="pt")
    return folder


@pytest.fixture
def train(folder, capsys):
    """`dsvl train` in this process: what it says; it must succeed."""

    def call(output, *flags, model="model", status=0):
        argv = [
            "--model",
            folder / model,
            "--data",
            folder / "data.jsonl",
            "--output",
            output,
            *STEPS,
            "--report-to",
            "none",
        ]
        argv += ["--per-device-train-batch-size", "4", "--disable-tqdm", "true", *flags]
        capsys.readouterr()
        found = main(["train", *map(str, argv)])
        said = capsys.readouterr()
        assert found == status, said.out + said.err
        return said.out + said.err

    return call


def model_of_four(**options):
    return tiny_model(num_hidden_layers=4, initializer_range=0.1, **options).set_trainable().train()


def labelled(*layouts, dtype=torch.float64):
    inputs = batch(*layouts, side="right", dtype=dtype)
    ids = inputs["input_ids"]
    return inputs | {"labels": ids.masked_fill((ids == IMAGE_ID) | (inputs["attention_mask"] == 0), -100)}


def step(model, inputs):
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def names(model):
    return {saved_name(name) for name, _ in frozen_linears(model)}


# -- which layers ------------------------------------------------------------------------------------------------------


def test_all_frozen_linear_layers_but_head_and_ends_of_the_decoder():
    model = model_of_four()
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    expected = {name for name in linear if name.startswith((f"{DECODER}layers.1.", f"{DECODER}layers.2.", TOWER))}
    before = count_parameters(model)
    assert freeze_in_8_bits(model, "fp8") == len(expected) == 14 + 12
    assert names(model) == expected
    assert count_parameters(model) == before
    told = describe_frozen_weights(model)
    assert told.startswith(
        "fp8 in 14 of 28 linear layers of the decoder and 12 of 12 linear layers of the vision tower (0.02 MiB"
    )
    assert told.endswith("float64 in layers.0, layers.3 of the decoder and the output head")


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (["none"], "float64 in the output head"),
        (["down_proj"], "float64 in 4 x layers.*.mlp.down_proj of the decoder and the output head"),
        (
            ["language_model.layers.2", "fc1"],
            "layers.2 of the decoder and 2 x encoder.layers.*.mlp.fc1 of the vision tower and",
        ),
        (["language_model.layers.0.mlp.up_proj"], "float64 in layers.0.mlp.up_proj of the decoder and the output head"),
    ],
)
def test_layers_are_kept_by_name_and_path(keep, told):
    model = model_of_four()
    freeze_in_8_bits(model, "int8", keep)
    assert told in describe_frozen_weights(model)
    pattern = "|".join(re.escape(one) for one in keep)
    assert not any(re.search(rf"(^|\.)({pattern})(\.|$)", name) for name in names(model))


def test_what_is_trained_stays_as_it_is():
    model = tiny_model(num_hidden_layers=3).set_trainable(language_model=True)
    freeze_in_8_bits(model, "fp8")
    assert names(model) and all(name.startswith(TOWER) for name in names(model))
    everything = tiny_model().set_trainable(language_model=True, vision_tower=True)
    # Layers that do not influence the features are frozen, and of no use.
    everything.model.vision_tower.requires_grad_(True)
    with pytest.raises(ValueError, match="no frozen linear layer in its decoder or vision tower"):
        freeze_in_8_bits(everything, "fp8")
    with pytest.raises(ValueError, match=r"--frozen-precision-keep x_proj: no linear layer matches"):
        freeze_in_8_bits(model_of_four(), "fp8", ["x_proj"])
    with pytest.raises(ValueError, match="precision='fp4' is unknown"):
        freeze_in_8_bits(model_of_four(), "fp4")


def test_layers_that_other_modules_read_stay_as_they_are():
    """The output projection of nn.MultiheadAttention, as in SigLIP's pooling head, and routers of mixtures of experts."""
    model = model_of_four()
    tower, layer = model.model.vision_tower, model.model.language_model.layers[1]
    tower.head = nn.MultiheadAttention(16, 2).double().requires_grad_(False)
    layer.mlp.gate = nn.Linear(32, 4).double().requires_grad_(False)
    freeze_in_8_bits(model, "fp8")
    assert not any(".head." in name or name.endswith(".gate") for name in names(model))
    states = torch.randn(3, 16, dtype=torch.float64)
    tower.head(states, states, states)


def test_where_products_are_computed(monkeypatch):
    model = model_of_four(dtype=torch.bfloat16)
    freeze_in_8_bits(copy.deepcopy(model), "fp8")
    integers, numbers, on_cores = (copy.deepcopy(model) for _ in range(3))
    freeze_in_8_bits(integers, "int8")
    freeze_in_8_bits(numbers, "fp8")
    assert describe_products(integers) == "in bfloat16, with dequantized weights"
    assert describe_products(numbers) == "in bfloat16, of numbers rounded to FP8 (there is no NVIDIA GPU)"
    freeze_in_8_bits(on_cores, "fp8", in_fp8=True)
    # The tower's MLPs are 24 wide.
    assert describe_products(on_cores) == "on FP8 tensor cores in 22 of 26 layers, whose sizes are multiples of 16"
    single = model_of_four(dtype=torch.float32)
    freeze_in_8_bits(single, "fp8", in_fp8=True)
    monkeypatch.setattr(frozen_linear, "why_not_in_fp8", lambda: None)
    monkeypatch.setattr("dsvl.training.frozen_precision.why_not_in_fp8", lambda: None)
    assert describe_products(single).endswith("(FP8 tensor cores are used with bfloat16, not float32)")


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
@pytest.mark.parametrize(("precision", "error"), [("fp8", 0.2), ("int8", 0.04)])
def test_losses_and_gradients_are_close(family, precision, error):
    options = {"num_hidden_layers": 2, "initializer_range": 0.1}
    model = tiny_model(family, **options).set_trainable().train()
    frozen = copy.deepcopy(model)
    freeze_in_8_bits(frozen, precision, ["none"])
    inputs = labelled("ttIttIt", "ttt")
    (loss, gradients), (expected, expected_gradients) = step(frozen, inputs), step(model, inputs)
    assert loss != expected and loss == pytest.approx(expected, rel=error / 20)
    assert (gradients - expected_gradients).norm() < error * expected_gradients.norm()


WAYS = [("compiled", "fp8")] + [(way, one) for way in ("checkpointed", "reentrant", "reduced") for one in PRECISIONS]
SLOW_WAYS = [("compiled", "int8"), ("all", "fp8"), ("all", "int8")]  # half a minute


@pytest.mark.parametrize(("way", "precision"), [*WAYS, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW_WAYS)])
def test_with_compiled_layers_checkpointing_and_reduced_memory_it_is_the_same(way, precision):
    model = model_of_four()
    freeze_in_8_bits(model, precision)
    changed = copy.deepcopy(model)
    if way in ("reduced", "all"):
        changed.reduce_memory(mlp_tile=7, offload=True, skip_image_queries=True)
        offload_activations(changed.model.language_model, ["cpu"])
    if way in ("checkpointed", "reentrant", "all"):
        changed.activation_checkpointing_enable({"use_reentrant": way == "reentrant"})
    if way in ("compiled", "all"):
        torch._dynamo.reset()
        changed.compile_decoder_layers(backend="aot_eager")
    for inputs in (labelled("ttIttIttttttt", "ttt"), labelled("tttttttttttttttt", "Itt")):
        (loss, gradients), (expected, expected_gradients) = step(changed, inputs), step(model, inputs)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert (gradients - expected_gradients).norm() < 1e-6 * expected_gradients.norm()


def test_attention_and_mlps_of_a_tower_in_8_bits_are_compiled_while_it_serves_training():
    model = model_of_four(vision_feature_layer=[-2, -1])
    freeze_in_8_bits(model, "fp8")
    changed = copy.deepcopy(model)
    torch._dynamo.reset()
    changed.compile_decoder_layers(backend="aot_eager", fullgraph=True)
    compile_8_bit_tower(changed)
    parts = [module for module in changed.model.vision_tower.modules() if module._compiled_call_impl is not None]
    assert sorted(type(part).__name__ for part in parts) == ["CLIPAttention"] * 2 + ["CLIPMLP"] * 2
    for layouts in (("ttIttIttttttt", "ttt"), ("tttttttttttttttt", "Itt")):
        inputs = labelled(*layouts)
        (loss, gradients), (expected, expected_gradients) = step(changed, inputs), step(model, inputs)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert (gradients - expected_gradients).norm() < 1e-6 * expected_gradients.norm()
    changed.eval()
    assert all(module._compiled_call_impl is None for module in changed.modules())


def test_offloading_leaves_8_bit_weights_where_they_are(monkeypatch):
    from dsvl.acceleration.memory import activation_offloading

    monkeypatch.setattr(activation_offloading, "MIN_BYTES", 1)
    model = model_of_four()
    freeze_in_8_bits(model, "fp8")
    moved = []
    stored = activation_offloading.SavedOnHost.__init__
    monkeypatch.setattr(
        activation_offloading.SavedOnHost,
        "__init__",
        lambda self, tensor, *args: moved.append(tensor.data_ptr()) or stored(self, tensor, *args),
    )
    offload_activations(model.model.language_model, ["cpu"])
    step(model, labelled("ttIttIttttttt"))
    assert moved and not set(moved).intersection(buffer.data_ptr() for buffer in model.buffers())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_alone_packed_and_padded_have_the_same_loss(precision):
    model = model_of_four()
    freeze_in_8_bits(model, precision)
    together = labelled("ttItt", "tItttttt")
    ids, padding = together["input_ids"], together["attention_mask"]
    first, second = (ids[row, padding[row] == 1] for row in range(2))
    packed = {"input_ids": torch.cat([first, second])[None], "pixel_values": together["pixel_values"]}
    packed["document_ids"] = torch.cat([torch.zeros(len(first)), torch.ones(len(second))]).long()[None]
    labels = [together["labels"][row, padding[row] == 1].clone() for row in range(2)]
    labels[1][0] = -100  # it would be predicted from the document before
    packed["labels"] = torch.cat(labels)[None]
    assert model(**packed, use_cache=False).loss.item() == pytest.approx(
        model(**together, use_cache=False).loss.item(), rel=1e-6
    )


def test_adapters_learn_on_8_bit_layers_as_on_dequantized_ones():
    model = model_of_four()
    config = lora_config(model, 4, vision=True)
    frozen = copy.deepcopy(model)
    torch.manual_seed(1)
    frozen = peft.get_peft_model(frozen, config)
    freeze_in_8_bits(frozen, "int8", ["none"])
    adapted = {name for name, module in frozen.named_modules() if hasattr(module, "lora_A")}
    assert adapted and {name.removesuffix(".base_layer") for name, _ in frozen_linears(frozen)} >= adapted
    torch.manual_seed(1)
    plain = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, layer in frozen_linears(frozen):
            dequantized = layer.weight.double() * layer.weight_scale.double()[:, None]
            plain.get_submodule(name).weight.copy_(dequantized)
    for one in (frozen, plain):
        torch.manual_seed(2)
        for name, parameter in one.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    inputs = labelled("ttIttIt", "ttt")
    (loss, gradients), (expected, expected_gradients) = step(frozen, inputs), step(plain, inputs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradients - expected_gradients).norm() < 1e-5 * expected_gradients.norm()
    with pytest.raises(RuntimeError):  # 8-bit numbers cannot take a merge; `merge_adapters` starts from the source
        frozen.merge_and_unload()


# -- original weights --------------------------------------------------------------------------------------------------


def test_the_weights_of_files_are_read_as_they_are(folder, tmp_path):
    made = load_file(folder / "model" / "model.safetensors")
    source = SourceWeights(str(folder / "model"))
    storages = set()
    for name, weight in made.items():
        found = source.get(name)
        assert found.dtype == weight.dtype and torch.equal(found, weight)
        storages.add(found.untyped_storage().data_ptr())
    assert len(storages) == len(made)  # what shares a storage is saved once
    assert copy.deepcopy(source) is source
    with pytest.raises(ValueError, match=r"no floating point weight lm\.head, .*dsvl.save_checkpoint"):
        source.get("lm.head")
    with pytest.raises(ValueError, match="was changed since it was loaded"):
        source.check("lm_head.weight", made["lm_head.weight"] + 1)
    DSVLForConditionalGeneration.from_pretrained(folder / "model").save_pretrained(tmp_path, max_shard_size="100KB")
    sharded = SourceWeights(str(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert all(torch.equal(sharded.get(name), weight) for name, weight in made.items())
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert torch.equal(sharded.get("lm_head.weight"), made["lm_head.weight"])


def test_weights_that_are_pickled_are_refused(tmp_path, folder):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights in pytorch_model\.bin, .*save the model as safetensors"):
        SourceWeights(str(tmp_path))
    broken = load_file(folder / "model" / "model.safetensors")
    del broken[f"{DECODER}layers.1.mlp.up_proj.weight"]
    save_file(broken, tmp_path / "model.safetensors")
    model = DSVLForConditionalGeneration.from_pretrained(folder / "model").set_trainable()
    with pytest.raises(ValueError, match=r"no floating point weight model\.language_model\.layers\.1\.mlp\.up_proj\.weight"):
        freeze_in_8_bits(model, "fp8", source=str(tmp_path))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_a_source_the_originals_are_kept(precision, tmp_path):
    """A model that was composed in memory."""
    model = model_of_four(dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    freeze_in_8_bits(model, precision)
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
    model.save_pretrained(tmp_path)
    loaded = DSVLForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], before[name]) for name in before)
    model.load_state_dict(state)


def assert_frozen_bytes_are_those_of(saved, source, changed):
    """All tensors but the changed ones are equal to the byte and in dtype."""
    saved, source = (load_file(path / "model.safetensors") for path in (saved, source))
    assert saved.keys() == source.keys()
    for name, weight in source.items():
        if changed(name):
            assert not torch.equal(saved[name].to(weight.dtype), weight), name
        else:
            assert saved[name].dtype == weight.dtype and torch.equal(saved[name], weight), name


def is_trained(name):
    return "multi_modal_projector" in name or "embed_tokens" in name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_saves_evaluates_and_resumes_with_the_bytes_of_the_source(folder, tmp_path, train, precision):
    """In bf16, with a source in float32: other frozen weights keep its dtype too."""
    output = tmp_path / "output"
    flags = ["--frozen-precision", precision, "--bf16", "--eval-data", folder / "held_out.jsonl"]
    flags += ["--eval-exact-match", "--eval-max-new-tokens", "3"]
    said = train(output, *flags)
    assert f"Frozen weights: {precision} in 14 of 28 linear layers of the decoder and 12 of 12 linear layers of the" in said
    assert "bfloat16 in layers.0, layers.3 of the decoder and the output head. Products: in bfloat16, " in said
    assert "Evaluations during training run with these weights; saved models have the original ones." in said
    assert said.count(f"| frozen weights in {precision}\n") == 3
    for path in (output, output / "checkpoint-2", output / "checkpoint-4"):
        assert_frozen_bytes_are_those_of(path, folder / "model", is_trained)
    card = ModelCard.load(output / "README.md").content
    assert f"| frozen weights | {precision} in 14 of 28" in card and "here they are the original ones |" in card
    whole, final = losses(output), weights(output)
    take_back(output)
    assert "Resuming from" in train(output, *flags)
    assert losses(output) == whole
    assert all(torch.equal(weight, final[name]) for name, weight in weights(output).items())
    other = "int8" if precision == "fp8" else "fp8"
    said = train(output, "--frozen-precision", other, *flags[2:], status=1)
    assert f'frozen_precision ("{precision}" before, "{other}" now)' in said


def test_adapters_are_merged_into_the_weights_of_the_source(folder, tmp_path, train):
    output = tmp_path / "output"
    flags = [
        "--frozen-precision",
        "fp8",
        "--frozen-precision-keep",
        "layers.0",
        "--lora-rank",
        "4",
        "--lora-targets",
        "q_proj",
    ]
    said = train(output, *flags)
    assert "float32 in layers.0 of the decoder and encoder.layers.0 of the vision tower and the output head" in said
    assert_frozen_bytes_are_those_of(
        output,
        folder / "model",
        lambda name: (
            is_trained(name)
            or name.endswith("language_model.layers.1.self_attn.q_proj.weight")
            or (DECODER in name and name.endswith("q_proj.weight"))
        ),
    )
    merged = merge_adapters(folder / "model", output / "adapters").state_dict()
    assert all(torch.equal(merged[name], weight) for name, weight in weights(output).items())
    with safe_open(output / "adapters" / "adapter_model.safetensors", "pt") as file:
        assert not any("base_layer" in name or "weight_scale" in name for name in file.keys())  # noqa: SIM118 - a file is no mapping
    whole = losses(output)
    take_back(output)
    assert "Resuming from" in train(output, *flags)
    assert losses(output) == whole


def test_a_checkpoint_with_other_frozen_weights_is_refused(folder, tmp_path, train):
    make_checkpoint(folder, "other", num_hidden_layers=4, initializer_range=0.1)
    train(tmp_path / "output", "--frozen-precision", "fp8")
    resume = ["--frozen-precision", "fp8", "--resume-from", tmp_path / "output" / "checkpoint-2"]
    said = train(tmp_path / "second", *resume, model="other", status=1)
    assert "differs from the frozen weight that this model has in fp8; start from the other weights" in said


def test_packs_feature_caches_and_accumulation(folder, tmp_path, train):
    """With cached features the tower does not run, and they are those of its original weights."""
    flags = ["--frozen-precision", "fp8", "--packing", "--max-length", "160", "--gradient-accumulation-steps", "2"]
    train(tmp_path / "plain", *flags)
    train(tmp_path / "cached", *flags, "--cache-image-features", tmp_path / "features")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), abs=0.02)
    assert losses(tmp_path / "cached") != losses(tmp_path / "plain")


# -- errors ------------------------------------------------------------------------------------------------------------


def test_the_report_has_the_error_of_every_layer(folder, tmp_path, train):
    output = tmp_path / "output"
    said = train(output, "--frozen-precision", "fp8", "--frozen-precision-report", "--lora-rank", "2", "--max-steps", "1")
    report = json.loads((output / "frozen_precision.json").read_text())
    assert len(report["layers"]) == 14 + 12
    assert all(0.01 < error < 0.08 for error in report["layers"].values())
    assert 0 < report["logits"] < 0.2 and 0 <= report["same_token"] <= 1
    assert report["loss"] == pytest.approx(report["original_loss"], rel=0.01)
    assert f"Error of fp8: {sorted(report['layers'].values(), reverse=True)[13]:.2%} of the output of a layer" in said
    worst = max(report["layers"], key=report["layers"].get)
    assert f"Largest errors: {worst} {report['layers'][worst]:.2%}, " in said
    assert not any("base_layer" in name for name in report["layers"])


@pytest.mark.parametrize("skip_queries", [False, True])
def test_the_reported_errors_are_those_of_the_products(skip_queries):
    model = model_of_four()
    original = copy.deepcopy(model)
    freeze_in_8_bits(model, "fp8", ["none"])
    if skip_queries:
        model.reduce_memory(skip_image_queries=True)
    inputs = labelled("ttIttIt", "ttt")
    errors = measure_errors(model, inputs)
    assert model.training and not any(layer._forward_hooks for name, layer in frozen_linears(model) if "q_proj" not in name)
    supervised = inputs["labels"][:, 1:] != -100
    with torch.no_grad():
        ours, theirs = (one.eval()(**inputs).logits[:, :-1][supervised].float() for one in (model, original))
    assert errors.logits == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-4)
    assert errors.original_loss == pytest.approx(original(**inputs).loss.item(), rel=1e-5)
    assert errors.loss == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
    inputs["labels"][:] = -100
    with pytest.raises(ValueError, match="No token of the batch has a label"):
        measure_errors(model, inputs)
    with pytest.raises(ValueError, match="no 8-bit layer to measure"):
        measure_errors(original, inputs)


# -- sharded -----------------------------------------------------------------------------------------------------------


def layers_of_two_widths():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Linear(32, 16)).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sharded_weight_computes_what_a_whole_one_does(single_group, precision, dtype):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    plain = layers_of_two_widths().to(dtype)
    whole = torch.nn.Sequential(*(FrozenLinear(layer, precision) for layer in plain))
    sharded = torch.nn.Sequential(*(FrozenLinear(layer, precision, sharded=True) for layer in plain))
    sharded.append(torch.nn.Linear(16, 16))  # trained, in float32
    for layer, other in zip(sharded[:2], whole, strict=True):
        assert torch.equal(layer.numbers, other.numbers) and layer.weight.dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if dtype == torch.bfloat16 else MixedPrecisionPolicy()
    last = torch.nn.Linear(16, 16)
    last.load_state_dict(sharded[2].state_dict())
    fully_shard(sharded, mp_policy=policy)
    assert all(isinstance(layer.weight, DTensor) and not layer.weight.requires_grad for layer in sharded[:2])
    one, other = (torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_() for _ in "ab")
    output, expected = sharded(one), last.to(dtype)(whole(other))
    assert torch.equal(output, expected)
    output.float().pow(2).sum().backward()
    expected.float().pow(2).sum().backward()
    assert torch.equal(one.grad, other.grad)
    state = sharded.state_dict()
    assert all(torch.equal(state[f"{index}.weight"], layer.weight) for index, layer in enumerate(plain))
    sharded.load_state_dict(state)
    with pytest.raises(ValueError, match="0.weight differs from the frozen weight"):
        sharded.load_state_dict(state | {"0.weight": state["0.weight"] + 1})
    with pytest.raises(ValueError, match="A sharded 8-bit weight cannot be cast"):
        sharded.half()


@pytest.fixture
def processes(request):
    """A process of several, as (rank, number), without the others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank, number = request.param
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=number)
    yield request.param
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [(0, 2), (1, 2), (1, 3), (2, 3), (10, 12), (11, 12)], indirect=True)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_process_makes_and_holds_its_share_of_a_weight(processes, precision):
    from torch.distributed.fsdp import fully_shard

    rank, number = processes
    plain = layers_of_two_widths()[0]
    numbers, scales = quantize_weight(plain.weight, precision)
    layer = FrozenLinear(plain, precision, sharded=True)
    own = numbers.new_zeros(numbers.shape)
    rows = -(-32 // number) * torch.tensor([rank, rank + 1])
    own[rows[0] : rows[1]] = numbers[rows[0] : rows[1]]  # none of the last of twelve
    assert torch.equal(layer.numbers, own) and torch.equal(layer.weight_scale, scales)
    fully_shard(layer)
    layer.check_share()
    part = layer.weight.to_local()
    assert torch.equal(part.view(numbers.dtype), numbers[rows[0] : rows[1]])
    layer.share = (0, 1)
    with pytest.raises(RuntimeError, match="this process made the share"):
        layer.check_share()


def test_casts_of_a_model_leave_sharded_numbers_alone():
    layer = FrozenLinear(layers_of_two_widths()[0], "fp8", sharded=True)
    numbers = layer.numbers.clone()
    for cast in (layer.float, layer.half, lambda: layer.to(torch.float64), lambda: layer.to("cpu")):
        cast()
        assert torch.equal(layer.numbers, numbers) and not layer.weight.requires_grad
        assert layer.weight_scale.dtype == torch.float32
    with pytest.raises(ValueError, match="A layer of 3 inputs cannot be sharded in 8 bits"):
        FrozenLinear(torch.nn.Linear(3, 2).requires_grad_(False), "fp8", sharded=True)


def test_a_sharded_model_is_loaded_with_its_own_frozen_weights_alone(single_group, folder, tmp_path):
    from torch.distributed.fsdp import fully_shard

    from dsvl.training.fsdp import load_full_state

    model = DSVLForConditionalGeneration.from_pretrained(folder / "model")
    model.set_trainable()
    assert freeze_in_8_bits(model, "fp8", ["none"], source=str(folder / "model"), sharded=True) > 10
    fully_shard(model)
    state = load_file(folder / "model" / "model.safetensors")
    name = "model.multi_modal_projector.linear.weight"
    name = name if name in state else next(key for key in state if "projector" in key and key.endswith("weight"))
    state[name] = state[name] + 1
    save_file(state, tmp_path / "model.safetensors")
    load_full_state(model, tmp_path)
    assert torch.equal(dict(model.named_parameters())[name].full_tensor(), state[name])
    frozen = next(key for key in state if key.endswith("q_proj.weight"))
    state[frozen] = state[frozen] + 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="q_proj.weight differs from the frozen weight"):
        load_full_state(model, tmp_path)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--frozen-precision fp4", "--frozen-precision fp4 is unknown; choose from fp8, int8"),
        ("--frozen-precision-keep q_proj", "--frozen-precision-keep without --frozen-precision; pass both"),
        ("--frozen-precision-report", "--frozen-precision-report without --frozen-precision; pass both"),
        ("--frozen-precision fp8 --deepspeed zero3", "with ZeRO-3, which does not partition 8-bit weights; choose --fsdp"),
        ("--frozen-precision fp8 --lora-rank 4 --dora", "with --dora, which reads the norms of the original weights"),
        ("--frozen-precision fp8 --lora-rank 4 --qlora", "with --qlora, which keeps frozen weights in 4 bits"),
        (
            "--frozen-precision int8 --train language vision",
            "--frozen-precision int8 with --train language vision: no linear",
        ),
        (
            "--frozen-precision int8 --frozen-precision-report --streaming --max-steps 2",
            "--frozen-precision-report with --streaming, whose samples are read once",
        ),
        (
            "--frozen-precision int8 --frozen-precision-report --fsdp",
            "--frozen-precision-report with --fsdp: it measures before the model is sharded",
        ),
        (
            "--frozen-precision int8 --frozen-precision-keep x_proj",
            "--frozen-precision-keep x_proj: no linear layer matches",
        ),
    ],
)
def test_arguments_that_do_not_go_together(flags, message, train, tmp_path):
    assert message in train(tmp_path / "output", *flags.split(), status=1)


def test_the_plan_counts_8_bit_weights(folder, capsys):
    from test_plan import llama_7b

    sizes = {
        precision: plan(llama_7b(), micro_batch=2, sequence_length=4096, images=8, frozen_precision=precision)
        for precision in (None, *PRECISIONS)
    }
    linear = 30 * (4 * 4096**2 + 3 * 4096 * 11008) + 24 * (4 * 1024**2 + 2 * 1024 * 4096)
    for precision in PRECISIONS:
        assert sizes[precision].parameters == sizes[None].parameters
        saved = sizes[None].forward_backward.weights - sizes[precision].forward_backward.weights
        assert saved == pytest.approx(linear, rel=0.001)
    assert main(["plan", "--model", str(folder / "model"), "--frozen-precision", "fp8", "--deepspeed", "zero2"]) == 0
    told = capsys.readouterr().out
    assert main(["plan", "--model", str(folder / "model"), "--deepspeed", "zero2"]) == 0
    weight = [float(re.search(r"weights +([\d.]+)", text)[1]) for text in (told, capsys.readouterr().out)]
    assert weight[0] < 0.8 * weight[1]
    for options, message in (
        ({"frozen_precision": "fp8", "deepspeed": "zero3"}, "frozen_precision='fp8' with deepspeed='zero3'"),
        ({"frozen_precision": "fp4"}, "frozen_precision='fp4' is unknown"),
        ({"frozen_keep": ["none"]}, "frozen_keep without frozen_precision"),
    ):
        with pytest.raises(ValueError, match=message):
            Planner(llama_7b(), **options)


def test_the_plan_shards_8_bit_weights():
    from test_plan import llama_7b

    options = dict(micro_batch=2, sequence_length=4096, images=8, activation_checkpointing=True, dtype="bfloat16")
    sharded = {
        precision: plan(llama_7b(), fsdp=True, world_size=4, frozen_precision=precision, **options).forward_backward
        for precision in (None, *PRECISIONS)
    }
    linear = 30 * (4 * 4096**2 + 3 * 4096 * 11008) + 24 * (4 * 1024**2 + 2 * 1024 * 4096)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    for precision in PRECISIONS:
        assert sharded[None].weights - sharded[precision].weights == pytest.approx(linear / 4, rel=0.001)
        # Of the first layer, in 16 bits, what is gathered and what it is copied from; of its neighbour what is gathered.
        assert sharded[None].buffers - sharded[precision].buffers == pytest.approx(layer, rel=0.001)
        options |= dict(frozen_keep=["none"])
        every = plan(llama_7b(), fsdp=True, world_size=4, frozen_precision=precision, **options).forward_backward
        assert sharded[None].buffers - every.buffers == pytest.approx(3 * layer, rel=0.001)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_real_step_peaks_where_the_plan_says(precision):
    from test_plan import DEFAULT, StepTracer, assert_real_as_traced, small_config

    options = dict(dtype=torch.float32, frozen_precision=precision, frozen_keep=["none"])
    assert_real_as_traced(StepTracer(small_config(), DEFAULT, **options))


def test_a_stage_of_a_recipe_is_planned(folder, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {folder / 'model'}\noutput: {tmp_path / 'out'}\ndata: {folder / 'data.jsonl'}\n"
        "save_steps: 2\nmax_steps: 2\nstages:\n  - name: first\n    train: [projector]\n    frozen_precision: int8\n"
        "  - name: second\n    train: [projector, embeddings]\n    lora_rank: 2\n    frozen_precision: fp8\n"
        "    frozen_precision_keep: [none]\n"
    )
    argv = [str(tmp_path / "recipe.yaml"), "--stage", "second.frozen_precision_keep=[x_proj]"]
    assert main(["train", *argv, "--report-to", "none"]) == 1
    assert "stage 'second': --frozen-precision-keep x_proj: no linear layer matches" in capsys.readouterr().err
    assert not (tmp_path / "out" / "stages").exists()
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["train", str(tmp_path / "recipe.yaml"), "--report-to", "none", "--disable-tqdm", "true"]) == 0
    said = capsys.readouterr()
    assert "int8 in 14 of 28 linear layers" in said.out + said.err
    assert "fp8 in 28 of 28 linear layers" in said.out + said.err
    assert_frozen_bytes_are_those_of(
        tmp_path / "out",
        folder / "model",
        lambda name: is_trained(name) or (DECODER in name and "_proj" in name),
    )
