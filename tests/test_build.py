"""What is distributed: the packages in pyproject.toml, and a wheel that works in an empty environment."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from snippets import ROOT, answers_at, free_port
from training_runs import make_checkpoint, make_conversations

APART = {"tests", "docs", "examples", "benchmarks", "build", "dist"}


def test_every_package_and_data_file_is_distributed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"dsvl"}
    for path in ROOT.rglob("__init__.py"):
        parts = path.relative_to(ROOT).parent.parts
        if parts and parts[0] not in APART and not any(part.startswith(".") for part in parts):
            found.add(".".join(("dsvl", *parts)))
    assert found == set(setuptools["packages"])
    for package, patterns in setuptools["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        assert all(list(folder.glob(pattern)) for pattern in patterns)
    assert "recipes/*.yaml" in setuptools["package-data"]["dsvl"]


def test_workflows_call_what_contributors_call() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    commands = []
    for path in workflows:
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            commands += [step["run"] for step in job["steps"] if "run" in step]
    for command in commands:
        if command.startswith("make "):
            assert re.search(rf"^{command.removeprefix('make ')}:", makefile, re.MULTILINE), command
        else:
            assert command.startswith("sudo apt-get") or (ROOT / command).is_file(), command
    assert {"make docs", "make build", "make test-slow", "make test-newest", ".ci/run"} <= set(commands)


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    """compose, a training step and the page, without this checkout; torch alone is lent, as it is large."""
    tools = Path(sys.executable).parent

    def run(*words: str | Path, **options: object) -> str:
        options = {"cwd": tmp_path, "env": variables, "timeout": 900} | options
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    run(tools / "pyproject-build", "--outdir", tmp_path / "dist", ROOT)
    files = sorted((tmp_path / "dist").iterdir())
    assert [path.suffix for path in files] == [".whl", ".gz"]
    run(tools / "twine", "check", "--strict", *files)

    run(sys.executable, "-m", "venv", tmp_path / "empty")
    python = tmp_path / "empty" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    lender = Path(torch.origin).parents[1]
    for path in lender.iterdir():
        if re.match(r"(torch|torchgen|functorch|triton)(-|$)", path.name):
            (packages / path.name).symlink_to(path)
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", f"{files[0]}[page]")
    assert str(tmp_path) in run(python, "-c", "import dsvl; print(dsvl.__file__)")

    command = tmp_path / "empty" / "bin" / "dsvl"
    listed = run(command, "train", "--list-recipes")
    assert [line.split()[0] for line in listed.splitlines()] == sorted(path.stem for path in (ROOT / "recipes").iterdir())
    make_checkpoint(tmp_path)
    data = make_conversations(tmp_path)
    run(command, "compose", "--vision", tmp_path / "tower", "--language", tmp_path / "llama", "--out", tmp_path / "composed")
    flags = ["--max-steps", "1", "--use-cpu", "--report-to", "none"]
    run(command, "train", "--model", tmp_path / "composed", "--data", data, "--output", tmp_path / "trained", *flags)
    assert json.loads((tmp_path / "trained" / "trainer_state.json").read_text())["global_step"] == 1

    port = free_port()
    words = [str(command), "demo", str(tmp_path / "trained"), "--port", str(port), "--device", "cpu"]
    page = subprocess.Popen(words, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(240):
            if answers_at(f"http://127.0.0.1:{port}/"):
                break
            try:
                page.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                continue
        assert page.poll() is None and answers_at(f"http://127.0.0.1:{port}/"), page.communicate()[0]
    finally:
        page.kill()
        page.communicate()
