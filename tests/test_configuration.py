"""A configuration says what it is, and refuses what does not go together."""

import json
import re

import pytest
import torch
from conftest import FAMILIES, PER_IMAGE, tiny_vision_config
from transformers import (
    AutoConfig,
    BloomConfig,
    CLIPConfig,
    JambaConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    Siglip2VisionConfig,
    T5Config,
    ViTConfig,
)

from dsvl import DSVLConfig, DSVLForConditionalGeneration, DSVLQwenVisionConfig
from dsvl.configuration_dsvl import PROJECTOR_TYPES


def config(**kwargs):
    return DSVLConfig(
        **({"vision_config": tiny_vision_config(), "text_config": FAMILIES["llama"](), "image_token_id": 90} | kwargs)
    )


def test_how_many_embeddings_an_image_becomes():
    assert config().image_seq_length == PER_IMAGE
    assert config(vision_feature_select_strategy="default").image_seq_length == PER_IMAGE - 1
    assert config(projector_type="vit").image_seq_length == PER_IMAGE
    assert config(projector_type="perceiver").image_seq_length == 256
    assert DSVLConfig().image_seq_length == 257  # CLIP ViT-L/14 at 224 pixels, with CLS


@pytest.mark.parametrize("projector_type", PROJECTOR_TYPES)
@pytest.mark.parametrize("strategy", ["full", "default"])
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_the_model_makes_as_many(projector_type, strategy, layer):
    model = DSVLForConditionalGeneration(
        config(projector_type=projector_type, vision_feature_select_strategy=strategy, vision_feature_layer=layer)
    )
    features = model.get_image_features(torch.zeros(2, 3, 8, 8)).pooler_output
    assert [f.shape for f in features] == [(model.config.image_seq_length, 32)] * 2


@pytest.mark.parametrize("projector_type", [name for name in PROJECTOR_TYPES if name != "vit"])
@pytest.mark.parametrize("strategy", ["full", "default"])
def test_features_of_several_layers_are_joined_along_their_width(projector_type, strategy):
    chosen = dict(projector_type=projector_type, vision_feature_select_strategy=strategy)
    model = DSVLForConditionalGeneration(config(**chosen, vision_feature_layer=(-1, 0, -2)))
    assert model.config.vision_feature_size == 3 * 16 and model.config.vision_feature_layer == [-1, 0, -2]
    pixels = torch.randn(2, 3, 8, 8)
    features = model.get_image_features(pixels)
    assert [f.shape for f in features.pooler_output] == [(model.config.image_seq_length, 32)] * 2
    parts = []
    for layer in (-1, 0, -2):
        alone = DSVLForConditionalGeneration(config(**chosen, vision_feature_layer=layer))
        alone.model.vision_tower = model.model.vision_tower
        parts.append(alone.get_image_features(pixels).last_hidden_state)
    assert features.last_hidden_state.equal(torch.cat(parts, dim=-1))
    assert len({part.sum().item() for part in parts}) == 3  # different layers


def test_a_list_of_one_layer_is_that_layer():
    torch.manual_seed(0)
    one = DSVLForConditionalGeneration(config(vision_feature_layer=-2))
    listed = DSVLForConditionalGeneration(config(vision_feature_layer=[-2]))
    listed.load_state_dict(one.state_dict())
    pixels = torch.randn(1, 3, 8, 8)
    assert listed.get_image_features(pixels).pooler_output[0].equal(one.get_image_features(pixels).pooler_output[0])


def test_the_mlp_projector_is_llavas():
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    ours = DSVLForConditionalGeneration(config(projector_type="mlp", vision_feature_layer=[-2, 0]))
    values = dict(vision_config=tiny_vision_config(), text_config=FAMILIES["llama"](), vision_feature_layer=[-2, 0])
    theirs = LlavaMultiModalProjector(LlavaConfig(**values))
    theirs.load_state_dict(ours.model.multi_modal_projector.state_dict())
    features = torch.randn(2, 5, 32)
    assert theirs(features).equal(ours.model.multi_modal_projector(features))


@pytest.mark.parametrize("layer", [-2, [-2, 0]])
def test_survives_a_round_trip(tmp_path, layer):
    original = config(projector_type="perceiver", multimodal_attention="causal", vision_feature_layer=layer)
    original.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"_name_or_path": ""} == original.to_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForCausalLM",
        "AutoModelForMultimodalLM",
        "AutoProcessor",
    }
    assert DSVLConfig(**written).to_dict() == original.to_dict()


def llama(**kwargs):
    return LlamaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **kwargs)


REFUSED = {
    "projector": ({"projector_type": "conv"}, "projector_type='conv' is not known; choose one of 'linear', 'mlp'"),
    "attention": ({"multimodal_attention": "full"}, "multimodal_attention='full' is not known; choose one of 'mmca'"),
    "strategy": ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy='cls' is not known"),
    "layer": ({"vision_feature_layer": 7}, "vision_feature_layer=7 does not exist: the tower has 2 layers.*from -3 to 2"),
    "layers": ({"vision_feature_layer": [1, 3]}, r"vision_feature_layer=\[1, 3\] does not exist.* or a list of them"),
    "no layer": ({"vision_feature_layer": []}, r"vision_feature_layer=\[\] does not exist"),
    "layer twice": ({"vision_feature_layer": [-2, 0, 1]}, r"vision_feature_layer=\[-2, 0, 1\] names a layer twice.*once"),
    "wide vit": (
        {"vision_feature_layer": [-2, -1], "projector_type": "vit"},
        r"'vit' is a layer of the tower's own width, but vision_feature_layer=\[-2, -1\] joins 2 layers; choose",
    ),
    "image token": ({"image_token_id": 96}, "image_token_id=96 lies outside text_config.vocab_size=96; extend"),
    "full CLIP": ({"vision_config": CLIPConfig()}, "model_type='clip' is not a vision tower; pass its vision_config"),
    "tower": ({"vision_config": FAMILIES["llama"]()}, "'llama' is not a vision tower.*: image_size=None, patch_size=None; "),
    "NaFlex": (
        {"vision_config": Siglip2VisionConfig()},
        "image_layout='crop' does not go with .*siglip2_vision",
    ),
    "prefix": ({"vision_config": ViTConfig()}, "How many tokens vision_config.model_type='vit' puts .* pass num_prefix"),
    "no patch": ({"vision_config": {"model_type": "clip_vision_model", "image_size": 8}}, "image_size=8 is smaller"),
    "no type": ({"text_config": {"hidden_size": 32}}, "text_config is a dict without 'model_type'.*add it"),
    "encoder": ({"text_config": T5Config(vocab_size=96)}, "model_type='t5' is not a plain causal decoder; pass"),
    "width": (
        {"projector_type": "perceiver", "text_config": LlamaConfig(vocab_size=96, hidden_size=30, num_attention_heads=3)},
        "hidden_size must be a multiple of 4, but it is 30; choose",
    ),
    "window": (
        {"multimodal_attention": "mmca_reference", "text_config": FAMILIES["mistral"]()},
        "mmca_reference.*text_config.sliding_window is 8; choose 'mmca'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_combinations_are_refused(case):
    values, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        config(**values)


@pytest.mark.parametrize(
    "text",
    [
        BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
        JambaConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, num_experts=2
        ),
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2),
    ],
    ids=lambda text: text.model_type,
)
def test_a_decoder_that_cannot_carry_mmca_is_refused(text):
    with pytest.raises(ValueError, match="(does not support|cannot be carried).*multimodal_attention='causal'"):
        DSVLForConditionalGeneration(config(text_config=text))


def test_softcapping_is_refused_where_it_would_be_ignored():
    model = DSVLForConditionalGeneration(config(text_config=FAMILIES["gemma2"]()))
    assert model.model.language_model.config._attn_implementation == "eager"  # transformers' own choice for it
    with pytest.raises(ValueError, match="eager"):
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_token_id", 1.5),
        ("image_token_id", float("nan")),
        ("image_token_id", -1),
        ("image_token_id", True),
        ("image_token_id", "90"),
        ("image_size", 8.5),
        ("image_size", 0),
        ("image_size", -8),
        ("num_prefix_tokens", -1),
        ("num_prefix_tokens", float("nan")),
        ("vision_feature_layer", -1.0),
        ("vision_feature_layer", True),
        ("vision_feature_layer", [-2, False]),
        ("vision_feature_layer", [-2, 1.0]),
        ("reversed_images", "yes"),
    ],
)
def test_numbers_that_are_none_are_refused(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}")):
        config(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 16.0), ("num_queries", -4), ("patch_size", 0), ("layer_norm_eps", float("nan")), ("image_size", -448)],
)
def test_numbers_that_are_none_are_refused_in_a_tower(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        DSVLQwenVisionConfig(**{field: value})


def test_a_subclass_needs_no_constructor_of_its_own(tmp_path):
    class Mine(DSVLConfig):
        model_type = "mine"

    made = Mine(vision_config=tiny_vision_config(), text_config=FAMILIES["llama"](), image_token_id=90)
    made.save_pretrained(tmp_path)
    again = Mine.from_pretrained(tmp_path)
    assert made.image_token_id == again.image_token_id == 90
    assert again.image_seq_length == PER_IMAGE and again.model_type == "mine"
    assert again.text_config.hidden_size == 32


def test_an_evaluation_gathers_no_caches_and_no_images():
    ignored = DSVLConfig.keys_to_ignore_at_inference
    assert {"past_key_values", "cache", "image_hidden_states", "image_outputs"} <= set(ignored)
