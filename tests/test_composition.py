"""Composing, saving, loading anywhere."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import FAMILIES, REFERENCE, save_tiny_llama, tiny_tower_config
from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import dsvl
from dsvl.cli import main
from dsvl.composition import checkpoint
from dsvl.configuration_dsvl import PROJECTOR_TYPES
from dsvl.publishing.fresh_process import run_without_dsvl

REMOTE_CODE = sorted(path.name for path in Path(dsvl.__file__).parent.glob("*_dsvl.py"))
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=100)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A full CLIP model, a bare tower, and LLaMAs with a tokenizer, as directories."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("parts")
    clip = CLIPModel(
        CLIPConfig(
            vision_config=tiny_tower_config().to_dict(),
            text_config=TEXT | {"bos_token_id": 1, "eos_token_id": 2},
            projection_dim=16,
        )
    )
    clip.save_pretrained(root / "clip")
    clip.vision_model.save_pretrained(root / "tower")
    for folder in ("clip", "tower"):
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(root / folder)
    for name, tied in (("llama", False), ("tied", True)):
        save_tiny_llama(root / name, torch.bfloat16, tie_word_embeddings=tied)
    return root


@pytest.mark.parametrize("vision", ["clip", "tower"])
@pytest.mark.parametrize("language", ["llama", "tied"])
@pytest.mark.parametrize("projector_type", PROJECTOR_TYPES)
def test_the_parts_keep_their_weights(parts, vision, language, projector_type):
    model, processor = dsvl.compose(parts / vision, parts / language, projector_type=projector_type, dtype="float32")
    tower = CLIPVisionModel.from_pretrained(parts / vision)
    decoder = LlamaForCausalLM.from_pretrained(parts / language, dtype=torch.float32)
    for name, tensor in tower.state_dict().items():
        assert model.model.vision_tower.state_dict()[name].equal(tensor), name
    ours = model.model.language_model.state_dict()
    for name, tensor in decoder.model.state_dict().items():
        assert ours[name][: len(tensor)].equal(tensor), name
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (language == "tied")
    assert model.config.tie_word_embeddings == (language == "tied")
    assert not any(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not model.training


def test_the_vocabulary_grows_to_a_multiple_of_64_by_the_mean(parts, tmp_path):
    model, processor = dsvl.compose(parts / "clip", parts / "llama", dtype=torch.float32)
    decoder = LlamaForCausalLM.from_pretrained(parts / "llama", dtype=torch.float32)
    assert model.config.text_config.vocab_size == 448 and len(processor.tokenizer) == 402
    assert (model.config.image_token_id, processor.tokenizer.pad_token) == (400, "<pad>")
    for ours, theirs in (
        (model.get_input_embeddings().weight, decoder.get_input_embeddings().weight),
        (model.lm_head.weight, decoder.lm_head.weight),
    ):
        torch.testing.assert_close(ours[400:], theirs.mean(0).expand(48, -1))
    assert processor.image_seq_length == model.config.image_seq_length == 5
    assert processor.tokenizer.padding_side == "left"
    processor.save_pretrained(tmp_path)
    assert dsvl.DSVLProcessor.from_pretrained(tmp_path).tokenizer.padding_side == "left"


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_models_of_every_family_compose(family, tmp_path):
    text = FAMILIES[family]()
    text.vocab_size = 400
    decoder = transformers.AutoModelForCausalLM.from_config(text)
    tower = CLIPVisionModel(tiny_tower_config())
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "tokenizer")
    model, processor = dsvl.compose(tower, decoder, tokenizer=tokenizer)
    assert model.model.vision_tower is tower and model.model.language_model is decoder.model
    dsvl.save_checkpoint(model, processor, tmp_path / "out")
    loaded = dsvl.DSVLForConditionalGeneration.from_pretrained(tmp_path / "out")
    inputs = processor(text="<image> hello", images=torch.zeros(3, 28, 28), return_tensors="pt")
    with torch.no_grad():
        assert loaded(**inputs).logits.equal(model(**inputs).logits)
    generated = loaded.generate(**inputs, max_new_tokens=20, do_sample=True)
    assert (generated[:, inputs["input_ids"].shape[1] :] < len(processor.tokenizer)).all()


def test_half_precision_is_kept(parts, tmp_path):
    model, processor = dsvl.compose(parts / "clip", parts / "llama")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    dsvl.save_checkpoint(model, processor, tmp_path / "out")
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    inputs = processor(text="<image> hello", images=torch.zeros(3, 28, 28), return_tensors="pt")
    assert loaded.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def compose_by_command(parts: Path, out: Path, *options: str) -> int:
    return main(
        ["compose", "--vision", str(parts / "clip"), "--language", str(parts / "llama"), "--out", str(out), *options]
    )


@pytest.fixture(scope="module")
def composed(parts, tmp_path_factory) -> Path:
    torch.manual_seed(0)  # its answers are whole characters
    out = tmp_path_factory.mktemp("composed") / "checkpoint"
    assert compose_by_command(parts, out, "--number-after", "--dtype", "float32", "--max-shard-size", "100KB") == 0
    return out


def test_the_command_writes_a_complete_checkpoint(composed):
    files = {path.name for path in composed.iterdir()}
    assert files >= {
        "README.md",
        *REMOTE_CODE,
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    shards = sorted(composed.glob("model-*.safetensors"))
    assert len(shards) > 1
    with safe_open(shards[0], "pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    assert str(composed.parent.parent) not in (composed / "config.json").read_text()  # no path of this machine
    card = (composed / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    question = [{"role": "user", "content": [{"type": "image"}]}]
    assert "(image 1)" in transformers.AutoProcessor.from_pretrained(composed).apply_chat_template(question)
    assert "(image 1)" in AutoTokenizer.from_pretrained(composed).apply_chat_template(question, tokenize=False)


@pytest.mark.parametrize(("flags", "layer"), [((), -1), (("-2",), -2), (("-2", "0", "-1"), [-2, 0, -1])], ids=str)
def test_the_command_takes_one_layer_or_several(parts, tmp_path, flags, layer):
    flags = ("--vision-feature-layer", *flags) if flags else ()
    assert compose_by_command(parts, tmp_path / "out", "--projector-type", "mlp", *flags) == 0
    model = dsvl.DSVLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.config.vision_feature_layer == layer
    assert model.model.multi_modal_projector.linear_1.in_features == 32 * max(len(flags) - 1, 1)


def test_nothing_half_written_is_left_behind(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "render_card", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    assert compose_by_command(parts, tmp_path / "out") == 1
    assert "disk full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_refused_before_anything_is_loaded(parts, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")
    assert main(["compose", "--vision", "nowhere", "--language", "nowhere", "--out", str(tmp_path / "out")]) == 1
    assert "exists and is not empty; remove it or choose another" in capsys.readouterr().err
    assert (tmp_path / "out" / "kept.txt").read_text() == "mine"


def test_wrong_parts_are_refused_by_name(parts, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # nothing waits for a Hub
    with pytest.raises(ValueError, match="is a model of type 'llama', which has no tower"):
        dsvl.compose(parts / "llama", parts / "llama", tokenizer=None, image_processor=object())
    with pytest.raises(ValueError, match="pass tokenizer="):
        dsvl.compose(parts / "clip", LlamaForCausalLM(LlamaConfig(**TEXT)))
    decoder = transformers.LlamaModel.from_pretrained(parts / "llama")
    with pytest.raises(ValueError, match="LlamaModel without a language modelling head"):
        dsvl.compose(parts / "clip", decoder)
    assert main(["compose", "--vision", "no/such", "--language", str(parts / "llama"), "--out", str(tmp_path / "x")]) == 1
    assert "dsvl compose: " in capsys.readouterr().err


# -- remote code -------------------------------------------------------------------------------------------------------

FRESH = """
import importlib.util, json, sys
assert importlib.util.find_spec("dsvl") is None
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline

directory, again = sys.argv[1:]
trust = {"trust_remote_code": True}
image = Image.radial_gradient("L").convert("RGB")
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}]

def answer(where, auto):
    processor = AutoProcessor.from_pretrained(where, **trust)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = auto.from_pretrained(where, **trust)
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return model, processor, processor.decode(new, skip_special_tokens=True)

assert AutoConfig.from_pretrained(directory, **trust).image_seq_length == 5
answers = []
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    model, processor, said = answer(directory, auto)
    assert type(model).__name__ == "DSVLForConditionalGeneration"
    answers.append(said)
pipe = pipeline("image-text-to-text", model=directory, **trust)
said = pipe(text=messages, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
answers.append(said.strip())  # cut out of the whole text, where its first word has a space before it
model.save_pretrained(again)
processor.save_pretrained(again)
answers.append(answer(again, AutoModelForImageTextToText)[2])
try:
    AutoModel.from_pretrained(directory, trust_remote_code=False)
    refusal = None
except ValueError as error:
    refusal = str(error)
assert importlib.util.find_spec("dsvl") is None and "dsvl" not in sys.modules
print(json.dumps({"answers": answers, "refusal": refusal}))
"""


def test_a_fresh_process_needs_the_directory_alone(composed, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(composed, moved)
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    done = run_without_dsvl(script, moved, tmp_path / "again", capture=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(set(result["answers"])) == 1, result["answers"]
    assert "trust_remote_code=True" in result["refusal"]
    config, again = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("moved", "again"))
    assert again["auto_map"] == config["auto_map"] and len(config["auto_map"]) == 6
    for name in REMOTE_CODE:
        assert (tmp_path / "again" / name).read_text() == (Path(dsvl.__file__).parent / name).read_text()


def test_remote_code_imports_nothing_but_torch_transformers_and_each_other():
    import ast

    # dependencies of transformers itself
    required = {"tokenizers", "safetensors", "numpy"}
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers"} | required
    for name in REMOTE_CODE:
        tree = ast.parse((Path(dsvl.__file__).parent / name).read_text())
        guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in block.body}
        for node in ast.walk(tree):
            if id(node) in guarded:
                continue
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module.split(".")[0] in allowed, (name, node.module)
