"""The command `dsvl`: what it imports to start, what its help shows, and what it says of mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny_llama
from training_runs import environment, make_checkpoint, make_conversations

from dsvl import DSVLConfig, DSVLForConditionalGeneration, cli
from dsvl.training.argument_parser import GROUPS, TrainParser
from dsvl.training.arguments import DataArguments, DSVLTrainingArguments, ModelArguments
from dsvl.utils.local_paths import looks_like_path
from dsvl.utils.model_loading import load_checkpoint

# What the console script does, whatever of the package is installed.
SCRIPT = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("dsvl_command", {str(Path(__file__).parent.parent / "dsvl_command.py")!r})
dsvl_command = importlib.util.module_from_spec(spec); spec.loader.exec_module(dsvl_command)
"""
DSVL = ["-c", SCRIPT + "sys.exit(dsvl_command.main())"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("command"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder)
    return folder


def _python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A fresh process."""
    return subprocess.run([sys.executable, *arguments], env=environment(), capture_output=True, text=True, timeout=120)


def _imported(start: str, script: str) -> "tuple[set[str], subprocess.CompletedProcess[str]]":
    """The modules that a script imports in a fresh process after `start`, and the process."""
    said = "atexit.register(lambda: print('imported', *{*sys.modules} - before, file=sys.stderr))"
    done = _python("-c", f"{start}\nimport atexit, sys\nbefore = {{*sys.modules}}\n{said}\n{script}")
    lines = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("imported ")]
    assert len(lines) == 1, done.stderr
    return set(lines[0]), done


def said(capsys: Any, *argv: str) -> tuple[int, str]:
    """The status of a command, and all that it printed."""
    try:
        status = cli.main(argv)
    except SystemExit as left:
        status = int(left.code or 0)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


# -- starting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], [], ["chat", "--help"], ["evaluate", "--help"], ["env", "--help"], ["chta"]]
)
def test_what_needs_no_model_imports_python_s_own_modules_alone(arguments: list[str]) -> None:
    """Torch and transformers take seconds."""
    imported, done = _imported("", f"{SCRIPT}sys.argv = {['dsvl', *arguments]}; sys.exit(dsvl_command.main())")
    assert done.returncode == (2 if arguments == ["chta"] else 0)
    others = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert "dsvl.cli" in imported and others == {"dsvl"}
    shown = done.stdout + done.stderr
    assert ("did you mean chat?" in shown) if arguments == ["chta"] else shown.startswith(("usage: dsvl", "dsvl "))


def test_a_command_has_the_whole_package(checkpoint: Path) -> None:
    """The console script imports `dsvl/__init__.py` before the command runs, not before its arguments are read."""
    script = """
checkpoint = sys.argv.pop(); status = dsvl_command.main()
import dsvl; assert dsvl.DSVLConfig.__module__ == "dsvl.configuration_dsvl" and dsvl.compose
from transformers import AutoConfig; assert type(AutoConfig.from_pretrained(checkpoint)) is dsvl.DSVLConfig
sys.exit(status)
"""
    done = _python("-c", SCRIPT + script, "data", "list", str(checkpoint))
    assert done.returncode == 0 and "llava_conversations" in done.stdout, done.stderr


def test_the_package_imports_what_its_classes_need_of_transformers_alone() -> None:
    imported, done = _imported("from transformers import GenerationMixin, PreTrainedModel, ProcessorMixin", "import dsvl")
    packages = {name.partition(".")[0] for name in imported}
    assert done.returncode == 0, done.stderr
    assert packages - sys.stdlib_module_names <= {"dsvl", "transformers", "tokenizers", "PIL", "torchvision"}
    own = {name.split(".")[1] for name in imported if name.startswith("dsvl.")}
    assert {name for name in own if not name.endswith("_dsvl")} == {"utils"}
    models = {name.split(".")[2] for name in imported if name.startswith("transformers.models.")}
    assert models <= {"auto", "clip", "encoder_decoder", "llama"}, models


def test_the_auto_classes_know_it_after_importing_it_alone() -> None:
    script = """
import dsvl
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
assert type(AutoConfig.for_model("dsvl")) is dsvl.DSVLConfig
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    assert auto._model_mapping[dsvl.DSVLConfig] is dsvl.DSVLForConditionalGeneration
assert PROCESSOR_MAPPING[dsvl.DSVLConfig] is dsvl.DSVLProcessor
assert dsvl.migration.migrate_checkpoint and dsvl.save_checkpoint and dsvl.compose
"""
    done = _python("-c", script)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # nor is there anything that nobody can act on


# -- help ----------------------------------------------------------------------------------------------------------------


def test_the_help_of_training_has_groups_and_each_flag_once(capsys: Any) -> None:
    status, text = said(capsys, "train", "--help")
    assert status == 0 and [title for title in re.findall(r"^(\w.*):$", text, re.M)] == list(GROUPS)
    flags = re.findall(r"^  (--[\w-]+)", text, re.M)
    assert len(flags) == len(set(flags)) < 75 and not re.search(r"^  --\w+_", text, re.M)
    assert re.search(r"--output DIR .*\[required\]", text) and re.search(r"--lora-rank N .*\[default: 0\]", text)
    assert "[default: on; disable with --no-lora-language]" in text


def test_every_field_is_in_the_help_for_all() -> None:
    parser = TrainParser([ModelArguments, DataArguments, DSVLTrainingArguments], usage="")
    everything = [action.dest for actions in parser.groups(everything=True).values() for action in actions]
    fields = {name for one in (ModelArguments, DataArguments, DSVLTrainingArguments) for name in one.__dataclass_fields__}
    assert len(everything) == len(set(everything))
    assert fields - set(everything) <= {"gradient_checkpointing", "gradient_checkpointing_kwargs", "_n_gpu"}
    shown = {action.dest for actions in parser.groups().values() for action in actions}
    ours = fields - set(DSVLTrainingArguments.__mro__[1].__dataclass_fields__)
    assert ours <= shown


# -- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["train", "--lerning-rate", "1"], "--learning-rate"),
        (["train", "--lora_rnak=8"], "--lora-rank"),
        (["chat", "--tempreature", "1"], "--temperature"),
        (["evaluate", "m", "d", "--bathc-size", "3"], "--batch-size"),
        (["data", "show", "--modle", "x", "y"], "--model"),
        (["serve", "m", "--max-imgaes", "3"], "--max-images"),
        (["evalaute"], "evaluate"),
        (["data", "shwo"], "show"),
    ],
)
def test_what_is_mistyped_gets_a_suggestion(capsys: Any, argv: list[str], meant: str) -> None:
    status, text = said(capsys, *argv)
    assert status == 2 and f"did you mean {meant}?" in text and len(text.splitlines()) == 2


def test_flags_are_what_they_were(capsys: Any) -> None:
    parser = TrainParser([ModelArguments, DataArguments, DSVLTrainingArguments], usage="", allow_abbrev=False)
    for flags in (["--max_length", "9"], ["--max-length", "9"]):
        assert parser.parse_args(["--model", "m", "--data", "d", *flags]).max_length == 9
    assert said(capsys, "evaluate", "--allow")[1].startswith("dsvl evaluate: the following arguments are required")  # short


@pytest.mark.parametrize("name", ["./m", "../m", "/m", "~/m", "a/b/c", "m.csv", "a/m.jsonl", "x.yaml", "t.JSON"])
def test_paths(name: str) -> None:
    assert looks_like_path(name)


@pytest.mark.parametrize("name", ["m", "owner/name", "meta-llama/Llama-3.1-8B", "owner/name.v2", "stabilityai/sd-2.1"])
def test_names_on_the_hub(name: str) -> None:
    assert not looks_like_path(name)


MISSING = [
    ["chat", "./missing"],
    ["serve", "./missing"],
    ["demo", "./missing"],
    ["evaluate", "./missing", "d"],
    ["evaluate", "m", "missing.csv"],
    ["merge", "--model", "./missing", "--adapters", "a", "--out", "o"],
    ["plan", "--model", "./missing"],
    ["env", "./missing"],
    ["compose", "--vision", "./missing", "--language", "l", "--out", "o"],
    ["export", "./missing", "--to", "llava", "--out", "o"],
    ["compose", "--vision", "v", "--language", "./missing", "--out", "o"],
    ["data", "show", "missing.csv"],
    ["train", "--model", "./missing", "--data", "d", "--output", "o"],
    ["train", "--model", "m", "--data", "missing.csv", "--output", "o"],
]


@pytest.mark.parametrize("argv", MISSING, ids=" ".join)
def test_a_path_that_does_not_exist_is_not_looked_for_elsewhere(
    capsys: Any, tmp_path: Path, monkeypatch: Any, argv: list[str]
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the Hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", never)
    status, text = said(capsys, *argv)
    assert status in (1, 2) and re.search(r"(\./missing|missing\.csv) does not exist", text), text


def test_a_loader_says_so_as_well(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        load_checkpoint(str(tmp_path / "missing"))


def test_a_package_that_is_missing_names_the_extra(capsys: Any, checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    data = tmp_path / "data.parquet"
    data.write_bytes(b"PAR1")
    for package, extra, argv in (
        ("peft", "train", ["merge", "--model", str(checkpoint), "--adapters", str(tmp_path), "--out", str(tmp_path / "o")]),
        ("datasets", "data", ["data", "show", str(data)]),
        ("datasets", "evaluate", ["evaluate", str(checkpoint), str(data), "--out", str(tmp_path / "a.jsonl")]),
        ("rapidfuzz", "evaluate", ["evaluate", str(checkpoint), str(data)]),
        ("uvicorn", "serve", ["serve", str(checkpoint)]),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.chdir(tmp_path)
            status, text = said(capsys, *argv)
        assert status == 1 and f"pip install 'dsvl[{extra}]'" in text, (package, text)


# -- what is no checkpoint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["chat", "serve", "demo", "evaluate", "merge", "plan", "train", "data show"])
def test_a_language_models_directory_is_no_checkpoint(
    capsys: Any, command: str, language_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model, data = str(language_model), str(make_conversations(tmp_path))
    argv = {
        "evaluate": ["evaluate", model, data],
        "merge": ["merge", "--model", model, "--adapters", model, "--out", "o"],
        "plan": ["plan", "--model", model],
        "train": ["train", "--model", model, "--data", data, "--output", "o"],
        "data show": ["data", "show", data, "--model", model],
    }.get(command, [command, model])
    monkeypatch.setattr(DSVLForConditionalGeneration, "__init__", lambda *args: pytest.fail("a model was built"))
    status, text = said(capsys, *argv)
    assert status == 1 and "'llama'" in text and ("not a DSVL checkpoint" in text or command == "plan"), text


def test_from_pretrained_refuses_another_models_directory(language_model: Path) -> None:
    for loaded in (DSVLForConditionalGeneration, DSVLConfig):
        with pytest.raises(ValueError, match=r"is of type 'llama', not a DSVL checkpoint"):
            loaded.from_pretrained(language_model)


# -- noise and interruption ----------------------------------------------------------------------------------------------

NOISE = ("torchvision", "gemm_4bit", "accelerator", "non_blocking", "pin_memory", "FutureWarning", "shards", "lm_head")


def _start(*argv: str) -> "subprocess.Popen[str]":
    """A command as a terminal starts it: Ctrl-C reaches all its processes."""
    return subprocess.Popen(
        [sys.executable, *DSVL, *argv],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _interrupted(process: "subprocess.Popen[str]", after: str | float) -> str:
    """Press Ctrl-C after so many seconds, or when a line says this; all that was printed."""
    lines = []
    if isinstance(after, str):
        assert process.stdout is not None
        watchdog = threading.Timer(120, process.kill)  # the line never comes
        watchdog.start()
        for line in process.stdout:
            lines.append(line)
            if after in line:
                break
        watchdog.cancel()
    else:
        time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=120)[0]
    return "".join(lines) + rest


@pytest.mark.parametrize(
    ("command", "after", "kept"),
    [
        ("train", "| loss ", "kept"),
        ("train", 1.5, "kept"),
        ("evaluate", 1.5, "kept; run the same command to resume"),
        ("compose", 1.5, "Nothing was written; run the same command to start again"),
        ("data", 4.0, "Converted data is kept; run the same command to resume"),
    ],
)
def test_ctrl_c_is_one_line(checkpoint: Path, tmp_path: Path, command: str, after: str | float, kept: str) -> None:
    model, data, out = str(checkpoint), str(make_conversations(tmp_path)), str(tmp_path / "out")
    parts = [str(checkpoint.parent / name) for name in ("tower", "llama")]
    flags = ["--max-steps", "100000", "--logging-steps", "1", "--report-to", "none", "--dataloader-num-workers", "1"]
    argv = {
        "train": ["--model", model, "--data", data, "--output", out, *flags],
        "evaluate": [model, data, "--out", out],
        "compose": ["--vision", parts[0], "--language", parts[1], "--out", out],
        "data": ["convert", "llava_conversations", "--root", str(tmp_path / "raw.json"), "--out", out, "--workers", "2"],
    }[command]
    turns = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]
    raw = [{"id": str(number), "image": "images/0_0.png", "conversations": turns} for number in range(100_000)]
    (tmp_path / "raw.json").write_text(json.dumps(raw if command == "data" else []))
    with _start(command, *argv) as process:
        text = _interrupted(process, after)
    assert process.returncode == 130, text
    assert "Traceback" not in text and "KeyboardInterrupt" not in text, text
    assert text.rstrip().splitlines()[-1].startswith(f"dsvl {command}: Interrupted") and kept in text, text
    assert not (tmp_path / "out" / "config.json").exists()


def test_ctrl_c_within_a_finalizer_is_not_lost() -> None:
    """It comes when a module is imported, say, and the finalizer of an object of a library runs."""
    script = """
import signal, sys, time
from dsvl import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without
class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def run(arguments):
    Finalized()
    time.sleep(60)
class Module:
    add_parser = staticmethod(lambda commands: commands.add_parser("data").set_defaults(run=run))
cli.import_module = lambda *arguments: Module
sys.exit(cli.main(["data"]))
"""
    done = _python("-c", script)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "\ndsvl data: Interrupted. Converted data is kept; run the same command to resume.\n"


def test_an_ordinary_training_prints_nothing_of_others(checkpoint: Path, tmp_path: Path) -> None:
    data = make_conversations(tmp_path)
    flags = ["--max-steps", "2", "--save-steps", "1", "--report-to", "none", "--output", str(tmp_path / "out")]
    with _start("train", "--model", str(checkpoint), "--data", str(data), *flags) as process:
        text = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "are trained" in text, text
    assert not [noise for noise in NOISE if noise in text], text


def test_other_warnings_are_not_hidden() -> None:
    script = "from dsvl.utils.third_party_output import silence_third_party_output as silence; silence();"
    script += "import logging, warnings;"
    script += "logging.getLogger('transformers.trainer').warning('a real one'); warnings.warn('ours', FutureWarning)"
    done = _python("-c", script)
    assert "a real one" in done.stderr and "ours" in done.stderr
