"""An image KV cache goes into files and to other processes, and is refused wherever its images would not be exact."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import _COMMON, FAMILIES, batch, random_images, tiny_model
from safetensors.torch import save_file
from test_reuse import LAYOUTS, ROPES, greedy, prefills
from training_runs import environment
from transformers import AutoModelForCausalLM

from dsvl import DSVLForConditionalGeneration, ImageKVCache


def test_a_cache_outlives_its_model(tmp_path):
    model, inputs = tiny_model(dtype=torch.float32), batch(*LAYOUTS[1], dtype=torch.float32)
    cache = model.encode_images(inputs["pixel_values"])
    expected = greedy(model, inputs)
    cache.save(tmp_path / "images.safetensors")
    model.save_pretrained(tmp_path / "model")
    again = DSVLForConditionalGeneration.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    again.generation_config.eos_token_id = None
    loaded = ImageKVCache.load(tmp_path / "images.safetensors")
    assert loaded.keys.equal(cache.keys) and loaded.values.equal(cache.values)
    assert greedy(again, inputs, loaded).equal(expected)
    assert greedy(again, inputs, ImageKVCache.cat([loaded[:1], again.encode_images(inputs["pixel_values"][1:])])).equal(
        expected
    )


ANSWER = """
import json, sys
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from dsvl import ImageKVCache

checkpoint, images, ids = sys.argv[1:]
model_class = get_class_from_dynamic_module("modeling_dsvl.DSVLForConditionalGeneration", checkpoint)
model = model_class.from_pretrained(checkpoint).eval()
assert model_class.__module__.startswith("transformers_modules.")
model.generation_config.eos_token_id = None
cache = ImageKVCache.load(images)
print(model.generate(torch.tensor(json.loads(ids)), image_cache=cache, max_new_tokens=8, do_sample=False).tolist())
"""


def test_a_cache_is_used_by_a_checkpoints_own_code(tmp_path):
    """In another process, whose model is of the checkpoint's code and not of this package."""
    model, inputs = tiny_model(dtype=torch.float32), batch(*LAYOUTS[1], dtype=torch.float32)
    model.encode_images(inputs["pixel_values"]).save(tmp_path / "images.safetensors")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "answer.py").write_text(ANSWER)
    ids = json.dumps(inputs["input_ids"].tolist())
    arguments = (tmp_path / "answer.py", tmp_path / "model", tmp_path / "images.safetensors", ids)
    run = subprocess.run([sys.executable, *map(str, arguments)], env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == greedy(model, inputs).tolist()


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"keys": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has the format None, not 'dsvl_image_cache_2'"):
        ImageKVCache.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.01),
        lambda model: model.model.vision_tower.load_state_dict(tiny_model(seed=3).model.vision_tower.state_dict()),
        lambda model: (model.lm_head.train(), model.model.language_model.norm.weight.data.mul_(2), model.eval()),
    ],
)
def test_a_cache_of_earlier_weights_is_refused(change):
    model, inputs = tiny_model(), batch("tItt")
    cache = model.encode_images(inputs["pixel_values"])
    with torch.no_grad():
        change(model)
    with pytest.raises(ValueError, match="or by this one before its weights changed; encode the images again"):
        greedy(model, inputs, cache)
    greedy(model, inputs, model.encode_images(inputs["pixel_values"]))


def test_new_words_do_not_make_another_model():
    model, inputs = tiny_model(), batch("tItt")
    cache = model.encode_images(inputs["pixel_values"])
    expected = prefills(model, inputs, cache)[1][0]
    model.resize_token_embeddings(128)
    got = prefills(model, inputs, cache)[1][0]
    torch.testing.assert_close(got[..., : expected.shape[-1]], expected, atol=1e-12, rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"family": "qwen3"}, {"rms_norm_eps": 1e-4}, {"rope_parameters": ROPES["yarn"]}]
)
def test_another_models_cache_is_refused(other):
    inputs = batch("tItt")
    cache = tiny_model(**other).encode_images(inputs["pixel_values"])
    with pytest.raises(ValueError, match="was encoded by another model"):
        greedy(tiny_model(), inputs, cache)


def test_another_dtype_is_refused():
    model, inputs = tiny_model(), batch("tItt")
    cache = model.encode_images(inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"is torch.float32, but the decoder's keys are torch.float64; pass image_cache.to"):
        greedy(model, inputs, cache.to(torch.float32))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention": "causal"}, "With multimodal_attention='causal'"),
        ({"attention": "mmca_reference"}, "With multimodal_attention='mmca_reference'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            "With positions of the kind dynamic",
        ),
    ],
)
def test_models_whose_images_depend_on_more_are_refused(overrides, message):
    with pytest.raises(ValueError, match=f"{message} .* cannot be reused; pass pixel_values"):
        tiny_model(**overrides).encode_images(random_images(1))


def test_reversed_images_are_refused():
    model = tiny_model()
    model.config.reversed_images = True
    with pytest.raises(ValueError, match="With reversed_images=True"):
        model.encode_images(random_images(1))


OTHERS = {
    "gpt2": (lambda: transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4), "GPT2Model: it has no rotary"),
    "phi": (lambda: transformers.PhiConfig(**_COMMON), "PhiModel: its apply_rotary_pos_emb does not take its keys"),
    "hunyuan": (
        lambda: transformers.HunYuanDenseV1Config(**_COMMON, head_dim=8),
        r"HunYuanDenseV1Model: in its layers \[0, 1\] positions change image tokens by more than a rotation",
    ),
    "nemotron": (lambda: transformers.NemotronConfig(**_COMMON), "NemotronAttention was not handed multimodal_masks"),
}


@pytest.mark.parametrize("family", OTHERS)
def test_decoders_that_rotate_otherwise_are_refused_by_name(monkeypatch, family):
    config, message = OTHERS[family]
    monkeypatch.setitem(FAMILIES, family, config)
    with pytest.raises(ValueError, match=message):
        tiny_model(family).encode_images(random_images(1))


@pytest.mark.parametrize(
    ("layouts", "cached", "message"),
    [
        (("tItIt",), 1, r"hold \[10\] image tokens, 10 in all, but there are 1 images of 5 tokens"),
        (("tItIt", "ttt"), 3, r"hold \[10, 0\] image tokens, 10 in all, but there are 3 images"),
        (("ttt",), 1, r"hold \[0\] image tokens"),
        (("tItI",), 2, "Row 0 of the prompts ends with an image or with padding"),
        (("ttIt", "tI"), 2, "Row 1 of the prompts ends with an image"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(layouts, cached, message):
    model, inputs = tiny_model(), batch(*layouts)
    with pytest.raises(ValueError, match=message):
        greedy(model, inputs, model.encode_images(random_images(cached)))


def test_an_image_that_is_cut_is_refused():
    model, inputs = tiny_model(), batch("tIItt")
    cut = {name: torch.cat([inputs[name][:, :3], inputs[name][:, 6:]], 1) for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"hold \[7\] image tokens, 7 in all, but there are 2 images of 5 tokens"):
        greedy(model, cut, model.encode_images(inputs["pixel_values"]))


def test_what_an_image_cache_cannot_do_is_said():
    model, inputs = tiny_model(), batch("ttItt")
    cache = model.encode_images(inputs["pixel_values"])
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    assistant = AutoModelForCausalLM.from_config(model.config.text_config).double().eval()
    for options, message in (
        ({"assistant_model": assistant}, "This way of decoding does not take an image KV cache"),
        ({"use_cache": False}, "is copied into a KV cache"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size concerns all tokens"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions concerns all tokens"),
        ({"pixel_values": inputs["pixel_values"]}, "but pixel_values came with it"),
        ({"image_cache": cache[:0]}, "holds no image; omit it"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**text, **({"image_cache": cache, "max_new_tokens": 4} | options))
    filled = greedy(model, inputs, cache, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="input_ids hold 9 tokens, but the KV cache 16 already"):
        model.prefill(inputs["input_ids"], cache, filled)
    static = greedy(model, inputs, cache, return_dict_in_generate=True, cache_implementation="static").past_key_values
    with pytest.raises(ValueError, match="input_ids hold 9 tokens, but the KV cache 16 already"):
        model.prefill(inputs["input_ids"], cache, static)
    with pytest.raises(ValueError, match="hold no image"):
        model.encode_images(random_images(0))
