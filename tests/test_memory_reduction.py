"""Tiled MLPs, offloaded activations and skipped image queries are exact, and save what they say."""

import copy

import pytest
import torch
from conftest import FAMILIES, IMAGE_ID, tiny_model
from plain_kernels import use_plain_kernels
from test_compiled_layers import IMAGE_STARTS, assert_same, kept, labelled, packed, step
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from dsvl import DSVLForConditionalGeneration
from dsvl.acceleration.memory import activation_offloading
from dsvl.acceleration.memory.activation_offloading import offload_activations
from dsvl.acceleration.memory.tiled_mlp import tiles_of
from dsvl.training.adapters import lora_config
from dsvl.training.arguments import parse

ALL = {"mlp_tile": 7, "offload": True, "skip_image_queries": True}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tiny tensors are moved, in several blocks; also those of a CPU, which is the host itself."""
    monkeypatch.setattr(activation_offloading, "MIN_BYTES", 1)
    monkeypatch.setattr(activation_offloading, "BLOCK_BYTES", 1000)


def pair(family="llama", checkpointing=None, options=None, learning=("language_model", "lm_head"), **overrides):
    """A model, and the same one in less memory, both in training mode."""
    model = tiny_model(family, initializer_range=0.1, **overrides).set_trainable(**dict.fromkeys(learning, True)).train()
    reduced = copy.deepcopy(model)
    reduce(reduced, ALL if options is None else options)
    if checkpointing is not None:
        reduced.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model, reduced


def reduce(model, options):
    model.reduce_memory(**options)
    if options.get("offload"):
        offload_activations(model.model.language_model, ["cpu"])


@pytest.mark.parametrize("way", ["gathered", "fused"])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_losses_and_gradients_are_the_same(way, checkpointing, monkeypatch):
    if way == "fused":
        use_plain_kernels(monkeypatch)
    model, reduced = pair(checkpointing=checkpointing)
    for number, starts in enumerate(IMAGE_STARTS):
        inputs = labelled(starts, number)
        assert_same(reduced, model, packed(inputs) if number % 2 else inputs)


@pytest.mark.parametrize("option", ALL)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("phi3", "mixtral")])
def test_each_is_exact_for_every_decoder(family, option):
    model, reduced = pair(family, "non-reentrant", {option: ALL[option]})
    assert_same(reduced, model, labelled(IMAGE_STARTS[0], 0))


def with_adapters(dropout):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama").train()
    model = peft.get_peft_model(model, lora_config(model, 4, dropout=dropout)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_adapters_in_the_tiles_learn_the_same():
    model = with_adapters(dropout=0.0)
    reduced = copy.deepcopy(model)
    reduce(reduced.get_base_model(), ALL)
    reduced.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(reduced, model, labelled(IMAGE_STARTS[0], 0))
    assert any("mlp" in name and "lora_A" in name for name in step(reduced, labelled(IMAGE_STARTS[0], 0))[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_tile_that_is_computed_again_drops_the_same_elements(use_reentrant):
    reduced = with_adapters(dropout=0.5)
    reduce(reduced.get_base_model(), ALL)
    kept_tiles = copy.deepcopy(reduced)  # the same tiles, in the same order, of which nothing is computed again
    for layer in kept_tiles.get_base_model().model.language_model.layers:
        tiles_of(layer).tile = lambda forward, states: forward(states)
    reduced.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    inputs, gradients = labelled(IMAGE_STARTS[0], 0), []
    for model, seed in ((reduced, 3), (kept_tiles, 3), (kept_tiles, 4)):
        torch.manual_seed(seed)
        gradients.append(step(model, inputs)[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-7, rtol=1e-6, msg=name)
    assert any((gradient - gradients[2][name]).abs().max() > 1e-3 for name, gradient in gradients[0].items())


@pytest.mark.parametrize("way", ["gathered", "fused"])
@pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
def test_with_compiled_layers(way, checkpointing, monkeypatch):
    """Attention, norms and tiles are a few graphs, which the next batches and all layers share."""
    if way == "fused":
        use_plain_kernels(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    layers = 10 if way == "fused" else 3  # more than torch compiles a function anew
    model, reduced = pair(checkpointing=checkpointing, num_hidden_layers=layers)
    reduced.compile_decoder_layers(backend="aot_eager", fullgraph=True)
    seen = []
    for number, starts in enumerate(IMAGE_STARTS):
        assert_same(reduced, model, labelled(starts, number))
        seen.append(counters["stats"]["unique_graphs"])
    assert seen == [3] * len(IMAGE_STARTS)  # norms, attention, tiles


def test_skipped_queries_in_compiled_layers_without_tiles():
    torch._dynamo.reset()
    counters.clear()
    model, reduced = pair(options={"skip_image_queries": True, "offload": True}, checkpointing="non-reentrant")
    reduced.compile_decoder_layers(backend="aot_eager", fullgraph=True)
    for number, starts in enumerate(IMAGE_STARTS):
        assert_same(reduced, model, labelled(starts, number))
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]  # norms, attention, MLPs


# ----------------------------------------------------------------------------------------------------------------------
# What it saves


def products(model, inputs) -> int:
    """Operations of the matrix products of a training step, tower and head included."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs, use_cache=False).loss.backward()
    return counter.get_total_flops()


def test_tiles_of_a_checkpointed_layer_cost_no_more_products_and_queries_fewer():
    inputs = labelled(IMAGE_STARTS[0], 0)
    plain, tiled = pair(options={"mlp_tile": 7}, learning=())
    _, fewer = pair(options=ALL, learning=())
    for model in (plain, tiled, fewer):
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert products(tiled, inputs) == products(plain, inputs)
    # The gathered mask has as many slots for each row as the row with most text tokens needs.
    text, ids = plain.config.text_config, inputs["input_ids"]
    slots = int(((ids != IMAGE_ID) & inputs["attention_mask"].bool()).sum(-1).max())
    heads = text.num_attention_heads * plain.model.language_model.layers[0].self_attn.head_dim
    skipped = 2 * (ids.numel() - len(ids) * slots) * text.num_hidden_layers * text.hidden_size * heads
    assert products(tiled, inputs) - products(fewer, inputs) == 3 * skipped > 0  # forward, recomputation, input gradient


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
def test_tiles_keep_one_input_of_an_mlp(checkpointing):
    inputs = labelled(IMAGE_STARTS[0], 0)
    plain, tiled = pair(options={"mlp_tile": 7}, checkpointing=checkpointing, learning=(), intermediate_size=480)
    if checkpointing:
        plain.activation_checkpointing_enable({"use_reentrant": False})
        assert kept(tiled, inputs) == kept(plain, inputs)
    else:
        assert kept(tiled, inputs) < kept(plain, inputs) / 3


def test_offloaded_inputs_of_layers_leave_the_device(monkeypatch):
    """Counted by storages that autograd holds; the host's blocks are used again by the next step."""
    model, reduced = pair(options={"offload": True}, checkpointing="non-reentrant", num_hidden_layers=6)
    (offloading,) = {
        hook.__self__ for hook in reduced.model.language_model._forward_pre_hooks.values() if hasattr(hook, "__self__")
    }
    inputs, moved = labelled(IMAGE_STARTS[0], 0), []
    pack = activation_offloading.OffloadedPass.pack

    def noting(self, tensor):
        packed = pack(self, tensor)
        moved.append((tuple(tensor.shape), isinstance(packed, activation_offloading.SavedOnHost)))
        return packed

    monkeypatch.setattr(activation_offloading.OffloadedPass, "pack", noting)
    step(reduced, inputs)
    hidden = (*inputs["input_ids"].shape, reduced.config.text_config.hidden_size)
    assert [is_moved for shape, is_moved in moved if shape == hidden].count(True) >= 6
    blocks = offloading.memory.blocks
    assert blocks == len(offloading.memory.free) > 0
    step(reduced, inputs)
    assert offloading.memory.blocks == blocks == len(offloading.memory.free)
    with pytest.raises(TypeError):  # a call that fails leaves no hook behind
        reduced(**inputs, unknown=1)
    assert not offloading.running


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_weights_that_fsdp_gathers_are_not_moved(single_group, monkeypatch, is_compiled, every):
    """Not those of layers that are not checkpointed either, and those that a compiled layer keeps for its backward."""
    from torch.distributed.fsdp import fully_shard

    model = tiny_model(dtype=torch.float32, num_hidden_layers=4).set_trainable().train()
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    reduce(model, {"offload": True})
    if is_compiled:
        model.compile_decoder_layers(backend="aot_eager")
    decoder = model.model.language_model
    weights = {shape for one in decoder.layers[0].parameters() for shape in (tuple(one.shape), tuple(one.T.shape))}
    for layer in decoder.layers:
        fully_shard(layer)
    fully_shard(model)
    moved = []
    stored = activation_offloading.SavedOnHost.__init__
    monkeypatch.setattr(
        activation_offloading.SavedOnHost,
        "__init__",
        lambda self, tensor, *args: moved.append(tuple(tensor.shape)) or stored(self, tensor, *args),
    )
    inputs = {name: one.float() if one.is_floating_point() else one for name, one in labelled(IMAGE_STARTS[0], 0).items()}
    model(**inputs, use_cache=False).loss.backward()
    assert moved and not weights.intersection(moved)


@pytest.mark.parametrize("count", [1, 3, 200])
def test_tiles_that_processes_agreed_on_are_exact(count):
    """As under ZeRO-3; also more tiles than tokens, of which some are empty."""
    model, reduced = pair(checkpointing="non-reentrant", options={"mlp_tile": 7})
    for layer in reduced.model.language_model.layers:
        tiles_of(layer).count = count
    assert_same(reduced, model, labelled(IMAGE_STARTS[0], 0))
    inputs = {name: value for name, value in labelled(IMAGE_STARTS[0], 0).items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(reduced.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_two_forward_passes_before_their_backward_passes():
    model, reduced = pair(checkpointing="non-reentrant")
    batches = [labelled(IMAGE_STARTS[number], number) for number in range(2)]
    gradients = []
    for either in (reduced, model):
        either.zero_grad()
        losses = [either(**inputs, use_cache=False).loss for inputs in batches]
        for loss in losses:
            loss.backward()
        gradients.append({name: p.grad for name, p in either.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-7, rtol=1e-6, msg=name)


def test_a_backward_pass_that_is_repeated():
    model, reduced = pair()
    loss = reduced(**labelled(IMAGE_STARTS[0], 0), use_cache=False).loss
    weight = reduced.model.language_model.layers[0].mlp.up_proj.weight
    first, second = (torch.autograd.grad(loss, weight, retain_graph=keep)[0] for keep in (True, False))
    assert first.equal(second) and first.abs().sum() > 0


def test_a_copy_is_of_its_own_weights_and_nothing_is_saved(tmp_path):
    _, reduced = pair(checkpointing="non-reentrant", dtype=torch.float32)
    other = copy.deepcopy(reduced)
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.up_proj.weight.zero_()
        other.model.language_model.layers[0].self_attn.q_proj.weight.zero_()
    plain = tiny_model(dtype=torch.float32).train()
    plain.load_state_dict(other.state_dict())
    plain.set_trainable(language_model=True, lm_head=True)
    inputs = labelled(IMAGE_STARTS[0], 0, dtype=torch.float32)
    torch.testing.assert_close(step(other, inputs)[0], step(plain, inputs)[0], atol=1e-5, rtol=1e-5)
    reduced.save_pretrained(tmp_path)
    loaded = DSVLForConditionalGeneration.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(plain.state_dict())


def test_prompts_are_answered_the_same():
    model, reduced = pair()
    inputs = {key: value for key, value in labelled(IMAGE_STARTS[0], 0).items() if key != "labels"}
    how = {"max_new_tokens": 4, "do_sample": False}
    assert reduced.eval().generate(**inputs, **how).equal(model.eval().generate(**inputs, **how))


def test_data_parallel_training(single_group):
    """Every gradient is complete once, though several tiles contribute to it."""
    model, reduced = pair(checkpointing="non-reentrant")
    inputs = labelled(IMAGE_STARTS[0], 0)
    wrapped = torch.nn.parallel.DistributedDataParallel(reduced, bucket_cap_mb=0.005)
    wrapped(**inputs, use_cache=False).loss.backward()
    for name, gradient in step(model, inputs)[1].items():
        torch.testing.assert_close(reduced.get_parameter(name).grad, gradient, atol=1e-7, rtol=1e-6, msg=name)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_what_does_not_go_is_refused():
    with pytest.raises(ValueError, match="A tile of 0 tokens"):
        tiny_model().reduce_memory(mlp_tile=0)
    with pytest.raises(ValueError, match="'causal' uses the queries"):
        tiny_model(attention="causal").reduce_memory(skip_image_queries=True)
    with pytest.raises(ValueError, match="Phi3Attention has no q_proj"):
        tiny_model("phi3").reduce_memory(skip_image_queries=True)
    without = tiny_model()
    without.model.language_model.layers[0].mlp.experts = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="a mixture of experts"):
        without.reduce_memory(mlp_tile=8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tiled-mlp", "0"], "--tiled-mlp 0"),
        (["--tiled-mlp", "8", "--torch-compile"], "--tiled-mlp with --torch-compile"),
        (["--offload-activations"], "--offload-activations without --activation-checkpointing"),
        (
            [
                "--offload-activations",
                "--activation-checkpointing",
                "--activation-checkpointing-kwargs",
                '{"offload": true}',
            ],
            "moves activations twice",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse(["--model", str(tmp_path), "--data", str(tmp_path), "--output", str(tmp_path / "out"), *flags])
