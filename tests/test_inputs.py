"""Inputs that contradict themselves, and inputs that look odd but are plain enough."""

from typing import Any

import pytest
import torch
from conftest import IMAGE_ID, PER_IMAGE, batch, random_images, tiny_model
from plain_loop import PlainLoop
from torch import nn

from dsvl.transformers_dsvl import COMMON_KEYWORDS


def real_logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


# ----------------------------------------------------------------------------------------------------------------------
# Keywords


@pytest.mark.parametrize("name", ["pixel_valeus", "attention_masks", "image_sizes"])
def test_a_keyword_that_nobody_knows_is_named(name):
    model, inputs = tiny_model(), batch("ttIt")
    for call in (model, model.model):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            call(**inputs, **{name: inputs["attention_mask"]})
    with pytest.raises(ValueError, match=name):
        model.generate(**inputs, **{name: inputs["attention_mask"]}, max_new_tokens=1)
    with pytest.raises(TypeError, match=name):
        model.get_image_features(inputs["pixel_values"], **{name: 1})


def test_keywords_of_transformers_and_of_the_decoder_are_known():
    model, inputs = tiny_model(), batch("ttIt")
    expected = real_logits(model, inputs)
    known: dict[str, Any] = dict.fromkeys(COMMON_KEYWORDS - {"position_ids"}) | {"use_cache": False, "return_dict": True}
    assert {"num_items_in_batch", "output_attentions", "cu_seq_lens_q"} <= COMMON_KEYWORDS
    torch.testing.assert_close(real_logits(model, inputs | known), expected)


def test_bidirectional_attention_is_refused_where_it_is_not_defined():
    inputs = batch("ttIt")
    with pytest.raises(ValueError, match="is_causal=False does not go with multimodal_attention='mmca'"):
        tiny_model()(**inputs, is_causal=False)


def test_packs_that_only_a_flash_kernel_would_see_are_refused():
    lengths = torch.tensor([0, 3, 7])
    with pytest.raises(ValueError, match="cu_seq_lens_q without position_ids"):
        tiny_model()(input_ids=torch.arange(3, 10)[None], cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)


# ----------------------------------------------------------------------------------------------------------------------
# Types


def test_booleans_are_types():
    model, inputs = tiny_model(), batch("ttIttIt", "ttIt")
    got = real_logits(model, inputs | {"mm_token_type_ids": inputs["mm_token_type_ids"].bool()})
    assert got.equal(real_logits(model, inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda types: types * 2, "values from 0 to 2; expected 1 for image tokens"),
        (lambda types: -types, "values from -1 to 0"),
        (lambda types: types * 0, r"\[10, 0\] image tokens .*mark \[0, 0\] as such"),
        (lambda types: 1 - types, r"differ at \[13, 13\] positions"),
        (lambda types: types.roll(1, 1), r"mark \[10, 0\] as such and differ at \[4, 0\]"),
        (lambda types: types.double(), "torch.float64; pass integers"),
        (lambda types: torch.cat([types, types[:, :1]], 1), r"\(2, 14\), but the inputs hold 2 rows of 13 tokens"),
        (lambda types: types[:, :-1], r"\(2, 12\), but the inputs hold 2 rows of 13 tokens"),
        (lambda types: types[:1], r"\(1, 13\), but the inputs hold 2 rows of 13 tokens"),
    ],
)
@pytest.mark.parametrize("attention", ["mmca", "causal"])
def test_types_that_contradict_the_ids_are_refused(attention, change, message):
    model, inputs = tiny_model(attention=attention), batch("ttItI", "ttt")
    wrong = inputs | {"mm_token_type_ids": change(inputs["mm_token_type_ids"])}
    with pytest.raises(ValueError, match=message):
        model(**wrong)


# ----------------------------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "change",
    [lambda labels: labels[:, :-1], lambda labels: labels[:1], lambda labels: labels.repeat(1, 2), lambda labels: labels[0]],
)
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_another_shape_are_refused(name, change, training):
    model, inputs = tiny_model().train(training), batch("ttIttt", "ttIttt")
    labels = change(inputs["input_ids"].clone())
    with pytest.raises(ValueError, match=rf"{name} are of shape \({labels.shape[0]},.*but the inputs of \(2, 10\)"):
        model(**inputs, **{name: labels})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("items", [None, 7])
def test_labels_that_are_shifted_already(training, items):
    model, inputs = tiny_model().train(training), batch("ttIttt", "ttt")
    labels = torch.where(inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE_ID), inputs["input_ids"], -100)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = model(**inputs, labels=labels, num_items_in_batch=items).loss
    torch.testing.assert_close(model(**inputs, shift_labels=shifted, num_items_in_batch=items).loss, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Shapes and masks


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (0, 0)])
def test_a_batch_of_nothing_is_refused(shape):
    model = tiny_model()
    message = rf"hold {shape[0]} rows of {shape[1]} tokens"
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=torch.zeros(*shape, 32, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 9), (2, 11), (1, 10)])
@pytest.mark.parametrize("layouts", [("ttIttt", "ttt"), ("t" * 10, "ttt")])
def test_a_mask_of_another_shape_is_refused(layouts, shape):
    inputs = batch(*layouts) | {"attention_mask": torch.ones(shape, dtype=torch.long)}
    with pytest.raises(ValueError, match=rf"attention_mask is of shape \({shape[0]}, {shape[1]}\).*\(2, 10\)"):
        tiny_model()(**inputs)


def test_a_mask_of_the_new_tokens_alone_is_refused():
    model, inputs = tiny_model(), batch("ttIttt")
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    with pytest.raises(ValueError, match=r"after 10 cached ones; pass the mask of the whole sequence, \(1, 11\)"):
        model(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)


MASKS = {
    "holes": lambda mask: mask.index_fill(1, torch.tensor([1, 9]), 0),
    "holes in an image": lambda mask: mask.index_fill(1, torch.tensor([3, 4]), 0),
    "both sides": lambda mask: torch.stack([mask[0].cumsum(0).gt(3), mask[1].cumsum(0).le(12)]).long(),
}


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_with_holes_and_padding_on_both_sides(kind, backend):
    model, inputs = tiny_model(backend=backend), batch("ttIttIt", "tIttItt")
    inputs["attention_mask"] = mask = MASKS[kind](torch.ones_like(inputs["input_ids"]))
    got = real_logits(model, inputs)
    loop = PlainLoop(inputs["mm_token_type_ids"], mask)
    oracle = tiny_model(attention="causal")
    oracle.set_attn_implementation({"text_config": loop.name})
    torch.testing.assert_close(got, real_logits(oracle, inputs), atol=1e-9, rtol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings instead of ids


@pytest.mark.parametrize("attention", ["mmca", "causal"])
def test_images_find_their_places_among_embeddings(attention):
    model, inputs = tiny_model(attention=attention), batch("ttItIt", "ttt")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "pixel_values": inputs["pixel_values"]}
    torch.testing.assert_close(real_logits(model, given), real_logits(model, inputs), atol=1e-12, rtol=1e-12)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert model.generate(**given, max_new_tokens=5, do_sample=False).equal(expected)


def test_images_without_a_place_among_embeddings_are_refused():
    model, inputs = tiny_model(), batch("tttt")
    with pytest.raises(ValueError, match=r"hold \[0\] image tokens"):
        model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), pixel_values=random_images(1))


def test_embeddings_that_may_hold_images_need_their_types():
    model, inputs = tiny_model(), batch("tttt")
    with pytest.raises(ValueError, match="do not tell text from images; pass mm_token_type_ids"):
        model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))


# ----------------------------------------------------------------------------------------------------------------------
# Outputs


def test_outputs_as_tuples():
    model, inputs = tiny_model(), batch("ttItIt", "ttt")
    for part in (model, model.model):
        whole = part(**inputs, output_hidden_states=True)
        parts = part(**inputs, output_hidden_states=True, return_dict=False)
        assert type(parts) is tuple and len(parts) == 4
        assert parts[0].equal(whole[0]) and parts[3][0].equal(whole.image_outputs.last_hidden_state)
        part.config.return_dict = False
        assert type(part(**inputs)) is tuple
        part.config.return_dict = True
    features = model.get_image_features(inputs["pixel_values"], return_dict=False)
    assert type(features) is tuple and len(features[1]) == 2


def test_a_configuration_that_asks_for_tuples_trains_and_generates():
    model, inputs = tiny_model(), batch("ttItIt", "ttt")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model.config.return_dict = False
    assert model(**inputs, labels=inputs["input_ids"])[0].equal(loss)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).equal(expected)


def test_the_towers_states_are_returned_on_request():
    model, pixels = tiny_model(), random_images(2)
    model.set_attn_implementation({"vision_config": "eager"})
    plain = model.get_image_features(pixels)
    assert plain.hidden_states is None and plain.attentions is None
    asked = model.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
    layers = model.config.vision_config.num_hidden_layers
    assert [state.shape for state in asked.hidden_states] == [(2, PER_IMAGE, 16)] * (layers + 1)
    assert [weights.shape for weights in asked.attentions] == [(2, 2, PER_IMAGE, PER_IMAGE)] * layers
    torch.testing.assert_close(asked.last_hidden_state, plain.last_hidden_state)


def test_image_outputs_have_the_older_name_too():
    model, inputs = tiny_model(), batch("ttItIt")
    outputs = model(**inputs)
    with pytest.warns(FutureWarning, match="use image_outputs.pooler_output"):
        assert outputs.image_hidden_states.equal(torch.stack(outputs.image_outputs.pooler_output))
    text = model(**batch("ttt"))
    with pytest.warns(FutureWarning):
        assert text.image_outputs is None and text.image_hidden_states is None


def test_gradients_reach_the_weights_that_are_returned():
    model = tiny_model(backend="eager")
    outputs = model(**batch("ttItIt", "ttt"), output_attentions=True)
    for weights in outputs.attentions:
        weights.retain_grad()
    outputs.logits[0, -1, 0].backward()
    assert all(weights.grad is not None and weights.grad.abs().sum() > 0 for weights in outputs.attentions)
