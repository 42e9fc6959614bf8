"""Recipes: how their stages are read, what is refused before weights are loaded, and the recipes of the package."""

import json
import os
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from snippets import ROOT
from training_runs import make_checkpoint, make_conversations

from dsvl import DSVLForConditionalGeneration
from dsvl.cli import main
from dsvl.training.ready_recipes import find_recipe, ready_recipes
from dsvl.training.recipe import compose_arguments, read_recipe

pytestmark = pytest.mark.usefixtures("fresh_log")

RECIPE = """
output: out
use_cpu: true
report_to: none
learning_rate: 1e-3
max-images-per-pack:
stages:
  - name: align
    train: [projector]
    data: data.jsonl
  - name: instruct
    data: data.jsonl
    learning_rate: 2e-5
    train: [projector, language]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    make_checkpoint(folder)
    make_conversations(folder)
    return folder


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and read it with flags of the command line."""

    def read(text=RECIPE, *flags):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return read_recipe(path, list(map(str, flags)))

    return read


# -- whose value holds -------------------------------------------------------------------------------------------------


def test_a_stage_overrides_what_is_shared(recipe):
    made = recipe()
    assert list(made.stages) == ["align", "instruct"]
    align, instruct = (made.values(name)[0] for name in made.stages)
    assert (align["learning_rate"], instruct["learning_rate"]) == (1e-3, 2e-5)
    assert (align["train"], instruct["train"]) == (["projector"], ["projector", "language"])
    assert align["seed"] == 42 and made.values("align")[1] >= {"train", "data", "learning_rate", "output_dir"}


def test_flags_override_all_stages_and_a_stages_own_value_overrides_them(recipe):
    flags = ["--learning-rate", "3e-4", "--train", "embeddings", "--stage", "align.learning_rate=7e-3"]
    flags += ["--stage", "align.train=[projector, head]", "--stage", "instruct.learning-rates={embeddings: 1e-2}"]
    made = recipe(RECIPE, *flags)
    align, instruct = (made.values(name)[0] for name in made.stages)
    assert (align["learning_rate"], instruct["learning_rate"]) == (7e-3, 3e-4)
    assert (align["train"], instruct["train"]) == (["projector", "head"], ["embeddings"])
    assert json.loads(instruct["learning_rates"]) == {"embeddings": 1e-2} and align["learning_rates"] is None


def test_null_in_a_stage_is_the_default(recipe):
    assert recipe(RECIPE + "    max_steps: 3\n").values("instruct")[0]["max_steps"] == 3
    made = recipe(RECIPE.replace("use_cpu", "max_steps: 3\nuse_cpu") + "    max_steps: null\n")
    assert [made.values(name)[0]["max_steps"] for name in made.stages] == [3, -1]


def test_null_on_the_command_line_is_the_default(recipe):
    text = RECIPE.replace("use_cpu", "max_steps: 3\nuse_cpu")
    made = recipe(text, "--stage", "instruct.max_steps=null", "--stage", "align.max-length=~")
    assert [made.values(name)[0]["max_steps"] for name in made.stages] == [3, -1]


def test_a_file_without_stages_is_no_recipe(recipe):
    assert recipe("model: m\ndata: d\n") is None


def test_a_model_on_the_command_line_replaces_the_composed_one(recipe):
    text = RECIPE + "compose: {vision: v, language: l}\n"
    assert recipe(text).composes and not recipe(text, "--model", "m").composes and not recipe().composes


# -- what is refused, before weights are loaded ------------------------------------------------------------------------


@pytest.fixture
def refused(folder, tmp_path, monkeypatch, capsys):
    """Train a recipe that must fail before weights are loaded; returns its one-sentence error."""

    def no_weights(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(DSVLForConditionalGeneration, "from_pretrained", no_weights)
    monkeypatch.setattr(import_module("dsvl.composition.compose"), "load_tower", no_weights)
    monkeypatch.chdir(folder)

    def call(text, *flags, model=True):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        flags = [*flags, *(["--model", "model"] if model else [])]
        environment = dict(os.environ)
        assert main(["train", str(path), *flags]) == 1
        assert dict(os.environ) == environment and not (folder / "out").exists()
        said = capsys.readouterr()
        (sentence,) = [line for line in said.err.splitlines() if line.startswith("dsvl train: ")]
        assert said.err.rstrip().endswith(sentence) and "Traceback" not in said.err
        return sentence.removeprefix("dsvl train: ").replace(f"{path}", "recipe.yaml")

    return call


HEAD = "output: out\nuse_cpu: true\nreport_to: none\ndata: data.jsonl\n"
BROKEN = [
    (
        "lerning_rate: 1\nstages: [{name: a}]",
        "recipe.yaml: unknown key lerning_rate; keys are the flags of dsvl train without their dashes; did you ",
    ),
    (
        "stages: [{name: a, lora_rnk: 1}]",
        "recipe.yaml: stage 'a': unknown key lora_rnk; keys are the flags of dsvl train without",
    ),
    (
        "stages: [{name: a, max_length: 9, max-length: 8}]",
        "recipe.yaml: stage 'a': max-length is set twice, under two names; ",
    ),
    (
        "stages: []",
        "recipe.yaml: `stages` is []; expected a list of stages, such as `- name: align`.",
    ),
    (
        "stages: {name: a}",
        "recipe.yaml: `stages` is {'name': 'a'}; expected a list of stages",
    ),
    (
        "stages: [a]",
        "recipe.yaml: stage 1 is 'a'; expected a mapping with `name` and flags",
    ),
    (
        "stages: [{train: [projector]}]",
        "recipe.yaml: stage 1 has no name; add a line such as `name: align`.",
    ),
    (
        "stages: [{name: a/b}]",
        "recipe.yaml: stage 1 has the name 'a/b'; choose one of letters, digits, - and _.",
    ),
    (
        "stages: [{name: a}, {name: a}]",
        "recipe.yaml: two stages have the name 'a'; rename one of them.",
    ),
    (
        "stages: [{name: a, output: b}]",
        "recipe.yaml: stage 'a': output in a stage: a stage has a directory in the output",
    ),
    (
        "stages: [{name: a, model: b}]",
        "recipe.yaml: stage 'a': model in a stage: a stage starts from the result of the stage",
    ),
    (
        "stages: [{name: a, resume_from: b}]",
        "recipe.yaml: stage 'a': resume_from in a stage: the whole run is resumed by the ",
    ),
    (
        "stages: [{name: a, compose: {vision: v}}]",
        "recipe.yaml: stage 'a': compose belongs to the whole recipe; move it out",
    ),
    (
        "keep_stages: some\nstages: [{name: a}]",
        "recipe.yaml: `keep_stages` is 'some'; expected true or false.",
    ),
    (
        "stages: [{name: a}, {name: b, train: []}]",
        "stage 'b': --train names nothing to train; name parts, or pass --lora-rank.",
    ),
    (
        "stages: [{name: a}, {name: b, train: [language], lora_rank: 4}]",
        "stage 'b': --train language trains in full what ",
    ),
    (
        "stages: [{name: a}, {name: b, streaming: true}]",
        "stage 'b': --streaming never ends; pass --max-steps.",
    ),
    (
        "stages: [{name: a}, {name: b, lora_rank: many}]",
        "stage 'b': argument --lora_rank/--lora-rank: invalid int value: 'many'; dsvl train --help lists",
    ),
    (
        "stages: [{name: a}, {name: b, data: gone.jsonl}]",
        "stage 'b': gone.jsonl does not exist (looked for in ",
    ),
    (
        "stages: [{name: a}, {name: b, data: null}]",
        "stage 'b': no data; pass --stage b.data=FILE, or set `data:` of the stage in",
    ),
    (
        "stages: [{name: a}, {name: b, eval_data: gone.jsonl}]",
        "stage 'b': gone.jsonl does not exist (looked for in ",
    ),
    (
        "stages: [{name: a}, {name: b, learning_rates: {vision: 1e-5}}]",
        "stage 'b': --learning-rates has a rate for vision, which",
    ),
    (
        "resume_from: checkpoint-4\nstages: [{name: a}, {name: b}]",
        "--resume-from checkpoint-4 with stages: each stage resumes",
    ),
    (
        "resume_from: last\nstages: [{name: a}, {name: b}]",
        "out contains no complete checkpoint to resume from; drop",
    ),
    (
        "stages: [{name: a, cache_image_features: c}, {name: b, train: [vision]}, {name: c, cache_image_features: c}]",
        "stage 'c': --cache-image-features c has the features of the vision tower before stage 'b' trains it; give",
    ),
    (
        "stages:\n- name: a\n  train: [projector\n- name: b",
        "recipe.yaml is not YAML (line 8, column 7): expected ',' or ']', but got ':'.",
    ),
    (
        "stages:\n- name: a\n  name: b",
        "recipe.yaml is not YAML (line 7, column 3): the key 'name' occurs twice.",
    ),
]


@pytest.mark.parametrize("text, sentence", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_recipe_is_refused_with_a_sentence(refused, text, sentence):
    assert refused(HEAD + text + "\n").startswith(sentence)


TWO = HEAD + "stages: [{name: a}, {name: b}]\n"
WITHOUT_MODEL = {
    TWO: "recipe.yaml has neither `model` nor `compose`; pass --model DIR.",
    TWO
    + "model: m\ncompose: {vision: v, language: l}\n": "recipe.yaml has both `model` and `compose`, which makes a model;",
    TWO + "compose: v\n": "recipe.yaml: `compose` is 'v'; expected flags of dsvl compose, such as `vision: NAME`.",
    TWO + "compose: {vision: v, languag: l}\n": "compose: unknown key languag; the keys are vision, language,",
    TWO + "compose: {vision: v, language: l, out: o}\n": "compose: unknown key out; the keys are",
    TWO + "compose: {vision: v}\n": "compose: the following arguments are required: --language",
    TWO
    + "compose: {vision: v, language: l, projector_type: liner}\n": "compose: argument --projector-type: invalid choice:",
    TWO + "compose: {vision: ./gone, language: llama}\n": "./gone does not exist (looked for in ",
}


def test_several_files_of_a_stage_are_a_mixture(refused):
    said = refused(HEAD + "stages: [{name: a, data: [one.jsonl, two.jsonl]}]\n")
    assert "data takes one value, not a list of 2; for several files, write a mixture" in said


@pytest.mark.parametrize(
    "values, sentence",
    [
        ("b.lora_rank=4 b.lora_targets=[layers.9]", "stage 'b': --lora-targets layers.9: no linear layer matches layers.9"),
        ("b.attn_implementation=foo", "stage 'b': "),
    ],
)
def test_what_a_later_stage_asks_of_the_model_is_checked_before_the_first_is_trained(refused, values, sentence):
    text = HEAD + "stages: [{name: a, train: [projector]}, {name: b, train: [projector]}]\n"
    assert refused(text, *(flag for value in values.split() for flag in ("--stage", value))).startswith(sentence)


@pytest.mark.parametrize("text", WITHOUT_MODEL)
def test_a_model_that_cannot_be_made_is_refused(refused, text):
    assert refused(text, model=False).startswith(WITHOUT_MODEL[text])


@pytest.mark.parametrize(
    "flag, sentence",
    [
        ("align.data", "--stage align.data: expected NAME.KEY=VALUE, such as a.data=FILE."),
        ("c.data=x", "--stage c.data=x: no stage has the name c; the stages are a, b."),
        ("a.dta=x", "--stage a.dta=x: unknown key dta; keys are the flags"),
        ("a.output=x", "--stage a.output=x: a stage has a directory in the output of the recipe; pass it for the whole run"),
        ("a.train=[projector", "--stage a.train=[projector is not YAML"),
    ],
)
def test_a_value_of_one_stage_that_makes_no_sense_is_refused(refused, flag, sentence):
    assert refused(TWO, "--stage", flag).startswith(sentence)


def test_flags_of_recipes_need_a_recipe(folder, capsys):
    argv = ["train", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--output", "o"]
    assert main([*argv, "--stage", "a.data=x"]) == 1
    expected = "--stage a.data=x without a recipe; pass a YAML file with `stages:` (or a name of --list-recipes) first."
    assert expected in capsys.readouterr().err
    assert main([*argv, "--keep-stages"]) == 1 and "--keep-stages without a recipe" in capsys.readouterr().err


def test_an_unknown_flag_is_named_as_without_a_recipe(folder, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(TWO)
    with pytest.raises(SystemExit) as exit:
        main(["train", str(tmp_path / "recipe.yaml"), "--lerning-rate", "1"])
    assert exit.value.code == 2 and "did you mean --learning-rate?" in capsys.readouterr().err


def test_the_keys_of_compose_are_the_flags_of_the_command():
    values = {"vision": "v", "language": "l", "number-after": False, "vision_feature_layer": -2}
    values |= {"chat_template_kwargs": {"enable_thinking": False}}
    made = compose_arguments(values, "out")
    assert (made.vision, made.language, made.out) == ("v", "l", "out")
    assert made.number_after is False and made.chat_template_kwargs == {"enable_thinking": False}
    assert compose_arguments({"vision": "v", "language": "l"}, "out").number_after is None


# -- the recipes of the package ----------------------------------------------------------------------------------------


def test_every_ready_recipe_is_listed_with_a_line(capsys):
    assert main(["train", "--list-recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ready_recipes())
    assert {"visualchat", "llava", "lora-24gb", "full-8x80gb", "document"} <= set(ready_recipes())
    assert all(len(line) > 40 for line in lines)


def test_a_local_file_of_a_ready_recipes_name_wins_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("llava") == ROOT / "recipes" / "llava.yaml"
    (tmp_path / "llava").write_text("stages: []")
    assert find_recipe("llava") == Path("llava")
    assert "llava is read from this directory, not the recipe of that name in the package." in caplog.text


def test_an_unknown_recipe_is_refused_with_a_suggestion(capsys):
    assert main(["train", "lava", "--output", "o"]) == 1
    expected = "dsvl train: lava is neither a file nor a recipe of the package; the recipes are "
    said = capsys.readouterr().err
    assert said.startswith(expected) and said.endswith("(dsvl train --list-recipes); did you mean llava?\n")


@pytest.mark.parametrize("name", ready_recipes())
def test_a_ready_recipe_asks_for_its_data(name, folder, tmp_path, capsys):
    """What a recipe cannot know is the data; everything else is set, and fits together."""
    assert main(["train", name, "--model", str(folder / "model"), "--output", str(tmp_path / "o"), "--use-cpu"]) == 1
    first = next(iter(read_recipe(find_recipe(name)).stages))
    assert f"stage '{first}': no data; pass --stage {first}.data=FILE, or set `data:`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ready_recipes())
def test_every_value_of_a_ready_recipe_has_a_reason(name):
    """Or a value above it on the same subject: at least one comment for two values."""
    text = find_recipe(name).read_text(encoding="utf-8")
    values = [line for line in text.splitlines() if re.match(r" *(- )?[a-z_]+: \S", line) and "name:" not in line]
    assert sum("#" in line for line in values) >= len(values) / 2
    assert set(yaml.safe_load(text)) >= {"description", "compose", "stages"}
