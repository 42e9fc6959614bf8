"""Pushing to a Hub on the loopback address, and what is refused before anything is sent."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import plain_answer
import pytest
import torch
from hub_server import TOKEN, Hub, Refused, connect
from huggingface_hub import ModelCard
from plain_environment import plain_packages, run_plainly
from training_runs import make_checkpoint, make_conversations
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

import dsvl
from dsvl.cli import main
from dsvl.publishing import directory_checks, push
from dsvl.training.arguments import DSVLTrainingArguments
from dsvl.training.collator import ConversationCollator
from dsvl.training.trainer import DSVLTrainer

REMOTE_CODE = {path.name for path in Path(dsvl.__file__).parent.glob("*_dsvl.py")}
ANSWER = Path(__file__).with_name("plain_answer.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("publishing"))


@pytest.fixture
def checkpoint(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


@pytest.fixture
def hub(monkeypatch):
    """A Hub, and this process as a client of it."""
    with Hub() as server:
        connect(server, monkeypatch)
        yield server


@pytest.fixture
def opens(monkeypatch):
    """Skip the process that loads the checkpoint; the tests that name it use the real one."""
    monkeypatch.setattr(push, "check_standalone", lambda directory: {})


def commit_count(hub: Hub, repo_id: str) -> int:
    return len(hub.repositories[repo_id].commits)


# -- end to end --------------------------------------------------------------------------------------------------------


def test_a_stranger_loads_what_the_command_pushed(checkpoint, tmp_path):
    """One process pushes, the other has an empty cache, and nothing but torch, transformers and Pillow."""
    with Hub() as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "mine")}
        command = [sys.executable, "-m", "dsvl.cli", "push", str(checkpoint), "me/tiny"]
        pushed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert pushed.returncode == 0, pushed.stderr
        revision = hub.repositories["me/tiny"].refs["main"]
        assert f'from_pretrained("me/tiny", revision="{revision}", trust_remote_code=True)' in pushed.stdout
        hub.repositories["me/tiny"].add_commit("main", {}, "somebody empties main afterwards")

        packages = [plain_packages(tmp_path / "plain", "torch", "transformers", "pillow")]
        endpoint = {"HF_ENDPOINT": hub.address}
        there = run_plainly(ANSWER, "me/tiny", revision, packages=packages, home=tmp_path, **endpoint)
        assert there.returncode == 0, there.stderr
    theirs, ours = json.loads(there.stdout), plain_answer.answer(str(checkpoint))
    assert theirs["importable"] == [] and "dsvl" in ours["importable"]
    # With the package, gathered tokens are summed in another order.
    for name in ("logits", "losses"):
        torch.testing.assert_close(torch.tensor(theirs.pop(name)), torch.tensor(ours.pop(name)), atol=1e-6, rtol=1e-6)
    assert {**theirs, "importable": None} == {**ours, "importable": None}


def test_the_repository_holds_the_directory_and_its_card_the_address(hub, opens, checkpoint):
    commit = push.push_directory(checkpoint, "me/tiny")
    files = hub.files("me/tiny", commit.oid)
    assert set(files) == {path.name for path in checkpoint.iterdir()}
    assert all(files[name] == (checkpoint / name).read_bytes() for name in files if name != "README.md")
    card = ModelCard(files["README.md"].decode())
    assert 'name = "me/tiny"' in card.text and 'name = "."' not in card.text
    assert commit_count(hub, "me/tiny") == 2  # with the empty first one: all files came in one
    # The same again changes nothing.
    assert push.push_directory(checkpoint, "me/tiny").oid == commit.oid


def test_a_push_replaces_the_weights_of_an_earlier_one(hub, opens, checkpoint, made, tmp_path):
    push.push_directory(checkpoint, "me/tiny")
    api = huggingface_hub.HfApi()
    for name in ("adapters/adapter_model.safetensors", "of/somebody.safetensors"):
        api.upload_file(path_or_fileobj=b"old", path_in_repo=name, repo_id="me/tiny")
    model = AutoModelForImageTextToText.from_pretrained(made)
    sharded = dsvl.save_checkpoint(model, AutoProcessor.from_pretrained(made), tmp_path / "sharded", max_shard_size="200KB")
    commit = push.push_directory(sharded, "me/tiny")
    expected = {path.name for path in sharded.iterdir()} | {"of/somebody.safetensors"}
    assert set(hub.files("me/tiny", commit.oid)) == expected and "model.safetensors" not in expected


# -- what the options do -----------------------------------------------------------------------------------------------


def test_a_branch(hub, opens, checkpoint):
    assert main(["push", str(checkpoint), "me/tiny", "--revision", "trial"]) == 0
    assert hub.files("me/tiny") == {} and "model.safetensors" in hub.files("me/tiny", "trial")


def test_a_pull_request(hub, opens, checkpoint, capsys):
    assert main(["push", str(checkpoint), "me/tiny", "--create-pr"]) == 0
    assert hub.files("me/tiny") == {} and "model.safetensors" in hub.files("me/tiny", "refs/pr/1")
    assert "me/tiny/discussions/1" in capsys.readouterr().out
    assert main(["push", str(checkpoint), "me/tiny", "--create-pr", "--revision", "trial"]) == 1
    assert "pass create_pr or revision, not both" in capsys.readouterr().err


def test_private_means_private(hub, opens, checkpoint, capsys, monkeypatch):
    assert main(["push", str(checkpoint), "me/secret", "--private"]) == 0
    assert hub.repositories["me/secret"].private and "model.safetensors" in hub.files("me/secret")
    assert main(["push", str(checkpoint), "me/secret", "--private"]) == 0
    assert main(["push", str(checkpoint), "me/open"]) == 0
    before = commit_count(hub, "me/open")
    assert main(["push", str(checkpoint), "me/open", "--private"]) == 1
    assert "me/open exists and is public; make it private" in capsys.readouterr().err
    assert commit_count(hub, "me/open") == before


def test_a_dry_run_sends_nothing(hub, opens, checkpoint, capsys):
    (checkpoint / "checkpoint-4").mkdir()
    (checkpoint / "checkpoint-4" / "optimizer.pt").write_bytes(b"state")
    assert main(["push", str(checkpoint), "me/tiny", "--dry-run"]) == 0
    said = capsys.readouterr().out
    weights = (checkpoint / "model.safetensors").stat().st_size
    assert f"{weights:,}  model.safetensors" in said and "skipped  checkpoint-4" in said
    assert hub.log == []


# -- interruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["in the middle of the weights", "at the commit"])
def test_an_interrupted_push_is_completed_by_another(moment, hub, opens, made, tmp_path, capsys):
    model, processor = AutoModelForImageTextToText.from_pretrained(made), AutoProcessor.from_pretrained(made)
    checkpoint = dsvl.save_checkpoint(model, processor, tmp_path / "sharded", max_shard_size="200KB")
    shards = len(list(checkpoint.glob("*.safetensors")))
    assert shards > 2

    uploads = itertools.count(1)  # which come several at a time

    def fail(method: str, path: str) -> None:
        if moment == "at the commit" and "/commit/" in path:
            raise ConnectionError
        if moment != "at the commit" and method == "PUT" and next(uploads) > 1:
            raise Refused(403, message="the connection is gone")

    hub.before = fail
    assert main(["push", str(checkpoint), "me/tiny"]) == 1
    said = capsys.readouterr().err
    assert "me/tiny could not be pushed: " in said and "run the same again" in said
    assert hub.files("me/tiny") == {}, "nothing, or all of it"
    arrived = len(hub.uploaded)
    assert arrived == (shards if moment == "at the commit" else 1)

    hub.before, hub.log = (lambda method, path: None), []
    assert main(["push", str(checkpoint), "me/tiny"]) == 0
    assert set(hub.files("me/tiny")) == {path.name for path in checkpoint.iterdir()}
    assert sum(method == "PUT" for method, _ in hub.log) == shards - arrived  # what was uploaded is not uploaded twice


def test_a_hub_that_lost_a_file_is_found_out(hub, opens, checkpoint, capsys):
    make_commit = hub.RequestHandlerClass._make_commit

    def forgetful(self, repo_id, revision, lines, as_pull):
        return make_commit(self, repo_id, revision, [line for line in lines if line["key"] != "lfsFile"], as_pull)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub.RequestHandlerClass, "_make_commit", forgetful)
        assert main(["push", str(checkpoint), "me/tiny"]) == 1
    assert "does not hold model.safetensors as pushed; push again" in capsys.readouterr().err


def test_without_a_token_nothing_is_pushed(hub, opens, checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert main(["push", str(checkpoint), "me/tiny"]) == 1
    assert "me/tiny could not be pushed: " in capsys.readouterr().err and hub.repositories == {}


# -- push_to_hub of the parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["model first", "processor first"])
def test_model_and_processor_pushed_apart_are_a_whole(order, hub, made, tmp_path):
    model, processor = AutoModelForImageTextToText.from_pretrained(made), AutoProcessor.from_pretrained(made)
    parts = [model, processor] if order == "model first" else [processor, model]
    for part in parts:
        part.push_to_hub("me/tiny")
        assert set(hub.files("me/tiny")) >= REMOTE_CODE
    for name, content in hub.files("me/tiny").items():
        (tmp_path / name).write_bytes(content)
    assert directory_checks.read_contents(tmp_path).faults == []
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text" and 'name = "me/tiny"' in card.text


def test_a_card_that_somebody_wrote_is_kept(hub, made):
    model = AutoModelForImageTextToText.from_pretrained(made)
    model.push_to_hub("me/tiny", tags=["cups"])
    assert "cups" in ModelCard(hub.files("me/tiny")["README.md"].decode()).data.tags
    own = "---\nlibrary_name: transformers\n---\n# Mine\n"
    huggingface_hub.HfApi().upload_file(path_or_fileobj=own.encode(), path_in_repo="README.md", repo_id="me/tiny")
    model.push_to_hub("me/tiny")
    assert hub.files("me/tiny")["README.md"].decode() == own


@pytest.mark.parametrize("kind", [DSVLTrainer, Trainer])
def test_a_trainer_pushes_a_model_and_no_state(kind, hub, opens, made, tmp_path):
    data = dsvl.data.load_conversations(make_conversations(tmp_path, layout="pt"))
    model, processor = AutoModelForImageTextToText.from_pretrained(made), AutoProcessor.from_pretrained(made)
    arguments = DSVLTrainingArguments(
        str(tmp_path / "run"), max_steps=1, save_strategy="no", report_to="none", use_cpu=True, hub_model_id="me/trained"
    )
    trainer = kind(model, arguments, ConversationCollator(processor), train_dataset=data, processing_class=processor)
    trainer.train()
    commit = trainer.push_to_hub()
    if kind is Trainer:  # on its own it adds its arguments as a pickle, and its draft of a card; the rest is whole
        assert {"training_args.bin", *REMOTE_CODE} <= set(hub.files("me/trained"))
        assert "dsvl" in ModelCard(hub.files("me/trained")["README.md"].decode()).data.tags
        hub.repositories["me/trained"].commits[commit.oid].pop("training_args.bin")
    (tmp_path / "pushed").mkdir()
    for name, content in hub.files("me/trained", commit.oid).items():
        (tmp_path / "pushed" / name).write_bytes(content)
    contents = directory_checks.read_contents(tmp_path / "pushed")
    assert set(contents.files) >= REMOTE_CODE
    if kind is Trainer:
        assert len(contents.faults) == 1 and "README.md has pipeline_tag: None" in contents.faults[0]
        return
    assert contents.faults == []
    card = ModelCard.load(tmp_path / "pushed" / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text" and "| data.jsonl | 2 |" in card.text
    assert not (tmp_path / "run" / ".push.partial").exists()


def test_a_training_is_published_once_when_it_is_complete(hub, opens, made, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    data = make_conversations(tmp_path, layout="pt")
    argv = ["train", "--model", made, "--data", data, "--output", tmp_path / "run", "--max-steps", 2, "--save-steps", 1]
    argv += ["--report-to", "none", "--push-to-hub", "--hub-model-id", "me/trained", "--hub-private-repo", "true"]
    assert main(list(map(str, argv))) == 0
    assert commit_count(hub, "me/trained") == 2 and hub.repositories["me/trained"].private
    files = hub.files("me/trained")
    assert set(files) >= REMOTE_CODE and not any("checkpoint-" in name or name.endswith(".bin") for name in files)
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()


# -- what is refused ---------------------------------------------------------------------------------------------------


def add_to_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FAULTS = {
    "a token": (
        lambda folder: add_to_json(folder / "generation_config.json", note="hf_" + "aB3" * 12),
        "generation_config.json holds a token of Hugging Face (hf_aB3a...)",
    ),
    "a key in code": (
        lambda folder: (folder / "more.py").write_text('key = "AKIAABCDEFGHIJKLMNOP"\n'),
        "more.py holds a key of AWS",
    ),
    "a private key": (
        lambda folder: (folder / "notes.txt").write_text("-----BEGIN RSA PRIVATE KEY-----\n"),
        "notes.txt holds a private key",
    ),
    "a file of credentials": (lambda folder: (folder / ".env").write_text("A=1"), ".env may hold credentials"),
    "a pickle": (
        lambda folder: (folder / "training_args.bin").write_bytes(b"\x80"),
        "training_args.bin is in a format that can run code",
    ),
    "an optimizer": (lambda folder: (folder / "optimizer.pt").write_bytes(b"\x80"), "optimizer.pt is the state of an"),
    "a state of DeepSpeed": (
        lambda folder: ((folder / "global_step4").mkdir(), (folder / "global_step4" / "x_states.pt").write_bytes(b"")),
        "global_step4/x_states.pt is the state of an",
    ),
    "a path": (
        lambda folder: add_to_json(folder / "config.json", best="/data/me/run/checkpoint-4"),
        "config.json holds a path of this machine (best: /data/me/run/checkpoint-4)",
    ),
    "a path deep in a sentence": (
        lambda folder: add_to_json(folder / "config.json", args=[{"said": "read /home/me/secret.json"}]),
        "config.json holds a path of this machine (args.said: read /home/me/secret.json)",
    ),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja is missing"),
    "no code": (lambda folder: (folder / "processing_dsvl.py").unlink(), "processing_dsvl.py is missing, which auto_map"),
    "half an auto_map": (
        lambda folder: add_to_json(folder / "config.json", auto_map={"AutoConfig": "configuration_dsvl.DSVLConfig"}),
        "auto_map in config.json lacks AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, "
        "AutoModelForMultimodalLM, AutoProcessor",
    ),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors cannot be read",
    ),
    "a missing shard": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
        "model-1.safetensors is missing, which model.safetensors.index.json names",
    ),
    "no metadata": (lambda folder: (folder / "README.md").write_text("# A model\n"), "README.md has library_name: None"),
    "another model": (
        lambda folder: add_to_json(folder / "config.json", model_type="llama"),
        "does not belong to a DSVL model",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_must_not_be_published_is_refused_by_name(fault, hub, opens, checkpoint, capsys):
    damage, expected = FAULTS[fault]
    damage(checkpoint)
    for options in ([], ["--dry-run"]):
        assert main(["push", str(checkpoint), "me/tiny", *options]) == 1
        assert expected in capsys.readouterr().err
    assert hub.log == []


def test_all_faults_are_told_at_once(checkpoint):
    for fault in ("a token", "a pickle", "no template"):
        FAULTS[fault][0](checkpoint)
    assert len(directory_checks.read_contents(checkpoint).faults) == 3


def test_text_that_only_looks_like_a_path_is_let_pass(checkpoint):
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["/usr/lib/python"] = 99999
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    add_to_json(checkpoint / "generation_config.json", note="either/or, 1/2/3, </s>, /", address="https://hf.co/tmp/x")
    assert directory_checks.read_contents(checkpoint).faults == []


def test_a_directory_that_does_not_open_alone_is_refused(hub, checkpoint, capsys):
    with (checkpoint / "projectors_dsvl.py").open("a") as file:
        file.write("\nraise RuntimeError('broken code')\n")
    assert main(["push", str(checkpoint), "me/tiny"]) == 1
    said = capsys.readouterr().err
    assert "does not load in a process without the package dsvl" in said and "broken code" in said and hub.log == []


@pytest.mark.parametrize("moved", [True, False])
def test_weights_of_other_names_are_refused(checkpoint, capsys, moved):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    name = "model.multi_modal_projector.linear.weight"
    weights["lost"] = weights[name].clone()
    if moved:
        del weights[name]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    assert main(["push", str(checkpoint), "me/tiny", "--dry-run"]) == 1
    reason = f"lacks 1 weights, such as {name}" if moved else "The weights are not those of the configuration"
    assert reason in capsys.readouterr().err
