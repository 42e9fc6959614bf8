"""`numbered_images`: under MMCA the embeddings of an image's tokens hold the number of their image.

The models of layout_models.py have numbered images, too, so that chat, server, page, evaluation and library are tested with
them in every image layout.
"""

from typing import Any

import peft
import pytest
import torch
from conftest import IMAGE_ID, PER_IMAGE, batch, number_images, random_images, rows, save_tiny_llama, tiny_model
from layout_models import CASES, SIZES, layout_parts, model_inputs, noise, question, shared_parts
from torch import nn
from transformers import AutoTokenizer, CLIPVisionModel, DynamicCache, StaticCache

import dsvl
from dsvl import DSVLConfig, DSVLForConditionalGeneration
from dsvl.acceleration.reuse.fingerprint import fingerprint_of
from dsvl.acceleration.reuse.image_cache import ImageKVCache
from dsvl.chat import DSVLChat
from dsvl.composition.compose import NUMBERED_IMAGES
from dsvl.image_library import ImageLibrary

every_case = pytest.mark.parametrize("case", CASES)
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def by_hand(model: Any, inputs: dict[str, Any], tiles_of_images: list[list[int]], numbers: list[int]) -> torch.Tensor:
    """Logits with images that were numbered one by one, from embeddings that contain them.

    Args:
        tiles_of_images: for each image, the number of tokens of each tile.
        numbers: of the images.
    """
    images = {name: inputs[name] for name in ("pixel_values", "spatial_shapes", "pixel_attention_mask") if name in inputs}
    tiles = list(model.get_image_features(**images).pooler_output)
    module = model.model.multi_modal_projector.image_numbers
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).clone()
    places = (ids == model.config.image_token_id).nonzero()
    place = 0
    for lengths, number in zip(tiles_of_images, numbers, strict=True):
        for length in lengths:
            tile = tiles.pop(0)
            assert len(tile) == length
            for token in tile:
                if 1 <= number <= len(module.embeddings):
                    token = token + module.weight @ module.embeddings[number - 1]
                row, column = places[place]
                embeds[row, column] = token
                place += 1
    assert place == len(places) and not tiles
    rest = {name: inputs[name] for name in ("attention_mask", "document_ids") if inputs.get(name) is not None}
    types = (ids == model.config.image_token_id).long()
    return model(inputs_embeds=embeds, mm_token_type_ids=types, **rest).logits


@torch.no_grad()
@every_case
def test_an_images_tokens_hold_its_number_in_its_row(case: str) -> None:
    model, processor = shared_parts(case)
    counts = (2, 0, 3, 1)
    conversations = [question([noise(size, i) for i, size in enumerate(SIZES[:count])]) for count in counts]
    inputs = model_inputs(processor, conversations)
    lengths = [processor.tile_lengths(height, width) for count in counts for width, height in SIZES[:count]]
    numbers = [number for count in counts for number in range(1, count + 1)]
    expected = by_hand(model, inputs, lengths, numbers)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-12, rtol=1e-12)
    # In other forms.
    images = {
        name: inputs.pop(name) for name in ("pixel_values", "spatial_shapes", "pixel_attention_mask") if name in inputs
    }
    encoded = model.get_image_features(**images)
    features = {"image_features": encoded.last_hidden_state} | {n: v for n, v in images.items() if n == "spatial_shapes"}
    for form in (features, {"mm_encoder_outputs": {"image": encoded}}):
        torch.testing.assert_close(model(**inputs, **form).logits, expected, atol=1e-12, rtol=1e-12)
    tiles = inputs.pop("num_tiles", None)
    given = {"image_numbers": torch.tensor(numbers)} | ({} if tiles is None else {"num_tiles": tiles})
    held = model.get_image_features(**images, **given)
    torch.testing.assert_close(model(**inputs, mm_encoder_outputs={"image": held}).logits, expected, atol=1e-12, rtol=1e-12)
    other = model(**inputs, **images, **(given | {"image_numbers": torch.tensor(numbers[::-1])})).logits
    assert (other - expected).abs().max() > 1e-3


@torch.no_grad()
def test_later_images_than_are_numbered_hold_none() -> None:
    model, inputs = tiny_model(numbered_images=2), batch("ttItItI", "IIIIt")
    expected = by_hand(model, inputs, [[PER_IMAGE]] * 7, [1, 2, 0, 1, 2, 0, 0])
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("told_by", ["document_ids", "positions"])
def test_numbers_begin_anew_in_each_packed_document(told_by: str) -> None:
    model = tiny_model(numbered_images=5)
    documents = rows("ttIt", "IIt", "tt", "tIItI")
    ids = torch.tensor([sum(documents, [])])
    document_ids = torch.cat([torch.full((len(one),), number) for number, one in enumerate(documents)])[None]
    told = {"document_ids": document_ids}
    if told_by == "positions":
        told = {"position_ids": torch.cat([torch.arange(len(one)) for one in documents])[None]}
    inputs = {"input_ids": ids, "pixel_values": random_images(6), "document_ids": document_ids}
    expected = by_hand(model, inputs, [[PER_IMAGE]] * 6, [1, 1, 2, 1, 2, 3])
    got = model(ids, pixel_values=inputs["pixel_values"], **told).logits
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_a_new_map_is_a_model_without_numbers() -> None:
    plain, model = tiny_model(), tiny_model(numbered_images=3)
    weights = plain.state_dict()
    model.load_state_dict(weights | {k: v for k, v in model.state_dict().items() if k not in weights})
    fresh = DSVLForConditionalGeneration(model.config).model.multi_modal_projector.image_numbers
    assert not fresh.weight.any() and fresh.embeddings.std() == pytest.approx(0.02, rel=0.3)
    inputs = batch("ttItI")
    assert (model(**inputs).logits - plain(**inputs).logits).abs().max() > 1e-3
    nn.init.zeros_(model.model.multi_modal_projector.image_numbers.weight)
    assert model(**inputs).logits.equal(plain(**inputs).logits)


# -- caches and generation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_images_behind_a_cache_are_counted_on() -> None:
    # An image of each row is in the cache.
    model, inputs, cut = tiny_model(numbered_images=5), batch("ttItI", "tItIt"), 7
    expected = model(**inputs).logits
    for kind in (lambda: DynamicCache(), lambda: StaticCache(config=model.config.text_config, max_cache_len=64)):
        cache = kind()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert (ids[:, :cut] == IMAGE_ID).sum(-1).tolist() == [PER_IMAGE] * 2 and ids.shape[1] == 13
        pixels = inputs["pixel_values"]
        model(ids[:, :cut], attention_mask=mask[:, :cut], pixel_values=pixels[[0, 2]], past_key_values=cache)
        rest = model(ids[:, cut:], attention_mask=mask, pixel_values=pixels[[1, 3]], past_key_values=cache).logits
        torch.testing.assert_close(rest, expected[:, cut:], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("case", ["tiles", "native"])
def test_behind_images_of_any_size_numbers_are_asked_for(case: str) -> None:
    model, processor = shared_parts(case)
    first = question([noise(size, seed) for seed, size in enumerate(SIZES[:2])])
    cache, opening = DynamicCache(config=model.config.text_config), model_inputs(processor, [first])
    answer = processor.decode(model.generate(**opening, **GREEDY, past_key_values=cache)[0, opening["input_ids"].shape[1] :])
    messages = [*first, {"role": "assistant", "content": answer}, *question([noise(SIZES[3], 3)], "And this?")]
    whole = model_inputs(processor, [messages])
    expected = model.generate(**whole, **GREEDY)
    names = [n for n in ("pixel_values", "spatial_shapes", "pixel_attention_mask", "num_tiles") if n in whole]
    new = dict(processor(images=[noise(SIZES[3], 3)], return_tensors="pt"))
    only_new = {name: whole[name] for name in whole if name not in names} | {name: new[name] for name in names}
    only_new["pixel_values"] = only_new["pixel_values"].double()
    with pytest.raises(ValueError, match="how many images the cache holds is not known; pass image_numbers"):
        model.generate(**only_new, **GREEDY, past_key_values=cache)
    again = DynamicCache(config=model.config.text_config)
    model.generate(**opening, **GREEDY, past_key_values=again)
    told = {"image_numbers": torch.tensor([3])}
    assert model.generate(**only_new, **told, **GREEDY, past_key_values=again).equal(expected)
    # With all images of the conversation they are counted.
    assert model.generate(**whole, **GREEDY, past_key_values=cache).equal(expected)


def test_tiles_are_not_taken_for_images() -> None:
    model, processor = shared_parts("tiles")
    inputs = model_inputs(processor, [question([noise(SIZES[1], 1)])])
    assert inputs.pop("num_tiles").tolist() > [1]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="how many images the tiles are is not known; pass num_tiles"):
            call(**inputs)
    with pytest.raises(ValueError, match="1 image_numbers for [0-9]+ images or tiles"):
        model(**inputs, image_numbers=torch.tensor([1]))


@pytest.mark.parametrize("case", ["crop", "tiles", "native"])
@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"prefill_chunk_size": 7}, {"cache_implementation": "static"}, {"assistant": "numbered"}, {}]
)
def test_every_way_to_decode_numbers_images(case: str, how: dict[str, Any]) -> None:
    model, processor = shared_parts(case)
    inputs = model_inputs(processor, [question([noise(size, i) for i, size in enumerate(SIZES[1:3])])])
    with torch.no_grad():
        first = model(**inputs).logits[0, -1].argmax()
    options, expected = dict(how), None
    if options.pop("assistant", None):
        options["assistant_model"] = layout_parts(case)[0]
        expected = model.generate(**inputs, **GREEDY)
    made = model.generate(**inputs, **GREEDY, **options)
    assert expected is None or made.equal(expected)
    numbers = model.model.multi_modal_projector.image_numbers
    kept = numbers.weight.clone()
    with torch.no_grad():
        numbers.weight.zero_()
    try:
        other = model.generate(**inputs, **GREEDY, **options)
    finally:
        numbers.weight.data.copy_(kept)
    if not how.get("num_beams"):
        assert made[0, inputs["input_ids"].shape[1]] == first
    assert not other.equal(made)  # so that the comparison above could fail


@torch.no_grad()
@every_case
def test_prompts_of_embeddings_number_images(case: str) -> None:
    model, processor = shared_parts(case)
    inputs = model_inputs(processor, [question([noise(size, i) for i, size in enumerate(SIZES[1:3])])])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for told in ({}, {"image_numbers": torch.tensor([4, 2])}):
        expected = model.generate(**inputs, **told, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        assert model.generate(inputs_embeds=embeds, **others, **told, **GREEDY).equal(expected)
        del others["mm_token_type_ids"]  # the embedding of the image token tells them, too
        assert model.generate(inputs_embeds=embeds, **others, **told, **GREEDY).equal(expected)


@pytest.mark.parametrize("case", ["crop", "tiles", "native"])
def test_numbers_of_a_call_hold_over_a_library_and_compiled_turns(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, processor), (fast, _) = shared_parts(case), layout_parts(case)
    images = [noise(size, i) for i, size in enumerate(SIZES[1:3])]
    inputs, told = model_inputs(processor, [question(images)]), {"image_numbers": torch.tensor([4, 2])}
    expected = model.generate(**inputs, **told, **GREEDY)
    assert not expected.equal(model.generate(**inputs, **GREEDY))
    fast.image_library = ImageLibrary(fast, 2**24)
    for _ in range(2):
        assert fast.generate(**inputs, **told, **GREEDY).equal(expected)
    fast.image_library = None
    # Behind a KV cache, new images are encoded first after `compile_text_prefill`.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    fast.compile_text_prefill()
    first = question(images[:1])
    messages = [*first, {"role": "assistant", "content": "Yes"}, *question(images[1:], "And this?")]
    opening, whole = model_inputs(processor, [first]), model_inputs(processor, [messages])
    answers = []
    for one in (model, fast):
        cache = DynamicCache(config=one.config.text_config)
        with torch.no_grad():
            one(**opening, past_key_values=cache)
        answers.append(one.generate(**whole, **told, past_key_values=cache, **GREEDY))
    assert answers[0].equal(answers[1])


@pytest.mark.parametrize("case", ["crop", "tiles", "native"])
def test_image_numbers_are_compared_with_the_images(case: str) -> None:
    model, processor = shared_parts(case)
    inputs = model_inputs(processor, [question([noise(size, i) for i, size in enumerate(SIZES[1:3])])])
    for numbers in ([1], [1, 2, 3]):
        told = {"image_numbers": torch.tensor(numbers)}
        cache = DynamicCache(config=model.config.text_config)
        for call in (model, model.generate):
            for others in ({}, {"past_key_values": cache}):
                with pytest.raises(ValueError, match=f"{len(numbers)} image_numbers for 2 images or tiles; pass one"):
                    call(**inputs, **told, **others)


@pytest.mark.parametrize("case", ["crop", "tiles", "native"])
@pytest.mark.parametrize("numbered", ["assistant", "model"])
def test_one_of_model_and_assistant_may_number_images(case: str, numbered: str) -> None:
    (one, processor), (other, _) = shared_parts(case), layout_parts(case, numbered_images=0)
    model, assistant = (one, other) if numbered == "model" else (other, one)
    inputs = model_inputs(processor, [question([noise(size, i) for i, size in enumerate(SIZES[1:3])])])
    expected = model.generate(**inputs, **GREEDY)
    assert model.generate(**inputs, **GREEDY, assistant_model=assistant).equal(expected)


@torch.no_grad()
def test_numbers_for_a_model_without_numbers_are_refused() -> None:
    model, inputs = tiny_model(), batch("ttItIt")
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="image_numbers for a model of numbered_images=0"):
            call(**inputs, image_numbers=torch.tensor([1, 2]))


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "images encoded behind the cache"])
def test_turns_of_a_chat_answer_as_from_scratch(positions: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = layout_parts("tiles", image_positions=positions)
    if compiled:  # as after `compile_text_prefill`, by which new images are encoded into an image KV cache
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        model.compile_text_prefill()
    chat = DSVLChat(model, processor, **GREEDY, context_length=1024)
    other, _ = layout_parts("tiles", image_positions=positions)
    for seeds in ([0, 1], [2], [], [3, 4]):
        chat.ask("What?", [noise(SIZES[seed], seed) for seed in seeds])
        inputs = model_inputs(processor, [chat.messages[:-1]])
        expected = other.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
        assert chat.last_turn.answer_ids == expected


# -- encoded images --------------------------------------------------------------------------------------------------------


def test_encoded_images_hold_numbers_and_prompts_compare_them() -> None:
    model, inputs = tiny_model(numbered_images=4), batch("ttItIt", "Ittt")
    pixels = inputs.pop("pixel_values")
    expected = model.generate(**inputs, pixel_values=pixels, **GREEDY)
    cache = model.encode_images(pixels, image_numbers=[1, 2, 1])
    assert model.generate(**inputs, image_cache=cache, **GREEDY).equal(expected)
    with pytest.raises(ValueError, match=r"hold the numbers \[3\], but the first image of a prompt is 1"):
        model.generate(**inputs, image_cache=model.encode_images(pixels), **GREEDY)
    with pytest.raises(ValueError, match=r"hold the numbers \[1, 1\]"):
        model.generate(**inputs, image_cache=cache[[0, 0, 2]], **GREEDY)
    with pytest.raises(ValueError, match=r"hold the numbers \[2, 1\]"):
        model.generate(**inputs, image_cache=cache[[1, 0, 2]], **GREEDY)
    with pytest.raises(ValueError, match="2 image_numbers for 3 images or tiles; pass one for each image"):
        model.encode_images(pixels, image_numbers=[1, 2])
    with pytest.raises(ValueError, match="image_numbers for a model of numbered_images=0"):
        tiny_model().encode_images(pixels, image_numbers=[1, 2, 3])
    with pytest.raises(ValueError, match="image_numbers for a model of numbered_images=0"):
        tiny_model().get_image_features(pixels, image_numbers=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="input_ids alone, but image_numbers came with it"):
        model.generate(**inputs, image_cache=cache, image_numbers=torch.tensor([1, 2, 1]), **GREEDY)
    with pytest.raises(ValueError, match="1 numbers for 3 images"):
        ImageKVCache(cache.keys, cache.values, cache.fingerprint, cache.tile_lengths, numbers=[1])


@torch.no_grad()
@pytest.mark.parametrize("case", ["crop", "tiles", "native"])
def test_encoded_images_go_on_from_the_numbers_in_the_cache(case: str) -> None:
    model, processor = shared_parts(case)
    images = [noise(size, i) for i, size in enumerate(SIZES[1:3])]
    first = question(images[:1])
    messages = [*first, {"role": "assistant", "content": "Yes"}, *question(images[1:], "And this?")]
    opening, whole = model_inputs(processor, [first]), model_inputs(processor, [messages])
    assert whole["input_ids"][:, : opening["input_ids"].shape[1]].equal(opening["input_ids"])
    expected = model.generate(**whole, **GREEDY)
    prompt = {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"]}
    names = ("pixel_values", "spatial_shapes", "pixel_attention_mask", "num_tiles")
    new = {name: value for name, value in processor(images=images[1:], return_tensors="pt").items() if name in names}
    new["pixel_values"] = new["pixel_values"].double()

    def answer(number: int) -> torch.Tensor:
        cache = DynamicCache(config=model.config.text_config)
        model(**opening, past_key_values=cache)
        encoded = model.encode_images(**new, image_numbers=[number])
        return model.generate(**prompt, image_cache=encoded, past_key_values=cache, **GREEDY)

    assert answer(2).equal(expected)
    for wrong in [1] if case in ("tiles", "native") else [1, 3]:  # whose images can have any number of tokens
        with pytest.raises(ValueError, match=rf"hold the numbers \[{wrong}\], but .* those in the KV cache too"):
            answer(wrong)


def test_tiles_are_not_encoded_as_images() -> None:
    model, processor = shared_parts("tiles")
    inputs = model_inputs(processor, [question([noise(SIZES[1], 1)])])
    with pytest.raises(ValueError, match="how many images the tiles are is not known; pass num_tiles"):
        model.encode_images(inputs["pixel_values"])
    tiles = inputs["num_tiles"].tolist()
    assert model.encode_images(inputs["pixel_values"], num_tiles=tiles).numbers == (1,)
    pixels = inputs.pop("pixel_values")
    one_by_one = model.encode_images(pixels, image_numbers=[1] * sum(tiles))
    assert one_by_one.numbers == (1,) * sum(tiles)
    expected = model.generate(**inputs, pixel_values=pixels, **GREEDY)
    assert model.generate(**inputs, image_cache=one_by_one, **GREEDY).equal(expected)


def test_an_image_of_several_tiles_does_not_come_twice_under_a_number() -> None:
    model, processor = shared_parts("tiles")
    inputs = model_inputs(processor, [question([noise(SIZES[1], 1)] * 2)])
    cache = model.encode_images(inputs.pop("pixel_values"), num_tiles=inputs["num_tiles"])
    with pytest.raises(ValueError, match=r"hold the numbers \[1, 1\]"):
        model.generate(**inputs, image_cache=cache[[0, 0]], **GREEDY)


def test_caches_of_before_images_had_numbers_stay_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    fingerprint = model.model.image_reuse.fingerprint()
    fields = model.config.to_dict()
    del fields["numbered_images"]
    monkeypatch.setattr(model.config, "to_dict", lambda: fields)
    assert fingerprint_of(model.model)[0] == fingerprint
    assert fingerprint_of(tiny_model(numbered_images=2).model)[0] != fingerprint


def test_whatever_is_done_to_encoded_images_they_keep_their_numbers(tmp_path: Any) -> None:
    model = tiny_model(numbered_images=9, dtype=torch.float32)
    cache = model.encode_images(random_images(3, torch.float32), image_numbers=[4, 5, 7], chunk_size=2)
    cache.save(tmp_path / "images.safetensors")
    for same in (
        ImageKVCache.load(tmp_path / "images.safetensors"),
        cache.quantize(),
        cache.quantize().to(torch.float32),
        cache.offload(),
        cache.to(torch.bfloat16),
        ImageKVCache.cat([cache[:1], cache[1:]]),
        model.encode_images(random_images(3, torch.float32), image_numbers=[4, 5, 7], quantize=True, offload=True),
    ):
        assert same.numbers == (4, 5, 7)
    assert cache[2].numbers == (7,) and cache[[2, 0]].numbers == (7, 4) and cache[1:].numbers == (5, 7)
    assert tiny_model().encode_images(random_images(2)).numbers is None


@pytest.mark.parametrize(
    "rope", [None, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}], ids=["keys", "features"]
)
def test_a_library_keeps_an_image_for_each_of_its_numbers(rope: dict[str, Any] | None) -> None:
    changed = {} if rope is None else {"rope_parameters": rope}
    model = tiny_model(numbered_images=4, **changed)
    cup, dog = random_images(2)
    asked = {"ttIt": [cup], "ItIt": [dog, cup], "IttI": [cup, dog]}
    prompts = [(batch(f"{layout}t"), torch.stack(images)) for layout, images in asked.items()]
    expected = [model.generate(**(inputs | {"pixel_values": pixels}), **GREEDY) for inputs, pixels in prompts]
    model.image_library = library = ImageLibrary(model, 2**24)
    assert (library.features_because is None) == (rope is None)
    missed = []
    for (inputs, pixels), answer in zip(prompts, expected, strict=True):
        assert model.generate(**(inputs | {"pixel_values": pixels}), **GREEDY).equal(answer)
        missed.append(library.counts.misses)
    # The cup as 1; the dog as 1 and the cup as 2; the dog as 2. Features hold no number.
    assert missed == ([1, 3, 4] if rope is None else [1, 2, 2])


# -- training --------------------------------------------------------------------------------------------------------------


def test_numbers_are_trained_with_the_projector_and_text_alone_gives_them_gradients_of_zero() -> None:
    model = tiny_model(numbered_images=4).train().set_trainable()
    inputs = batch("ttItItt")
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_ID, -100)).loss.backward()
    numbers = model.model.multi_modal_projector.image_numbers
    assert numbers.weight.grad.any() and numbers.embeddings.grad[:2].any() and not numbers.embeddings.grad[2:].any()
    model.zero_grad(set_to_none=True)
    text = torch.tensor([[3, 4, 5, 6]])
    model(text, labels=text).loss.backward()
    assert not numbers.weight.grad.any() and not numbers.embeddings.grad.any()
    model.set_trainable(projector=False)
    assert not any(parameter.requires_grad for parameter in numbers.parameters())


@torch.no_grad()
def test_adapters_have_numbers_of_their_own_and_merge_them() -> None:
    model, inputs = tiny_model(numbered_images=4), batch("ttItItt")
    before = model(**inputs).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    ).eval()
    numbers = dict(adapted.named_parameters())
    names = [name for name in numbers if "image_numbers" in name and numbers[name].requires_grad]
    assert [name.rpartition(".")[2] for name in names] == ["embeddings", "weight"]
    numbers[names[1]].mul_(2)
    changed = adapted(**inputs).logits
    assert (changed - before).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert adapted(**inputs).logits.equal(before)
    torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, changed)


# -- configuration and composition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"numbered_images": -1}, "numbered_images=-1 is not valid"),
        ({"numbered_images": 2.5}, "numbered_images=2.5 is not valid"),
        ({"numbered_images": 2, "multimodal_attention": "causal"}, "numbered_images=2 with multimodal_attention='causal'"),
        ({"numbered_images": 2, "multimodal_attention": "mmca_reference"}, "leave it at 0"),
        ({"numbered_images": 2, "reversed_images": True}, "reversed_images=True: numbers are for images in reading order"),
    ],
)
def test_numbers_are_for_mmca(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSVLConfig(**fields)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("parts")
    save_tiny_llama(folder / "language")
    CLIPVisionModel(tiny_model().config.vision_config).save_pretrained(folder / "tower")
    return folder


def test_composed_models_number_images_by_the_language_models_own_embeddings(parts: Any) -> None:
    model, _ = dsvl.compose(parts / "tower", parts / "language", chat_template=own_template(parts))
    assert model.config.numbered_images == NUMBERED_IMAGES
    numbers = model.model.multi_modal_projector.image_numbers
    assert not numbers.weight.any()
    tokenizer = AutoTokenizer.from_pretrained(parts / "language")
    table = model.get_input_embeddings().weight
    one, twelve = (tokenizer(f"Image {n}", add_special_tokens=False)["input_ids"] for n in (1, 12))
    digits = [len(tokenizer(f"Image {n}", add_special_tokens=False)["input_ids"]) - len(one) for n in (12, 123)]
    assert digits == [1, 2], "the tokenizer of this test splits numbers into digits"
    torch.testing.assert_close(numbers.embeddings[0], table[one[-1]])
    torch.testing.assert_close(numbers.embeddings[11], table[twelve[-2]] / 3 + table[twelve[-1]] * 2 / 3)
    assert len({tuple(row.tolist()) for row in numbers.embeddings}) == NUMBERED_IMAGES


def own_template(parts: Any) -> Any:
    path = parts / "template.jinja"
    path.write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return path


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 0),  # this language model has no template of its own: DeepSpeed-VisualChat's is taken
        ({"chat_template": "own"}, NUMBERED_IMAGES),
        ({"chat_template": "own", "multimodal_attention": "causal"}, 0),
        ({"chat_template": "own", "numbered_images": 0}, 0),
        ({"numbered_images": 7}, 7),
    ],
)
def test_the_default_is_for_mmca_outside_of_visualchats_format(parts: Any, options: dict[str, Any], expected: int) -> None:
    if "chat_template" in options:
        options = options | {"chat_template": own_template(parts)}
    model, _ = dsvl.compose(parts / "tower", parts / "language", **options)
    assert model.config.numbered_images == expected
    assert (model.model.multi_modal_projector.image_numbers is not None) == (expected > 0)


def test_a_checkpoint_keeps_them(tmp_path: Any) -> None:
    model, inputs = tiny_model(numbered_images=3), batch("ttItI")
    model.save_pretrained(tmp_path)
    again = DSVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.config.numbered_images == 3 and again(**inputs).logits.equal(model(**inputs).logits)
    assert number_images(tiny_model()).config.numbered_images == 0
