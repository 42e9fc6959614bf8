"""Packing: each conversation is in one pack, attends only to itself, and training equals training without packing."""

import functools
import itertools
import json
import random

import pytest
import torch
from conftest import FAMILIES, rows, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_attention import backends, close, packed
from torch.utils.data import DataLoader
from training_runs import make_checkpoint, make_conversations, run, take_back, weights
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from dsvl.data import complete_messages, load_conversations
from dsvl.data.messages import images_of
from dsvl.data.packing import PackedConversations, pack, pack_stream
from dsvl.data.streaming import Stream
from dsvl.training import ConversationCollator

ITEMS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=60)


@given(ITEMS, st.sampled_from([None, 3, 5]), st.integers(1, 9))
def test_every_item_is_in_exactly_one_pack_within_its_bounds(items, max_tiles, pool):
    stream = [(number, *item) for number, item in enumerate(items)]
    packs = list(pack(stream, 40, max_tiles, pool))
    assert sorted(itertools.chain(*(one.items for one in packs))) == list(range(len(items)))
    for one in packs:
        assert one.tokens == sum(items[number][0] for number in one.items) <= 40
        assert one.tiles == sum(items[number][1] for number in one.items) <= (max_tiles or 1000)
    assert packs == list(pack(iter(stream), 40, max_tiles, pool))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9))
def test_the_pack_of_the_largest_item_is_filled_optimally(sizes):
    (first, *_) = pack([(number, size, 0) for number, size in enumerate(sizes)], 16)
    largest = max(range(len(sizes)), key=lambda number: sizes[number])
    others = sizes[:largest] + sizes[largest + 1 :]
    sums = [sum(chosen) for count in range(len(sizes)) for chosen in itertools.combinations(others, count)]
    assert first.tokens == max(total + sizes[largest] for total in sums if total + sizes[largest] <= 16)


def test_an_item_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="41 tokens and 1 tiles does not fit into a pack of 40 tokens; raise"):
        list(pack([("a", 41, 1)], 40))
    with pytest.raises(ValueError, match="4 tiles does not fit into a pack of 40 tokens and 3 tiles"):
        list(pack([("a", 1, 4)], 40, 3))


def like_llava(number: int) -> list[int]:
    """Lengths as of LLaVA-Instruct: an image of 257 tokens, a system sentence, and short, middle and long answers."""
    rng = random.Random(0)
    kinds = [((0.15, 0.50, 0.35), (130, 250, 320), (40, 60, 140))]
    ((shares, means, widths),) = kinds
    drawn = [rng.choices(range(3), shares)[0] for _ in range(number)]
    return [257 + 60 + max(20, int(rng.gauss(means[kind], widths[kind]))) for kind in drawn]


@pytest.mark.parametrize("max_tokens", [2048, 4096, 8192])
@pytest.mark.parametrize("max_tiles", [None, 16])
def test_packs_are_filled_on_lengths_like_llavas(max_tokens, max_tiles):
    packs = list(pack([(n, length, 1) for n, length in enumerate(like_llava(4000))], max_tokens, max_tiles))
    assert sum(one.tokens for one in packs) / (max_tokens * len(packs)) > (0.99 if max_tokens > 2048 else 0.95)


def test_packs_are_filled_on_the_demos_conversations(tmp_path):
    from dsvl.demo.training import TrainingConversations

    collator = ConversationCollator(AutoProcessor.from_pretrained(make_checkpoint(tmp_path)))
    lessons = TrainingConversations(0, 400)
    lengths = [collator.processor.count_tokens(complete_messages(lessons[number])) for number in range(len(lessons))]
    packs = list(pack([(number, length, 0) for number, length in enumerate(lengths)], 4096))
    assert (
        sum(one.tokens for one in packs[:-1]) / (4096 * (len(packs) - 1)) > 0.99
    )  # the last pack holds the remaining items


# -- isolation -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    make_checkpoint(folder)
    # An image at the very start follows from the template; texts alone between, before and after conversations with some.
    make_conversations(folder, layout="tpptptt" + "ppt" * 5)
    return folder


@functools.lru_cache
def loaded(folder, attention, backend, positions="token"):
    # transformers' eager attention gives NaN where padding meets float64: finfo.min is -inf in its float32 softmax.
    dtype = torch.float32 if backend == "eager" else torch.float64
    config = AutoConfig.from_pretrained(folder / "model", multimodal_attention=attention, image_positions=positions)
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", config=config, dtype=dtype)
    model.set_attn_implementation({"text_config": backend})
    assert model.config.multimodal_attention == attention
    return model


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("packs", [[7], [3, 4], [1, 5, 1], [2, 2, 3]])
def test_loss_and_gradients_are_those_of_the_conversations_apart(folder, positions, attention, backend, packs):
    model = loaded(folder, attention, backend, positions).train()
    samples = [load_conversations(folder / "data.jsonl")[number] for number in range(7)]
    collator = ConversationCollator(AutoProcessor.from_pretrained(folder / "model"))
    ends = list(itertools.accumulate(packs))
    batch = collator([samples[end - size : end] for end, size in zip(ends, packs, strict=True)])
    assert batch["input_ids"].shape[0] == len(packs) and batch["input_ids"].shape[1] % 8 == 0
    items = (batch["labels"] != -100).sum()
    together = model(**batch, num_items_in_batch=items).loss
    together.backward()
    from_packs = gradients(model)
    apart = 0
    for sample in samples:
        loss = model(**collator([sample]), num_items_in_batch=items).loss
        loss.backward()
        apart += loss.item()
    tolerance = 1e-5 if backend == "eager" else 1e-6  # transformers takes the loss in float32
    assert together.item() == pytest.approx(apart, abs=tolerance)
    expected = gradients(model)
    assert from_packs.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(from_packs[name], gradient, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize(("family", "backend"), [(family, backend) for family in FAMILIES for backend in backends(family)])
@pytest.mark.parametrize("layouts", [("ttttt", "tttttttt"), ("Itt", "I", "ttI")])
def test_conversations_are_isolated_also_without_use_cache_false(family, backend, attention, layouts, uncompiled):
    model = tiny_model(family, attention, backend)
    inputs, lengths = packed(*layouts)
    inputs = {key: value for key, value in inputs.items() if key != "pixel_values" or len(value)}
    with torch.no_grad():
        together = model(**inputs).logits[0].split(lengths)
        first = 0
        for row, layout, logits in zip(rows(*layouts), layouts, together, strict=True):
            count = layout.count("I")
            pixels = {"pixel_values": inputs["pixel_values"][first : first + count]} if count else {}
            first += count
            torch.testing.assert_close(logits, model(input_ids=torch.tensor([row]), **pixels).logits[0], **close(backend))


def test_labels_and_tokens_of_a_pack_are_those_of_its_conversations(folder):
    samples = [load_conversations(folder / "data.jsonl")[number] for number in range(5)]
    collator = ConversationCollator(AutoProcessor.from_pretrained(folder / "model"))
    batch, documents = collator([samples[:2], samples[2:]]), set()
    for row, own in enumerate((samples[:2], samples[2:])):
        start = 0
        for sample in own:
            alone = collator([sample])
            real = alone["attention_mask"][0].bool()
            length = int(real.sum())
            for key in ("input_ids", "labels", "mm_token_type_ids"):
                assert torch.equal(batch[key][row, start : start + length], alone[key][0, real]), key
            document = batch["document_ids"][row, start : start + length].unique().tolist()
            assert len(document) == 1 and document[0] not in documents  # also not the padding's
            documents.add(document[0])
            start += length
        assert (batch["labels"][row, start:] == -100).all() and (batch["document_ids"][row, start:] == 0).all()
    alone = [collator([sample]).get("pixel_values") for sample in samples]
    assert torch.equal(batch["pixel_values"], torch.cat([pixels for pixels in alone if pixels is not None]))


# -- data sets of packs ------------------------------------------------------------------------------------------------


def test_a_stream_is_packed_once_by_all_workers_of_all_processes(tmp_path):
    path = tmp_path / "numbered.jsonl"
    talks = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": "."}] for n in range(200)]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")

    def number(sample):
        return int(sample["messages"][0]["content"])

    def shares(processes, workers):
        read = []
        for rank in range(processes):
            stream = Stream(path, rank=rank, processes=processes)
            stream.arrange = functools.partial(
                pack_stream,
                size=lambda sample: (5 + number(sample) % 7, 0),
                max_tokens=32,
                max_tiles=4,
                bad=stream.bad,
            )
            loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=lambda one: one)
            read.append([[number(sample) for sample in one] for one in itertools.islice(loader, 60)])
        return read

    for processes, workers in ((1, 0), (1, 1), (2, 0), (2, 1)):
        read = shares(processes, workers)
        first = [list(itertools.chain(*share))[: 200 // processes - 64] for share in read]  # the first epoch
        assert len(set(itertools.chain(*first))) == sum(map(len, first))
        assert all(sum(5 + n % 7 for n in one) <= 32 for share in read for one in share)
        assert read == shares(processes, workers)


def test_conversations_that_cannot_be_packed_are_errors_or_counted(folder, caplog):
    data = load_conversations(folder / "data.jsonl")

    def size(sample):
        if len(sample["messages"]) > 4:
            raise ValueError("too long.")
        return 10, len(images_of(complete_messages(sample)))

    with pytest.raises(ValueError, match="too long.*Or skip such conversations"):
        PackedConversations(data, size, 40)
    packs = PackedConversations(data, size, 40, max_tiles=1, on_bad_sample="skip", max_bad_samples=1)
    good = [n for n in range(len(data)) if len(data[n]["messages"]) <= 4 and data.images(n) <= 1]
    assert packs.skipped == len(data) - len(good) > 0
    assert sorted(itertools.chain(*packs.packs)) == good
    assert f"{packs.skipped} conversations cannot be packed" in caplog.text


# -- dsvl train --------------------------------------------------------------------------------------------------------


def test_a_run_over_packs_resumes_to_the_bit_and_is_the_same_in_two_processes(folder, tmp_path):
    base = ["--model", folder / "model", "--data", folder / "data.jsonl", "--packing", "--max-length", 512]
    base += ["--max-images-per-pack", 4, "--max-steps", 4, "--save-steps", 2, "--logging-steps", 1]
    base += ["--learning-rate", "1e-2"]
    first = run(*base, "--output", tmp_path / "one", "--per-device-train-batch-size", 2)
    assert "packs" in first.stderr and "filled to" in first.stderr
    whole = weights(tmp_path / "one")
    take_back(tmp_path / "one")
    assert "Resuming from" in run(*base, "--output", tmp_path / "one", "--per-device-train-batch-size", 2).stderr
    resumed = weights(tmp_path / "one")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    run(*base, "--output", tmp_path / "two", "--per-device-train-batch-size", 1, processes=2)
    history = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two")]
    one, two = ([entry["loss"] for entry in entries if "loss" in entry] for entries in history)
    assert two == pytest.approx(one, abs=1e-4)
