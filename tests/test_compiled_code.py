"""Code that one process compiled is there for the next."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_chat_command import make_checkpoint

from dsvl.utils import compiled_code
from dsvl.utils.compiled_code import VARIABLE, keep_compiled_code

SCRIPT = Path(__file__).with_name("compiled_decoding.py")


@pytest.mark.slow  # the headers of torch are compiled anew in a new directory
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    answers = []
    for _ in range(2):
        command = [sys.executable, str(SCRIPT), str(checkpoint)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        answers.append(json.loads(run.stdout.splitlines()[-1]))
    first, second = answers
    assert first["found"] == {"fxgraph_cache_miss": 1} and second["found"] == {"fxgraph_cache_hit": 1}
    assert first["tokens"] == second["tokens"]
    directory = Path(first["directory"])
    assert directory == tmp_path / "cache" / "dsvl" / "compiled" and directory.stat().st_mode & 0o777 == 0o700


def test_the_command_says_where(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT.parents[1] / "dsvl_command.py"), "env", "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)["compiled_code"]
    assert found == {"directory": str(tmp_path / "dsvl" / "compiled"), "mib": 0.0}


def test_a_directory_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_compiled_code()
    assert os.environ[VARIABLE] == str(tmp_path / "own") and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("is_file", [True, False])
def test_a_directory_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_file: bool
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if is_file:
        (tmp_path / "dsvl").write_text("")
    else:
        monkeypatch.setattr(compiled_code.os, "access", lambda *args: False)
    keep_compiled_code()
    assert not os.environ[VARIABLE] and "cannot be written; set TORCHINDUCTOR_CACHE_DIR" in caplog.text
