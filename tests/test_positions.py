"""`image_positions="image"`: the tokens of an image share a position, everywhere as the plain definition has it."""

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from conftest import FAMILIES, IMAGE_ID, PER_IMAGE, batch, random_images, rows, tiny_model, tiny_vision_config
from plain_loop import PlainLoop, run_by_loop
from test_attention import CASES, LAYOUTS, close, packed
from test_generation import exact_quantization, feature_output, greedy, make_cache  # noqa: F401, a fixture
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CompileConfig,
    DynamicCache,
    LlamaForCausalLM,
    Siglip2VisionConfig,
)

from dsvl import DSVLConfig, DSVLForConditionalGeneration, ImageKVCache
from dsvl.cache_dsvl import cached_positions, cached_types
from dsvl.chat.prompts import Prompt, count_positions
from dsvl.positions_dsvl import documents_of_positions, image_positions, token_positions
from dsvl.utils.cache_cropping import crop

families = pytest.mark.parametrize("family", FAMILIES)
attentions = pytest.mark.parametrize("attention", ["mmca", "causal"])


def by_definition(types, lengths=None, real=None, documents=None) -> list[int]:
    """The positions of one row, one token after the other; `lengths` are those of its images in reading order."""
    lengths, position, left, found = list(lengths or []), -1, 0, []
    for index, kind in enumerate(types):
        if documents is not None and index and documents[index] != documents[index - 1]:
            position, left = -1, 0
        if real is not None and not real[index]:
            found.append(None)
            continue
        if kind == 1:
            if left == 0:  # another image
                position, left = position + 1, lengths.pop(0) if lengths else PER_IMAGE
            left -= 1
        else:
            position, left = position + 1, 0
        found.append(position)
    return found


def expected_positions(inputs: dict[str, Any]) -> torch.Tensor:
    """(batch, tokens); 0 where padded, which concerns nobody."""
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    found = [by_definition((ids == IMAGE_ID).tolist(), real=row) for ids, row in zip(inputs["input_ids"], real, strict=True)]
    return torch.tensor([[position or 0 for position in row] for row in found])


def shared(*args: Any, **kwargs: Any) -> Any:
    return tiny_model(*args, image_positions="image", **kwargs)


def unmarked(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}


# -- the definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_positions_are_those_of_the_definition(seed):
    """Any rows: padded anywhere, packed, after a cache of any length, images of one length or of several."""
    generator = random.Random(seed)
    native, packs = seed % 2 == 1, seed % 3 == 0
    types, lengths, real, documents, found = [], [], [], [], []
    for _ in range(generator.randint(1, 4)):
        row, own, ids, number = [], [], [], 0
        for _ in range(generator.randint(1, 12)):
            new = [0] * generator.randint(1, 3)
            if generator.random() < 0.5:
                own.append(generator.randint(1, 9) if native else PER_IMAGE)
                new = [1] * own[-1]
            number += generator.random() < 0.3
            row, ids = row + new, ids + [number] * len(new)
        types.append(row)
        lengths.append(own)
        documents.append(ids)
    longest = max(map(len, types))
    for index, row in enumerate(types):
        missing = 0 if packs else longest - len(row)
        if packs:  # padding is a document of its own
            documents[index] += [99] * (longest - len(row))
            types[index] = row + [0] * (longest - len(row))
        else:
            types[index] = [0] * missing + row
        real.append([0] * missing + [1] * (longest - missing))
        found.append(by_definition(types[index], lengths[index], real[index], documents[index] if packs else None))
    all_types, all_real = torch.tensor(types), torch.tensor(real)
    inputs = {"padding": all_real, "document_ids": torch.tensor(documents) if packs else None}
    of_batch = sum(lengths, []) if native else None
    got = image_positions(all_types, PER_IMAGE, of_batch, **inputs)
    assert [[p if r else None for p, r in zip(*pair, strict=True)] for pair in zip(got.tolist(), real, strict=True)] == found
    if packs or native:
        return
    for past in range(longest):  # and from what a cache remembers
        cached = got[:, :past].masked_fill(all_real[:, :past] == 0, -1)
        later = image_positions(all_types, PER_IMAGE, padding=all_real, cached=cached)
        assert later.equal(got[:, past:])


def test_without_lengths_a_run_of_image_tokens_is_cut_into_whole_images():
    """So images of several lengths are told apart wherever text is between them."""
    types = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1]])
    assert image_positions(types, 5).tolist() == [[0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 4, 5]]


def test_documents_are_told_by_positions_as_transformers_does():
    positions = torch.tensor([[0, 1, 2, 0, 1, 5, 6, 0]])
    documents = documents_of_positions(positions)
    assert documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 3]]
    assert token_positions(documents).tolist() == [[0, 1, 2, 0, 1, 0, 1, 0]]


# -- the model ---------------------------------------------------------------------------------------------------------


@attentions
@pytest.mark.parametrize(("family", "backend"), CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_plain_loop(family, backend, attention, side, uncompiled):
    # transformers' own eager attention gives NaN where padding meets float64
    is_exact = attention == "mmca" or backend != "eager"
    dtype = torch.float64 if is_exact else torch.float32
    inputs = batch(*LAYOUTS, side=side, dtype=dtype)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours = shared(family, attention, backend, dtype)(**inputs).logits
        loop = PlainLoop(inputs["mm_token_type_ids"], real, kind=attention)
        by_loop = tiny_model(family, "causal", dtype=dtype)
        expected = run_by_loop(by_loop, inputs, loop, position_ids=expected_positions(inputs)).logits
        of_tokens = tiny_model(family, attention, backend, dtype)(**inputs).logits
    tolerance = 1e-9 if is_exact else 1e-4
    torch.testing.assert_close(ours[real], expected[real], atol=tolerance, rtol=tolerance)
    assert (ours[real] - of_tokens[real]).abs().max() > 1e-2  # so positions matter here


@attentions
@pytest.mark.parametrize(("family", "backend"), CASES)
@pytest.mark.parametrize("positions", ["token", "image"])
def test_packed_documents_equal_the_documents_apart(family, backend, attention, positions, uncompiled):
    """Also one that is an image alone, and under the window of a decoder that has one."""
    model = tiny_model(family, attention, backend, image_positions=positions)
    layouts = ("Itttt", "t", "ttttttttttt", "ttIIt", "I", "tttttI")
    inputs, lengths = packed(*layouts)
    del inputs["position_ids"]
    inputs["document_ids"] = torch.tensor([sum(([7 - number] * length for number, length in enumerate(lengths)), [])])
    with torch.no_grad():
        together = model(**inputs).logits[0].split(lengths)
        first = start = 0
        for logits, length, layout in zip(together, lengths, layouts, strict=True):
            pixels = inputs["pixel_values"][first : first + layout.count("I")]
            alone = {"input_ids": inputs["input_ids"][:, start : start + length]}
            first, start = first + len(pixels), start + length
            if len(pixels):
                alone["pixel_values"] = pixels
            torch.testing.assert_close(logits, model(**alone).logits[0], **close(backend))


@attentions
def test_text_in_packs_is_separated_too(attention):
    model = shared("mistral", attention)
    ids = torch.tensor([sum(rows("tttttttttttt", "ttt", "tttt"), [])])
    documents = torch.tensor([[5] * 12 + [2] * 3 + [9] * 4])
    with torch.no_grad():
        together = model(input_ids=ids, document_ids=documents).logits
        apart = [model(input_ids=part).logits for part in ids.split([12, 3, 4], 1)]
    torch.testing.assert_close(together, torch.cat(apart, 1), atol=1e-9, rtol=1e-9)


@attentions
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_under_token_document_ids_are_what_restarting_positions_are(family, attention):
    """To the bit: those of transformers' and TRL's collators."""
    model = tiny_model(family, attention)
    inputs, lengths = packed("Itttt", "ttIIt", "tttt")
    documents = torch.tensor([sum(([number] * length for number, length in enumerate(lengths)), [])])
    with torch.no_grad():
        by_positions = model(**inputs).logits
        positions = inputs.pop("position_ids")
        assert model(**inputs, document_ids=documents).logits.equal(by_positions)
        moved = model(**inputs, document_ids=documents, position_ids=positions + 3).logits
    torch.testing.assert_close(moved, by_positions, atol=1e-4, rtol=1e-4)  # cosines are in float32


@families
@attentions
def test_text_alone_is_as_under_token(family, attention):
    inputs = batch("ttttttttttttt")
    with torch.no_grad():
        one, other = (tiny_model(family, attention, image_positions=kind)(**inputs).logits for kind in ("token", "image"))
    assert one.equal(other)


def test_gradients_equal_the_plain_loops():
    inputs = batch("ttItttIIttt", "IItItt", side="right")
    real = inputs["attention_mask"].bool()
    found = []
    for model in (shared(), tiny_model(attention="causal")):
        kwargs: dict[str, Any] = {}
        if model.config.multimodal_attention == "causal":
            model.model.language_model.set_attn_implementation(PlainLoop(inputs["mm_token_type_ids"], real).name)
            kwargs["position_ids"] = expected_positions(inputs)
        (model(**inputs, use_cache=False, **kwargs).logits[real] ** 2).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-8, rtol=1e-8, msg=name)


@attentions
def test_embeddings_that_contain_their_images(attention):
    model, inputs = shared(attention=attention), batch("tItIItt", "Itt")
    with torch.no_grad():
        expected = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        types = inputs["mm_token_type_ids"]
        embeds[types == 1] = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
        got = model(inputs_embeds=embeds, mm_token_type_ids=types, attention_mask=inputs["attention_mask"]).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(got[real], expected[real], atol=1e-12, rtol=1e-12)
        with pytest.raises(ValueError, match="do not tell text from images; pass mm_token_type_ids"):
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    generated = model.generate(inputs_embeds=embeds[1:], mm_token_type_ids=types[1:], max_new_tokens=5, do_sample=False)
    alone = {"input_ids": inputs["input_ids"][1:], "pixel_values": inputs["pixel_values"][-1:]}
    if inputs["attention_mask"][1].all():
        assert generated.equal(greedy(model, alone)[:, :5])
    with pytest.raises(ValueError, match="image_positions='image'; pass mm_token_type_ids"):
        model.generate(inputs_embeds=embeds, max_new_tokens=5)


def native_model(attention: str) -> DSVLForConditionalGeneration:
    """A tower for images of any shape, of which each patch is a token."""
    vision = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=2, num_patches=16
    )
    more = {"image_layout": "native", "max_image_tokens": 16, "image_positions": "image", "multimodal_attention": attention}
    torch.manual_seed(0)
    config = DSVLConfig(vision, FAMILIES["llama"](), "linear", image_token_id=IMAGE_ID, **more)
    model = DSVLForConditionalGeneration(config).to(torch.float64).eval()
    model.generation_config.eos_token_id = None
    return model


@attentions
@pytest.mark.parametrize("given", ["features", "pixels"])
def test_images_of_several_lengths(attention, given):
    """Next to each other too, in rows padded on the left."""
    model = native_model(attention)
    shapes = torch.tensor([[1, 3], [2, 1], [1, 5], [1, 1]])
    ids = torch.tensor([[0, 4, *[IMAGE_ID] * 5, 5, 6], [3, *[IMAGE_ID] * 6, 7, 8]])
    positions = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3, 4], [0, 1, 1, 1, 1, 1, 2, 3, 4]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    images = {"pixel_values": torch.randn(4, 5, 12, dtype=torch.float64), "spatial_shapes": shapes}
    with torch.no_grad():
        features = model.get_image_features(**images)
        assert [len(image) for image in features.pooler_output] == [3, 2, 5, 1]
        images = images if given == "pixels" else {"mm_encoder_outputs": {"image": features}}
        got = model(**inputs, **images).logits
        expected = model(**inputs, **images, position_ids=positions).logits
        other = model(**inputs, **images, position_ids=positions.clamp(max=3)).logits
    real = inputs["attention_mask"].bool()
    assert got[real].equal(expected[real]) and not got[real].equal(other[real])
    tokens = greedy(model, inputs, **images)
    for step in range(1, 4):
        whole = torch.cat([ids, tokens[:, :step]], 1)
        at = torch.cat([positions, positions[:, -1:] + 1 + torch.arange(step)], 1)
        with torch.no_grad():
            logits = model(input_ids=whole, attention_mask=(whole > 0).long(), **images, position_ids=at).logits[:, -1]
        logits[:, IMAGE_ID] = -torch.inf
        assert logits.argmax(-1).equal(tokens[:, step])
    assert greedy(model, inputs, **images, prefill_chunk_size=4).equal(tokens)
    assert greedy(model, inputs, **images, num_beams=1, cache_implementation="static", disable_compile=True).equal(tokens)


@attentions
def test_the_whole_model_compiles_as_one_graph(attention):
    model, inputs = shared(attention=attention, num_hidden_layers=1), batch("ttItIItt")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected, atol=1e-9, rtol=1e-9)


# -- caches ------------------------------------------------------------------------------------------------------------

LAYOUT = "ttItttIIttttttIttt"
KINDS = [(family, kind) for family in ("llama", "mistral", "gemma3_text") for kind in ("dynamic", "static")]
KINDS.append(("qwen3", "quantized"))


@attentions
@pytest.mark.parametrize(("family", "kind"), KINDS)
@pytest.mark.parametrize("chunks", [[1] * 34, [20, 1, 1, 1, 5, 1, 5], [3, 31], [7, 7, 7, 7, 6]])
def test_any_split_into_steps_equals_one_prefill(family, kind, attention, chunks, exact_quantization):  # noqa: F811
    """Also where a split falls inside an image, whose other half goes on at its position."""
    model, inputs = shared(family, attention), batch(LAYOUT)
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(**inputs).logits
        features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
        cache, logits, start = make_cache(kind, model), [], 0
        for length in chunks:
            part = ids[:, start : start + length]
            images = int((part == IMAGE_ID).sum())
            given = feature_output(features[:images]) if images else None
            logits.append(model(input_ids=part, past_key_values=cache, mm_encoder_outputs=given, use_cache=True).logits)
            features, start = features[images:], start + length
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=1e-9, rtol=1e-9)
    assert cached_positions(cache).equal(expected_positions(inputs))


def test_a_padded_batch_goes_on_in_each_row_from_its_own_position():
    """One row of which is nothing but padding at first."""
    model, inputs = shared(), batch("ttItttIIttt", "tt", "Itt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
        whole, cache, logits = model(**inputs).logits, DynamicCache(), []
        # Reading order is by rows, and a chunk holds a part of each.
        which = ((ids == IMAGE_ID).flatten().cumsum(0) - 1).view_as(ids)
        for start in range(0, ids.shape[1], 6):
            part = slice(start, start + 6)
            own = which[:, part][ids[:, part] == IMAGE_ID]
            given = feature_output(features[own]) if len(own) else None
            kwargs = {"attention_mask": mask[:, : start + 6], "mm_encoder_outputs": given}
            logits.append(model(input_ids=ids[:, part], past_key_values=cache, **kwargs).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], whole[real], atol=1e-9, rtol=1e-9)


@attentions
@pytest.mark.parametrize("duplicate", [lambda one: one, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_positions_move_with_the_rows_of_a_cache(attention, duplicate):
    model, inputs = shared(attention=attention), batch("ttItIt", "ttttttt", "tIttItt")
    cache = DynamicCache()
    with torch.no_grad():
        model(**unmarked(inputs), past_key_values=cache)
        cache = duplicate(cache)
        expected = expected_positions(inputs).masked_fill(inputs["attention_mask"] == 0, -1)
        assert cached_positions(cache).equal(expected)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        assert cached_positions(cache).equal(expected[[2, 0]])
        crop(cache, cache.get_seq_length() - 3)
        assert cached_positions(cache).equal(expected[[2, 0], :-3])
        cache.crop(-2)
        assert cached_positions(cache).equal(expected[[2, 0], :-5])
        cache.reset()
    assert cached_positions(cache) is cached_types(cache) is None


def test_a_cache_is_cropped_inside_an_image_and_goes_on():
    model, inputs = shared(), batch("ttItttIt")
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(**inputs, past_key_values=cache).logits
        crop(cache, 13)  # two tokens of the second image are left
        features = model.get_image_features(inputs["pixel_values"]).pooler_output[1][3:]
        rest = inputs["input_ids"][:, 13:]
        features = features[: int((rest == IMAGE_ID).sum())]
        got = model(input_ids=rest, past_key_values=cache, mm_encoder_outputs=feature_output(features)).logits
    torch.testing.assert_close(got, whole[:, 13:], atol=1e-9, rtol=1e-9)


def test_a_cache_of_unknown_positions_is_refused_unless_they_are_passed():
    model, inputs = shared(attention="causal"), batch("ttIttt")
    foreign = tiny_model(attention="causal")  # which does not keep them
    position_ids = expected_positions(inputs)
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        cache = DynamicCache()
        foreign(**dict(inputs, input_ids=inputs["input_ids"]), position_ids=position_ids, past_key_values=cache)
        crop(cache, 9)
        last = inputs["input_ids"][:, -1:]
        with pytest.raises(ValueError, match="holds 9 tokens of unknown"):
            model(input_ids=last, past_key_values=cache)
        types = inputs["mm_token_type_ids"]
        with pytest.raises(ValueError, match="9 tokens of unknown positions.*pass position_ids, or fill the cache by this"):
            model(input_ids=last, past_key_values=cache, mm_token_type_ids=types)
        with pytest.raises(ValueError, match="9 tokens of unknown positions"):
            model.generate(inputs["input_ids"], past_key_values=cache, max_new_tokens=2)
        got = model(input_ids=last, past_key_values=cache, position_ids=position_ids[:, -1:]).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


# -- generation --------------------------------------------------------------------------------------------------------


@families
@attentions
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}])
def test_generated_tokens_follow_from_whole_forward_passes(family, attention, options):
    model, inputs = shared(family, attention, seed=1), batch(LAYOUT)
    expected, ids = [], inputs["input_ids"]
    for _ in range(10):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        logits[IMAGE_ID] = -torch.inf
        expected.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[expected[-1]]])], 1)
    assert greedy(model, inputs, **options)[0].tolist() == expected


@attentions
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}])
def test_a_left_padded_batch_generates_as_its_samples_do(family, attention, options):
    model = shared(family, attention)
    layouts = ("ttItttt", "tttt", "IttItItttttt", "tttttttttttttttIt")
    inputs = batch(*layouts)
    together, first = greedy(model, inputs, **options), 0
    for row, layout in enumerate(layouts):
        pixels = inputs["pixel_values"][first : first + layout.count("I")]
        first += layout.count("I")
        ids = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
        beams = {"num_beams": 3} if "num_beams" in options else {}
        alone = greedy(model, {"input_ids": ids, "pixel_values": pixels if len(pixels) else None}, **beams)
        assert together[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize(("family", "attention"), [("llama", "mmca"), ("gemma3_text", "causal")])
def test_a_compiled_static_step_gives_the_same_tokens(family, attention, static_steps):
    model, inputs = shared(family, attention, dtype=torch.float32), batch(LAYOUT, dtype=torch.float32)
    expected = greedy(model, inputs)
    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, mode="default", backend="eager")
    compile_config._compile_all_devices = True  # transformers compiles on accelerators alone, unless told so
    got = greedy(model, inputs, cache_implementation="static", compile_config=compile_config)
    assert got.equal(expected)
    assert static_steps or "_compiled_call" in model.__dict__, "nothing was compiled"


@attentions
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_assisted_decoding_gives_the_same_tokens(family, attention):
    model, inputs = shared(family, attention), batch(LAYOUT)
    expected = greedy(model, inputs)
    for assistant in (shared(family, attention, seed=5), tiny_model(family, attention), shared(family, attention)):
        assert greedy(model, inputs, assistant_model=assistant).equal(expected)
        assert greedy(assistant, inputs, assistant_model=model).equal(greedy(assistant, inputs))
    assert greedy(model, inputs, prompt_lookup_num_tokens=3).equal(expected)
    text_alone = AutoModelForCausalLM.from_config(model.config.text_config).to(torch.float64).eval()
    assert greedy(model, inputs, assistant_model=text_alone).equal(expected)


def test_an_assistant_counts_positions_in_its_own_way():
    model, inputs, asked = tiny_model(), batch(LAYOUT), []
    assistant = shared()

    def note(module, args, kwargs):
        cache = kwargs["cache"]
        asked.append((cache.get_seq_length(), kwargs["position_ids"][0].tolist()))

    assistant.model.register_forward_pre_hook(note, with_kwargs=True)
    greedy(model, inputs, assistant_model=assistant)
    prompt = expected_positions(inputs)[0].tolist()
    expected = [*prompt, *range(prompt[-1] + 1, prompt[-1] + 30)]
    assert len(asked) > 3 and asked[0] == (0, prompt)
    for past, positions in asked:
        assert positions == expected[past : past + len(positions)]


@attentions
@pytest.mark.parametrize("chunk", [4, 7, 16])
def test_chunked_prefill_gives_the_same_tokens(chunk, attention):
    model, inputs = shared(attention=attention), batch(LAYOUT, "tttIttt")
    assert greedy(model, inputs, prefill_chunk_size=chunk).equal(greedy(model, inputs))


@attentions
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("new_alone", [False, True])
def test_a_conversation_continues_from_its_cache(family, kind, attention, new_alone):
    model, first = shared(family, attention), batch("ttItttIt")
    answer = model.generate(
        **first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, past_key_values=make_cache(kind, model)
    )
    new = batch("ttIttt", seed=7)
    whole = torch.cat([answer.sequences, new["input_ids"]], 1)
    pixels = torch.cat([first["pixel_values"], new["pixel_values"]])
    expected = greedy(model, {"input_ids": whole, "pixel_values": pixels})
    again: dict[str, Any] = {"input_ids": whole, "pixel_values": pixels}
    if new_alone:  # and what was said, but is not in the cache yet
        ids = torch.cat([answer.sequences[:, -1:], new["input_ids"]], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(whole), "pixel_values": new["pixel_values"]}
    cache = answer.past_key_values
    assert greedy(model, again, past_key_values=cache).equal(expected)
    held = int(cache.get_seq_length())
    said = expected_positions({"input_ids": torch.cat([whole, expected], 1)})
    assert cached_positions(cache)[:, :held].equal(said[:, :held])


# -- image KV caches ---------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_prompts_over_encoded_images_are_the_whole_prompts(family, options):
    model, inputs = shared(family), batch("IIt", "ttItIItttttttttt", "tttttttttttt")
    image_cache = model.encode_images(inputs["pixel_values"])
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}
    assert greedy(model, without, image_cache=image_cache, **options).equal(greedy(model, inputs, **options))
    with torch.no_grad():
        got, expected = model.prefill(**unmarked(without), image_cache=image_cache).logits, model(**inputs).logits[:, -1:]
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_a_conversation_goes_on_after_encoded_images():
    model, inputs = shared(), batch("ttItIt")
    image_cache = model.encode_images(inputs["pixel_values"])
    one, other = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model.prefill(inputs["input_ids"], image_cache, one)
        model(**inputs, past_key_values=other)
        assert cached_positions(one).equal(cached_positions(other))
        ids = torch.tensor([[5, 6, 7]])
        logits = [model(input_ids=ids, past_key_values=cache).logits for cache in (one, other)]
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)


def test_encoded_images_serve_both_ways_to_count(tmp_path):
    """Their keys are not rotated yet, so a saved cache does not depend on positions."""
    pixels = random_images(2)
    by_token, by_image = tiny_model(), shared()
    by_token.encode_images(pixels).save(tmp_path / "images.safetensors")
    cache = ImageKVCache.load(tmp_path / "images.safetensors")
    inputs = batch("tIItt")
    for model in (by_token, by_image):
        assert greedy(model, {"input_ids": inputs["input_ids"]}, image_cache=cache).equal(greedy(model, inputs))


# -- refusals ----------------------------------------------------------------------------------------------------------


@attentions
def test_positions_that_go_backwards_are_refused_and_never_documents(attention):
    model = shared(attention=attention)
    inputs, lengths = packed("Itttt", "tttttt")
    with pytest.raises(ValueError, match=r"go backwards \[1\] times.*pass document_ids"):
        model(**inputs)
    documents = torch.tensor([[0] * lengths[0] + [1] * lengths[1]])
    with torch.no_grad():  # positions of one's own go with documents
        model(**inputs, document_ids=documents)
        equal = {**inputs, "position_ids": torch.zeros_like(inputs["position_ids"])}
        ordinary = {
            **inputs,
            "position_ids": inputs["position_ids"] * 0,
            "attention_mask": torch.ones_like(inputs["input_ids"]),
        }
        torch.testing.assert_close(model(**equal).logits, model(**ordinary).logits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda ids: {"document_ids": ids[:, 1:]}, r"shape \(1, 9\), but the inputs hold 1 rows of 10 tokens"),
        (lambda ids: {"document_ids": ids.float()}, "torch.float32 of shape"),
        (lambda ids: {"document_ids": ids, "attention_mask": torch.ones_like(ids)}, "came with an attention_mask"),
        (lambda ids: {"document_ids": ids, "past_key_values": DynamicCache()}, "came with a KV cache"),
        (lambda ids: {"document_ids": ids, "use_cache": True}, "came with a KV cache"),
    ],
)
@pytest.mark.parametrize("positions", ["token", "image"])
def test_document_ids_that_cannot_be_are_refused(wrong, message, positions):
    model, ids = tiny_model(image_positions=positions), torch.arange(10)[None] + 3
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, **wrong(ids))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_positions": "picture"}, "image_positions='picture' is not known; choose one of 'token', 'image'"),
        ({"image_positions": "image", "multimodal_attention": "mmca_reference"}, "choose image_positions='token'"),
        ({"image_positions": "image", "reversed_images": True}, "reversed_images=True.*choose image_positions='token'"),
    ],
)
def test_configurations_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DSVLConfig(**fields)


def test_a_decoder_without_positions_is_refused():
    text = BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=2)
    config = DSVLConfig(tiny_vision_config(), text, multimodal_attention="causal", image_token_id=IMAGE_ID)
    DSVLForConditionalGeneration(config)
    config.image_positions = "image"
    with pytest.raises(ValueError, match="BloomModel does not take position_ids.*choose image_positions='token'"):
        DSVLForConditionalGeneration(config)


def test_a_configuration_without_the_field_counts_tokens():
    values = DSVLConfig().to_dict()
    del values["image_positions"]
    assert DSVLConfig.from_dict(values).image_positions == "token"


def test_a_prompt_is_measured_in_positions():
    prompt = Prompt(rows("ttItIIt")[0], [], [[PER_IMAGE], [PER_IMAGE, PER_IMAGE]])
    assert count_positions(tiny_model().config, prompt) == 19
    assert count_positions(shared().config, prompt) == 7


def test_five_hundred_images_take_five_hundred_positions():
    """More tokens than the decoder has positions, none of which is beyond them."""
    model, seen = shared(dtype=torch.float32), []
    inputs = batch("I" * 100 + "t" * 50, dtype=torch.float32)
    rotary = model.model.language_model.rotary_emb
    hook = rotary.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    assert inputs["input_ids"].shape[1] == 550 > model.config.text_config.max_position_embeddings
    greedy(model, inputs)
    hook.remove()
    assert [int(positions.max()) for positions in seen] == list(range(149, 159))


def test_the_decoder_alone_computes_the_same_with_these_positions():
    """`position_ids` are all that is different for it: what another engine needs to be given."""
    model, inputs = shared(attention="causal"), batch("ttItIItt")
    decoder = LlamaForCausalLM(model.config.text_config).to(torch.float64).eval()
    decoder.model, decoder.lm_head = model.model.language_model, model.lm_head
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == IMAGE_ID] = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
        cache = DynamicCache()
        got = decoder(inputs_embeds=embeds, position_ids=expected_positions(inputs), past_key_values=cache).logits
        torch.testing.assert_close(got, model(**inputs).logits, atol=1e-9, rtol=1e-9)
