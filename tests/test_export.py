"""An exported model is transformers' LLaVA, and computes what the checkpoint computes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import DECODERS, compose_for_export, save_and_export
from huggingface_hub import ModelCard
from llava_answer import answers
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

import dsvl
from dsvl.cli import main
from dsvl.export import checkpoint as export_checkpoint
from dsvl.export import to_llava
from dsvl.export.limits import unknown_fields
from dsvl.publishing.fresh_process import run_without_dsvl


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("prompts", "input_ids", "generated", "alone"):
        assert one[name] == other[name], name
    torch.testing.assert_close(torch.tensor(one["logits"]), torch.tensor(other["logits"]), atol=1e-4, rtol=0)


def opened(directory: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An exported model, all of whose weights are in the directory."""
    model, loading = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval(), AutoProcessor.from_pretrained(directory)


# -- it computes the same ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_computes_the_same(decoder, tmp_path):
    model, processor = compose_for_export(decoder=decoder)
    llava, llava_processor = opened(save_and_export(tmp_path, model, processor))
    assert type(llava_processor) is LlavaProcessor
    ours = answers(model, processor)
    assert_same(answers(llava, llava_processor), ours)
    assert len({tuple(ids) for ids in ours["generated"]}) > 1
    with torch.no_grad():
        llava.model.multi_modal_projector.linear_2.bias += 0.5  # the images matter
    changed = answers(llava, llava_processor)["logits"]
    assert (torch.tensor(changed) - torch.tensor(ours["logits"])).abs().max() > 0.1


CHOICES: dict[str, tuple[str, dict[str, Any], int]] = {
    "clip, all tokens, last layer": ("clip", {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, 5),
    "clip, three layers": ("clip", {"vision_feature_layer": [-1, 0, -3]}, 4),
    "clip, one layer in a list": ("clip", {"vision_feature_layer": [-2]}, 4),
    "siglip, second to last layer": ("siglip", {}, 4),
    "siglip, last layer before the norm": ("siglip", {"vision_feature_layer": 3}, 4),
    "siglip, two layers, all tokens": (
        "siglip",
        {"vision_feature_layer": [-2, 3], "vision_feature_select_strategy": "full"},
        4,
    ),
    "dinov2, interpolated positions": ("dinov2", {}, 4),
    "dinov2 with registers": ("dinov2_with_registers", {}, 9),
    "vit": ("vit", {"vision_feature_select_strategy": "full"}, 5),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_tower_and_choice_of_features_computes_the_same(choice, tmp_path):
    tower, options, tokens = CHOICES[choice]
    model, processor = compose_for_export(tower, **options)
    assert model.config.image_seq_length == tokens
    llava, llava_processor = opened(save_and_export(tmp_path, model, processor))
    assert llava.config.image_seq_length == tokens
    assert_same(answers(llava, llava_processor), answers(model, processor))


@pytest.mark.parametrize("number_after", [False, True])
def test_prompts_and_pixels_are_those_of_the_checkpoint(number_after, tmp_path, photographs):
    model, processor = compose_for_export(number_after=number_after)
    _, exported = opened(save_and_export(tmp_path, model, processor))
    content = [{"type": "image", "image": photograph} for photograph in photographs[:3]]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "Which is the cat?"}]}]
    text = exported.apply_chat_template(messages, add_generation_prompt=True)
    assert text == processor.apply_chat_template(messages, add_generation_prompt=True)
    assert ("(image 3)" in text) == number_after and text.count("<image>") == 3
    options = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    ours, theirs = (one.apply_chat_template(messages, **options) for one in (processor, exported))
    assert ours["input_ids"].equal(theirs["input_ids"]) and ours["pixel_values"].equal(theirs["pixel_values"])


ZEPHYR = """\
{%- for message in messages -%}
{{- "<|" ~ message.role ~ "|>\\n" ~ message.content ~ eos_token ~ "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>\\n" -}}{%- endif -%}
"""


@pytest.mark.parametrize("number_after", [False, True])
def test_the_language_models_own_chat_format_is_exported(number_after, tmp_path):
    (tmp_path / "zephyr.jinja").write_text(ZEPHYR)
    model, processor = compose_for_export(chat_template=tmp_path / "zephyr.jinja", number_after=number_after)
    llava, llava_processor = opened(save_and_export(tmp_path, model, processor))
    theirs = answers(llava, llava_processor)
    assert_same(theirs, answers(model, processor))
    assert theirs["prompts"][3].endswith("<|assistant|>\n") and ("(image 3)" in theirs["prompts"][3]) == number_after
    assert theirs["input_ids"][3].count(model.config.image_token_id) == 3 * 4  # not those that were typed
    bos = processor.tokenizer.bos_token_id
    assert bos not in sum(theirs["input_ids"], [])  # the template writes none
    assert processor.tokenizer("a")["input_ids"][0] == bos != llava_processor.tokenizer("a")["input_ids"][0]


@pytest.mark.parametrize("value", [False, True])
def test_a_variable_that_the_processor_passes_is_written_into_the_template(value, tmp_path):
    """As checkpoints of 0.2 do."""
    model, processor = compose_for_export(number_after=not value)
    processor.number_after = value
    llava, llava_processor = opened(save_and_export(tmp_path, model, processor))
    theirs = answers(llava, llava_processor)
    assert_same(theirs, answers(model, processor))
    assert ("(image 1)" in theirs["prompts"][1]) == value


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_stays_tied_or_untied(tied, tmp_path):
    model, processor = compose_for_export(text={"tie_word_embeddings": tied})
    exported = save_and_export(tmp_path, model, processor)
    with safe_open(exported / "model.safetensors", "pt") as weights:
        assert ("language_model.lm_head.weight" in set(weights.keys())) != tied
    llava, llava_processor = opened(exported)
    assert (llava.lm_head.weight is llava.get_input_embeddings().weight) == tied
    assert_same(answers(llava, llava_processor), answers(model, processor))


def test_what_ends_an_answer_and_what_is_never_said_is_carried_over(tmp_path):
    model, processor = compose_for_export()
    free = answers(model, processor)["alone"]
    model.generation_config.suppress_tokens += [free[2][0]]
    suppressed = answers(model, processor)["alone"]
    end = suppressed[1][3]  # the fourth token of an answer
    model.generation_config.eos_token_id = [2, end]
    exported = save_and_export(tmp_path, model, processor)
    llava, llava_processor = opened(exported)
    theirs = answers(llava, llava_processor)
    assert_same(theirs, answers(model, processor))
    assert theirs["alone"][1] == suppressed[1][: suppressed[1].index(end) + 1]
    assert free[2][0] not in sum(theirs["alone"], [])
    written = json.loads((exported / "generation_config.json").read_text())
    assert model.config.image_token_id in written["suppress_tokens"]
    assert set(range(len(processor.tokenizer), 448)) < set(written["suppress_tokens"])  # padding rows


def test_the_image_token_is_never_generated(tmp_path):
    model, processor = compose_for_export()
    with torch.no_grad():
        model.lm_head.weight[model.config.image_token_id] = (
            100 * model.lm_head.weight[answers(model, processor)["alone"][3][0]]
        )
    llava, llava_processor = opened(save_and_export(tmp_path, model, processor))
    theirs = answers(llava, llava_processor)
    assert_same(theirs, answers(model, processor))
    assert max(theirs["logits"][-1]) == theirs["logits"][-1][model.config.image_token_id]


def test_half_precision_and_shards_are_kept(tmp_path):
    model, processor = compose_for_export(dtype="bfloat16")
    dsvl.save_checkpoint(model, processor, tmp_path / "checkpoint")
    exported = dsvl.export_llava(tmp_path / "checkpoint", tmp_path / "llava", max_shard_size="100KB")
    assert len(list(exported.glob("*.safetensors"))) > 1
    llava, _ = opened(exported)
    ours, theirs = model.state_dict(), llava.state_dict()
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert llava.dtype == torch.bfloat16


def test_a_model_in_memory_is_converted_without_a_copy():
    model, processor = compose_for_export()
    llava, llava_processor = to_llava(model, processor)
    for ours, theirs in zip(model.parameters(), llava.parameters(), strict=True):
        assert ours is theirs
    assert not any(buffer.is_meta for buffer in llava.buffers())
    assert_same(answers(llava, llava_processor), answers(model, processor))
    assert llava_processor.tokenizer is not processor.tokenizer  # saving it names LLaVA's classes in it


# -- anywhere ----------------------------------------------------------------------------------------------------------


def test_a_fresh_process_without_the_package_opens_it(tmp_path):
    """Without remote code."""
    expected, paths = {}, []
    for tower, decoder in (("clip", "llama"), ("siglip", "gemma2")):
        model, processor = compose_for_export(tower, decoder, number_after=True)
        paths.append(save_and_export(tmp_path / tower, model, processor))
        expected[str(paths[-1])] = answers(model, processor)
    done = run_without_dsvl(Path(__file__).with_name("llava_answer.py"), *paths, capture=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "dsvl" not in found["importable"]
    for name, ours in expected.items():
        theirs = found["models"][name]
        assert theirs["classes"] == ["LlavaForConditionalGeneration", "LlavaProcessor"]
        assert theirs["wrong weights"] == {}
        assert_same(theirs, ours)


def test_the_directory_names_published_weights_and_no_code(tmp_path):
    """Inference engines look for these names."""
    for tower in ("clip", "siglip"):
        exported = save_and_export(tmp_path / tower, *compose_for_export(tower))
        with safe_open(exported / "model.safetensors", "pt") as weights:
            names = set(weights.keys())
        prefixes = (
            "language_model.model.",
            "language_model.lm_head.",
            "multi_modal_projector.",
            "vision_tower.vision_model.",
        )
        assert all(name.startswith(prefixes) for name in names) and len(names) > 30
        config = json.loads((exported / "config.json").read_text())
        assert config["model_type"] == "llava" and config["text_config"]["architectures"] == ["LlamaForCausalLM"]
        for path in exported.glob("*.json"):
            assert "auto_map" not in path.read_text() and "DSVL" not in path.read_text(), path
        assert not list(exported.glob("*.py"))


# -- the model card ----------------------------------------------------------------------------------------------------


CARD = """\
---
license: llama2
base_model:
- openai/clip-vit-large-patch14
- meta-llama/Llama-2-7b-hf
base_model_relation: finetune
tags: [dsvl, multi-image, custom_code, medical]
datasets: [someone/llava]
---

# A DSVL model

A model for X-ray images.

## Use

```python
trust_remote_code=True
```

## Attention

`multimodal_attention="causal"`: ordinary.

## Training

| data | conversations |
|---|---|
| llava | 12,345 |

![Loss](plots/loss.png) ![Elsewhere](https://example.org/a.png) ![Missing](missing.png)

## Licence

- `llama2`: comply with its conditions.

The code in `*_dsvl.py` is Apache-2.0.
"""


def test_the_card_keeps_what_the_checkpoint_says(tmp_path):
    model, processor = compose_for_export()
    dsvl.save_checkpoint(model, processor, tmp_path / "checkpoint")
    (tmp_path / "checkpoint/README.md").write_text(CARD, encoding="utf-8")
    (tmp_path / "checkpoint/plots").mkdir()
    (tmp_path / "checkpoint/plots/loss.png").write_bytes(b"PNG")
    exported = dsvl.export_llava(tmp_path / "checkpoint", tmp_path / "llava")
    card = ModelCard.load(exported / "README.md")
    assert card.data.license == "llama2" and card.data.datasets == ["someone/llava"]
    assert card.data.base_model == ["openai/clip-vit-large-patch14", "meta-llama/Llama-2-7b-hf"]
    assert card.data.tags == ["llava", "multi-image", "medical"]
    headings = re.findall(r"^#+ .*$", card.text, re.MULTILINE)
    assert headings == ["# A LLaVA model", "## Use", "## Training", "## Licence"]
    assert "A model for X-ray images." in card.text and "comply with its conditions" in card.text
    assert "trust_remote_code" not in card.text and "_dsvl.py" not in card.text
    assert (exported / "plots/loss.png").read_bytes() == b"PNG" and not (exported / "missing.png").exists()


def test_the_card_shows_how_to_load_it(tmp_path, monkeypatch, photographs, capsys):
    exported = save_and_export(tmp_path, *compose_for_export())
    snippet = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    monkeypatch.chdir(exported)
    photographs[0].save("photo.jpg")
    exec(snippet[1], {})
    assert capsys.readouterr().out.strip()


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return dsvl.save_checkpoint(*compose_for_export(), tmp_path_factory.mktemp("export") / "checkpoint")


def test_the_command_writes_a_model(checkpoint, tmp_path, capsys):
    assert main(["export", str(checkpoint), "--to", "llava", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    opened(tmp_path / "out")


def test_nothing_half_written_is_left_behind(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_checkpoint, "llava_card", lambda card: (_ for _ in ()).throw(OSError("disk full")))
    assert main(["export", str(checkpoint), "--to", "llava", "--out", str(tmp_path / "out")]) == 1
    assert "disk full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_refused_before_anything_is_loaded(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dsvl.DSVLForConditionalGeneration, "from_pretrained", lambda *_: pytest.fail("loaded"))
    (tmp_path / "kept.txt").write_text("mine")
    assert main(["export", str(checkpoint), "--to", "llava", "--out", str(tmp_path)]) == 1
    assert "exists and is not empty; remove it or choose another" in capsys.readouterr().err


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mmca": (
        "clip",
        {"multimodal_attention": "mmca"},
        "'mmca': LLaVA's decoder attends causally.*--multimodal-attention causal",
    ),
    "mmca_reference": ("clip", {"multimodal_attention": "mmca_reference"}, "'mmca_reference': LLaVA's decoder attends"),
    "linear": ("clip", {"projector_type": "linear"}, "projector_type='linear': LLaVA's .*--projector-type mlp and train it"),
    "vit": ("clip", {"projector_type": "vit"}, "projector_type='vit': LLaVA's projector is two linear layers with GELU"),
    "perceiver": ("clip", {"projector_type": "perceiver"}, "projector_type='perceiver': LLaVA's projector"),
    "tiles": ("clip", {"image_layout": "tiles"}, "image_layout='tiles': LLaVA takes an image as.*--image-layout crop"),
    "pad": ("clip", {"image_layout": "pad"}, "image_layout='pad': LLaVA takes an image as its tower's image processor"),
    "downsample": (
        "clip",
        {"downsample": 2},
        "downsample=2: LLaVA's projector makes a token of each.*--downsample 1",
    ),
    "registers": (
        "dinov2_with_registers",
        {"vision_feature_select_strategy": "default"},
        "drops the 5 tokens before the patches of this 'dinov2_with_registers' tower, but LLaVA drops one; .*full",
    ),
    "last layer": (
        "siglip",
        {"vision_feature_layer": -1},
        "-1 of this 'siglip_vision_model' tower is after its last norm.*--vision-feature-layer -2, as LLaVA-1.5, or 3, the",
    ),
    "shared positions": (
        "clip",
        {"image_positions": "image"},
        "image_positions='image': LLaVA gives every token a position of its own; compose .*--image-positions token",
    ),
    "last of several layers": (
        "dinov2",
        {"vision_feature_layer": [-2, -1]},
        r"vision_feature_layer=\[-2, -1\]: -1 of this 'dinov2' tower is after its last norm",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llava_cannot_express_is_refused_with_the_alternative(case, tmp_path):
    tower, options, message = REFUSED[case]
    dsvl.save_checkpoint(*compose_for_export(tower, **options), tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=f"The model cannot be exported to LLaVA[.:].*{message}"):
        dsvl.export_llava(tmp_path / "checkpoint", tmp_path / "llava")
    assert not (tmp_path / "llava").exists()


def test_every_reason_is_named_before_the_weights_are_read(checkpoint, tmp_path, monkeypatch):
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"multimodal_attention": "mmca", "projector_type": "linear", "reversed_images": True}
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").write_text(json.dumps(config))
    monkeypatch.setattr(dsvl.DSVLForConditionalGeneration, "from_pretrained", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="cannot be exported") as refused:
        dsvl.export_llava(tmp_path / "checkpoint", tmp_path / "llava")
    lines = str(refused.value).splitlines()
    found = [next(word for word in ("mmca", "linear", "reversed", "quantized") if word in line) for line in lines[1:]]
    assert found == ["mmca", "linear", "reversed", "quantized"]


def test_qwens_tower_is_refused(tmp_path):
    from reference_data import migrated

    config = dsvl.DSVLConfig.from_pretrained(migrated("E_qwen_mmca_on", mmca=True))
    config.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(
        ValueError, match="vision_config is Qwen-VL's tower, which transformers does not have; compose with CLIP"
    ):
        dsvl.export_llava(tmp_path / "checkpoint", tmp_path / "llava")


def test_adapters_are_to_be_merged(checkpoint, tmp_path):
    import peft

    model, processor = compose_for_export()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match="adapters holds adapters without the model; merge them first: dsvl merge --model"):
        dsvl.export_llava(tmp_path / "adapters", tmp_path / "llava")
    with pytest.raises(ValueError, match="It has adapters that are not merged; merge them first"):
        to_llava(model, processor)


def test_other_models_are_refused(tmp_path):
    exported = save_and_export(tmp_path, *compose_for_export())
    with pytest.raises(ValueError, match="is of type 'llava', not a DSVL checkpoint"):
        dsvl.export_llava(exported, tmp_path / "again")
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        dsvl.export_llava(tmp_path / "nothing", tmp_path / "again")


def test_a_setting_that_the_export_does_not_know_is_refused():
    class Later(dsvl.DSVLConfig):
        def __init__(self, later_setting: int = 1, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.later_setting = later_setting

    model, processor = compose_for_export()
    for value in (1, 4):
        model.config.__class__, model.config.later_setting = Later, value
        if value == 1:
            to_llava(model, processor)
        else:
            with pytest.raises(ValueError, match="later_setting=4: the export does not know this setting"):
                to_llava(model, processor)


def test_the_export_knows_every_setting():
    assert unknown_fields(dsvl.DSVLConfig) == []


def test_other_prompts_and_other_features_are_noticed(monkeypatch):
    model, processor = compose_for_export()
    processor.image_seq_length += 1
    with pytest.raises(ValueError, match="LlavaProcessor makes other input_ids than DSVLProcessor"):
        to_llava(model, processor)
    processor.image_seq_length -= 1
    monkeypatch.setattr(type(model), "get_image_features", lambda self, pixels: self.model.encode(pixels + 1))
    with pytest.raises(
        ValueError, match=r"The features that LLaVA computes with this 'clip_vision_model' tower differ.*; compose"
    ):
        to_llava(model, processor)
