"""Generation: caches hold the modality of what they hold, and every way of decoding gives the same tokens."""

from typing import Any

import pytest
import torch
from conftest import FAMILIES, IMAGE_ID, PER_IMAGE, batch, random_images, tiny_model
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, QuantizedCache, StaticCache, TextStreamer
from transformers.cache_utils import QuantoQuantizedLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

families = pytest.mark.parametrize("family", FAMILIES)
LAYOUT = "ttItttIIttttttIttt"


def make_cache(kind: str, model: Any) -> Any:
    text = model.config.text_config
    if kind == "static":
        return StaticCache(config=text, max_cache_len=64)
    if kind == "quantized":
        return QuantizedCache(backend="quanto", config=text, nbits=4, residual_length=8)
    return DynamicCache(config=text)


def feature_output(features: torch.Tensor) -> dict[str, BaseModelOutputWithPooling]:
    return {"image": BaseModelOutputWithPooling(pooler_output=[features])}


@pytest.fixture
def exact_quantization(monkeypatch):
    """Quantized caches that lose nothing: what is left to test is where each key went."""
    monkeypatch.setattr(QuantoQuantizedLayer, "_quantize", lambda self, tensor, axis: tensor)
    monkeypatch.setattr(QuantoQuantizedLayer, "_dequantize", lambda self, tensor: tensor)


# transformers quantizes caches of full attention alone
FAMILIES_AND_CACHES = [(family, kind) for family in FAMILIES for kind in ("dynamic", "static")]
FAMILIES_AND_CACHES += [("llama", "quantized"), ("qwen3", "quantized")]


@pytest.mark.parametrize(("family", "kind"), FAMILIES_AND_CACHES)
@pytest.mark.parametrize("chunks", [[1] * 34, [20, 1, 1, 1, 5, 1, 5], [3, 31], [7, 7, 7, 7, 6]])
def test_any_split_into_steps_equals_one_prefill(family, kind, chunks, exact_quantization):
    """Also where a split falls inside an image."""
    model = tiny_model(family)
    inputs = batch(LAYOUT)
    ids = inputs["input_ids"]
    assert sum(chunks) == ids.shape[1]
    with torch.no_grad():
        whole = model(**inputs).logits
        features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
        cache, logits, start = make_cache(kind, model), [], 0
        for length in chunks:
            part = ids[:, start : start + length]
            images = int((part == IMAGE_ID).sum())
            outputs = model(
                input_ids=part,
                past_key_values=cache,
                mm_encoder_outputs=feature_output(features[:images]) if images else None,
                use_cache=True,
            )
            features, start = features[images:], start + length
            logits.append(outputs.logits)
    # Gemma 2's text before its first image is transformers' eager attention, which computes in float32.
    tolerance = 1e-5 if family == "gemma2" else 1e-9
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=tolerance, rtol=tolerance)


def test_a_really_quantized_cache_generates():
    model = tiny_model(dtype=torch.float32, hidden_size=64, head_dim=16)
    inputs = batch(LAYOUT, dtype=torch.float32)
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 8, "axis_key": 0, "axis_value": 0}
    got = greedy(model, inputs, cache_implementation="quantized", cache_config=config)
    assert got.shape == (1, 10)
    assert got[0, 0] == greedy(model, inputs)[0, 0]  # the first token follows from the prefill, which is not quantized


def test_reference_attention_decodes_as_it_prefills_once_every_image_is_seen():
    model = tiny_model("llama", "mmca_reference")
    inputs = batch("tItIttttt")
    with torch.no_grad():
        whole = model(**inputs).logits[:, -3:]
        cache = DynamicCache(config=model.config.text_config)
        prompt = dict(inputs, input_ids=inputs["input_ids"][:, :-3], attention_mask=inputs["attention_mask"][:, :-3])
        prompt.pop("mm_token_type_ids")
        model(**prompt, past_key_values=cache)
        steps = [model(input_ids=ids, past_key_values=cache).logits for ids in inputs["input_ids"][:, -3:].split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-9, rtol=1e-9)


def greedy(model: Any, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    generated = model.generate(**inputs, max_new_tokens=10, do_sample=False, **kwargs)
    return generated[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, a) for f in FAMILIES for a in ("mmca", "causal")] + [("llama", "mmca_reference"), ("qwen3", "mmca_reference")],
)
def test_generated_tokens_follow_from_whole_forward_passes(family, attention):
    model, inputs = tiny_model(family, attention, seed=1), batch(LAYOUT)
    expected, ids = [], inputs["input_ids"]
    for _ in range(10):
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(expected)))
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=types, pixel_values=inputs["pixel_values"]).logits[0, -1]
        if attention != "mmca_reference":
            logits[IMAGE_ID] = -torch.inf
        expected.append(int(logits.argmax()))
        assert expected[-1] != IMAGE_ID, "choose another seed: a forward pass would take this token for an image"
        ids = torch.cat([ids, torch.tensor([[expected[-1]]])], 1)
    assert greedy(model, inputs)[0].tolist() == expected


# Not "mmca_reference": the released code lets padding into its uniform rows.
@pytest.mark.parametrize("attention", ["mmca", "causal"])
@families
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_left_padded_batch_generates_as_its_samples_do(family, attention, cache):
    # transformers' own eager attention (Gemma 2) gives NaN for left padding in float64
    dtype = torch.float32 if attention == "causal" else torch.float64
    model = tiny_model(family, attention, dtype=dtype)
    layouts = ("ttItttt", "tttt", "IttItItttttt", "tttttttttttttttIt")
    inputs = batch(*layouts, dtype=dtype)
    together = greedy(model, inputs, cache_implementation=cache, disable_compile=True)
    first = 0
    for row, layout in enumerate(layouts):
        pixels = inputs["pixel_values"][first : first + layout.count("I")]
        first += layout.count("I")
        ids = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
        alone = greedy(model, {"input_ids": ids, "pixel_values": pixels if len(pixels) else None})
        assert together[row].tolist() == alone[0].tolist()


@families
def test_static_cache_and_modality_told_from_ids(family):
    model, inputs = tiny_model(family), batch(LAYOUT, "tttItttt")
    expected = greedy(model, inputs)
    inputs.pop("mm_token_type_ids")
    assert greedy(model, inputs).equal(expected)
    assert greedy(model, inputs, cache_implementation="static", disable_compile=True).equal(expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_compiled_static_step_gives_the_same_tokens(family, static_steps):
    model, inputs = tiny_model(family, dtype=torch.float32), batch(LAYOUT, dtype=torch.float32)
    expected = greedy(model, inputs)
    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True  # transformers compiles on accelerators alone, unless told so
    got = greedy(model, inputs, cache_implementation="static", compile_config=compile_config)
    assert got.equal(expected)
    assert bool(static_steps) == (family == "llama") == ("_compiled_call" not in model.__dict__)


def test_beams_see_each_samples_own_images():
    model = tiny_model()
    layouts = ("ttItItttt", "tttt", "tIttt")
    inputs = batch(*layouts)
    together = greedy(model, inputs, num_beams=3)
    first = 0
    for row, layout in enumerate(layouts):
        pixels = inputs["pixel_values"][first : first + layout.count("I")]
        first += layout.count("I")
        ids = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
        alone = greedy(model, {"input_ids": ids, "pixel_values": pixels if len(pixels) else None}, num_beams=3)
        assert together[row].tolist() == alone[0].tolist()


def test_sampling_is_seeded_and_the_image_token_never_said():
    model, inputs = tiny_model(), batch(LAYOUT, "ttt")
    with torch.no_grad():
        model.lm_head.weight[IMAGE_ID] = 50 * model.lm_head.weight[IMAGE_ID].abs()
    torch.manual_seed(0)
    one = model.generate(**inputs, max_new_tokens=40, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    two = model.generate(**inputs, max_new_tokens=40, do_sample=True, num_return_sequences=2)
    assert one.equal(two)
    new = one[:, inputs["input_ids"].shape[1] :]
    assert not (new == IMAGE_ID).any()
    greedy_new = greedy(model, inputs, suppress_tokens=[5])  # a caller's own list does not lift it
    assert not (greedy_new == IMAGE_ID).any() and not (greedy_new == 5).any()


class Collector(TextStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_streaming_gives_the_tokens_one_by_one():
    model, inputs = tiny_model(), batch(LAYOUT)
    streamer = Collector()
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False, streamer=streamer)
    assert streamer.tokens == expected[0].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_assisted_decoding_gives_the_same_tokens(family):
    model, inputs = tiny_model(family), batch(LAYOUT)
    expected = greedy(model, inputs)
    assert greedy(model, inputs, assistant_model=tiny_model(family, seed=5)).equal(expected)
    assert greedy(model, inputs, assistant_model=tiny_model(family)).equal(expected)
    assert greedy(model, inputs, assistant_model=tiny_model(family, hidden_size=64)).equal(expected)
    assert greedy(model, inputs, prompt_lookup_num_tokens=3).equal(expected)
    text_alone = AutoModelForCausalLM.from_config(model.config.text_config).to(torch.float64).eval()
    assert greedy(model, inputs, assistant_model=text_alone).equal(expected)


@pytest.mark.parametrize("chunk", [4, 7, 16])
def test_chunked_prefill_gives_the_same_tokens(chunk):
    model, inputs = tiny_model(), batch(LAYOUT, "tttIttt")
    assert greedy(model, inputs, prefill_chunk_size=chunk).equal(greedy(model, inputs))


@families
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("new_alone", [False, True])
def test_a_conversation_continues_from_its_cache(family, kind, new_alone):
    """The second round sees the first one's images, which are not encoded again."""
    model, first = tiny_model(family), batch("ttItttIt")
    cache = StaticCache(config=model.config.text_config, max_cache_len=128) if kind == "static" else None
    kwargs = {"past_key_values": cache} if cache is not None else {}
    answer = model.generate(
        **first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, disable_compile=True, **kwargs
    )
    second = batch("ttIttt", seed=7)["input_ids"]
    ids = torch.cat([answer.sequences, second], 1)
    new_image = random_images(1, seed=3)
    whole = {"input_ids": ids, "pixel_values": torch.cat([first["pixel_values"], new_image])}
    expected = greedy(model, whole)

    encoded = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len((args or list(kwargs.values()))[0])), with_kwargs=True
    )
    again = {"input_ids": ids, "pixel_values": new_image if new_alone else whole["pixel_values"]}
    got = greedy(model, again, past_key_values=answer.past_key_values, disable_compile=True)
    hook.remove()
    assert got.equal(expected)
    assert encoded == [1]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_conversation_continues_from_its_new_tokens_alone(kind):
    model, first = tiny_model(), batch("ttItttIt")
    answer = model.generate(
        **first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, past_key_values=make_cache(kind, model)
    )
    new = batch("ttIttt", seed=7)
    tail = answer.sequences[:, -1:]  # said, but not in the cache yet
    ids = torch.cat([tail, new["input_ids"]], 1)
    whole = torch.cat([answer.sequences, new["input_ids"]], 1)
    expected = greedy(model, {"input_ids": whole, "pixel_values": torch.cat([first["pixel_values"], new["pixel_values"]])})
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(whole), "pixel_values": new["pixel_values"]}
    assert greedy(model, inputs, past_key_values=answer.past_key_values).equal(expected)


def test_a_cache_of_unknown_modality_is_refused():
    model, inputs = tiny_model(), batch("ttIttt")
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.layers[0].mm_token_type_ids = None
        with pytest.raises(ValueError, match="10 tokens of unknown modality; pass mm_token_type_ids"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_inputs_embeds_generate_with_their_modality():
    model, inputs = tiny_model(), batch("ttIttt")
    expected = greedy(model, inputs)
    with torch.no_grad():
        features = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == IMAGE_ID] = features.flatten(0, 1)
    got = model.generate(
        inputs_embeds=embeds, mm_token_type_ids=inputs["mm_token_type_ids"], max_new_tokens=10, do_sample=False
    )
    assert got.equal(expected)
    with pytest.raises(ValueError, match="pass mm_token_type_ids"), torch.no_grad():
        model(inputs_embeds=embeds)


def test_image_features_can_be_passed_in():
    model, inputs = tiny_model(), batch("ttIttt", "Itt")
    with torch.no_grad():
        expected = model(**inputs)
        assert expected.image_hidden_states.shape == (2, PER_IMAGE, 32)
        features = model.get_image_features(inputs.pop("pixel_values"))
        again = model(**inputs, mm_encoder_outputs={"image": features})
    assert again.logits.equal(expected.logits)
    assert greedy(model, inputs, mm_encoder_outputs={"image": features}).shape == (2, 10)
