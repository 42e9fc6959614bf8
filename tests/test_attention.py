"""MMCA computes what its definition says, in every backend and decoder."""

import copy

import pytest
import torch
import transformers
from conftest import _COMMON, FAMILIES, IMAGE_ID, batch, random_images, rows, tiny_model
from plain_loop import PlainLoop, run_by_loop
from transformers import StaticCache
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from dsvl.acceleration.attention import gathered_mask, query_intervals
from dsvl.acceleration.attention.gathered_mask import settled
from dsvl.masks_dsvl import Visibility, visibilities
from dsvl.positions_dsvl import documents_of_positions

LAYOUTS = ("tttItttIIttt", "Itt", "ttttttttttttt", "tI", "IItItttttttI", "ttttttttttttttttIt")


def backends(family: str) -> list[str]:
    return ["eager", "flex_attention"] if family == "gemma2" else ["eager", "sdpa", "flex_attention"]


def close(backend: str) -> dict[str, float]:
    """Where one side has no image, it is the decoder's own attention; transformers' eager one computes in float32."""
    tolerance = 1e-5 if backend == "eager" else 1e-9
    return {"atol": tolerance, "rtol": tolerance}


CASES = [(family, backend) for family in FAMILIES for backend in backends(family)]


def assert_equals_the_plain_loop(family, backend, side):
    inputs = batch(*LAYOUTS, side=side)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours = tiny_model(family, backend=backend)(**inputs).logits
        loop = PlainLoop(inputs["mm_token_type_ids"], real)
        expected = run_by_loop(tiny_model(family, "causal"), inputs, loop).logits
    torch.testing.assert_close(ours[real], expected[real], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("family", "backend"), CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_plain_loop(family, backend, side, uncompiled):
    assert_equals_the_plain_loop(family, backend, side)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_itself_is_causal_attention_when_told_so(family):
    # In float32: transformers' eager attention (Gemma 2) takes its softmax in it and gives NaN on float64's lowest number.
    inputs = batch(*LAYOUTS, side="right", dtype=torch.float32)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        loop = PlainLoop(inputs["mm_token_type_ids"], real, kind="causal")
        by_loop = run_by_loop(tiny_model(family, "causal", dtype=torch.float32), inputs, loop).logits
        by_transformers = tiny_model(family, "causal", dtype=torch.float32)(**inputs).logits
    torch.testing.assert_close(by_loop[real], by_transformers[real], atol=1e-4, rtol=1e-4)


def packed(*layouts: str):
    """Documents in one row without padding: positions restart, and no attention mask is passed."""
    ids = rows(*layouts)
    input_ids = torch.tensor([sum(ids, [])])
    position_ids = torch.tensor([sum((list(range(len(row))) for row in ids), [])])
    count = sum(layout.count("I") for layout in layouts)
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "pixel_values": random_images(count)}
    return inputs, [len(row) for row in ids]


@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_packed_documents_equal_the_documents_apart(family, backend, attention, uncompiled):
    model = tiny_model(family, attention, backend)
    layouts = ("Itttt", "ttttttttttt", "ttIIt", "tttttI")
    inputs, lengths = packed(*layouts)
    with torch.no_grad():
        together = model(**inputs, use_cache=False).logits[0].split(lengths)
        first = 0
        for length, layout, start in zip(lengths, layouts, torch.tensor([0, *lengths]).cumsum(0).tolist(), strict=False):
            pixels = inputs["pixel_values"][first : first + layout.count("I")]
            first += layout.count("I")
            alone = model(
                input_ids=inputs["input_ids"][:, start : start + length], pixel_values=pixels if len(pixels) else None
            ).logits[0]
            torch.testing.assert_close(together[layouts.index(layout)], alone, **close(backend))


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_a_left_padded_batch_equals_its_samples_alone(family, backend, uncompiled):
    model = tiny_model(family, backend=backend)
    inputs = batch(*LAYOUTS)
    first = 0
    with torch.no_grad():
        # Positions count from a sample's own start, as generate() makes them.
        together = model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits
        for row, layout in enumerate(LAYOUTS):
            real = inputs["attention_mask"][row].bool()
            pixels = inputs["pixel_values"][first : first + layout.count("I")]
            first += layout.count("I")
            alone = model(
                input_ids=inputs["input_ids"][row : row + 1, real], pixel_values=pixels if len(pixels) else None
            ).logits[0]
            torch.testing.assert_close(together[row, real], alone, **close(backend))


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_text_alone_is_the_language_model_to_the_bit(family, backend, uncompiled):
    import transformers

    model = tiny_model(family, backend=backend, dtype=torch.float32)
    text = transformers.AutoModelForCausalLM.from_config(model.config.text_config).eval()
    text.base_model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    text.set_attn_implementation(backend)
    inputs = batch("ttttttttttttt", "ttttt")
    inputs.pop("pixel_values")
    types = inputs.pop("mm_token_type_ids")
    with torch.no_grad():
        assert torch.equal(model(**inputs, mm_token_type_ids=types).logits, text(**inputs).logits)
        ours = model.generate(**inputs, mm_token_type_ids=types, max_new_tokens=8, do_sample=False)
        theirs = text.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[IMAGE_ID], eos_token_id=None)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_a_later_image_changes_no_earlier_logit(family, backend, uncompiled):
    model = tiny_model(family, backend=backend)
    inputs = batch("tttItttItt")
    other = dict(inputs, pixel_values=torch.cat([inputs["pixel_values"][:1], random_images(1, seed=9)]))
    with torch.no_grad():
        one, two = model(**inputs).logits[0], model(**other).logits[0]
    second = 3 + 5 + 3  # where the second image begins
    torch.testing.assert_close(one[:second], two[:second], atol=1e-12, rtol=0)
    assert (one[second:] - two[second:]).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_an_image_token_depends_on_its_image_alone(family, backend, uncompiled):
    model = tiny_model(family, backend=backend)
    alone, among = batch("I"), batch("ttttIttt", seed=3)
    among["pixel_values"] = alone["pixel_values"]
    with torch.no_grad():
        one = model.model(**alone).last_hidden_state[0]
        two = model.model(**among).last_hidden_state[0, 4:9]
    torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


# flex_attention has no backward on a CPU; tests/test_gpu.py holds its gradients against sdpa's.
@pytest.mark.parametrize(("family", "backend"), [case for case in CASES if case[1] != "flex_attention"])
def test_gradients_equal_the_plain_loops(family, backend):
    inputs = batch(*LAYOUTS, side="right")
    labels = torch.where(inputs["attention_mask"].bool() & (inputs["mm_token_type_ids"] == 0), inputs["input_ids"], -100)
    ours, plain = tiny_model(family, backend=backend), tiny_model(family, "causal")
    ours(**inputs, labels=labels).loss.backward()
    loop = PlainLoop(inputs["mm_token_type_ids"], inputs["attention_mask"].bool())
    run_by_loop(plain, inputs, loop, labels=labels).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        if expected[name].grad is not None:
            scale = expected[name].grad.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(parameter.grad / scale, expected[name].grad / scale, atol=1e-4, rtol=0, msg=name)


def test_a_decoder_that_keeps_the_masks_from_its_attention_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "nemotron", lambda: transformers.NemotronConfig(**_COMMON))
    model = tiny_model("nemotron")
    assert model(**batch("ttt")).logits.shape == (1, 3, 96)
    with pytest.raises(ValueError, match="NemotronAttention was not handed multimodal_masks: .* choose another decoder"):
        model(**batch("tItt"))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_text_takes_a_four_dimensional_mask_that_is_broadcast_over_queries(backend):
    inputs, mask = batch("tttttt", "ttt"), torch.zeros(2, 1, 1, 6, dtype=torch.float64)
    mask[1, :, :, :3] = torch.finfo(mask.dtype).min
    ours, plain = (tiny_model(attention=attention, backend=backend) for attention in ("mmca", "causal"))
    logits = ours(input_ids=inputs["input_ids"], attention_mask=mask).logits
    assert logits.equal(plain(input_ids=inputs["input_ids"], attention_mask=mask).logits)


def test_eager_returns_the_weights_it_used():
    model = tiny_model(backend="eager")
    inputs = batch("ttIttIt", "Ittt")
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 2 and len(outputs.hidden_states) == 3
    weights = outputs.attentions[0]
    assert weights.shape == (2, 4, inputs["input_ids"].shape[1], inputs["input_ids"].shape[1])
    sums = weights.sum(-1)[:, 0]
    # text before an image 1; after it 2; an image token, like padding, its own value alone
    torch.testing.assert_close(sums[0], torch.tensor([1.0] * 7 + [2, 2] + [1] * 5 + [2], dtype=torch.float64))
    torch.testing.assert_close(sums[1], torch.tensor([1.0] * 7 + [1] * 5 + [2] * 3, dtype=torch.float64))


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_the_image_branch_in_parts_is_the_whole(family, least, monkeypatch):
    """Cut where images come into sight, in a padded batch and alone, with a window."""
    monkeypatch.setattr(gathered_mask, "LEAST_PART", least)
    cut = []
    parts = gathered_mask.split_image_branch
    monkeypatch.setattr(gathered_mask, "split_image_branch", lambda mask: cut.append(parts(mask)) or cut[-1])
    sdpa = tiny_model(family, backend="sdpa", **({"sliding_window": 9} if family == "mistral" else {}))
    eager = copy.deepcopy(sdpa)
    eager.set_attn_implementation({"text_config": "eager"})
    for layouts in (("ttIttttIttttIIttt", "IttttItt", "ttttttIttttt", "tttt"), ("tttIttttttIttttt",)):
        inputs = batch(*layouts)
        real = inputs["attention_mask"].bool()
        got, expected = (model(**inputs).logits[real] for model in (sdpa, eager))
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)
        (got.square().sum() + expected.square().sum()).backward()
    for ours, theirs in zip(sdpa.parameters(), eager.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-9)
    assert any(len(found) > 2 for found in cut)
    assert family == "mistral" or any(part.keys and part.mask is None for found in cut for part in found)


def dense_edges(visible):
    """The interval that each query sees, read off the whole mask; without padding, all rows of which are alike here."""
    seen = visible.dense()[:, 0].to(torch.uint8)
    return seen.argmax(-1), seen.shape[-1] - seen.flip(-1).argmax(-1)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("pairs", [10**6, 40])
def test_what_a_query_sees_is_told_as_an_interval(family, pairs, monkeypatch):
    """Whole prompts, packed documents, windows, prompts that go on from a cache: what the fused kernels are told."""
    monkeypatch.setattr(query_intervals, "PAIRS_AT_ONCE", pairs)
    config = tiny_model(family, **({} if family == "llama" else {"sliding_window": 5})).config.text_config
    embeds, found = torch.zeros(2, 12, 4), 0
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]] * 2)
    static = StaticCache(config=config, max_cache_len=20)
    for document_ids, cache in ((None, None), (documents, None), (None, static)):
        for visible in visibilities(config, embeds, None, cache, document_ids).values():
            since, up_to = dense_edges(visible)
            for edges in (query_intervals.query_intervals(visible), query_intervals.intervals_by_calling(visible)):
                if edges == (None, None):  # from the first key to its own
                    assert not since.any() and up_to.equal(torch.arange(12).add(1).expand(2, 12))
                else:
                    assert edges[0].equal(since) and edges[1].equal(up_to)
                    found += edges is not None
    assert found >= (1 if family == "llama" else 2)


def test_a_mask_function_is_known_by_what_it_does():
    """Not by its name, nor by what it was made of."""
    window = sliding_window_causal_mask_function(5)

    def size(function):
        sizes = dict(batch_size=1, q_length=8, kv_length=8, q_offset=0, kv_offset=0, local_size=5)
        rest = dict(padding=None, is_causal=False, device=torch.device("cpu"))
        return query_intervals.window_size(Visibility(function, **sizes, **rest))

    assert size(window) == 5
    for function in (
        sliding_window_causal_mask_function(4),
        and_masks(window, causal_mask_function),
        and_masks(causal_mask_function, window),
        chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.long)),
    ):
        assert size(function) is None


def test_positions_that_go_on_are_one_conversation():
    """Which the host may be told, or not: what is seen is the same."""
    config, embeds = tiny_model().config.text_config, torch.zeros(2, 6, 4)
    for position_ids in (torch.arange(6)[None], torch.arange(3, 9).expand(2, 6)):
        (visible,) = visibilities(config, embeds, None, None, documents_of_positions(position_ids)).values()
        assert not visible.is_causal and settled(visible).is_causal
        assert visible.dense().equal(settled(visible).dense())
    (divided,) = visibilities(config, embeds, None, None, torch.tensor([[0, 0, 0, 1, 1, 1]])).values()
    assert settled(divided) is divided


def test_what_is_no_interval_is_not_fused():
    config = tiny_model().config.text_config
    (visible,) = visibilities(config, torch.zeros(1, 8, 4), None, None, None).values()
    visible.is_causal, visible.local_size = False, None
    for function in (
        lambda b, h, q, k: (k <= q) & (k != 2),  # a hole
        lambda b, h, q, k: (k <= q) & (k >= 4 - q),  # one that goes back
        lambda b, h, q, k: k < q,  # nothing at all
    ):
        visible.mask_function = function
        assert query_intervals.query_intervals(visible) is None
