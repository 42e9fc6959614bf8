"""What README.md shows runs as it is written, with tiny models under the names of the real ones."""

import re
from pathlib import Path

import pytest
from snippets import ROOT, Reader, snippets

import dsvl

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("servers", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "with servers"])
def test_every_example_runs_in_order(tmp_path, monkeypatch, photographs, servers):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("sys.stdin", None)
    reader = Reader(tmp_path, photographs, servers)
    for snippet in snippets("README.md"):
        assert not snippet.not_run
        reader.run(snippet)
    assert reader.names["answer"].shape[1] > reader.names["inputs"]["input_ids"].shape[1]
    untrained = dsvl.DSVLForConditionalGeneration.from_pretrained("my-model").model.multi_modal_projector
    trained = dsvl.DSVLForConditionalGeneration.from_pretrained("my-tuned-model").model.multi_modal_projector
    assert not trained.linear.weight.equal(untrained.linear.weight)


def test_it_is_short_and_its_links_exist():
    assert len(README.splitlines()) <= 160
    (quick_start,) = [snippet for snippet in snippets("README.md") if snippet.language == "python"]
    assert len(quick_start.text.splitlines()) <= 20
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("https://") or (Path(ROOT) / target).exists(), target
