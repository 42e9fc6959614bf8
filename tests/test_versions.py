"""A checkpoint composed with one transformers opens in another and does the same there."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import llava_answer
import plain_answer
import pytest
import torch
import transformers
from exported_models import compose_for_export, save_and_export
from plain_environment import plain_packages, run_plainly
from training_runs import make_checkpoint

import dsvl
from dsvl import transformers_dsvl
from dsvl.transformers_dsvl import NEWEST_TESTED, OLDEST_TESTED

ROOT = Path(dsvl.__file__).parent
# Environments of other transformers releases, which `make test` makes and names.
RELEASES = os.environ.get("DSVL_RELEASES")
OTHER_RELEASES = re.search(r"^OTHER_RELEASES := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()  # type: ignore[index]
needs_releases = pytest.mark.skipif(RELEASES is None, reason="DSVL_RELEASES names no environments; run make test")


def run_in(release: str, script: str, *arguments: str | Path, home: Path, more: tuple[str, ...] = ()) -> Any:
    """What a script prints where only an older transformers, torch, Pillow and `more` can be imported."""
    home.mkdir()
    (site_packages,) = Path(str(RELEASES), release).glob("lib/python*/site-packages")
    lent = plain_packages(home / "lent", "torch", "pillow", *more)
    packages = [site_packages, lent]
    if more:
        (home / "dsvl").symlink_to(ROOT)
        packages = [home, *packages, ROOT / "tests"]
    done = run_plainly(ROOT / "tests" / script, *arguments, packages=packages, home=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    numbers = ("logits", "losses")
    for name in numbers:
        torch.testing.assert_close(torch.tensor(one[name]), torch.tensor(other[name]), atol=1e-5, rtol=1e-5)
    same = one.keys() - {*numbers, "transformers", "importable"}
    assert {name: one[name] for name in same} == {name: other[name] for name in same}


def test_the_bounds_are_the_tested_releases():
    bounds = re.search(r'"transformers>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    pinned = re.search(r"^transformers==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert bounds is not None and pinned is not None
    assert bounds[1] == OTHER_RELEASES[0] and bounds[1].startswith("{}.{}".format(*OLDEST_TESTED))
    assert bounds[2] == f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}"
    assert pinned[1].startswith("{}.{}.".format(*NEWEST_TESTED))


@needs_releases
@pytest.mark.parametrize("release", OTHER_RELEASES)
def test_a_checkpoint_composed_here_answers_there(release, tmp_path):
    """By remote code, with transformers, torch and Pillow alone."""
    checkpoint = make_checkpoint(tmp_path)
    there = run_in(release, "plain_answer.py", checkpoint, home=tmp_path / "home")
    assert there["transformers"] == release != transformers.__version__
    assert there["importable"] == []
    assert_same(there, plain_answer.answer(str(checkpoint)))


@needs_releases
@pytest.mark.parametrize("release", OTHER_RELEASES)
def test_a_checkpoint_composed_there_answers_here(release, tmp_path):
    """By the package there, by remote code here."""
    make_checkpoint(tmp_path)  # whose parts are used
    output = tmp_path / "there"
    arguments = (tmp_path / "tower", tmp_path / "llama", output)
    there = run_in(
        release, "composed_elsewhere.py", *arguments, home=tmp_path / "home", more=("accelerate", "tqdm", "jinja2", "pyyaml")
    )
    assert there["transformers"] == release and "dsvl" in there["importable"]
    lent = plain_packages(tmp_path / "lent", "torch", "pillow", "transformers", "tokenizers")
    here = run_plainly(ROOT / "tests" / "plain_answer.py", output, packages=[lent], home=tmp_path / "home")
    assert here.returncode == 0, here.stderr
    assert_same(there, json.loads(here.stdout))


@needs_releases
def test_what_the_oldest_release_cannot_do_right_is_refused_by_name(tmp_path):
    lent = ("accelerate", "tqdm", "jinja2", "pyyaml", "pytest")
    errors = run_in(OTHER_RELEASES[0], "refused_by_release.py", home=tmp_path / "home", more=lent)
    assert "attn_logit_softcapping in transformers below 5.21" in errors["softcapping"]
    assert errors["softcapping"] == errors["softcapping of texts"] == errors["softcapping, causal"]
    assert errors["training"].startswith("Training needs transformers 5.23 or newer, but 5.20 is installed")
    assert "prefill_chunk_size does not go with images in transformers below 5.23" in errors["chunks"]


def test_a_newer_release_is_warned_of(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformers_dsvl.warn_of_a_newer_release()
    monkeypatch.setattr(transformers_dsvl, "NEWEST_TESTED", (5, 1))
    with pytest.warns(UserWarning, match=rf"transformers {transformers.__version__} is newer than 5.1, the newest release"):
        transformers_dsvl.warn_of_a_newer_release()


@needs_releases
@pytest.mark.parametrize("release", OTHER_RELEASES)
def test_an_exported_model_answers_there(release, tmp_path):
    """As transformers' own LLaVA, with transformers, torch and Pillow alone."""
    model, processor = compose_for_export("siglip", "qwen3", vision_feature_layer=[-2, 0])
    exported = save_and_export(tmp_path, model, processor)
    there = run_in(release, "llava_answer.py", exported, home=tmp_path / "home")
    assert there["transformers"] == release and there["importable"] == []
    theirs, ours = there["models"][str(exported)], llava_answer.answers(model, processor)
    assert theirs["wrong weights"] == {}
    torch.testing.assert_close(torch.tensor(theirs["logits"]), torch.tensor(ours["logits"]), atol=1e-4, rtol=0)
    same = ("prompts", "input_ids", "generated", "alone")
    assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}
