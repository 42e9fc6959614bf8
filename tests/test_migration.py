"""Names of the original's state dicts."""

import pytest
import torch
from reference_data import ReferenceCase

from dsvl.migration import convert_state_dict

CASES = ["B_baseline_mmca_on", "C_vit_mmca_on", "D_perceiver_mmca_on"]


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_arrives(name):
    weights = ReferenceCase(name).weights
    converted = convert_state_dict(weights)
    assert sum(t.numel() for t in converted.values()) == (
        sum(t.numel() for n, t in weights.items() if n != "lang_decoder.model.embed_tokens.weight")
    )
    assert converted["model.language_model.embed_tokens.weight"].equal(weights["lang_embed.weight"])


def test_tables_that_are_computed_anew_are_passed_over():
    weights = ReferenceCase(CASES[0]).weights
    extra = {
        "vis_encoder.vision_model.embeddings.position_ids": torch.arange(5)[None],
        "lang_decoder.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    assert set(convert_state_dict(weights | extra)) == set(convert_state_dict(weights))


@pytest.mark.parametrize("name", CASES)
def test_unknown_and_missing_names_are_listed(name):
    weights = dict(ReferenceCase(name).weights)
    del weights["lang_embed.weight"], weights["vis_encoder.vision_model.encoder.layers.1.mlp.fc1.bias"]
    weights["something.else"] = weights["lang_decoder.model.layers.9.odd.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        convert_state_dict(weights)
    message = str(caught.value)
    assert "Unknown names (2): lang_decoder.model.layers.9.odd.weight, something.else." in message
    assert "Missing names (2): lang_embed.weight, vis_encoder.vision_model.encoder.layers.1.mlp.fc1.bias." in message


def test_a_missing_layer_is_noticed():
    weights = {n: t for n, t in ReferenceCase(CASES[0]).weights.items() if "lang_decoder.model.layers.1." not in n}
    with pytest.raises(ValueError, match=r"Missing names \(9\): lang_decoder.model.layers.1.input_layernorm.weight"):
        convert_state_dict(weights)
