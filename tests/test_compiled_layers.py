"""A decoder whose layers are compiled trains as it does otherwise, by one graph for every kind of layer."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_ID, PER_IMAGE, batch, tiny_model
from plain_kernels import use_plain_kernels
from torch._dynamo.utils import counters
from training_runs import BATCH, STEPS, furthest, losses, make_checkpoint, make_conversations, run, take_back, weights

from dsvl import DSVLForConditionalGeneration
from dsvl.training.adapters import lora_config

TOKENS = 28
# Of the images of two rows; labels differ as well.
IMAGE_STARTS = ([[3, 12], [6]], [[0], [1, 8, 16]], [[5], [20]], [[23], []], [[], []])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def labelled(rows: list[list[int]], number: int, tokens: int = TOKENS, dtype: torch.dtype = torch.float64):
    """Two rows of `tokens` tokens, the second padded by two, with images that begin at these indices."""
    layouts = []
    for row, starts in enumerate(rows):
        layout, length = "", tokens - 2 * row
        index = 0
        while index < length:
            layout += "I" if index in starts else "t"
            index += PER_IMAGE if index in starts else 1
        layouts.append(layout)
    inputs = batch(*layouts, side="right", dtype=dtype, seed=number)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    trained = real & (ids != IMAGE_ID) & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(number)) < 0.5)
    return inputs | {"labels": torch.where(trained, ids, -100)}


def packed(inputs, positions: str = "token"):
    rest = {key: value for key, value in inputs.items() if key != "attention_mask"}
    index = torch.arange(TOKENS).expand_as(inputs["input_ids"])
    return rest | ({"position_ids": index % 11} if positions == "token" else {"document_ids": index // 11})


def pair(family: str, *learning: str, **overrides):
    """A model, and the same one with compiled layers, both in training mode."""
    model = tiny_model(family, **overrides).set_trainable(**dict.fromkeys(learning, True)).train()
    compiled = copy.deepcopy(model)
    compiled.compile_decoder_layers(backend="aot_eager", fullgraph=True)
    return model, compiled


def step(model, inputs):
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(compiled, model, inputs):
    (loss, gradients), (expected, expected_gradients) = step(compiled, inputs), step(model, inputs)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)  # transformers takes the loss in float32
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-7, rtol=1e-6, msg=name)


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("family", "rows", "way", "positions"),
    [
        ("llama", "padded", "gathered", "image"),
        ("llama", "packed", "fused", "token"),
        ("llama", "packed", "fused", "image"),
        ("llama", "padded", "eager", "token"),
        ("gemma3_text", "packed", "gathered", "token"),
        ("gemma3_text", "padded", "fused", "image"),
    ],
)
def test_loss_and_gradients_are_the_same_and_the_graph_holds(family, rows, way, positions, monkeypatch):
    """Ten layers, more than torch compiles a function anew; images (in a batch none), starts and labels change."""
    if way == "fused":
        use_plain_kernels(monkeypatch)
    layers, kinds = {"num_hidden_layers": 10, "initializer_range": 0.1, "image_positions": positions}, 1
    if family == "gemma3_text":
        layers["layer_types"], kinds = ["sliding_attention", "full_attention"] * 5, 2
    model, compiled = pair(family, "language_model", backend="eager" if way == "eager" else "sdpa", **layers)
    for number, starts in enumerate(reversed(IMAGE_STARTS) if way == "fused" else IMAGE_STARTS):
        inputs = labelled(starts, number)
        assert_same(compiled, model, packed(inputs, positions) if rows == "packed" else inputs)
        assert graphs() == kinds


@pytest.mark.parametrize(("way", "learning"), [("gathered", ()), ("fused", ("language_model", "lm_head"))])
def test_lengths_share_one_more_graph(way, learning, monkeypatch):
    if way == "fused":
        use_plain_kernels(monkeypatch)
    model, compiled = pair("llama", *learning)
    for number, tokens in enumerate((28, 40, 31, 57)):
        assert_same(compiled, model, labelled([[3], [9]], number, tokens))
    assert graphs() == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_are_computed_again_by_the_graph(use_reentrant):
    model, compiled = pair("llama", "language_model", num_hidden_layers=4)
    whole = kept(compiled, labelled(IMAGE_STARTS[0], 0))
    for either in (model, compiled):
        either.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for number, starts in enumerate(IMAGE_STARTS):
        assert_same(compiled, model, labelled(starts, number))
    assert graphs() == 2
    assert kept(compiled, labelled(IMAGE_STARTS[0], 0)) < whole / 3


def kept(model, inputs) -> int:
    """The bytes that the decoder keeps for its backward pass, weights apart."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.nn.functional.embedding(inputs["input_ids"], model.get_input_embeddings().weight)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        states = model.model(inputs_embeds=hidden, mm_token_type_ids=inputs["mm_token_type_ids"], use_cache=False)
    assert states.last_hidden_state.requires_grad
    return sum(storages.values())


def test_adapters_learn_the_same():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama").train()
    model = peft.get_peft_model(model, lora_config(model, 4, dropout=0.0)).double()
    compiled = copy.deepcopy(model)
    compiled.get_base_model().compile_decoder_layers(backend="aot_eager", fullgraph=True)
    for number, starts in enumerate(IMAGE_STARTS):
        assert_same(compiled, model, labelled(starts, number))
    assert graphs() == 1
    assert any("lora_A" in name for name in step(compiled, labelled(IMAGE_STARTS[0], 0))[1])


@pytest.mark.parametrize("checkpointing", [False, True])
@torch._dynamo.config.patch(optimize_ddp=True)
def test_data_parallel_training_keeps_the_graph_whole(checkpointing, single_group):
    """However small DDP's buckets are."""
    model, compiled = pair("llama", "language_model", "lm_head")
    if checkpointing:
        compiled.activation_checkpointing_enable({"use_reentrant": False})
    compiled.compile_decoder_layers(backend="aot_eager", fullgraph=True)
    wrapped = torch.nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=0.005)
    inputs = labelled(IMAGE_STARTS[0], 0)
    wrapped(**inputs, use_cache=False).loss.backward()
    for name, gradient in step(model, inputs)[1].items():
        torch.testing.assert_close(compiled.get_parameter(name).grad, gradient, atol=1e-7, rtol=1e-6, msg=name)
    assert graphs() == 1


def test_evaluation_is_not_compiled_and_training_goes_on_with_its_graph():
    model, compiled = pair("llama")
    inputs = labelled(IMAGE_STARTS[0], 0)
    assert_same(compiled, model, inputs)
    for either in (model, compiled):
        either.eval()
    prompt = {key: value for key, value in inputs.items() if key != "labels"}
    how = {"max_new_tokens": 4, "do_sample": False}
    assert compiled.generate(**prompt, **how).equal(model.generate(**prompt, **how))
    assert graphs() == 1
    assert_same(compiled.train(), model.train(), labelled(IMAGE_STARTS[1], 1))
    assert graphs() == 1


def test_a_copy_is_compiled_for_itself():
    _, compiled = pair("llama")
    other = copy.deepcopy(compiled).train()
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.up_proj.weight.zero_()
    plain = copy.deepcopy(other)
    plain.model._compiled_layers = None
    for layer in plain.model.language_model.layers:
        layer._compiled_call_impl = None
    assert_same(other, plain, labelled(IMAGE_STARTS[0], 0))
    assert graphs() == 1


def test_nothing_of_it_is_saved(tmp_path):
    model, compiled = pair("llama", dtype=torch.float32)
    assert list(compiled.state_dict()) == list(model.state_dict())
    compiled.save_pretrained(tmp_path)
    loaded = DSVLForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name
    assert not loaded.train().model.compiles_layers


def test_a_decoder_without_a_list_of_layers_is_refused():
    model = tiny_model()
    del model.model.language_model.layers
    with pytest.raises(ValueError, match="LlamaModel has no list of layers"):
        model.compile_decoder_layers()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gathered", "fused"])
def test_generated_code_agrees_as_well(way, monkeypatch):
    """By the backend that users have, in single precision, with and without checkpointing."""
    if way == "fused":
        use_plain_kernels(monkeypatch)
    model = tiny_model("qwen2", dtype=torch.float32, initializer_range=0.1).set_trainable(language_model=True).train()
    compiled = copy.deepcopy(model)
    compiled.compile_decoder_layers(fullgraph=True)
    for checkpointing in (False, True):
        for either in (model, compiled) if checkpointing else ():
            either.activation_checkpointing_enable({"use_reentrant": False})
        for number, starts in enumerate(IMAGE_STARTS):
            inputs = labelled(starts, number, dtype=torch.float32)
            (loss, gradients), (expected, expected_gradients) = step(compiled, inputs), step(model, inputs)
            torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4, msg=name)
    assert graphs() == 4


@pytest.mark.parametrize("checkpointing", [(), ("checkpointing",)])
def test_under_zero3_layers_share_a_graph_that_keeps_no_weights(checkpointing, tmp_path, monkeypatch):
    """The graph has torch's own linear layers: guards on DeepSpeed's would differ from layer to layer."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    pytest.importorskip("deepspeed")
    script, found = str(Path(__file__).with_name("compiled_zero3.py")), {}
    for way in ("plain", "compiled"):
        run(way, tmp_path / way, *checkpointing, processes=2, module=script)
        found[way] = json.loads((tmp_path / way).read_text())
    assert found["compiled"]["losses"] == pytest.approx(found["plain"]["losses"], abs=1e-5)
    assert (found["plain"]["linear_layers"], found["compiled"]["linear_layers"]) == ([], [7])
    assert found["compiled"]["losses"][-1] < found["compiled"]["losses"][0]
    assert found["compiled"]["left"] < 0.05 * found["compiled"]["weights"]  # gathered weights would be as many as weights


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--lora-rank 4", "--activation-checkpointing true --packing --max-length 400"])
def test_a_run_learns_the_same_and_resumes(flags, tmp_path):
    make_checkpoint(tmp_path)
    data = make_conversations(tmp_path)
    common = ["--model", tmp_path / "model", "--data", data, BATCH, "4", *STEPS, *flags.split()]
    run(*common, "--output", tmp_path / "plain")
    run(*common, "--output", tmp_path / "compiled", "--compile-decoder-layers")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    whole = weights(tmp_path / "compiled")
    assert furthest(whole, weights(tmp_path / "plain")) < 1e-3
    take_back(tmp_path / "compiled")
    done = run(*common, "--output", tmp_path / "compiled", "--compile-decoder-layers")
    assert "Resuming from" in done.stderr
    assert furthest(weights(tmp_path / "compiled"), whole) < 1e-6
