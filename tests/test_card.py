"""The model card: of a composed, a fine-tuned, a LoRA and a migrated model; whose licence it carries on."""

import json

import pytest
from conftest import tiny_model
from huggingface_hub import ModelCard, metadata_load
from training_runs import make_checkpoint, make_conversations

import dsvl
from dsvl.cli import main
from dsvl.data.mixture import load_mixture, split
from dsvl.hub_card import TrainingFacts, at_repository, render_card
from dsvl.hub_card.base_models import BaseModel, inherited_license, read_base_models
from dsvl.publishing.directory_checks import read_contents
from dsvl.training.model_card import data_counts, read_emissions

FACTS = TrainingFacts(
    data={"llava": 12345, "my|own": 6},
    datasets=["someone/llava"],
    settings={"trained parts": "projector, embeddings", "learning rate": 0.001, "steps": 40},
    results={"eval_loss": 1.23456, "eval_exact_match": 0.5},
    hardware="8 x NVIDIA H100",
    seconds=9000.0,
    emissions=1.25,
)


@pytest.fixture(scope="module")
def config():
    return tiny_model().config


def table(card, heading):
    """The rows of the table under a header row that begins like this."""
    lines = card.text.splitlines()
    rows = []
    for line in lines[lines.index(heading) + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")])
    return dict(rows)


# -- four kinds of models ----------------------------------------------------------------------------------------------


def test_a_composed_model(config):
    card = ModelCard(render_card(config, ["openai/clip-vit-large-patch14", "Qwen/Qwen3-0.6B"], untrained=True))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["dsvl", "multi-image", "custom_code"],
        "base_model": ["openai/clip-vit-large-patch14", "Qwen/Qwen3-0.6B"],
        "base_model_relation": "merge",
    }
    assert "**The projector is untrained.**" in card.text and "## Training" not in card.text
    assert "Based on openai/clip-vit-large-patch14 and Qwen/Qwen3-0.6B." in card.text


def test_a_fine_tuned_model(config):
    card = ModelCard(render_card(config, ["me/composed"], FACTS))
    assert card.data.base_model == ["me/composed"] and card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["someone/llava"]
    assert card.data.co2_eq_emissions == {
        "emissions": 1250.0,
        "source": "codecarbon",
        "training_type": "fine-tuning",
        "hardware_used": "8 x NVIDIA H100",
    }
    assert table(card, "| data | conversations |") == {"llava": "12,345", "my¦own": "6"}
    assert table(card, "| | |") == {
        "trained parts": "projector, embeddings",
        "learning rate": "0.001",
        "steps": "40",
        "hardware": "8 x NVIDIA H100",
        "time": "2.5 hours",
        "emissions (codecarbon's estimate)": "1.25 kg of CO2 equivalents",
    }
    assert table(card, "| result | |") == {"eval_loss": "1.2346", "eval_exact_match": "0.5000"}
    assert "untrained" not in card.text


def test_a_lora_model_from_the_command(tmp_path, monkeypatch):
    """What `dsvl train` writes is ready to be pushed: a card of its facts, and nothing of this machine."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    checkpoint = make_checkpoint(tmp_path)
    data = make_conversations(tmp_path, layout="ptppt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "emissions.csv").write_text("timestamp,emissions\na,0.25\nb,0.5\n")
    argv = [
        "train",
        "--model",
        checkpoint,
        "--data",
        data,
        "--output",
        tmp_path / "run",
        "--max-steps",
        2,
        "--save-steps",
        1,
    ]
    argv += ["--lora-rank", 2, "--eval-data", data, "--per-device-train-batch-size", 2, "--report-to", "none"]
    assert main(list(map(str, argv))) == 0
    contents = read_contents(tmp_path / "run")
    assert contents.faults == [] and "adapters/adapter_model.safetensors" in contents.files
    assert {name.partition("/")[0] for name in contents.skipped} >= {"checkpoint-2", "emissions.csv"}
    card = ModelCard.load(tmp_path / "run" / "README.md")
    settings = table(card, "| | |")
    assert settings["adapters"] == "LoRA: decoder rank 2, alpha 4 (14 of 14 linear layers)" and settings[
        "hardware"
    ].startswith("1 process on CPU")
    assert "time" in settings and settings["emissions (codecarbon's estimate)"].startswith("0.75 kg")
    assert table(card, "| data | conversations |") == {"data.jsonl": "5"}
    assert "eval_loss" in table(card, "| result | |") and card.data.base_model is None
    assert str(tmp_path) not in card.content


def test_a_migrated_model(tmp_path):
    model, processor = dsvl.compose(*_parts(tmp_path), multimodal_attention="mmca_reference")
    note = "Weights of a training by [DeepSpeed-VisualChat](https://arxiv.org/abs/2309.14327)."
    saved = dsvl.save_checkpoint(
        model, processor, tmp_path / "migrated", base_models=["openai/clip", "meta-llama/Llama-2-7b-hf"], origin=note
    )
    card = ModelCard.load(saved / "README.md")
    assert note in card.text and "untrained" not in card.text and card.data.base_model_relation == "finetune"
    assert "softmax over images is uniform and includes later images" in card.text
    assert read_contents(saved).faults == []


def _parts(folder):
    make_checkpoint(folder)
    return folder / "tower", folder / "llama"


# -- metadata ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["mmca", "mmca_reference", "causal"])
@pytest.mark.parametrize("training", [None, FACTS], ids=["plain", "trained"])
def test_the_metadata_is_read_back_and_the_example_runs(attention, training, tmp_path):
    config = tiny_model(attention=attention).config
    path = tmp_path / "README.md"
    path.write_text(render_card(config, ["a/b"], training), encoding="utf-8")
    metadata = metadata_load(path)
    assert metadata == ModelCard.load(path).data.to_dict() and metadata["pipeline_tag"] == "image-text-to-text"
    text = path.read_text()
    assert "{{" not in text and "{%" not in text and "None" not in text and "\n\n\n" not in text
    assert f'multimodal_attention="{attention}"' in text
    (example,) = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    compile(example, "README.md", "exec")
    assert 'name = "."' in example and "revision=revision" in example
    assert 'name = "me/x"\n' in at_repository(text, "me/x")


@pytest.mark.parametrize("image_positions", ["token", "image"])
def test_it_says_how_many_images_are_numbered(config, image_positions):
    plain = {"multimodal_attention": "mmca", "image_positions": image_positions}
    text = render_card(type(config).from_dict(config.to_dict() | plain | {"numbered_images": 1024}), ["a/b"])
    assert "The embeddings of the tokens of the first 1,024 images of a conversation also hold the image's number" in text
    assert "\n\n\n" not in text and "(`numbered_images=1024`)." in text
    assert "numbered_images" not in render_card(type(config).from_dict(config.to_dict() | plain), ["a/b"])


def test_directories_of_this_machine_are_not_named(config, tmp_path):
    content = render_card(config, ["openai/clip-vit-large-patch14", str(tmp_path)])
    assert str(tmp_path) not in content and ModelCard(content).data.base_model == ["openai/clip-vit-large-patch14"]


def test_names_are_remembered_by_the_parts(tmp_path):
    config = tiny_model().config
    config.vision_config.name_or_path, config.text_config.name_or_path = "openai/clip", "Qwen/Qwen3-0.6B"
    for base_models in ([], [str(tmp_path)]):
        assert ModelCard(render_card(config, base_models)).data.base_model == ["openai/clip", "Qwen/Qwen3-0.6B"]
    assert ModelCard(render_card(config, ["a/b"])).data.base_model == ["a/b"]


# -- licences ----------------------------------------------------------------------------------------------------------

MIT, APACHE = BaseModel("a/mit", "mit"), BaseModel("a/apache", "apache-2.0")
LLAMA, UNKNOWN = BaseModel("meta-llama/Llama-2-7b-hf", "llama2"), BaseModel("a/unknown")
OWN = BaseModel("a/own", "other", "some-license", "https://a.b/license")


@pytest.mark.parametrize(
    "bases, expected",
    [
        ([MIT, APACHE], {"license": "apache-2.0"}),
        ([MIT, MIT], {"license": "mit"}),
        ([APACHE, LLAMA], {"license": "llama2"}),
        ([UNKNOWN, LLAMA], {"license": "llama2"}),
        ([MIT, UNKNOWN], {}),
        ([], {}),
        ([BaseModel("a/b", "other")], {"license": "other", "license_name": "of-the-base-model"}),
        ([MIT, OWN], {"license": "other", "license_name": "some-license", "license_link": "https://a.b/license"}),
        ([LLAMA, OWN], {"license": "other", "license_name": "llama2-and-some-license"}),
    ],
)
def test_the_strictest_licence_is_inherited(bases, expected):
    assert inherited_license(bases) == expected


def base_on_disk(folder, license, model_type="llama", **metadata):
    folder.mkdir()
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in {"license": license, **metadata}.items())
    (folder / "README.md").write_text(f"---\n{lines}---\n# Base\n")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


@pytest.mark.parametrize("license, asks", [("llama3.1", 'show "Built with Llama"'), ("gemma", "Gemma Terms of Use")])
def test_a_licence_that_travels_along_is_a_warning(config, tmp_path, license, asks):
    card = ModelCard(render_card(config, [base_on_disk(tmp_path / "base", license)]))
    assert card.data.license == license
    assert "**The licence of a base model applies to this model.**" in card.text and asks in card.text


def test_what_is_not_known_is_said(config):
    card = ModelCard(render_card(config, ["a/never-downloaded"]))
    assert card.data.license is None and "The licence of a/never-downloaded was not known" in card.text


def test_origin_and_licence_go_on_from_composing_to_fine_tuning(config, tmp_path):
    composed = base_on_disk(tmp_path / "composed", "gemma", "dsvl", base_model=["openai/clip", "google/gemma-2-2b"])
    card = ModelCard(render_card(config, [composed], FACTS))
    assert card.data.base_model == ["openai/clip", "google/gemma-2-2b"] and card.data.license == "gemma"


def test_the_cache_of_the_hub_is_read(tmp_path, monkeypatch):
    cached = tmp_path / "README.md"
    cached.write_text("---\nlicense: llama2\n---\n")
    monkeypatch.setattr("dsvl.hub_card.base_models.try_to_load_from_cache", lambda name, file: str(cached))
    assert read_base_models(["a/b"]) == [BaseModel("a/b", "llama2")]


def test_a_broken_card_of_a_base_model_is_skipped_with_a_warning(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    assert read_base_models([str(tmp_path)]) == [BaseModel(None)]
    assert "its licence counts as unknown" in caplog.text


# -- facts -------------------------------------------------------------------------------------------------------------


def test_conversations_are_counted_by_data_set(tmp_path):
    make_conversations(tmp_path, "one.jsonl", layout="tttt")
    make_conversations(tmp_path, "two.jsonl", layout="tt")
    path = tmp_path / "blend.yaml"
    path.write_text("datasets:\n  - {path: one.jsonl, samples: 3}\n  - {path: two.jsonl, concatenate: 2}\n")
    blend = load_mixture(path)
    assert data_counts(blend) == ({"one": 3, "two": 2}, [])
    train, held_out = split(blend, 0.3)
    counts = [data_counts(part)[0] for part in (train, held_out)]
    assert {name: sum(count[name] for count in counts) for name in ("one", "two")} == {"one": 3, "two": 2}


def test_without_codecarbon_there_is_no_estimate(tmp_path):
    assert read_emissions(tmp_path / "emissions.csv") is None
