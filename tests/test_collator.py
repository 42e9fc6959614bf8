"""Contents and labels of batches, and conversations that do not fit or are broken."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import PER_IMAGE, REFERENCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from training_runs import make_checkpoint
from transformers import AutoTokenizer

from dsvl import DSVLForConditionalGeneration
from dsvl.data import complete_messages
from dsvl.data.sample_errors import NAMED
from dsvl.training.collator import ConversationCollator

EOS = "</s>"


def user(*parts):
    """A user message of texts, images and paths of images."""

    def part(value):
        if isinstance(value, str):
            return {"type": "text", "text": value}
        return {"type": "image"} | ({"path": str(value)} if isinstance(value, Path) else {"image": value})

    return {"role": "user", "content": [part(value) for value in parts]}


def assistant(text):
    return {"role": "assistant", "content": text}


def supervised(batch, row=0):
    """The texts of the spans with labels, in order; every label must equal its token."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "tokenizer")
    ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
    spans, previous = [], -100
    for token, label in zip(ids, labels, strict=True):
        if label != -100:
            assert label == token
            if previous == -100:
                spans.append([])
            spans[-1].append(label)
        previous = label
    return [tokenizer.decode(span) for span in spans]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(one[key].equal(other[key]) for key in one)


@pytest.fixture
def collator(processor):
    return ConversationCollator(processor)


@pytest.fixture
def turns(photographs):
    """Three turns; the second has two images."""
    return [
        user(photographs[0], "What is red?"),
        assistant("One cup."),
        user(photographs[1], "Is ", photographs[2], " blue?"),
        assistant("Two are blue."),
        user("And green?"),
        assistant("No."),
    ]


def damaged(folder, name="damaged.png"):
    path = folder / name
    path.write_text("not an image")
    return path


# -- labels ------------------------------------------------------------------------------------------------------------


def test_only_the_answers_and_their_ends_have_labels(collator, turns):
    batch = collator([{"messages": turns}, [user("Hello?"), assistant("A cat")]])
    assert supervised(batch, 0) == ["One cup." + EOS, "Two are blue." + EOS, "No." + EOS]
    assert supervised(batch, 1) == ["A cat" + EOS]
    assert batch["labels"].dtype == torch.int64
    assert (batch["labels"][batch["mm_token_type_ids"] == 1] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_consecutive_answers_all_have_labels(collator):
    batch = collator([[user("One"), user("Two?"), assistant("red"), assistant("blue"), user("?"), assistant("cat")]])
    assert supervised(batch) == ["red" + EOS, "blue" + EOS, "cat" + EOS]


def test_an_answer_in_parts_equals_one_text(collator):
    parts = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}, {"type": "text", "text": " and a dog"}]}
    assert_equal(collator([[user("?"), parts]]), collator([[user("?"), assistant("a cat and a dog")]]))


def test_typed_special_tokens_are_text(collator, processor, photographs):
    """Typed by a user, they end no answer, start no image and have no labels."""
    typed = f"What does {EOS} mean, <image> or <pad>?"
    batch = collator([[user(photographs[0], typed), assistant(f"An <image> is no {EOS}, but")]])
    ids = batch["input_ids"][0]
    ends = ids == processor.tokenizer.eos_token_id
    assert ends.sum() == 1 and batch["labels"][0][ends] == processor.tokenizer.eos_token_id
    assert (ids == processor.image_token_id).sum() == batch["mm_token_type_ids"].sum() == PER_IMAGE
    assert len(batch["pixel_values"]) == 1
    assert supervised(batch) == [f"An <image> is no {EOS}, but{EOS}"]
    assert typed in processor.decode(ids)


TALK = st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12), st.booleans()), min_size=1, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(TALK)
def test_exactly_the_assistants_tokens_have_labels(collator, processor, photographs, talk):
    """For any text, the tokens with labels are those of the answers, up to their ends."""
    messages = []
    for question, answer, with_image in talk:
        messages += [user(photographs[0], question) if with_image else user(question), assistant(answer)]
    (ids,), (labels,) = (collator([messages])[key].numpy() for key in ("input_ids", "labels"))
    labelled = labels != -100
    assert (labels[labelled] == ids[labelled]).all()
    assert (ids[labelled] == processor.tokenizer.eos_token_id).sum() == len(talk)
    # Changing an answer changes tokens with labels only.
    others = [m if m["role"] == "user" else assistant("dog") for m in messages]
    (other_ids,), (other_labels,) = (collator([others])[key].numpy() for key in ("input_ids", "labels"))
    kept = (ids != processor.tokenizer.pad_token_id) & ~labelled
    other_kept = (other_ids != processor.tokenizer.pad_token_id) & (other_labels == -100)
    assert ids[kept].tolist() == other_ids[other_kept].tolist()


# -- the batch ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_to_a_multiple_of_eight(collator, processor, turns):
    widths = set()
    for extra in range(12):
        text = [user("red " * extra + "?"), assistant("b")]
        batch = collator([text, turns[4:]])
        tokens, longest = batch["input_ids"].shape[1], batch["attention_mask"].sum(1).max()
        assert tokens % 8 == 0 and tokens - longest < 8
        assert batch["attention_mask"].sum(1).tolist() == [processor.count_tokens(text), processor.count_tokens(turns[4:])]
        assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()
        assert {batch[key].shape for key in batch if key != "pixel_values"} == {(2, tokens)}
        widths.add(tokens)
    assert len(widths) > 1


def test_token_types_mark_the_images(collator, processor, turns):
    batch = collator([turns, turns[4:], turns[:2]])
    types = batch["mm_token_type_ids"]
    assert types.equal((batch["input_ids"] == processor.image_token_id).long())
    assert types.sum(1).tolist() == [3 * PER_IMAGE, 0, PER_IMAGE]
    assert batch["pixel_values"].shape == (4, 3, 28, 28)
    assert "pixel_values" not in collator([turns[4:]])


def test_images_beside_the_messages_are_those_inside_them(collator, turns, photographs, tmp_path):
    path = str(tmp_path / "image.png")
    photographs[0].save(path)
    inline = collator([{"messages": turns}])
    bare = [
        message
        if isinstance(message["content"], str)
        else message | {"content": [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]}
        for message in turns
    ]
    for first in (photographs[0], path, (tmp_path / "image.png").read_bytes()):
        assert_equal(collator([{"messages": bare, "images": [first, *photographs[1:3]]}]), inline)
    swapped = collator([{"messages": bare, "images": photographs[2::-1]}])
    assert swapped["pixel_values"].equal(inline["pixel_values"].flip(0))


def test_the_length_is_that_of_the_batch(collator, turns):
    for end in (2, 4, 6):
        batch = collator([turns[:end]])
        assert batch["attention_mask"].sum() == collator.processor.count_tokens(turns[:end])


# -- conversations that do not fit -------------------------------------------------------------------------------------


def test_whole_turns_are_dropped_from_the_end(processor, collator, turns):
    lengths = [processor.count_tokens(turns[:end]) for end in (2, 4, 6)]
    for kept, length in zip((2, 4, 6), lengths, strict=True):
        for slack in (0, 1):
            limited = ConversationCollator(processor, max_length=length + slack)
            assert_equal(limited([turns]), collator([turns[:kept]]))
            assert limited.counts.tolist() == [1, 0, int(kept < 6)]
    for kept, length in zip((2, 4), lengths[1:], strict=True):  # one token short
        assert_equal(ConversationCollator(processor, max_length=length - 1)([turns]), collator([turns[:kept]]))


def test_no_image_is_cut_whatever_the_limit(processor, collator, turns):
    for limit in range(processor.count_tokens(turns[:2]), processor.count_tokens(turns) + 1, 3):
        batch = ConversationCollator(processor, limit)([turns])
        assert batch["attention_mask"].sum() <= limit
        assert batch["mm_token_type_ids"].sum() == PER_IMAGE * len(batch["pixel_values"])
        assert supervised(batch)[-1].endswith(EOS)


def test_a_turn_ends_with_its_last_answer(processor, collator):
    messages = [
        {"role": "system", "content": "Be brief."},
        user("One"),
        user("Two?"),
        assistant("red"),
        assistant("blue"),
        user("Three?"),
        assistant("cat"),
        assistant("dog"),
    ]
    whole, first = processor.count_tokens(messages), processor.count_tokens(messages[:5])
    assert ConversationCollator(processor, whole).shorten(messages) == messages
    for limit in (whole - 1, first):  # never the cat without the dog
        assert ConversationCollator(processor, limit).shorten(messages) == messages[:5]
    with pytest.raises(ValueError, match=rf"takes {first} tokens"):  # never the red without the blue
        ConversationCollator(processor, first - 1).shorten(messages)
    assert collator.shorten(messages) is messages


def test_images_of_dropped_turns_are_not_decoded(processor, collator, turns, tmp_path):
    broken = [*turns[:2], user(damaged(tmp_path), "?"), assistant("!")]
    limited = ConversationCollator(processor, max_length=processor.count_tokens(turns[:2]))
    assert_equal(limited([broken]), collator([turns[:2]]))
    with pytest.raises(ValueError, match="cannot be decoded"):
        collator([broken])


def test_a_first_turn_that_is_too_long_is_an_error_with_both_lengths(processor, collator, turns):
    length = processor.count_tokens(turns[:2])
    expected = (
        rf"^The first turn of a conversation takes {length} tokens, more than max_length={length - 1} "
        r"\('What is red\?'\); raise max_length\. Or skip such conversations"
    )
    with pytest.raises(ValueError, match=expected):
        ConversationCollator(processor, length - 1)([turns])


def test_a_first_turn_that_is_too_long_can_be_skipped(processor, collator, turns, caplog):
    short = [user("?"), assistant("!")]
    limited = ConversationCollator(processor, processor.count_tokens(short), "skip")
    with caplog.at_level(logging.WARNING, "dsvl"):
        batch = limited([turns, short, turns])
    assert_equal(batch, collator([short]))
    assert limited.counts.tolist() == [3, 2, 0]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all(text.startswith("Skipped: The first turn") for text in messages)


@pytest.mark.parametrize("options", [{"max_length": 0}, {"max_length": -5}, {"on_bad_sample": "ignore"}])
def test_senseless_options_are_refused(processor, options):
    (name, value) = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ConversationCollator(processor, **options)


# -- images that are broken ------------------------------------------------------------------------------------------


def broken_samples(folder, photograph):
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, assistant("!")]
    path = folder / "half.png"
    photograph.resize((64, 64)).save(path)
    half = path.read_bytes()[:2000]
    path.write_bytes(half)
    return {
        "file": [user(damaged(folder), "?"), assistant("!")],
        "half a file": [user(path, "?"), assistant("!")],
        "no file": [user(folder / "gone.png", "?"), assistant("!")],
        "bytes": {"messages": bare, "images": [b"no image"]},
        "half the bytes": {"messages": bare, "images": [half]},
        "stored": {"messages": bare, "images": [{"bytes": b"no image", "path": None}]},
        "number": {"messages": bare, "images": [5]},
    }


KINDS = ["file", "half a file", "no file", "bytes", "half the bytes", "stored", "number"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image_is_an_error(collator, photographs, tmp_path, kind):
    sample = broken_samples(tmp_path, photographs[0])[kind]
    with pytest.raises(ValueError, match=r"(?i)image .* cannot be decoded: .*Or skip such conversations"):
        collator([sample])
    if "file" in kind:
        with pytest.raises(ValueError, match=str(tmp_path)):
            collator([sample])


def test_broken_images_can_be_skipped(processor, collator, turns, photographs, tmp_path, caplog):
    broken = broken_samples(tmp_path, photographs[0])
    assert list(broken) == KINDS
    skipping = ConversationCollator(processor, on_bad_sample="skip", max_bad_samples=1)
    with caplog.at_level(logging.WARNING, "dsvl"):
        batch = skipping([turns, *broken.values(), turns[:2]])
    assert_equal(batch, collator([turns, turns[:2]]))
    assert skipping.counts.tolist() == [len(KINDS) + 2, len(KINDS), 0]
    assert [record.getMessage()[:9] for record in caplog.records] == ["Skipped: "] * len(KINDS)


def test_many_broken_images_do_not_flood_the_log(processor, tmp_path, caplog):
    skipping = ConversationCollator(processor, on_bad_sample="skip", max_bad_samples=1)
    sample = [user(damaged(tmp_path), "?"), assistant("!")]
    with caplog.at_level(logging.WARNING, "dsvl"):
        skipping([sample] * (NAMED + 10))
    assert skipping.counts.tolist() == [NAMED + 10, NAMED + 10, 0] and len(caplog.records) == NAMED


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return DSVLForConditionalGeneration.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("collator")))


def test_a_batch_of_which_everything_is_skipped_has_no_labels(processor, model, tmp_path):
    skipping = ConversationCollator(processor, on_bad_sample="skip")
    batch = skipping([[user(damaged(tmp_path), "?"), assistant("!")]] * 2)
    assert skipping.counts.tolist() == [2, 2, 0]
    assert (batch["labels"] == -100).all() and batch["input_ids"].shape == (1, 8)
    model.train()
    model.set_trainable(projector=True, embeddings=True, vision_tower=True, language_model=True, lm_head=True)
    loss = model(**batch).loss
    assert loss.item() == 0
    loss.backward()  # the other processes reduce its gradients
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"model.multi_modal_projector.linear.weight", "model.language_model.embed_tokens.weight"} <= with_gradient
    assert with_gradient <= trainable
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_a_skipped_conversation_does_not_change_the_loss(processor, model, collator, turns, tmp_path):
    skipping = ConversationCollator(processor, on_bad_sample="skip")
    batch = skipping([[user(damaged(tmp_path), "?"), assistant("!")], turns])
    with torch.no_grad():
        assert model.eval()(**batch).loss == model(**collator([turns])).loss > 0


# -- counting ----------------------------------------------------------------------------------------------------------


def test_counts_of_workers_reach_the_parent(processor, collator, tmp_path):
    good = [user("One?"), assistant("Two."), user("Three?"), assistant("Four.")]
    samples = [good, [user(damaged(tmp_path), "?"), assistant("!")], good[:2]] * 4
    counting = ConversationCollator(processor, processor.count_tokens(good[:2]), "skip")
    loader = DataLoader(samples, batch_size=3, collate_fn=counting, num_workers=2, multiprocessing_context="fork")
    batches = list(loader)
    assert len(batches) == 4
    assert counting.counts.tolist() == [12, 4, 4]
    for batch in batches:
        assert_equal(batch, collator([good[:2], good[:2]]))


def test_collating_does_not_modify_a_sample(collator, turns):
    messages = complete_messages(turns)
    copy = [dict(message) for message in messages]
    collator([turns])
    assert messages == copy == turns
