"""DeepSpeed-VisualChat's checkpoints and Qwen-VL's tower become checkpoints of ours; what does not fit is refused.

That they compute the same is in test_reference.py.
"""

import json
import os
import re
import weakref
from pathlib import Path

import peft
import pytest
import torch
from reference_data import QWEN_PREFIX, ReferenceCase, migrated, parts_of
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, DynamicCache

from dsvl import DSVLForConditionalGeneration, DSVLProcessor, DSVLQwenVisionModel
from dsvl.cli import main
from dsvl.migration import migrate_checkpoint, migrate_qwen_tower, read_weights

B, C, D, E, G = "B_baseline_mmca_on", "C_vit_mmca_on", "D_perceiver_mmca_on", "E_qwen_mmca_on", "G_lora"
TABLE = "vis_encoder.vision_model.embeddings.position_embedding.weight"
EMBEDDINGS = "model.language_model.embed_tokens.weight"


def migrate(tmp_path: Path, name: str, weights: dict[str, torch.Tensor] | None = None, **options):
    """Migrate a case, or other weights of its size."""
    source = tmp_path / "pytorch_model.bin"
    torch.save(ReferenceCase(name).weights if weights is None else weights, source)
    vision, language = parts_of(name)
    return migrate_checkpoint(source, vision, language, tmp_path / "out", **options)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


# -- every tensor is accounted for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [B, C, D, E, G])
def test_every_tensor_is_accounted_for(name, tmp_path):
    weights = ReferenceCase(name).weights
    report = migrate(tmp_path, name)
    assert set(report.taken) | set(report.unused) == set(weights) and not set(report.taken) & set(report.unused)
    assert report.unused == {
        "lang_decoder.model.embed_tokens.weight": "the frozen copy of the embedding table; lang_embed is the trained one"
    }
    ours = tensors(tmp_path / "out")
    assert {name for names in report.taken.values() for name in names if "(LoRA)" not in name} == set(ours)
    assert ours[EMBEDDINGS].equal(weights["lang_embed.weight"])
    assert sum(t.numel() for t in ours.values()) == sum(
        t.numel() for n, t in weights.items() if "lora_" not in n and n not in report.unused
    )


def test_the_command_reports_them(tmp_path, capsys):
    vision, language = parts_of(G)
    torch.save(ReferenceCase(G).weights, tmp_path / "pytorch_model.bin")
    command = ["migrate", "checkpoint", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out"), "--no-mmca"]
    assert main([*command, "--vision", str(vision), "--language", str(language), "--projector", "baseline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(
        "out: 115 tensors converted, 1 unused, 0 filled in; LoRA: 21 layers, not fused in the file, merged"
    )
    assert (
        "  converted    3 x lang_decoder.model.layers.N.mlp.up_proj.lora_left_weight -> "
        "model.language_model.layers.N.mlp.up_proj (LoRA)" in lines
    )
    assert "  converted    1 x lang_embed.weight -> model.language_model.embed_tokens.weight" in lines
    assert sum(int(line.split()[1]) for line in lines if line.startswith("  converted")) == 115
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["multimodal_attention"], config["reversed_images"]) == ("causal", True)
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_its_tokens_are_the_originals(tmp_path):
    """With the tokenizer that lies beside the weights, and with the language model's."""
    vision, language = parts_of(B)
    torch.save(ReferenceCase(B).weights, tmp_path / "pytorch_model.bin")
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_tokens(["### Image:", "<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    tokenizer.pad_token = tokenizer.eos_token
    for out in ("from-language", "from-checkpoint"):
        migrate_checkpoint(tmp_path, vision, language, tmp_path / out)
        tokenizer.save_pretrained(tmp_path)
        processor = DSVLProcessor.from_pretrained(tmp_path / out)
        config = DSVLForConditionalGeneration.from_pretrained(tmp_path / out).config
        assert [processor.tokenizer.convert_tokens_to_ids(t) for t in ("### Image:", "<image>", "<PAD>")] == [400, 401, 402]
        assert (len(processor.tokenizer), config.image_token_id, config.text_config.vocab_size) == (403, 401, 403)
        # Padding with the end of the answer, as the original does, would keep transformers from training its embedding.
        assert processor.tokenizer.pad_token_id == config.text_config.pad_token_id == 402


def test_what_zero_3_leaves_out_and_what_others_save_besides_changes_nothing(tmp_path):
    weights = ReferenceCase(B).weights
    extra = {
        "vis_encoder.vision_model.embeddings.position_ids": torch.arange(5)[None],
        "lang_decoder.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    report = migrate(tmp_path, B, weights | extra)
    assert all(report.unused[name] == "a buffer that is computed" for name in extra)
    expected = tensors(migrated(B, True))
    assert all(tensor.equal(expected[name]) for name, tensor in tensors(tmp_path / "out").items())


def test_missing_position_tables_are_filled_in(tmp_path):
    case = ReferenceCase(D)
    weights = {n: t for n, t in case.weights.items() if n not in (TABLE, "projection.pos_embed")}
    report = migrate(tmp_path, D, weights)
    assert report.filled == {
        "model.multi_modal_projector.position_embedding": "sine-cosine positions, its initial value",
        "model.vision_tower.embeddings.position_embedding.weight": f"from --vision {parts_of(D)[0]}",
    }
    ours = tensors(tmp_path / "out")
    assert ours["model.vision_tower.embeddings.position_embedding.weight"].equal(case.weights[TABLE])
    table = case.outputs["reference.sincos_pos_embed_init"]
    torch.testing.assert_close(ours["model.multi_modal_projector.position_embedding"], table, atol=1e-6, rtol=0)


def test_a_tied_head_that_zero_3_left_out_is_the_frozen_table(tmp_path):
    vision, language = parts_of(B)
    tied = tmp_path / "tied"
    tied.mkdir()
    for file in language.iterdir():
        (tied / file.name).write_bytes(file.read_bytes())
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = {n: t for n, t in ReferenceCase(B).weights.items() if n != "lang_decoder.lm_head.weight"}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    report = migrate_checkpoint(tmp_path / "pytorch_model.bin", vision, tied, tmp_path / "out")
    frozen = "lang_decoder.model.embed_tokens.weight"
    assert report.taken[frozen] == ("lm_head.weight",) and not report.unused
    model = DSVLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.equal(weights[frozen]) and model.get_input_embeddings().weight.equal(
        weights["lang_embed.weight"]
    )
    with pytest.raises(ValueError, match=r"Missing names \(1\): lang_decoder.lm_head.weight"):
        migrate_checkpoint(tmp_path / "pytorch_model.bin", vision, language, tmp_path / "untied")


# -- adapters ----------------------------------------------------------------------------------------------------------


def fused_file(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """As the original saves below ZeRO-3: adapters added to the weights, and their factors beside them."""
    fused = load_file(Path(__file__).parent / "reference" / G / "weights_fused.safetensors")
    return {name: tensor.to(dtype) for name, tensor in (ReferenceCase(G).weights | fused).items()}


@pytest.mark.parametrize("options", [{}, {"lora": "fused"}])
def test_adapters_that_are_in_the_weights_are_not_added_again(tmp_path, options):
    report = migrate(tmp_path, G, fused_file(), **options)
    assert report.adapters == "21 layers, fused in the file, merged"
    expected = tensors(migrated(G, True))
    for name, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


def test_half_precision_does_not_hide_whether_they_are_fused(tmp_path):
    report = migrate(tmp_path, G, fused_file(torch.float16))
    assert report.adapters == "21 layers, fused in the file, merged"
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.float16}


def test_zero_3s_file_is_fused_and_has_no_factors(tmp_path):
    report = migrate(tmp_path, G, {n: t for n, t in fused_file().items() if "lora_" not in n})
    assert report.adapters == "none"
    expected = tensors(migrated(G, True))
    for name, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_kept_adapters_are_pefts(tmp_path, fused, capsys):
    report = migrate(tmp_path, G, fused_file() if fused else None, keep_adapter=True)
    assert report.adapters.endswith("kept in adapters/")
    base = DSVLForConditionalGeneration.from_pretrained(tmp_path / "out")
    plain = DSVLForConditionalGeneration.from_pretrained(migrated(B, True))  # G is B with adapters
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], atol=1e-6, rtol=0)
    case = ReferenceCase(G)
    inputs = case.batch("single")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapters")
    with torch.no_grad():
        logits, expected = adapted(**inputs).logits, case.outputs["unfused.single.logits"]
    torch.testing.assert_close(logits, expected[:, : logits.shape[1]], atol=1e-4, rtol=1e-4)
    out = str(tmp_path / "out")
    assert main(["merge", "--model", out, "--adapters", f"{out}/adapters", "--out", str(tmp_path / "merged")]) == 0
    merged = tensors(migrated(G, True))
    for name, tensor in tensors(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)


def test_the_towers_adapters_of_another_rank(tmp_path):
    weights = dict(ReferenceCase(G).weights)
    torch.manual_seed(0)
    name = "encoder.layers.1.mlp.fc1"
    right, left = torch.randn(32, 2), torch.randn(2, 64)
    theirs = f"vis_encoder.vision_model.{name}"
    weights |= {f"{theirs}.lora_right_weight": right, f"{theirs}.lora_left_weight": left}
    merged = migrate(tmp_path, G, weights)
    assert merged.adapters.startswith("22 layers, not fused")
    expected = weights[f"{theirs}.weight"] + (right @ left).T / 2
    torch.testing.assert_close(tensors(tmp_path / "out")[f"model.vision_tower.{name}.weight"], expected)
    (tmp_path / "kept").mkdir()
    migrate(tmp_path / "kept", G, weights, keep_adapter=True)
    base = DSVLForConditionalGeneration.from_pretrained(tmp_path / "kept" / "out")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "kept" / "out" / "adapters").merge_and_unload()
    torch.testing.assert_close(again.model.vision_tower.get_submodule(name).weight, expected)


def test_whether_they_are_fused_is_not_guessed(tmp_path):
    weights = dict(ReferenceCase(G).weights)
    weights["lang_decoder.model.layers.0.mlp.down_proj.weight"] = torch.randn(64, 128)
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj.weight is neither.*--lora fused or --lora unfused"):
        migrate(tmp_path, G, weights)
    assert migrate(tmp_path, G, weights, lora="unfused").adapters == "21 layers, not fused in the file, merged"


# -- images in reverse -----------------------------------------------------------------------------------------------


@pytest.fixture
def both():
    """A model that puts images in reverse, and the same with images where they stand."""
    models = [DSVLForConditionalGeneration.from_pretrained(migrated(B, mmca=False)) for _ in range(2)]
    models[1].config.reversed_images = False
    return models


def test_each_samples_images_are_turned_round(both):
    reverse, plain = both
    inputs = ReferenceCase(B).batch("batch")  # samples of 1, 2 and 3 images
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        assert not torch.allclose(reverse(**inputs).logits, plain(**inputs).logits)
        turned = inputs | {"pixel_values": pixels[[0, 2, 1, 5, 4, 3]]}
        assert reverse(**inputs).logits.equal(plain(**turned).logits)
        by_types = {k: v for k, v in inputs.items() if k != "input_ids"} | {
            "inputs_embeds": reverse.get_input_embeddings()(inputs["input_ids"]),
            "mm_token_type_ids": (inputs["input_ids"] == 401).long(),
        }
        assert reverse(**by_types).logits.equal(plain(**turned).logits)
        features = plain.get_image_features(pixels).last_hidden_state
        known = {k: v for k, v in inputs.items() if k != "pixel_values"} | {"image_features": features}
        torch.testing.assert_close(reverse(**known).logits, plain(**turned).logits)
        compiled = torch.compile(reverse, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, plain(**turned).logits)
    with pytest.raises(ValueError, match=r"The samples hold \[5, 10, 15\] image tokens, 30 in all, but there are 25 image"):
        reverse(**(inputs | {"pixel_values": pixels[1:]}))


def test_packed_conversations_are_turned_round_one_by_one(both):
    reverse, _ = both
    inputs = ReferenceCase(B).batch("batch")
    lengths, images = inputs["attention_mask"].sum(-1).tolist(), [1, 2, 3]
    rows = [row[:length] for row, length in zip(inputs["input_ids"], lengths, strict=True)]
    with torch.no_grad():
        packed = reverse(
            input_ids=torch.cat(rows)[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            pixel_values=inputs["pixel_values"],
        ).logits[0]
        alone = [
            reverse(input_ids=row[None], pixel_values=pixels).logits[0]
            for row, pixels in zip(rows, inputs["pixel_values"].split(images), strict=True)
        ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_generation_turns_them_round_once(both):
    reverse, plain = both
    inputs = ReferenceCase(B).batch("gen_multi")
    del inputs["labels"]
    turned = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    expected = plain.generate(**turned, max_new_tokens=8, do_sample=False)
    known = {k: v for k, v in inputs.items() if k != "pixel_values"}
    known["image_features"] = plain.get_image_features(inputs["pixel_values"]).last_hidden_state
    assert reverse.generate(**known, max_new_tokens=8, do_sample=False).equal(expected)
    assert not expected.equal(plain.generate(**inputs, max_new_tokens=8, do_sample=False))
    for options in ({}, {"prefill_chunk_size": 4}, {"num_beams": 1, "cache_implementation": "static"}):
        assert reverse.generate(**inputs, max_new_tokens=8, do_sample=False, **options).equal(expected)


@pytest.mark.parametrize("mmca", [False, True])
def test_a_cache_with_images_takes_text_but_no_more_images(mmca):
    model = DSVLForConditionalGeneration.from_pretrained(migrated(B, mmca))
    inputs = ReferenceCase(B).batch("gen_multi")
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    cut = int((ids[0] == 401).nonzero()[4]) + 1  # behind the first
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=ids[:, :cut], pixel_values=pixels[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="reversed_images puts the last image first, but the cache may hold"):
        model.generate(ids, pixel_values=pixels, past_key_values=cache, max_new_tokens=2)
    whole = model.generate(ids, pixel_values=pixels, max_new_tokens=2, do_sample=False)
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=ids[:, :-2], pixel_values=pixels, past_key_values=cache)
    continued = model.generate(ids, pixel_values=pixels, past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert continued.equal(whole)


# -- Qwen-VL's tower ---------------------------------------------------------------------------------------------------


def qwen_source(folder: Path, kind: str = "safetensors") -> Path:
    """Qwen-VL's checkpoint in three shards; the last has nothing of the tower, and cannot be read."""
    case = ReferenceCase(E)
    weights = {n.removeprefix("vis_encoder."): t for n, t in case.weights.items() if n.startswith("vis_encoder.")}
    folder.mkdir()
    names = ["model-1", "model-2", "model-3"]
    shards = [{QWEN_PREFIX + n: t for i, (n, t) in enumerate(weights.items()) if i % 2 == half} for half in (0, 1)]
    shards[0] |= {f"{QWEN_PREFIX}proj": torch.zeros(2, 2), "transformer.h.0.ln_1.weight": torch.zeros(2)}
    ending, index = (".safetensors", "model.safetensors") if kind == "safetensors" else (".bin", "pytorch_model.bin")
    for name, shard in zip(names, shards, strict=False):
        (save_file if kind == "safetensors" else torch.save)(shard, folder / f"{name}{ending}")
    (folder / f"{names[2]}{ending}").write_bytes(b"not to be read")
    places = {key: f"{name}{ending}" for name, shard in zip(names, shards, strict=False) for key in shard}
    places["transformer.wte.weight"] = f"{names[2]}{ending}"
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": places}))
    visual = {k: v for k, v in case.config["vision"].items() if k not in ("type", "mlp_size")} | {"mlp_ratio": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen", "visual": visual}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_qwens_tower_comes_out_of_its_shards(tmp_path, kind, capsys, monkeypatch):
    if kind == "bin":  # a shard is let go before the next is opened
        read, held = read_weights.read_pickle, []

        def watched(file):
            assert sum(tensor() is not None for tensor in held) <= 1
            loaded = read(file)
            held.extend(weakref.ref(tensor) for tensor in loaded.values())
            return loaded

        monkeypatch.setattr(read_weights, "read_pickle", watched)
    source, out = qwen_source(tmp_path / "qwen", kind), tmp_path / "tower"
    assert main(["migrate", "qwen-tower", "--from", str(source), "--out", str(out)]) == 0
    assert "2 layers of width 32, 4 embeddings of 128 an image of 56 pixels" in capsys.readouterr().out
    case = ReferenceCase(E)
    tower = AutoModel.from_pretrained(out)
    assert isinstance(tower, DSVLQwenVisionModel)
    with torch.no_grad():
        features = tower(case.inputs["batch.pixel_values"]).last_hidden_state
    torch.testing.assert_close(features, case.outputs["batch.image_features"], atol=1e-4, rtol=1e-4)
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "preprocessor_config.json", "vision_dsvl.py"}


def test_what_the_originals_script_extracted_is_read_too(tmp_path):
    weights = {n.removeprefix("vis_encoder."): t for n, t in ReferenceCase(E).weights.items() if n.startswith("vis_")}
    (tmp_path / "qwen_clip").mkdir()
    torch.save(weights, tmp_path / "qwen_clip" / "pytorch_model.bin")
    config = migrate_qwen_tower(tmp_path / "qwen_clip", tmp_path / "tower")
    assert (config.num_hidden_layers, config.intermediate_size, config.num_queries) == (2, 64, 4)
    assert (config.num_attention_heads, config.image_size) == (16, 448)  # which weights do not tell


def test_an_incomplete_or_other_qwen_is_refused(tmp_path):
    source = qwen_source(tmp_path / "qwen")
    shard = load_file(source / "model-2.safetensors")
    del shard[f"{QWEN_PREFIX}ln_pre.weight"]
    save_file(shard, source / "model-2.safetensors")
    with pytest.raises(
        ValueError, match=r"not the vision tower of Qwen-VL. Unknown names \(0\): none. Missing names \(1\): ln_pre.weight"
    ):
        migrate_qwen_tower(source, tmp_path / "tower")
    (source / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-2.safetensors, which model.safetensors.index.json names"):
        migrate_qwen_tower(source, tmp_path / "tower")
    save_file({"transformer.wte.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no weights transformer.visual.* .but transformer.wte.weight"):
        migrate_qwen_tower(tmp_path / "model.safetensors", tmp_path / "tower")
    source = qwen_source(tmp_path / "other")
    config = json.loads((source / "config.json").read_text())
    config["visual"]["output_dim"] = 256
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"attn_pool.\S+ becomes resampler.\S+ of shape .*128.*, but by config.json.*256"):
        migrate_qwen_tower(source, tmp_path / "tower")
    assert not (tmp_path / "tower").exists()


# -- refusals ----------------------------------------------------------------------------------------------------------


class Runs:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vision, language = parts_of(B)
    torch.save(ReferenceCase(B).weights | {"more": Runs()}, tmp_path / "pytorch_model.bin")
    command = ["migrate", "checkpoint", "--checkpoint", ".", "--vision", str(vision), "--language", str(language)]
    assert main([*command, "--out", "out"]) == 1
    assert "is a pickle that would run code (posix.system)" in capsys.readouterr().err
    assert main(["migrate", "qwen-tower", "--from", ".", "--out", "out"]) == 1
    assert "is a pickle that would run code (posix.system)" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"pytorch_model.bin"}


@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.99])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_file_that_is_cut_off_is_refused(tmp_path, name, kept):
    file = tmp_path / name
    weights = ReferenceCase(B).weights
    (save_file if name.endswith("safetensors") else torch.save)(weights, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept if kept in (0, 10) else kept * len(whole))])
    with pytest.raises(ValueError, match=f"{name} (is cut off or damaged|cannot be read)"):
        migrate_checkpoint(tmp_path, *parts_of(B), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_state_dict_are_refused(tmp_path):
    for content, message in (
        ([torch.zeros(1)], "holds a list; expected a state dict"),
        ({"epoch": 3}, "'epoch', which is no"),
    ):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            migrate_checkpoint(tmp_path, *parts_of(B), tmp_path / "out")
    (tmp_path / "epoch-3").mkdir()
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "epoch-3" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="holds no weights; pass one of its directories, epoch-3"):
        migrate_checkpoint(tmp_path, *parts_of(B), tmp_path / "out")


def test_other_sizes_name_the_first_tensor_and_both_shapes(tmp_path):
    torch.save(ReferenceCase(B).weights, tmp_path / "pytorch_model.bin")
    vision, language = parts_of(B)
    with pytest.raises(
        ValueError,
        match=r"vision_model.embeddings.position_embedding.weight becomes \S+ of shape \(5, 32\), but by --vision \S+ it "
        r"should be \(17, 32\)",
    ):
        migrate_checkpoint(tmp_path, parts_of(D)[0], language, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"mlp.down_proj.weight becomes \S+ of shape \(64, 128\), but by --language \S+ .* \(64, 112\)"
    ):
        migrate_checkpoint(tmp_path, vision, parts_of(C)[1], tmp_path / "out")
    other = tmp_path / "language"
    other.mkdir()
    config = json.loads((language / "config.json").read_text())
    for file in language.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(
        ValueError, match=r"other layers than .*: it lacks model.language_model.layers.3.\S+, .*\(9 in all\)"
    ):
        migrate_checkpoint(tmp_path, vision, other, tmp_path / "out")


def test_the_wrong_models_are_refused(tmp_path):
    torch.save(ReferenceCase(B).weights, tmp_path / "pytorch_model.bin")
    vision, language = parts_of(B)
    with pytest.raises(
        ValueError, match="is a tower of type 'dsvl_qwen_vision', but .* has one of type 'clip_vision_model'"
    ):
        migrate_checkpoint(tmp_path, parts_of(E)[0], language, tmp_path / "out")
    with pytest.raises(ValueError, match="is a model of type 'llama', which has no tower"):
        migrate_checkpoint(tmp_path, language, language, tmp_path / "out")
    with pytest.raises(ValueError, match="--projector vit, but .* has the projector 'linear'; omit --projector"):
        migrate_checkpoint(tmp_path, vision, language, tmp_path / "out", projector="vit")
    with pytest.raises(ValueError, match="--language .* is of type 'clip_vision_model'; .* supports 'llama' only"):
        migrate_checkpoint(tmp_path, vision, vision, tmp_path / "out")


def test_unknown_and_missing_names_are_listed(tmp_path):
    weights = dict(ReferenceCase(B).weights)
    del weights["projection.0.bias"], weights["vis_encoder.vision_model.encoder.layers.1.mlp.fc1.bias"]
    weights["something.else"] = weights["lang_decoder.model.layers.9.odd.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        migrate(tmp_path, B, weights)
    message = str(caught.value)
    assert "Unknown names (2): lang_decoder.model.layers.9.odd.weight, something.else." in message
    assert "Missing names (2): projection.0.bias, vis_encoder.vision_model.encoder.layers.1.mlp.fc1.bias." in message
    without = {n: t for n, t in ReferenceCase(B).weights.items() if "lang_decoder.model.layers.1." not in n}
    with pytest.raises(ValueError, match=r"Missing names \(9\): lang_decoder.model.layers.1.input_layernorm.weight"):
        migrate(tmp_path, B, without)


def test_what_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    command = ["migrate", "checkpoint", "--checkpoint", "nowhere", "--vision", "nowhere", "--language", "nowhere", "--out"]
    assert main([*command, str(tmp_path)]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "file" / "out")]) == 1
    assert f"as {tmp_path / 'file'} does not allow it; choose another directory" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main([*command, str(tmp_path / "new" / "out")]) == 1
    assert f"out cannot be written, as {tmp_path} does not allow it" in capsys.readouterr().err


# -- the guide ---------------------------------------------------------------------------------------------------------


def test_its_commands_are_ours(capsys):
    """Every flag that the page names on our side, and every command, exists."""
    from dsvl.training.arguments import parse

    page = (Path(__file__).parent.parent / "docs/guides/migrate.md").read_text()
    commands = re.findall(r"^(dsvl|deepspeed --module dsvl.training) (.+)$", page, re.MULTILINE)
    assert len(commands) == 6
    known = ""
    for command in (["compose"], ["migrate", "checkpoint"], ["data", "show"], ["chat"], ["evaluate"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        known += capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(["--help-all"])
    known += capsys.readouterr().out
    named = re.findall(r"^\| .* \| (.*) \|$", page, re.MULTILINE) + [rest for _, rest in commands]
    for flag in re.findall(r"--[a-z][a-z0-9-]+", " ".join(named)):
        assert flag in known or flag in ("--from", "--module"), flag
    (training,) = [rest for program, rest in commands if program != "dsvl"]
    training, _ = training.split(" --bf16 ")  # what is left needs neither a GPU nor a launcher
    arguments = parse(training.split())
    assert (arguments[2].adam_beta2, arguments[1].max_length) == (0.95, 4096)
