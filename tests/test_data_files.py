"""Random data files of each format: a clear error, or every record is a sample or counted."""

import csv
import gzip
import io
import json
import tarfile
import tempfile
from pathlib import Path

import datasets
import pytest
from conftest import PER_IMAGE, REFERENCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

from dsvl import DSVLProcessor
from dsvl.data import load_conversations
from dsvl.data.mixture import load_mixture
from dsvl.data.sample_errors import BadSample
from dsvl.data.streaming import Stream
from dsvl.training import ConversationCollator

datasets.disable_progress_bars()
FEW: dict = dict(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
MANY = FEW | {"max_examples": 500}


def mostly(good, odd=None, often=20):
    """A strategy that draws valid values most of the time."""
    return st.integers(0, often).flatmap(lambda number: (ODD if odd is None else odd) if number == often else good)


TEXTS = mostly(
    st.sampled_from(["What?", "A cup.", "é鳥", "</s>"]),
    st.sampled_from(["<image>", "<image>\nWhat?", "", " ", "\ud83d", "a\n\n\x00b", "y" * 300]),
    6,
)
PNG = io.BytesIO()
Image.new("RGB", (8, 6), "red").save(PNG, "PNG")
PATHS = mostly(
    st.sampled_from(["red.png", "./red.png"]), st.sampled_from(["gone.png", "broken.png", "", "\x00", "x" * 5000]), 6
)
ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 10**20), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXTS, inner, max_size=2)),
    max_leaves=4,
)
SOURCES = mostly(
    st.one_of(PATHS, st.fixed_dictionaries({"path": PATHS, "bytes": st.none()})),
    st.sampled_from(
        ["http://127.0.0.1:1/a.png", "file:///gone.png", "data:image/png;base64,aGFsbG8=", "data:,x", "s3://a/b"]
    ),
    6,
)


def with_odd_keys(strategy):
    names = ["image", "images", "weight", "name", "tool_calls", "id", "system", "text", "origin", "type", "url"]
    extra = st.dictionaries(st.sampled_from(names), ODD, max_size=1)
    return mostly(strategy, st.tuples(strategy, extra).map(lambda pair: pair[0] | pair[1]), often=12)


PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": mostly(TEXTS)}),
    st.fixed_dictionaries({"type": st.just("image")}, optional={"path": mostly(SOURCES)}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": mostly(st.fixed_dictionaries({"url": SOURCES}))}),
)
CONTENTS = st.one_of(TEXTS, st.lists(with_odd_keys(PARTS), max_size=3))
TURNS = st.tuples(
    with_odd_keys(st.fixed_dictionaries({"role": mostly(st.just("user")), "content": mostly(CONTENTS)})),
    with_odd_keys(st.fixed_dictionaries({"role": mostly(st.just("assistant")), "content": mostly(TEXTS)})),
)
MESSAGES = st.lists(TURNS, min_size=1, max_size=2).map(lambda turns: [message for turn in turns for message in turn])
IMAGES = {"images": mostly(st.lists(mostly(SOURCES), max_size=2))}
SHAREGPT = st.lists(
    st.tuples(
        with_odd_keys(st.fixed_dictionaries({"from": mostly(st.just("human")), "value": mostly(TEXTS)})),
        with_odd_keys(st.fixed_dictionaries({"from": mostly(st.just("gpt")), "value": mostly(TEXTS)})),
    ),
    min_size=1,
    max_size=2,
).map(lambda turns: [turn for pair in turns for turn in pair])
RECORDS = {
    "messages": with_odd_keys(st.fixed_dictionaries({"messages": mostly(MESSAGES)}, optional=IMAGES)),
    "conversations": with_odd_keys(
        st.fixed_dictionaries({"conversations": mostly(SHAREGPT)}, optional=IMAGES | {"image": mostly(SOURCES)})
    ),
    "question": with_odd_keys(
        st.fixed_dictionaries({"question": mostly(TEXTS), "answer": mostly(TEXTS)}, optional={"image": mostly(SOURCES)})
    ),
    "text": with_odd_keys(st.fixed_dictionaries({"text": mostly(TEXTS), "image": mostly(SOURCES)})),
}
RECORD = st.sampled_from(sorted(RECORDS)).flatmap(RECORDS.__getitem__)


@pytest.fixture(scope="module")
def processor():
    image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return DSVLProcessor(image_processor, AutoTokenizer.from_pretrained(REFERENCE / "tokenizer"), image_seq_length=PER_IMAGE)


def lines(records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def as_csv(records):
    file = io.StringIO(newline="")
    columns = sorted({str(key) for record in records for key in record})
    rows = [[str(record.get(column, "")) for column in columns] for record in records]
    csv.writer(file).writerows([columns, *rows])
    return file.getvalue().encode(errors="replace")


def as_tar(records):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, record in enumerate(records):
            files = {"png": PNG.getvalue(), "json": json.dumps(record).encode()}
            files |= {"txt": b"A cup."} if number % 2 else {}
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


FORMS = {
    "data.jsonl": lines,
    "data.ndjson": lines,
    "data.json": lambda records: json.dumps(records, indent=1).encode(),
    "data.jsonl.gz": lambda records: gzip.compress(lines(records), mtime=0),
    "data.csv": as_csv,
    "data.tar": as_tar,
    "metadata.jsonl": lambda records: lines(
        [{"file_name": "red.png"} | {k: v for k, v in one.items() if not k.startswith("image")} for one in records]
    ),
}
DAMAGE = st.one_of(st.none(), st.none(), st.none(), st.tuples(st.sampled_from(["cut", "flip"]), st.floats(0, 1)))


def damaged(content, damage):
    if damage is None or not content:
        return content
    position = int(damage[1] * (len(content) - 1))
    return (
        content[:position]
        if damage[0] == "cut"
        else content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]
    )


def check(source, processor):
    """Load a file as map-style data set and as stream, and make batches; returns whether a sample was good."""
    try:
        load_conversations(source, allow_urls=False)
    except ValueError as error:
        assert len(str(error)) < 1000 and str(source.parent) in str(error), error
        if isinstance(error, BadSample):
            assert error.location.startswith(str(source.parent)) and "--on-bad-sample skip" in str(error)
        else:
            assert "--on-bad-sample" not in str(error)
    try:
        data = load_conversations(source, "skip", allow_urls=False, max_bad_samples=1)
    except ValueError:
        return False
    assert len(data) + data.skipped == len(data.records)
    for index in range(len(data)):
        collator = ConversationCollator(processor, on_bad_sample="skip", max_bad_samples=1)
        batch = collator([data[index]])
        if collator.counts[1] == 0:
            assert len(batch.get("pixel_values", ())) == data.images(index)
            assert (batch["labels"] != -100).any()
    streamed = Stream(source, "skip", allow_urls=False, max_bad_samples=1)
    assert sorted(map(repr, streamed.epoch(0))) == sorted(map(repr, data))
    return True


def check_form(name, records, damage, processor):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "red.png").write_bytes(PNG.getvalue())
        (Path(folder) / "broken.png").write_bytes(PNG.getvalue()[:40])
        path = Path(folder) / name
        path.write_bytes(damaged(FORMS[name](records), damage))
        return check(path.parent if name == "metadata.jsonl" else path, processor)


def run(options, check, *strategies):
    """Run a check, and require that enough files contained good samples."""
    found = []

    @settings(**options)
    @given(st.tuples(*strategies))
    def all_of_them(drawn):
        found.append(check(*drawn))

    all_of_them()
    assert len(found) > 20 and sum(found) > 0.1 * len(found)


@pytest.mark.parametrize("name", FORMS)
def test_random_files(name, processor):
    run(FEW, lambda records, damage: check_form(name, records, damage, processor), st.lists(RECORD, max_size=4), DAMAGE)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_many_random_files(name, processor):
    run(MANY, lambda records, damage: check_form(name, records, damage, processor), st.lists(RECORD, max_size=4), DAMAGE)


# Arrow has one type per column, so only the values vary.
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.tuples(
                    st.fixed_dictionaries({"role": mostly(st.just("user"), TEXTS), "content": TEXTS}),
                    st.fixed_dictionaries(
                        {"role": st.just("assistant"), "content": TEXTS, "name": mostly(st.none(), TEXTS)}
                    ),
                ),
                min_size=1,
                max_size=2,
            ).map(lambda turns: [{"name": None} | message for turn in turns for message in turn]),
            "images": mostly(st.just([]), st.lists(st.one_of(PATHS, st.none()), max_size=2), 3),
            "image": mostly(PATHS, st.none(), 3),
        }
    ),
    min_size=1,
    max_size=4,
)


def check_parquet(rows, damage, processor):
    def storable(value):
        if isinstance(value, dict):
            return {key: storable(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [storable(inner) for inner in value]
        return value.encode(errors="replace").decode() if isinstance(value, str) else value

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "red.png").write_bytes(PNG.getvalue())
        path = Path(folder) / "data.parquet"
        datasets.Dataset.from_list([storable(row) for row in rows]).to_parquet(path)
        path.write_bytes(damaged(path.read_bytes(), damage))
        return check(path, processor)


@pytest.fixture
def no_waiting(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.02)  # of 5 seconds for each file
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_random_parquet_files(processor, no_waiting):
    run(FEW | {"max_examples": 30}, lambda rows, damage: check_parquet(rows, damage, processor), ROWS, DAMAGE)


@pytest.mark.slow
def test_many_random_parquet_files(processor, no_waiting):
    run(MANY, lambda rows, damage: check_parquet(rows, damage, processor), ROWS, DAMAGE)


MIXTURES = st.fixed_dictionaries(
    {
        "datasets": mostly(
            st.lists(
                mostly(
                    st.fixed_dictionaries(
                        {"path": mostly(st.just("data.jsonl"))},
                        optional={
                            "name": mostly(TEXTS),
                            "samples": mostly(st.sampled_from([1, "all"])),
                            "weight": mostly(st.floats(0.1, 3)),
                            "concatenate": mostly(st.integers(1, 3)),
                            "more": ODD,
                        },
                    )
                ),
                min_size=1,
                max_size=2,
            )
        )
    },
    optional={"seed": mostly(st.integers(0, 5)), "max_num_image_per_sample": mostly(st.integers(1, 3))},
)


def check_mixture(content, damage):
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        sample = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
        (Path(folder) / "data.jsonl").write_bytes(lines([sample] * 3))
        path = Path(folder) / "mix.yaml"
        path.write_bytes(damaged(yaml.safe_dump(content, allow_unicode=True).encode(errors="replace"), damage))
        try:
            blend = load_mixture(path)
        except (ValueError, FileNotFoundError) as error:
            assert len(str(error)) < 1000
            return False
        assert len(blend) > 0 and blend[len(blend) - 1]["messages"]
        return True


@pytest.fixture
def no_hub(monkeypatch):
    def nothing(*args, **kwargs):
        raise FileNotFoundError("there is no such data set on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", nothing)
    return monkeypatch


def test_random_mixtures(no_hub):
    run(FEW, check_mixture, MIXTURES, DAMAGE)


@pytest.mark.slow
def test_many_random_mixtures(no_hub):
    run(MANY, check_mixture, MIXTURES, DAMAGE)
