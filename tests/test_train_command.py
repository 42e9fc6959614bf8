"""`dsvl train` before weights are loaded: arguments, YAML files, and errors of one sentence."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import save_tiny_llama, tiny_tower_config
from training_runs import make_checkpoint
from transformers import CLIPVisionModel, get_scheduler

from dsvl import DSVLForConditionalGeneration
from dsvl.cli import main
from dsvl.training import argument_checks, run
from dsvl.training import training_arguments_table as table
from dsvl.training.argument_checks import check_options
from dsvl.training.arguments import parse
from dsvl.training.deepspeed_config import zero_stage

pytestmark = pytest.mark.usefixtures("fresh_log")

CONVERSATION = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("command"))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(CONVERSATION) + "\n")
    return path


@pytest.fixture
def refused(monkeypatch, capsys, checkpoint, data, tmp_path):
    """Run the command, which must fail before it loads weights; returns its one-sentence error."""

    def no_weights(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(DSVLForConditionalGeneration, "from_pretrained", no_weights)

    def call(*flags, model=checkpoint, data=data, output=tmp_path / "output"):
        argv = ["train", "--model", model, "--data", data, "--use-cpu", *flags]
        argv += [] if output is None else ["--output", output]
        environment = dict(os.environ)
        assert main([str(argument) for argument in argv]) == 1
        said = capsys.readouterr()
        assert not dist.is_initialized() and dict(os.environ) == environment
        (sentence,) = [line for line in said.err.splitlines() if line.startswith("dsvl train: ")]
        assert said.err.rstrip().endswith(sentence) and "Traceback" not in said.err and said.out == ""
        assert output is None or not output.exists()
        return sentence.removeprefix("dsvl train: ")

    return call


# -- what does not go together -----------------------------------------------------------------------------------------


def test_an_unknown_part_is_refused(refused):
    expected = "--train decoder tower: no such part; choose from projector, embeddings, vision, language, head."
    assert refused("--train", "projector", "decoder", "tower") == expected


@pytest.mark.parametrize(
    "flags",
    [
        "--lora-vision",
        "--dora",
        "--qlora",
        "--lora-alpha 8",
        "--lora-targets q_proj v_proj",
        "--lora-vision-rank 8",
        "--lora-vision-targets fc1",
    ],
)
def test_options_of_adapters_need_a_rank(refused, flags):
    assert refused(*flags.split()) == f"{flags.split()[0]} without adapters; also pass --lora-rank (for example 16)."


def test_options_of_adapters_are_named_together(refused):
    assert refused("--qlora", "--lora_alpha", 8, "--dora").startswith("--dora, --qlora, --lora-alpha without adapters;")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            "--train language",
            "--train language trains in full what --lora-rank freezes and adapts; remove language from --train",
        ),
        ("--train projector vision --lora-vision", "--train vision trains in full what --lora-rank freezes and adapts;"),
        ("--lora-language false", "--lora-rank with nothing to adapt; keep --lora-language on, or pass --lora-vision."),
        ("--lora-vision-rank 8", "--lora-vision-rank without --lora-vision; pass both."),
        ("--lora-vision-targets fc1", "--lora-vision-targets without --lora-vision; pass both."),
        ("--lora-vision --lora-vision-rank 0", "--lora-vision-rank 0: pass a positive rank, or omit --lora-vision."),
        (
            "--no-lora-language --lora-vision --lora-vision-rank 8",
            "--no-lora-language with both --lora-rank and --lora-vision-rank: only the vision tower is adapted; pass",
        ),
        (
            "--no-lora-language --lora-vision --lora-targets fc1 --lora-vision-targets fc2",
            "--no-lora-language with both --lora-targets and --lora-vision-targets: only the vision tower is adapted; pass",
        ),
    ],
)
def test_a_part_is_either_adapted_or_trained_in_full(refused, flags, sentence):
    assert refused("--lora-rank", 4, *flags.split()).startswith(sentence)


def test_a_negative_rank_is_refused(refused):
    assert refused("--lora-rank", -4) == "--lora-rank -4: pass a positive rank, or 0 for no adapters."


def test_a_run_that_trains_nothing_is_refused(refused):
    assert refused("--train") == "--train names nothing to train; name parts, or pass --lora-rank."


def test_adapters_may_be_trained_alone():
    model_arguments, _, _ = parsed("--train", "--lora-rank", 4)
    assert model_arguments.train == [] and model_arguments.lora_rank == 4


@pytest.mark.parametrize("name", ["zero4", "no/such/file.json"])
def test_an_unknown_deepspeed_configuration_is_refused(refused, name):
    expected = f"--deepspeed {name} is not a file; choose from zero1, zero2, zero3, zero3-offload, or pass the path of one."
    assert refused("--deepspeed", name) == expected


def test_a_deepspeed_configuration_that_is_no_json_is_refused(refused, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text("{'stage': 2}")
    assert refused("--deepspeed", path).startswith(f"--deepspeed {path} is not JSON: Expecting property name")


def test_four_bits_cannot_be_partitioned(refused, tmp_path):
    expected = "--qlora with ZeRO-3: 4-bit weights cannot be partitioned; choose --deepspeed zero2."
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    for name in ("zero3", "zero3-offload", own):
        assert refused("--qlora", "--lora-rank", 4, "--deepspeed", name) == expected


def test_four_bits_need_bitsandbytes(refused, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        argument_checks.importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    assert refused("--qlora", "--lora-rank", 4) == (
        "--qlora needs bitsandbytes, which is not installed; pip install bitsandbytes, or drop --qlora."
    )


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", "zero3-offload"])
def test_compiling_and_deepspeed_do_not_go_together(refused, stage):
    expected = "--torch-compile with --deepspeed: their hooks are not compatible; choose one of them."
    assert refused("--torch-compile", "--deepspeed", stage) == expected


def test_layers_are_not_compiled_twice(refused):
    expected = "--compile-decoder-layers with --torch-compile: the layers would be compiled twice; choose one of them."
    assert refused("--compile-decoder-layers", "--torch-compile") == expected


def test_compile_decoder_layers_compiles_the_layers(checkpoint):
    for rank in (0, 4):
        flags = ("--compile-decoder-layers", "--lora-rank", rank, "--model", checkpoint)
        model_arguments, _, arguments = parsed(*flags)
        model = run.load_model(model_arguments, arguments)
        inner = (model.get_base_model() if rank else model).model
        assert inner.train().compiles_layers and not inner.vision_tower.training
        assert all(layer._compiled_call_impl is not None for layer in inner.language_model.layers)


def test_steps_do_not_synchronize_with_the_device():
    """Neither for the logged loss nor for copying the next batch, unless it is requested."""
    _, _, arguments = parsed()
    assert not arguments.logging_nan_inf_filter and arguments.accelerator_config.non_blocking
    _, _, arguments = parsed("--logging-nan-inf-filter", "--dataloader-pin-memory", "false")
    assert arguments.logging_nan_inf_filter and not arguments.accelerator_config.non_blocking


def test_evaluations_need_held_out_data(refused):
    expected = "--early-stopping-patience needs evaluations; pass --eval-data or --eval-share."
    assert refused("--early-stopping-patience", 2) == expected
    expected = "--eval-exact-match needs held-out data; pass --eval-data or --eval-share."
    assert refused("--eval-exact-match") == expected


# -- the fields of TrainingArguments -----------------------------------------------------------------------------------


def test_every_field_of_training_arguments_is_listed_once():
    """A new release of transformers may add fields: decide how to treat them, and list them."""
    assert table.unlisted() == set()
    listed = [*table.SUPPORTED, *table.REFUSED, *table.WITHOUT_EFFECT]
    assert len(listed) == len(set(listed)) and set(table.REFUSED_VALUES) <= set(table.SUPPORTED)


REFUSED_FLAGS = {
    "--bf16-full-eval": "--bf16-full-eval True: the last evaluation would round the trained weights",
    "--save-on-each-node": "--save-on-each-node True: hosts with output directories of their own",
    "--enable-jit-checkpoint": "--enable-jit-checkpoint True: a stopped run would be saved as if it were finished",
    "--label-names x": "--label-names ['x']: the only labels of a batch are",
    "--fsdp full_shard": "--fsdp full_shard: FSDP2 has no strategies; pass --fsdp alone",
    "--fsdp": "--fsdp in a single process has nothing to shard; start several, for example by torchrun",
    "--train-sampling-strategy group_by_length": "--train-sampling-strategy group_by_length: lengths are not known",
    "--train-sampling-strategy batch_rebalance": "--train-sampling-strategy batch_rebalance: lengths are not known",
    "--remove-unused-columns true": "--remove-unused-columns True: the collator needs the columns",
    "--hub-strategy checkpoint": "--hub-strategy checkpoint: only the finished model is published",
    "--fp16": "--fp16 on a CPU: CPUs do not multiply matrices in float16; pass --bf16, or neither.",
    "--report-to nonsense": "--report-to nonsense is unknown; choose from none, all, ",
    "--include-num-input-tokens-seen some": "--include-num-input-tokens-seen some is unknown; choose from all, non_padding,",
}


@pytest.mark.parametrize("flags", REFUSED_FLAGS)
def test_unsupported_values_are_refused_with_a_sentence(refused, flags):
    assert refused(*flags.split()).startswith(REFUSED_FLAGS[flags])


def test_a_report_without_its_package_is_refused_at_once(refused, monkeypatch):
    monkeypatch.setattr(argument_checks, "get_available_reporting_integrations", lambda: [])
    expected = "--report-to tensorboard needs the package tensorboard, which is not installed; pip install 'dsvl[train]'."
    assert refused("--report-to", "tensorboard") == expected


def test_a_flag_without_effect_is_logged(caplog):
    parsed("--do-eval", "--eval-accumulation-steps", 3)
    assert sorted(record.getMessage() for record in caplog.records if record.name.startswith("dsvl")) == [
        "--do-eval True has no effect: evaluation is enabled by --eval-data or --eval-share.",
        "--eval-accumulation-steps 3 has no effect: evaluations collect no predictions.",
    ]


def test_the_defaults_are_neither_refused_nor_logged(caplog):
    parsed()
    assert not [record for record in caplog.records if record.name.startswith("dsvl")]


def test_an_output_is_needed(refused):
    assert refused(output=None) == "No output directory; pass --output DIR."


def test_an_unknown_flag_is_named(refused, capsys):
    with pytest.raises(SystemExit) as exit:
        refused("--no-such-flag", "1")
    said = capsys.readouterr().err
    assert exit.value.code == 2
    assert said == "dsvl train: unrecognized argument: --no-such-flag\ndsvl train --help lists what it takes.\n"


# -- what is not there, or broken --------------------------------------------------------------------------------------


def test_a_model_that_is_not_dsvl_is_refused(refused, tmp_path):
    save_tiny_llama(tmp_path / "llama")
    CLIPVisionModel(tiny_tower_config()).save_pretrained(tmp_path / "clip")
    for name, kind in (("llama", "llama"), ("clip", "clip_vision_model")):
        expected = f"{tmp_path / name} is of type '{kind}', not a DSVL checkpoint; compose one"
        assert refused(model=tmp_path / name).startswith(expected)


def test_a_directory_without_a_model_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(model=tmp_path / "empty")


@pytest.mark.parametrize("flag", ["data", "eval_data"])
def test_data_that_is_not_there_is_named(refused, tmp_path, flag):
    path = tmp_path / "gone.jsonl"
    expected = f"{path} does not exist (looked for in {Path.cwd()}); check the path."
    if flag == "data":
        assert refused(data=path) == expected
    else:
        assert refused("--eval-data", path) == expected


@pytest.mark.parametrize("flag", ["data", "eval_data"])
def test_a_broken_line_is_named(refused, tmp_path, flag):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(CONVERSATION) + '\n\n{"messages": [}\n')
    sentence = refused(data=path) if flag == "data" else refused("--eval-data", path)
    assert sentence.startswith(f"{path}, line 3: is not JSON (Expecting value: line 1 column 15")
    assert sentence.endswith("Or skip such conversations (--on-bad-sample skip).")


def test_a_missing_image_is_named(refused, tmp_path):
    content = [{"type": "image", "path": "gone.png"}, {"type": "text", "text": "?"}]
    path = tmp_path / "images.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}, CONVERSATION["messages"][1]]}))
    assert refused(data=path).startswith(f"{path}, line 1: the image {tmp_path / 'gone.png'} does not exist. ")
    assert refused("--on-bad-sample", "skip", data=path).startswith(f"{path} holds no conversation to train on (1 were")


def test_unknown_ways_to_treat_bad_samples_are_refused(refused):
    assert refused("--on-bad-sample", "ignore").startswith("on_bad_sample='ignore' is not known; choose from 'error'")


def test_a_senseless_length_is_refused(refused):
    assert refused("--max-length", 0).startswith("max_length=0 leaves no token")


def test_a_sound_run_goes_on_to_the_weights(checkpoint, data, tmp_path, monkeypatch):
    """The tests above do not pass for another reason."""

    class Reached(Exception):
        pass

    def reached(model_arguments, training_arguments):
        raise Reached

    monkeypatch.setattr(run, "load_model", reached)
    with pytest.raises(Reached):
        main(["train", "--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path / "output"), "--use-cpu"])


# -- arguments and YAML ------------------------------------------------------------------------------------------------

NEEDED = ["--model", "m", "--data", "d", "--output", "o", "--use-cpu"]


def parsed(*flags):
    return parse([*NEEDED, *map(str, flags)])


def plain(three):
    """The arguments as dictionaries, without the time in the name of the log directory."""
    return [vars(one) if number < 2 else one.to_dict() | {"logging_dir": None} for number, one in enumerate(three)]


def from_yaml(tmp_path, text, *flags):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return parse([str(path), *map(str, flags)])


YAML = """
model: m
data: d
output: o
use_cpu: true
train: [projector, vision]
max-length: 77
learning_rate: 1e-4   # a text in YAML 1.1
weight_decay: 0.1
learning_rates: {projector: 2.5e-3}
lr_scheduler_kwargs: {num_cycles: 0.25}
lora_targets:
report_to: [none]
activation_checkpointing: false
seed: 7
"""


def test_a_yaml_file_says_what_flags_say(tmp_path):
    flags = ["--train", "projector", "vision", "--max-length", 77, "--learning-rate", 1e-4, "--weight-decay", 0.1]
    flags += ["--learning-rates", "projector=2.5e-3", "--lr-scheduler-kwargs", '{"num_cycles": 0.25}']
    flags += ["--report-to", "none", "--activation-checkpointing", "false", "--seed", 7]
    model_arguments, data_arguments, training = three = from_yaml(tmp_path, YAML)
    assert plain(three) == plain(parsed(*flags))
    assert model_arguments.train == ["projector", "vision"] and model_arguments.lora_targets is None
    assert data_arguments.max_length == 77
    assert (training.learning_rate, training.learning_rates, training.weight_decay) == (1e-4, {"projector": 2.5e-3}, 0.1)
    assert training.lr_scheduler_kwargs == {"num_cycles": 0.25} and training.report_to == []
    assert training.output_dir == "o" and training.seed == 7 and training.activation_checkpointing is False


def test_flags_override_the_file(tmp_path):
    model_arguments, data_arguments, training = from_yaml(
        tmp_path, YAML, "--train", "projector", "head", "--learning-rate", "3e-5", "--max_length", 9, "--output", "elsewhere"
    )
    assert model_arguments.train == ["projector", "head"] and data_arguments.max_length == 9
    assert training.learning_rate == 3e-5 and training.output_dir == "elsewhere" and training.seed == 7


@pytest.mark.parametrize(
    "line, field, value",
    [
        ("save_strategy: no", "save_strategy", "no"),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("include_num_input_tokens_seen: non_padding", "include_num_input_tokens_seen", "non_padding"),
        ("include_num_input_tokens_seen: true", "include_num_input_tokens_seen", "all"),
        ("include_num_input_tokens_seen: no", "include_num_input_tokens_seen", "no"),
        ("resume_from_checkpoint: false", "resume_from_checkpoint", "no"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "last"),
        ("dataloader_drop_last: yes", "dataloader_drop_last", True),
        ("weight_decay: 1e-2", "weight_decay", 0.01),
        ("report_to: none", "report_to", []),
    ],
)
def test_words_of_yaml_mean_what_flags_mean(tmp_path, line, field, value):
    other = "".join(own for own in YAML.splitlines(keepends=True) if not own.startswith(f"{field}:"))
    assert getattr(from_yaml(tmp_path, other + line + "\n")[2], field) == value


def test_numbers_of_yaml_are_numbers_wherever_they_are(tmp_path):
    yaml = (
        YAML.replace("{num_cycles: 0.25}", "{min_lr: 1e-5, num_cycles: 1.5e-1}") + "lr_scheduler_type: cosine_with_min_lr\n"
    )
    arguments = from_yaml(tmp_path, yaml)[2]
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-5, "num_cycles": 0.15}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    get_scheduler(arguments.lr_scheduler_type, optimizer, 2, 10, arguments.lr_scheduler_kwargs).step()


@pytest.mark.parametrize("flag", ["--max-pictures-per-pack", "--max_pictures_per_pack"])
def test_a_former_flag_is_read_with_a_warning(tmp_path, caplog, flag):
    data_arguments = parsed("--packing", "--max-length", 64, flag, 3)[1]
    assert data_arguments.max_images_per_pack == 3
    assert f"{flag} is deprecated and will be removed in dsvl 0.3; use --max-images-per-pack." in caplog.text
    yaml = YAML + "packing: true\nmax_pictures_per_pack: 3\n"
    assert from_yaml(tmp_path, yaml)[1].max_images_per_pack == 3


@pytest.mark.parametrize("flag", ["--embeddings-learning-rate", "--embeddings_learning_rate"])
def test_the_former_rate_of_the_embeddings_is_read_with_a_warning(tmp_path, caplog, flag):
    assert parsed(flag, "3e-3")[2].learning_rates == {"embeddings": 3e-3}
    assert f"{flag} is deprecated and will be removed in dsvl 0.4; use --learning-rates embeddings=0.003." in caplog.text
    assert parsed(flag, "3e-3", "--learning-rates", "projector=1e-2")[2].learning_rates == {
        "projector": 1e-2,
        "embeddings": 3e-3,
    }
    with pytest.raises(ValueError, match="--embeddings-learning-rate is --learning-rates embeddings=RATE, which is passed"):
        parsed(flag, "3e-3", "--learning-rates", "embeddings=1e-2")


@pytest.mark.parametrize("text", ["projector=1e-3,embeddings=2", '{"projector": 1e-3, "embeddings": 2}'])
def test_learning_rates_of_parts_are_pairs_or_json(text):
    assert parsed("--learning-rates", text)[2].learning_rates == {"projector": 1e-3, "embeddings": 2.0}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("projektor=1e-3", "--learning-rates projektor: no such part; choose from .*; did you mean projector"),
        ("projector", "--learning-rates projector: expected PART=RATE, such as"),
        ("projector=1,projector=2", "--learning-rates names projector twice"),
        ('{"projector": 1, "projector": 2}', "--learning-rates names projector twice"),
        ("projector=fast", "--learning-rates projector=fast: expected a positive number"),
        ("projector=-1", "--learning-rates projector=-1: expected a positive number"),
        ('{"projector": true}', "--learning-rates projector=True: expected a positive number"),
        ('{"projector": 1', "is not JSON"),
        ("vision=1e-5", r"has a rate for vision, which is not trained \(projector, embeddings are\); drop it, or train"),
        ("adapters=1e-5", "has a rate for adapters, which is not trained"),
    ],
)
def test_senseless_learning_rates_are_refused(refused, text, sentence):
    assert re.search(sentence, refused("--learning-rates", text))


def test_an_empty_list_is_one(tmp_path):
    yaml = YAML.replace("learning_rates: {projector: 2.5e-3}", "")
    assert from_yaml(tmp_path, yaml, "--train", "--lora-rank", 4)[0].train == []
    yaml = yaml.replace("[projector, vision]", "[]") + "lora_rank: 4\n"
    assert from_yaml(tmp_path, yaml)[0].train == []


def test_an_unknown_key_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        from_yaml(tmp_path, YAML + "learning_rat: 1\n")
    assert exit.value.code == 2 and "--learning_rat" in capsys.readouterr().err


def test_a_value_of_the_wrong_type_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        from_yaml(tmp_path, YAML + "lora_rank: many\n")
    assert "invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.parametrize("text, kind", [("- a\n- b\n", "list"), ("", "NoneType"), ("just text", "str")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, kind):
    with pytest.raises(
        ValueError, match=rf"run.yaml contains a value of type {kind}; expected lines such as `model: my-model`\."
    ):
        from_yaml(tmp_path, text)


def test_a_file_that_is_missing_or_no_yaml_is_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"gone\.yml is not a file; pass a YAML file\."):
        parse([str(tmp_path / "gone.yml"), *NEEDED])
    with pytest.raises(ValueError, match=r"run\.yaml is not YAML \(line 1, column 9\): "):
        from_yaml(tmp_path, "model: [")
    with pytest.raises(ValueError, match=r"run\.yaml is not YAML \(line 3, column 1\): the key 'model' occurs twice\."):
        from_yaml(tmp_path, "model: m\ndata: d\nmodel: n\n")
    assert main(["train", str(tmp_path / "gone.yml")]) == 1
    assert capsys.readouterr().err == f"dsvl train: {tmp_path / 'gone.yml'} is not a file; pass a YAML file.\n"


def test_the_deepspeed_launchers_rank_may_stand_before_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    assert plain(parse(["--local_rank=0", str(path)]))[:2] == plain(from_yaml(tmp_path, YAML))[:2]


# -- defaults ----------------------------------------------------------------------------------------------------------


def test_defaults():
    model_arguments, data_arguments, training = parsed()
    assert model_arguments.train == ["projector", "embeddings"] and model_arguments.lora_rank == 0
    assert data_arguments.on_bad_sample == "error" and data_arguments.max_length is None
    assert training.lr_scheduler_type == "cosine" and training.warmup_steps == 0.03
    assert training.get_warmup_steps(1000) == 30
    assert training.remove_unused_columns is False
    assert training.eval_strategy == "no" and training.load_best_model_at_end is False
    assert training.deepspeed is None and training.output_dir == "o"


@pytest.mark.parametrize("strategy, steps", [("steps", 30), ("epoch", 500)])
def test_held_out_data_is_watched_whenever_a_checkpoint_is_written(strategy, steps):
    flags = ["--save-strategy", strategy] + (["--save-steps", steps] if strategy == "steps" else [])
    training = parsed("--eval-data", "e", *flags)[2]
    assert training.eval_strategy == training.save_strategy == strategy
    assert training.load_best_model_at_end is True
    assert training.metric_for_best_model == "loss" and training.greater_is_better is False
    if strategy == "steps":
        assert training.eval_steps == training.save_steps == steps


def test_explicit_flags_about_evaluation_win(tmp_path):
    training = parsed("--eval-data", "e", "--eval-strategy", "epoch")[2]  # checkpoints by steps: the best may not be saved
    assert training.eval_strategy == "epoch" and training.load_best_model_at_end is False
    training = parsed("--eval-data", "e", "--eval_steps=250")[2]
    assert training.eval_steps == 250 and training.save_steps == 500 and training.load_best_model_at_end is True
    assert parsed("--eval-data", "e", "--load-best-model-at-end", "false")[2].load_best_model_at_end is False
    training = parsed("--eval-data", "e", "--save-strategy", "no")[2]
    assert training.eval_strategy == "no" and training.load_best_model_at_end is False
    training = from_yaml(tmp_path, YAML + "eval_data: e\neval_strategy: epoch\nsave_strategy: steps\n")[2]
    assert training.eval_strategy == "epoch" and training.load_best_model_at_end is False


def test_zero_stages():
    stages = {name: zero_stage(name) for name in ("zero1", "zero2", "zero3", "zero3-offload")}
    assert stages == {"zero1": 1, "zero2": 2, "zero3": 3, "zero3-offload": 3}
    assert zero_stage(None) is None and zero_stage({}) == 0 and zero_stage({"zero_optimization": {"stage": 2}}) == 2


def test_sound_combinations_pass_the_check():
    values = dict(
        train=["projector"], lora_rank=0, lora_language=True, lora_vision=False, qlora=False, eval_exact_match=False
    )
    check_options(values)
    check_options(values | dict(train=["vision", "language", "head"]))
    check_options(values | dict(train=["vision"], lora_rank=8))
    check_options(values | dict(train=["language"], lora_rank=8, lora_language=False, lora_vision=True))
    check_options(values | dict(deepspeed="zero3", eval_data="e", eval_exact_match=True, early_stopping_patience=2))
