"""Streaming: each epoch contains each sample once, for any number of processes and workers; runs can be resumed."""

import itertools
import json
import shutil

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import pixels
from torch.utils.data import DataLoader
from training_runs import furthest, losses, make_checkpoint, make_conversations, run, weights

from dsvl.data import complete_messages, load_conversations, streaming
from dsvl.data.streaming import Stream, StreamLoader, read_lines


@pytest.fixture
def numbered(tmp_path, monkeypatch):
    """A file of 200 numbered conversations in several shards."""
    monkeypatch.setattr(streaming, "MIN_SHARD_BYTES", 1000)
    path = tmp_path / "numbered.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": str(number)}, {"role": "assistant", "content": "." * (number % 50)}]}
        for number in range(200)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def numbers(stream, count, workers=0, batch_size=None):
    loader = StreamLoader(stream, workers, batch_size=batch_size, collate_fn=lambda one: one)
    batches = list(itertools.islice(loader, count))
    return [[int(one["messages"][0]["content"]) for one in ([b] if batch_size is None else b)] for b in batches]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_contains_every_sample_once(numbered, processes, workers):
    class Once(Stream):
        def __iter__(self):
            return self.epoch(0)

    seen = []
    for rank in range(processes):
        stream = Once(numbered, seed=1, rank=rank, processes=processes)
        read = list(itertools.chain(*numbers(stream, None, workers)))
        assert read == list(itertools.chain(*numbers(stream, None, workers)))  # deterministic
        seen += read
    assert sorted(seen) == list(range(200)) and seen != sorted(seen)


def test_each_epoch_has_another_order(numbered):
    read = list(itertools.chain(*numbers(Stream(numbered), 400)))
    assert sorted(read[:200]) == sorted(read[200:]) == list(range(200)) and read[:200] != read[200:]
    assert read[:200] != list(itertools.chain(*numbers(Stream(numbered, seed=1), 200)))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_resumes_after_the_batches_that_were_read(numbered, workers):
    whole = numbers(Stream(numbered), 60, workers, batch_size=4)
    for batches in (1, 2, 3, 52):
        stream = Stream(numbered)
        stream.start_after(batches, 4)
        rest = numbers(stream, 60 - batches, workers, batch_size=4)
        assert rest == whole[batches:]


def test_a_fast_worker_does_not_change_the_epoch_of_the_others(numbered, monkeypatch):
    expected = list(Stream(numbered).epoch(0))
    stream, set_epoch = Stream(numbered), datasets.IterableDataset.set_epoch

    def meanwhile(rows, epoch):
        set_epoch(rows, epoch)
        set_epoch(stream.rows, epoch + 1)  # as another worker does, which shares this object

    monkeypatch.setattr(datasets.IterableDataset, "set_epoch", meanwhile)
    assert list(stream.epoch(0)) == expected


@given(st.lists(st.text(max_size=9).map(lambda text: text.encode().replace(b"\n", b" ")), max_size=12), st.data())
def test_byte_ranges_of_a_file_contain_every_line_once(lines, data):
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(b"\n".join(lines))
        file.flush()
        size = file.tell()
        cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=4)))
        parts = [(file.name, *part) for part in itertools.pairwise([0, *cuts, size])]
        read = [row["line"].rstrip(b"\n") for part in parts for row in read_lines([part])]
        assert read == [line for line in lines if line.strip()]


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "directory"])
def test_tables_stream_the_same_samples_as_json_lines(tmp_path, kind):
    """Images inside a table, and as files."""
    lines = load_conversations(make_conversations(tmp_path, layout="ppp"))
    rows = []
    for sample in lines:
        parts = [part for m in sample["messages"] if isinstance(m["content"], list) for part in m["content"]]
        images = [part.pop("path") for part in parts if part["type"] == "image"]
        for message in sample["messages"]:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        rows.append({"messages": sample["messages"], "images": images})
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    source = tmp_path / ("table.parquet" if kind == "parquet" else "table")
    table.to_parquet(source) if kind == "parquet" else table.save_to_disk(source)
    streamed = list(itertools.islice(Stream(source), 3))
    by_text = {json.dumps([m for m in s["messages"] if m["role"] == "user"][0]["content"][-1]): s for s in streamed}
    for line in load_conversations(tmp_path / "data.jsonl"):
        sample = by_text[json.dumps(line["messages"][0]["content"][-1])]
        assert pixels(complete_messages(sample)[:1]) == pixels(complete_messages(line)[:1])
        assert sample["messages"][1]["content"] == [{"type": "text", "text": line["messages"][1]["content"]}]


def test_broken_samples_are_named_or_counted(tmp_path, caplog):
    path = make_conversations(tmp_path, layout="tpt")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"messages": [}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 4: is not JSON .*Or skip such"):
        list(itertools.islice(Stream(path), 5))
    path.write_bytes(whole + b'{"messages": [}\n{"messages": []}\n')
    stream = Stream(path, on_bad_sample="skip")
    assert len(list(itertools.islice(stream, 3))) == 3
    list(itertools.islice(DataLoader(stream, batch_size=None, num_workers=1, collate_fn=lambda one: one), 4))
    assert stream.skipped >= 2 and "data.jsonl, line 5: expected an object" in caplog.text
    path.write_bytes(b"{}\n")
    with pytest.raises(ValueError, match=r"holds no conversation to train on \(1 were skipped\)"):
        next(iter(Stream(path, on_bad_sample="skip")))
    with pytest.raises(FileNotFoundError, match="is not a file; pass a JSON lines file"):
        Stream(tmp_path / "absent.jsonl")
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"has the columns \['text'\]; expected messages"):
        Stream(tmp_path / "other.parquet")


# -- dsvl train --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes, packing", [(1, True), (2, False), (2, True)])
def test_a_streamed_run_resumes_to_the_bit(tmp_path, processes, packing):
    model, data = make_checkpoint(tmp_path), make_conversations(tmp_path)
    base = ["--model", model, "--data", data, "--streaming", "--max-steps", 6, "--save-steps", 3, "--logging-steps", 1]
    base += ["--per-device-train-batch-size", 1 + (processes == 1), "--gradient-accumulation-steps", 2]
    base += ["--learning-rate", "1e-2", "--dataloader-num-workers", 1, "--lora-rank", 2, "--lora-dropout", 0.5]
    base += ["--packing", "--max-length", 256, "--max-images-per-pack", 4] if packing else []
    run(*base, "--output", tmp_path / "one", processes=processes)
    assert len(losses(tmp_path / "one")) == 6
    shutil.copytree(tmp_path / "one/checkpoint-3", tmp_path / "two/checkpoint-3")
    assert "Resuming from" in run(*base, "--output", tmp_path / "two", processes=processes).stderr
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert furthest(weights(tmp_path / "two"), weights(tmp_path / "one")) == 0


def test_two_processes_train_on_all_samples_of_a_stream(tmp_path):
    """More processes than shards: each reads every other sample."""
    model, data = make_checkpoint(tmp_path), make_conversations(tmp_path, layout="pt" * 4)
    base = ["--model", model, "--data", data, "--streaming", "--max-steps", 4, "--logging-steps", 1, "--save-strategy", "no"]
    said = run(*base, "--per-device-train-batch-size", 1, "--output", tmp_path / "one", processes=2).stderr
    assert "Data: streamed." in said
    assert "| data.jsonl | streamed |" in (tmp_path / "one/README.md").read_text()
