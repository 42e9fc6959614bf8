"""Tiled MLPs, offloaded activations and skipped image queries change neither losses nor gradients, and save what they say."""

import copy

import pytest
import torch
from conftest import FAMILIES, tiny_model
from plain_kernels import use_plain_kernels
from torch._dynamo.utils import counters
from test_compiled_layers import IMAGE_STARTS, assert_same, kept, labelled, packed, step

from dsvl.acceleration import activation_offloading
from dsvl.acceleration.activation_offloading import offload_activations
from dsvl.acceleration.tiled_mlp import tiles_of
from dsvl.training.adapters import lora_config

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
    model, reduced = pair(checkpointing=checkpointing, num_hidden_layers=10)
    reduced.compile_decoder_layers(backend="aot_eager", fullgraph=True)
    seen = []
    for number, starts in enumerate(IMAGE_STARTS):
        assert_same(reduced, model, labelled(starts, number))
        seen.append(counters["stats"]["unique_graphs"])
    print(seen, dict(counters["graph_break"]))
    assert seen[-1] == seen[0]
