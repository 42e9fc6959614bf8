"""Mixtures: the amount of each data set, concatenated conversations, and the evaluation split."""

import json
import logging
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training_runs import make_checkpoint

from dsvl.cli import main
from dsvl.data import complete_messages, load_conversations
from dsvl.data.messages import location_of
from dsvl.data.mixture import Mixture, Part, concatenated, load_mixture, split
from dsvl.training.arguments import parse
from dsvl.training.training_data import open_data


def write_set(folder, name, number, images=1, system=False):
    """Distinguishable conversations: the question names the data set and the number."""
    folder.mkdir(exist_ok=True)
    lines = []
    for index in range(number):
        paths = []
        for image in range(images):
            path = folder / f"{name}_{index}_{image}.png"
            Image.new("RGB", (4, 3), (index, image, 0)).save(path)
            paths.append(path.name)
        content = [{"type": "image"} for _ in paths] + [{"type": "text", "text": f"{name} {index}"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
        if system:
            messages.insert(0, {"role": "system", "content": "Be brief."})
        lines.append(json.dumps({"messages": messages, "images": paths}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder / f"{name}.jsonl"


def questions(data):
    """The questions of each conversation of a data set."""
    found = []
    for number in range(len(data)):
        users = [m for m in complete_messages(data[number]) if m["role"] == "user"]
        found.append([next(part["text"] for part in m["content"] if part["type"] == "text") for m in users])
    return found


def mixture(folder, *parts, seed=0, **options):
    return Mixture([(part, load_conversations(part.path)) for part in parts], seed, **options)


class Counted:
    """The methods of a data set that a mixture calls."""

    source, skipped = "counted", 0

    def __init__(self, counts, systems):
        self.counts, self.systems = counts, systems

    def __len__(self):
        return len(self.counts)

    def images(self, index):
        return self.counts[index]

    def has_system(self, index):
        return self.systems[index]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40),
    st.integers(1, 6),
    st.sampled_from([None, 3, 8]),
    st.integers(0, 5),
)
def test_concatenation_keeps_every_conversation_exactly_once(facts, together, max_images, seed):
    counts, systems = zip(*facts, strict=True)
    part = Part("x", concatenate=together)
    made = Mixture([(part, Counted(counts, systems))], seed, max_images).index
    indices = [index for _, group in made for index in group]
    assert sorted(indices) == list(range(len(counts)))
    for _, group in made:
        assert 1 <= len(group) <= together
        assert sum(counts[index] for index in group) <= (max_images or 1000)
        assert not any(systems[index] for index in group[1:])
    assert made == Mixture([(part, Counted(counts, systems))], seed, max_images).index


def test_group_sizes_are_random_and_depend_only_on_the_seed():
    data = Counted([1] * 600, [False] * 600)
    groups = [len(group) for _, group in Mixture([(Part("x", concatenate=3), data)], 0).index]
    shares = [groups.count(size) / len(groups) for size in (1, 2, 3)]
    assert all(0.25 < share < 0.42 for share in shares)
    assert Mixture([(Part("x", concatenate=3), data)], 1).index != Mixture([(Part("x", concatenate=3), data)], 0).index


def test_a_concatenated_conversation_has_its_images_numbered_through(tmp_path, processor):
    path = write_set(tmp_path, "a", 5)
    blend = mixture(tmp_path, Part(str(path), concatenate=5), seed=3)
    longest = max(range(len(blend)), key=blend.images)
    count = blend.images(longest)
    assert count > 1
    text = processor.apply_chat_template(blend[longest]["messages"], tokenize=False)
    assert [f"### Image {number}:" in text for number in range(1, count + 2)] == [True] * count + [False]
    # Each question follows its own image.
    for question, number in zip(questions(blend)[longest], range(1, count + 1), strict=True):
        assert f"### Image {number}:\n<image>\n\n### Question:\n{question}\n" in text
        message = blend[longest]["messages"][2 * number - 2]
        assert message["content"][0]["image"].endswith(f"{question.replace(' ', '_')}_0.png")


def test_samples_and_weights_select_the_amount_of_each(tmp_path):
    a, b = write_set(tmp_path, "a", 10, images=0), write_set(tmp_path, "b", 8, images=0)
    blend = mixture(tmp_path, Part(str(a), samples=4), Part(str(b), weight=2.5))
    asked = [question for (question,) in questions(blend)]
    of_a, of_b = ([q for q in asked if q.startswith(name)] for name in "ab")
    assert len(of_a) == len(set(of_a)) == 4
    assert sorted(of_b.count(f"b {number}") for number in range(8)) == [2, 2, 2, 2, 3, 3, 3, 3]


def test_a_conversation_with_too_many_images_is_skipped_and_counted(tmp_path, caplog):
    a, b = write_set(tmp_path, "a", 3, images=3), write_set(tmp_path, "b", 2)
    blend = mixture(tmp_path, Part(str(a)), Part(str(b)), max_images=2)
    assert len(blend) == 2 and blend.skipped == 3
    assert "a: skipped 3 conversations with more than 2 images." in caplog.text


def test_a_system_message_is_never_in_the_middle(tmp_path):
    (sample,) = load_conversations(write_set(tmp_path, "a", 1, system=True))
    with pytest.raises(ValueError, match="system message of its own cannot follow"):
        concatenated([sample, sample])


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_seed_chooses_the_evaluation_split(tmp_path, share):
    data = load_conversations(write_set(tmp_path, "a", 30, images=0))
    train, held_out = split(data, share)
    assert len(held_out) == 30 * share
    assert sorted(questions(train) + questions(held_out)) == sorted(questions(data))
    assert questions(split(data, share)[1]) == questions(held_out) != questions(split(data, share, seed=1)[1])
    with pytest.raises(ValueError, match="both parts need at least one"):
        split(data, 0.001)


# -- as files and flags ------------------------------------------------------------------------------------------------


def test_a_yaml_file_describes_a_mixture(tmp_path, monkeypatch):
    write_set(tmp_path / "sets", "a", 6)
    write_set(tmp_path / "sets", "b", 4)
    text = """
seed: 5
max_num_image_per_sample: 2
datasets:
  - {name: first, path: sets/a.jsonl, samples: 3}
  - {path: sets/b.jsonl, samples: all, concatenate: 4}
"""
    (tmp_path / "mix.yaml").write_text(text)
    monkeypatch.chdir("/")
    blend = load_mixture(tmp_path / "mix.yaml")
    asked = questions(blend)
    assert [part.name for part, _ in blend.parts] == ["first", "b"]
    assert sum(question[0].startswith("a") for question in asked) == 3
    assert sorted(q for group in asked for q in group if q.startswith("b")) == [f"b {number}" for number in range(4)]
    assert max(map(len, asked)) <= 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("datasets: [", "is not YAML"),
        ("data: []", "expected a list `datasets`"),
        ("datasets: [{path: a.jsonl, count: 3}]", r"datasets\[0\] is .*; expected path"),
        ("datasets: [{path: a.jsonl, samples: 3, weight: 2}]", "a has samples and a weight"),
        ("datasets: [{path: a.jsonl, samples: 0}]", "samples is 0"),
        ("datasets: [{path: a.jsonl, samples: 9}]", "a has 3 conversations, not the 9 asked for"),
        ("datasets: [{path: a.jsonl, weight: -1}]", "weight is -1"),
        ("datasets: [{path: a.jsonl, concatenate: true}]", "concatenate is True"),
        ("datasets: [{path: a.jsonl}, {path: a.jsonl}]", "a is the name of several"),
        ("max_num_image_per_sample: 0\ndatasets: [{path: a.jsonl}]", "max_num_image_per_sample is 0"),
        ("datasets: [{path: b.jsonl}]", "b.jsonl is not a file"),
        ("datasets: [{path: [1]}]", r"datasets\[0\]: path is \[1\]; expected a text"),
        ("datasets: [{path: 3}]", "path is 3; expected a text"),
        ("datasets: [{path: ''}]", "path is ''; expected a text"),
        ("datasets: [{path: a.jsonl, name: {a: 1}}]", "name is {'a': 1}; expected a text"),
        ("datasets: [{path: a.jsonl, weight: .inf}]", "weight is inf; expected a number above 0, and at most 1,000"),
        ("datasets: [{path: a.jsonl, weight: .nan}]", "weight is nan; expected"),
        ("datasets: [{path: a.jsonl, weight: 1.0e+300}]", r"weight is 1e\+300; expected"),
        ("datasets: [{path: a.jsonl, weight: x}]", "weight is x; expected"),
        ("seed: [1]\ndatasets: [{path: a.jsonl}]", r"seed is \[1\]; expected a whole number"),
        ("datasets: [{path: a.jsonl, since: 2024-13-45}]", "is not YAML: month must be in 1..12"),
        ("datasets: " + "[" * 5000, "is not YAML"),
        ("datasets: [{path: a.jsonl, samples: " + "x" * 5000 + "}]", "samples is x+"),
    ],
)
def test_a_broken_description_is_an_error(tmp_path, text, reason):
    write_set(tmp_path, "a", 3, images=0)
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as error:
        load_mixture(tmp_path / "mix.yaml")
    assert len(str(error.value)) < 700


def test_a_description_in_another_encoding_is_an_error(tmp_path):
    (tmp_path / "mix.yaml").write_bytes("datasets: [{path: é.jsonl}]".encode("latin-1"))
    with pytest.raises(ValueError, match=r"mix\.yaml is not a text in UTF-8"):
        load_mixture(tmp_path / "mix.yaml")


def test_samples_of_a_mixture_know_where_they_are_from(tmp_path):
    path = write_set(tmp_path, "a", 2, images=0)
    blend = mixture(tmp_path, Part(str(path), concatenate=2), seed=2)
    found = {location_of(blend[index]) for index in range(len(blend))}
    single = {f"{path}, line {number}" for number in (1, 2)}
    assert found == single or all(one in " ".join(found) for one in single)
    sample = load_conversations(path)[0]
    assert location_of(concatenated([sample, sample])) == f"{path}, line 1; {path}, line 1"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--dataset-samples 3", "--dataset-samples without --dataset-names"),
        ("--dataset-names a b --dataset-samples 3 4 5", "has 3 values for 2 names; pass one for each, or one for all."),
        ("--dataset-names a --dataset-samples some", "--dataset-samples some: expected a number"),
        ("--max-num-image-per-sample 3", "needs --dataset-names"),
        ("--eval-share 2", "--eval-share 2.0: expected a number between 0 and 1"),
        ("--packing", "--packing needs the length of a pack"),
        ("--max-images-per-pack 3", "--max-images-per-pack without --packing"),
        ("--streaming", "--streaming never ends; pass --max-steps"),
        ("--streaming --max-steps 2 --dataset-names a", "--streaming reads one data set, not a mixture"),
        ("--streaming --max-steps 2 --data mix.yaml", "--streaming reads one data set, not a mixture"),
        ("--streaming --max-steps 2 --eval-share 0.1", "--eval-share with --streaming: a stream cannot be split"),
        (
            "--streaming --max-steps 2 --cache-image-features c",
            "--cache-image-features with --streaming: a stream does not know its images",
        ),
        ("--cache-image-features c --train vision", "--cache-image-features with a trained vision tower"),
        ("--cache-image-features c --lora-rank 4 --lora-vision", "--cache-image-features with a trained vision tower"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, capsys, flags, reason):
    argv = ["train", "--model", "m", "--data", "d", "--output", str(tmp_path / "o"), *flags.split()]
    assert main(argv) == 1
    assert reason in capsys.readouterr().err


def test_a_blend_by_deepspeed_visualchats_flags_is_trained_and_evaluated(tmp_path, caplog):
    make_checkpoint(tmp_path)
    random.seed(0)
    write_set(tmp_path / "sets", "a", 12)
    write_set(tmp_path / "sets", "b", 9)
    argv = ["train", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "sets"), "--output", str(tmp_path / "out")]
    argv += ["--dataset-names", "a", "b", "--dataset-samples", "8", "all", "--dataset-concatenate-samples", "1", "3"]
    argv += [
        "--max-num-image-per-sample",
        "2",
        "--eval-share",
        "0.25",
        "--max-steps",
        "2",
        "--logging-steps",
        "1",
        "--report-to",
        "none",
    ]
    with caplog.at_level(logging.INFO, logger="dsvl"):
        assert main(argv) == 0
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in history)
    assert "a: 8 conversations in 8." in caplog.text


@pytest.mark.parametrize(("flags", "total"), [("--dataset-samples 2", 4), ("--dataset-samples 2 1", 3), ("", 7)])
def test_one_number_of_samples_is_that_of_every_name(tmp_path, flags, total):
    """As in DeepSpeed-VisualChat."""
    write_set(tmp_path, "a", 3, images=0)
    write_set(tmp_path, "b", 4, images=0)
    names = ["--data", str(tmp_path), "--dataset-names", "a", "b", *flags.split()]
    three = parse(["--model", str(tmp_path), "--output", str(tmp_path / "o"), "--use-cpu", *names])
    assert len(open_data(three[1], seed=0)[0]) == total


def test_one_number_to_concatenate_is_that_of_every_name(tmp_path):
    write_set(tmp_path, "a", 4, images=0)
    write_set(tmp_path, "b", 6, images=0)
    sizes = []
    for numbers in (["1"], ["2"], ["2", "2"]):
        names = ["--data", str(tmp_path), "--dataset-names", "a", "b", "--dataset-concatenate-samples", *numbers]
        three = parse(["--model", str(tmp_path), "--output", str(tmp_path / "o"), "--use-cpu", *names])
        sizes.append(len(open_data(three[1], seed=0)[0]))
    assert sizes[0] == 10 and sizes[1] == sizes[2] < 10
