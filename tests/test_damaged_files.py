"""Truncated, changed and other files: a ValueError that names them, or the right content."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_data import ReferenceCase, parts_of
from safetensors.torch import save_file

from dsvl import ImageKVCache
from dsvl.cli import main
from dsvl.evaluation.answer_file import AnswerFile
from dsvl.evaluation.answer_records import AnswerRecord, read_records
from dsvl.migration import migrate_checkpoint, migrate_qwen_tower
from dsvl.migration.read_weights import read_tensors, weight_files
from dsvl.training.checkpoints import MARKER, last_complete_checkpoint, mark_complete, why_incomplete


def damaged(whole: bytes, generator: random.Random) -> bytes:
    """Truncate a file, or change, drop or repeat some bytes."""
    kind = generator.randrange(4)
    position = generator.randrange(len(whole))
    if kind == 0:
        return whole[:position]
    if kind == 1:
        return whole[:position] + bytes([generator.randrange(256) for _ in range(8)]) + whole[position + 8 :]
    if kind == 2:
        return whole[:position] + whole[position + generator.randrange(1, 64) :]
    return whole[:position] + whole[max(0, position - 40) :]


# -- image KV caches ------------------------------------------------------------------------------------------------------


def a_cache() -> ImageKVCache:
    return ImageKVCache(torch.randn(2, 3, 5, 2, 4), torch.randn(2, 3, 5, 2, 4), "abc")


def test_a_damaged_image_cache_is_refused_or_right(tmp_path: Path) -> None:
    file, generator = tmp_path / "cache.safetensors", random.Random(0)
    a_cache().save(file)
    whole = file.read_bytes()
    refused = 0
    for _ in range(400):
        file.write_bytes(damaged(whole, generator))
        try:
            loaded = ImageKVCache.load(file)
        except ValueError as error:
            refused += str(file) in str(error)
        else:
            assert loaded.keys.shape == loaded.values.shape and loaded.keys.ndim == 4 and loaded.fingerprint
            assert sum(map(sum, loaded.tile_lengths)) == loaded.keys.shape[1] == 15
    assert refused > 200


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"keys": torch.ones(1)}, {"format": "dsvl_image_cache_1", "fingerprint": "a"}, "lacks its keys, its values"),
        ({n: torch.ones(1, 2, 3, 1, 2) for n in ("keys", "values")}, {"format": "dsvl_image_cache_1"}, "fingerprint"),
        ({n: torch.ones(2) for n in ("keys", "values")}, {"format": "dsvl_image_cache_1", "fingerprint": "a"}, "not two"),
        ({"keys": torch.ones(1, 2, 3, 1, 2), "values": torch.ones(1, 1, 3, 1, 2)}, None, "has the format None"),
        *(
            (
                {n: torch.ones(1, 6, 1, 2) for n in ("keys", "values")},
                {"format": "dsvl_image_cache_2", "fingerprint": "a", **lengths},
                "does not tell its images' tokens apart",
            )
            for lengths in ({}, {"tile_lengths": "[[3], [2]]"}, {"tile_lengths": "[[7, -1]]"}, {"tile_lengths": "[6]"})
        ),
    ],
)
def test_a_file_of_something_else_is_no_image_cache(tmp_path: Path, tensors: Any, metadata: Any, words: str) -> None:
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    with pytest.raises(ValueError, match=words):
        ImageKVCache.load(tmp_path / "other.safetensors")


# -- weights to migrate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bin", "legacy.bin", "safetensors"])
def test_damaged_weights_are_refused_or_tensors(tmp_path: Path, form: str) -> None:
    tensors = {"lang_embed.weight": torch.randn(4, 6), "b": torch.arange(9.0)}
    file, generator = tmp_path / f"model.{form}", random.Random(1)
    if form == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=form == "bin")
    whole = file.read_bytes()
    refused = 0
    for _ in range(200):
        file.write_bytes(damaged(whole, generator))
        try:
            found = dict(read_tensors([file]))
        except ValueError as error:
            refused += str(file) in str(error)
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
    assert refused > 80


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\udcff"])
def test_an_index_that_is_none_is_named(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.tensor(1.0), torch.ones(2, 2, 2)])
def test_an_embedding_table_of_other_dimensions_is_named(tmp_path: Path, tensor: torch.Tensor) -> None:
    vision, language = parts_of("B_baseline_mmca_on")
    torch.save({"lang_embed.weight": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lang_embed\.weight of shape"):
        migrate_checkpoint(tmp_path, vision, language, tmp_path / "out")


@pytest.mark.parametrize("config", ["[", "[]", '{"visual": []}', '{"visual": {"width": "wide"}}'])
def test_a_configuration_of_qwen_that_is_none_is_named(tmp_path: Path, config: str) -> None:
    weights = {
        name.removeprefix("vis_encoder."): tensor
        for name, tensor in ReferenceCase("E_qwen_mmca_on").weights.items()
        if name.startswith("vis_encoder.")
    }
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config\.json"):
        migrate_qwen_tower(tmp_path, tmp_path / "out")


# -- checkpoints of a training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", "[1]", "5", "null", '"a"', "{}", '{"w": "3"}', '{"w": {}}', "\udcff"])
def test_a_marker_that_is_none_makes_no_checkpoint(tmp_path: Path, content: str) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "w").write_text("abc")
        mark_complete(folder)
    assert why_incomplete(tmp_path / "checkpoint-4") is None
    (tmp_path / "checkpoint-4" / MARKER).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert why_incomplete(tmp_path / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


# -- answers ---------------------------------------------------------------------------------------------------------------

RECORD = AnswerRecord("a", 0, "What?", ["x.png"], "A dog.", ["a dog"], {"exact_match": 1.0}, "m")


def line(**changes: Any) -> str:
    return json.dumps(json.loads(RECORD.line()) | changes)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (line(answer="A cat."), "line 3 answers conversation 'a', turn 0, as line 1 does"),
        (RECORD.line(), "line 3 answers conversation 'a', turn 0, as line 1 does"),
        (line(turn=1, scores={"exact_match": float("nan")}), "line 3: the score 'exact_match' is nan"),
        (line(turn=1, scores={"exact_match": float("inf")}), "line 3: the score 'exact_match' is inf"),
        (line(turn=1, scores={"exact_match": "x"}), "line 3: the score 'exact_match' is 'x'"),
        (line(turn=1, scores={"exact_match": True}), "line 3: the score 'exact_match' is True"),
        (line(turn=1, scores=[1]), "line 3 is not an answer record: its scores are"),
        (line(id=5), "line 3 is not an answer record: its id is 5; expected a string"),
        (line(id=["a"]), "line 3 is not an answer record: its id is"),
        (line(id=None), "line 3 is not an answer record: its id is None"),
        (line(turn="1"), "line 3 is not an answer record: its turn is '1'"),
        (line(turn=-1), "line 3 is not an answer record: its turn is -1"),
        (line(turn=1.0), "line 3 is not an answer record: its turn is 1.0"),
        (line(turn=True), "line 3 is not an answer record: its turn is True"),
        (line(turn=1, images="x.png"), "line 3 is not an answer record: its images are"),
        (line(turn=1, references=[1]), "line 3 is not an answer record: its references are"),
        (line(turn=1, answer=None), "line 3 is not an answer record: its answer is None"),
        (line(turn=1, id="x" * 10_000, answer=5), "line 3 is not an answer record: its answer is 5"),
        ("[" * 100_000, "line 3 is not JSON"),
        ("\udcff", "line 3 is not JSON"),
        ("5", "line 3 is not an answer record"),
        (line(more=1), "line 3 is not an answer record"),
    ],
)
def test_answers_that_are_none_are_named_by_their_line(tmp_path: Path, capsys: Any, broken: str, words: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(f"{RECORD.line()}\n\n{broken}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as refused:
        read_records(path)
    assert words in str(refused.value) and str(path) in str(refused.value) and len(str(refused.value)) < 500
    assert main(["compare", str(path)]) == 1
    assert words in capsys.readouterr().err


def test_answers_to_what_is_not_asked_are_named(tmp_path: Path) -> None:
    header: dict[str, Any] = {"model": "m", "data": "d", "options": {}, "fingerprint": {"model": "1", "data": "2"}}
    path = tmp_path / "answers.jsonl"
    with contextlib.closing(AnswerFile(path, header)._file):
        pass
    path.write_text(f"{RECORD.line()}\n{line(turn=1)}\n{line(id='b')}\n")
    for rounds, words in (({"a": 2}, "line 3 answers conversation 'b'"), ({"a": 1, "b": 1}, "line 2 .* turn 1")):
        file = AnswerFile(path, header)
        with contextlib.closing(file._file), pytest.raises(ValueError, match=words):
            file.check_conversations(rounds)
    file = AnswerFile(path, header)
    file.check_conversations({"a": 2, "b": 1})
    file._file.close()


@pytest.mark.parametrize("summary", ["", "[]", "5", "{}", '{"options": 5}', '{"options": [1], "fingerprint": {}}'])
def test_a_summary_that_is_none_is_named(tmp_path: Path, summary: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(RECORD.line() + "\n")
    path.with_suffix(".summary.json").write_text(summary)
    header = {"model": "m", "data": "d", "options": {}, "fingerprint": {"model": "1", "data": "2"}}
    with pytest.raises(ValueError, match=r"answers\.summary\.json does not say of which run"):
        AnswerFile(path, header)
