"""The documentation builds without a warning, its commands exist, its pages run, and it quotes real error messages."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from snippets import PAGES, ROOT, Reader, check_command, flags_of, snippets
from training_runs import environment

from dsvl import cli
from dsvl.training import training_arguments_table

sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import generated_reference  # noqa: E402  (an extension of the documentation)

# Errors that are not raised by this package.
LAUNCHER_FLAGS = (
    " --num_gpus --module --hostfile --no_ssh --node_rank --master_addr --master_port --nnodes --nproc-per-node --node-rank"
    " --master-addr --master-port --max-restarts --rdzv-backend --rdzv-endpoint"
)
FOREIGN = {"TypeError: DSVLModelOutputWithPast.__init__() got an unexpected keyword argument 'cache'"}


def test_it_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"dsvl {name}" in (tmp_path / "reference" / "generated" / f"{name}.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_reference_has_every_flag(name: str) -> None:
    page = generated_reference.command_page(name)
    parser = generated_reference.command_parser(name)
    for one in generated_reference.parsers(parser):
        for action in one._actions:
            if action.dest not in ("help", "help_all") and action.help != "==SUPPRESS==":
                flags = [flag for flag in action.option_strings if "_" not in flag]
                deprecated = (action.help or "").startswith("Deprecated")
                assert deprecated or not flags or any(f"`{flag}" in page for flag in flags), flags
    assert f"generated/{name}\n" in (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8")


def test_the_table_of_training_arguments_is_a_page(tmp_path: Path) -> None:
    generated_reference.write_pages(tmp_path)
    assert (tmp_path / "training-arguments.md").read_text(encoding="utf-8") == training_arguments_table.markdown()


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_exist(page: str) -> None:
    for snippet in snippets(page):
        for words in snippet.commands:
            check_command(words)
            if words[0] == "dsvl":
                known = generated_reference.command_page(words[1])
            elif "dsvl.training" in words:
                known = generated_reference.command_page("train") + LAUNCHER_FLAGS
            else:
                continue
            for flag in flags_of(words):
                assert re.search(rf"{flag}\b", known), (words, flag)
        if snippet.language == "python":
            compile(snippet.text, page, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_every_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list) -> None:
    found = snippets(page)
    if not any(snippet.language in ("bash", "python") for snippet in found):
        pytest.skip("nothing to run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("sys.stdin", None)
    reader = Reader(tmp_path, photographs, servers=True)
    for snippet in found:
        reader.run(snippet)


@pytest.mark.slow
def test_the_notebook_learns_and_talks() -> None:
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "save the notebook without outputs"
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    answers = eval(notebook.cells[-2].outputs[-1]["data"]["text/plain"])
    assert len(answers) == 4 and sum(color == answer for color, answer in answers.items()) >= 3


def test_the_troubleshooting_page_quotes_real_messages() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sources = [path for path in ROOT.rglob("*.py") if not {"tests", ".venv", ".git"} & set(path.relative_to(ROOT).parts)]
    # Literals that are split over lines are joined.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    for heading in re.findall(r"^### (.*)$", page, re.MULTILINE):
        for message in set(re.findall(r"`([^`]*)`", heading)) - FOREIGN:
            for piece in message.split("..."):
                assert piece.strip(" )'") in code or message.startswith("dsvl "), message


def test_the_contributors_map_names_files_that_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    known = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.*") if ".venv" not in str(path)]
    for name in set(re.findall(r"`([\w/.-]+\.(?:py|md|cff|txt|toml|jinja))`", page)):
        assert any(path == name or path.endswith(f"/{name}") for path in known), name
    for folder in set(re.findall(r"`(\w+(?:/\w+)*)/`", page)):
        assert (ROOT / folder).is_dir() or folder in ("dist",) or (ROOT / "data" / folder).is_dir(), folder
    core = {path.name for path in ROOT.glob("*_dsvl.py")}
    assert core <= set(re.findall(r"`(\w+_dsvl\.py)`", page)), "the map lacks a file of the core"


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## \[(.*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version  # type: ignore[index]
