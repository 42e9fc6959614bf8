"""Replacing the code files of an older checkpoint."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import Hub, connect
from huggingface_hub import HfApi
from training_runs import make_checkpoint
from transformers import AutoModelForImageTextToText

import dsvl
from dsvl.cli import main
from dsvl.migration import checkpoint_code, migrate_code
from dsvl.publishing.fresh_process import check_standalone
from dsvl.publishing.travelling_code import travelling_code

ROOT = Path(dsvl.__file__).parent
RELEASE_0_1 = "5b4aead"  # whose code fails with transformers 5.24
STALE = "\n\ndef _fail(*args, **kwargs):\n    raise TypeError('code of an older release')\n\n\n"
STALE += "DSVLForConditionalGeneration.forward = _fail\n"


@pytest.fixture(scope="module")
def current(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("code"), "current")


@pytest.fixture
def old(current, tmp_path) -> Path:
    """A checkpoint whose code raises, with the names of an older release."""
    directory = Path(shutil.copytree(current, tmp_path / "old"))
    with (directory / "modeling_dsvl.py").open("a") as file:
        file.write(STALE)
    (directory / "pictures_dsvl.py").write_text("")
    (directory / "processor_dsvl.py").write_text("from .processing_dsvl import DSVLProcessor\n")
    rename_in_json(directory / "config.json", reversed_images="reversed_pictures")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        text = (directory / name).read_text()
        (directory / name).write_text(text.replace("processing_dsvl.DSVLProcessor", "processor_dsvl.DSVLProcessor"))
    return directory


@pytest.fixture
def equal_logits(monkeypatch):
    """Skip the comparison; the tests that name it use the real one."""
    monkeypatch.setattr(checkpoint_code, "compare_logits", lambda *args: 0.0)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with Hub() as server:
        connect(server, monkeypatch)
        yield server


def rename_in_json(path: Path, **keys: str) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({keys.get(key, key): value for key, value in content.items()}, indent=2))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_checkpoint_that_fails_by_remote_code_works_after_the_command(old, current, capsys):
    weights = (old / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="TypeError: code of an older release"):
        check_standalone(old)
    assert main(["migrate", "code", str(old)]) == 0
    printed = capsys.readouterr().out
    assert "largest difference 0 " in printed and "removed  pictures_dsvl.py" in printed
    assert (old / "model.safetensors").read_bytes() == weights
    assert check_standalone(old)["logits"] == check_standalone(current)["logits"]
    assert main(["migrate", "code", str(old)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_checkpoint_of_release_0_1(current, tmp_path):
    """With the code files of that release, from the history of this repository."""

    def git(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)

    listed = git("ls-tree", "--name-only", RELEASE_0_1)
    if listed.returncode != 0:
        pytest.skip(f"the history of this checkout has no commit {RELEASE_0_1}")
    directory = Path(shutil.copytree(current, tmp_path / "old"))
    for path in directory.glob("*_dsvl.py"):
        path.unlink()
    for name in listed.stdout.decode().split():
        if name.endswith("_dsvl.py"):
            (directory / name).write_bytes(git("show", f"{RELEASE_0_1}:{name}").stdout)
    rename_in_json(directory / "config.json", reversed_images="reversed_pictures")
    with pytest.raises(ValueError, match="TypeError"):
        check_standalone(directory)
    assert migrate_code(directory).difference == 0
    assert contents(directory).keys() == contents(current).keys()


def test_the_files_are_those_that_saving_writes(old, current, equal_logits):
    done = migrate_code(old)
    assert contents(old).keys() == contents(current).keys()
    assert {name: (old / name).read_bytes() for name in travelling_code()} == travelling_code()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
        assert json.loads((old / name).read_text()) == json.loads((current / name).read_text()), name
    assert done.removed == ["pictures_dsvl.py", "processor_dsvl.py"]
    assert "config.json" in done.written and "generation_config.json" not in done.written


def test_what_else_the_directory_holds_is_kept(old, equal_logits):
    kept = {"adapters/adapter_config.json": b"{}", "notes.txt": b"notes", "run_dsvl.txt": b""}
    for name, content in kept.items():
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).write_bytes(content)
    before = contents(old)
    done = migrate_code(old)
    after = contents(old)
    unchanged = before.keys() - {*done.written, *done.removed}
    assert unchanged >= {"model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md", *kept}
    assert all(after[name] == before[name] for name in unchanged)
    assert list(old.parent.glob(".*")) == []


def test_auto_map_of_a_nested_tower_and_of_another_tokenizer(old, equal_logits):
    config = json.loads((old / "config.json").read_text())
    config["vision_config"] = {"model_type": "dsvl_qwen_vision", "auto_map": {"AutoConfig": "tower_dsvl.Config"}}
    (old / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((old / "tokenizer_config.json").read_text())
    tokenizer["auto_map"]["AutoTokenizer"] = ["tokenization_other.OtherTokenizer", None]
    (old / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    migrate_code(old)
    config = json.loads((old / "config.json").read_text())
    assert config["auto_map"] == dsvl.configuration_dsvl.AUTO_MAP
    assert config["vision_config"]["auto_map"] == dsvl.configuration_dsvl.QWEN_VISION_AUTO_MAP
    assert json.loads((old / "tokenizer_config.json").read_text())["auto_map"] == {
        "AutoProcessor": "processing_dsvl.DSVLProcessor",
        "AutoTokenizer": ["tokenization_other.OtherTokenizer", None],
    }


def test_different_logits_change_nothing(old, monkeypatch, capsys):
    before = contents(old)
    monkeypatch.setattr(checkpoint_code, "check_standalone", lambda new: {"logits": [0.0] * 64})
    assert main(["migrate", "code", str(old)]) == 1
    assert "the logits of a prompt with an image differ" in capsys.readouterr().err
    assert contents(old) == before and list(old.parent.glob(".*")) == []


def test_an_interruption_changes_nothing(old, equal_logits, monkeypatch):
    before = contents(old)
    renames = []

    def interrupted(path: Path, target: Path) -> None:
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        os.rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        migrate_code(old)
    assert len(renames) == 3  # away, interrupted, and back
    assert contents(old) == before and list(old.parent.glob(".*")) == []


def test_a_replacement_that_was_killed_between_its_renames_is_restored(old, equal_logits):
    old.rename(old.with_name(".old.before-migration"))
    assert migrate_code(old).removed == ["pictures_dsvl.py", "processor_dsvl.py"]
    assert list(old.parent.glob(".*")) == []


def test_what_is_refused(old, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is not a DSVL checkpoint \(no config.json\)"):
        migrate_code(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"is not a DSVL checkpoint \(config.json has model_type 'llama'\)"):
        migrate_code(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        migrate_code(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        migrate_code(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is neither a directory nor the name of a repository"):
        migrate_code("not a name")
    with pytest.raises(ValueError, match="is a directory; create_pr"):
        migrate_code(old, create_pr=True)
    monkeypatch.chdir(old)
    with pytest.raises(ValueError, match="is the current directory"):
        migrate_code(".")


def test_a_repository_gets_a_pull_request(old, current, hub, capsys, tmp_path):
    api = HfApi()
    api.create_repo("me/old")
    (old / "checkpoint-2").mkdir()
    (old / "checkpoint-2" / "model.safetensors").write_bytes(b"of a training")
    api.upload_folder(repo_id="me/old", folder_path=str(old))
    before = hub.files("me/old")

    hub.log.clear()
    assert main(["migrate", "code", "me/old"]) == 0
    printed = capsys.readouterr().out
    assert "largest difference 0 " in printed and "pass --create-pr" in printed
    assert list(hub.repositories["me/old"].refs) == ["main"] and hub.files("me/old") == before
    downloaded = {path.rpartition("/")[2] for method, path in hub.log if "/resolve/" in path}
    assert "model.safetensors" in downloaded and "README.md" not in downloaded
    assert not any("checkpoint-2" in path for _, path in hub.log)

    assert main(["migrate", "code", "me/old", "--create-pr"]) == 0
    assert "me/old/discussions/1" in capsys.readouterr().out
    proposed = hub.files("me/old", "refs/pr/1")
    assert hub.files("me/old") == before
    assert {name for name in proposed if name.endswith("_dsvl.py")} == set(travelling_code())
    assert all(proposed[name] == before[name] for name in ("model.safetensors", "README.md", "tokenizer.json"))
    directory = tmp_path / "proposed"
    directory.mkdir()
    for name, content in proposed.items():
        if "/" not in name:
            (directory / name).write_bytes(content)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    expected = AutoModelForImageTextToText.from_pretrained(current)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_no_weights_are_downloaded_of_a_repository_that_is_up_to_date(current, hub, capsys):
    api = HfApi()
    api.create_repo("me/current")
    api.upload_folder(repo_id="me/current", folder_path=str(current))
    hub.log.clear()
    assert main(["migrate", "code", "me/current", "--create-pr"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert not any("safetensors" in path for _, path in hub.log)


def test_a_repository_that_does_not_exist(hub, capsys):
    assert main(["migrate", "code", "me/nothing"]) == 1
    assert "me/nothing could not be migrated" in capsys.readouterr().err
