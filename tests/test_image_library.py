"""The image library: the same answers as without it, from images that are encoded once."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, PER_IMAGE, batch, random_images, tiny_model
from transformers import DynamicCache, StaticCache

from dsvl.image_library import ImageLibrary, content_keys

SIZE = 2**26
LAYOUTS = ("ttIItIttttt", "tItt", "tttttt", "ttIt")


def with_library(model: Any, **options: Any) -> Any:
    model.image_library = ImageLibrary(model, options.pop("memory_bytes", SIZE), **options)
    return model


def without(model: Any, **inputs: Any) -> Any:
    """The result of generate() without the model's library."""
    library, model.image_library = model.image_library, None
    try:
        return model.generate(**inputs)
    finally:
        model.image_library = library


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tiles of every call of the vision tower."""
    from dsvl.modeling_dsvl import DSVLModel

    calls: list[int] = []
    encode = DSVLModel.encode

    def counted(self: Any, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(pixel_values))
        return encode(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(DSVLModel, "encode", counted)
    return calls


@pytest.mark.parametrize("positions", ["token", "image"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_answers_are_those_without_a_library(family: str, positions: str) -> None:
    model = with_library(tiny_model(family, image_positions=positions))
    inputs = batch(*LAYOUTS)
    for how in (
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
    ):
        torch.manual_seed(3)
        expected = without(model, **inputs, max_new_tokens=6, **how)
        for _ in range(2):  # encoded, and found
            torch.manual_seed(3)
            assert model.generate(**inputs, max_new_tokens=6, **how).equal(expected)
    counts = model.image_library.counts
    assert counts.misses == 5 and counts.hits == 5 * 7


def test_hits_misses_and_repeated_images_share_a_batch(towers: list[int]) -> None:
    model = with_library(tiny_model())
    images = random_images(4)
    inputs = batch("tIt", "tIIt", "tttt", "tIt", "tIt")
    model.generate(**batch("tIt") | {"pixel_values": images[:1]}, max_new_tokens=1)
    towers.clear()
    inputs["pixel_values"] = images[[0, 1, 0, 1, 1]]
    expected = without(model, **inputs, max_new_tokens=6, do_sample=False)
    towers.clear()
    assert model.generate(**inputs, max_new_tokens=6, do_sample=False).equal(expected)
    assert towers == [1]  # image 1 alone, once
    assert model.image_library.last_encoded == [False, True, False, True, True]


def test_sixteen_questions_about_one_image_encode_it_once(towers: list[int]) -> None:
    model = with_library(tiny_model())
    inputs = batch(*["tI" + "t" * (1 + number % 3) for number in range(16)])
    inputs["pixel_values"] = random_images(1).expand(16, -1, -1, -1)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert towers == [1]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
def test_eight_bits_change_log_probabilities_a_little(family: str) -> None:
    model = with_library(tiny_model(family), quantize=True)
    inputs = batch(*LAYOUTS)
    how = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    exact = without(model, **inputs, **how)
    first, second = (model.generate(**inputs, **how) for _ in range(2))
    assert first.scores[0].equal(second.scores[0])  # found or encoded, the same 8 bits
    finite = exact.scores[0].isfinite()
    error = (first.scores[0].log_softmax(-1) - exact.scores[0].log_softmax(-1))[finite].abs().max()
    assert 1e-6 < error < 0.05
    whole = tiny_model(family)
    with_library(whole)
    whole.generate(**inputs, max_new_tokens=1)
    assert (
        model.image_library.tiers.memory.bytes < whole.image_library.tiers.memory.bytes / 3
    )  # float64 and 8 bits with scales


@pytest.mark.parametrize("attention", ["causal", "mmca_reference"])
def test_where_reuse_is_not_exact_features_are_kept(attention: str, towers: list[int]) -> None:
    model = with_library(tiny_model(attention=attention))
    inputs = batch(*LAYOUTS)
    for how in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        torch.manual_seed(1)
        expected = without(model, **inputs, max_new_tokens=5, **how)
        for _ in range(2):
            torch.manual_seed(1)
            assert model.generate(**inputs, max_new_tokens=5, **how).equal(expected)
    towers.clear()
    model.generate(**inputs, max_new_tokens=1)
    assert towers == []
    assert "features only" in model.image_library.describe()
    assert all(name.startswith("features-") for name in model.image_library.tiers.memory.names())


def test_reversed_images_keep_their_order(towers: list[int]) -> None:
    model = tiny_model(attention="mmca_reference")
    model.config.reversed_images = True
    with_library(model)
    inputs = batch("tIIIt", "tIIt")
    expected = without(model, **inputs, max_new_tokens=5, do_sample=False)
    for _ in range(2):
        assert model.generate(**inputs, max_new_tokens=5, do_sample=False).equal(expected)


@pytest.mark.parametrize(
    "how",
    [
        {"prompt_lookup_num_tokens": 2},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"guidance_scale": 1.5},
    ],
)
def test_other_ways_to_decode(how: dict[str, Any]) -> None:
    model = with_library(tiny_model())
    inputs = batch("tItIttt")
    expected = without(model, **inputs, max_new_tokens=5, do_sample=False, **how)
    for _ in range(2):
        got = model.generate(**inputs, max_new_tokens=5, do_sample=False, **how)
        ids, expected_ids = (one if isinstance(one, torch.Tensor) else one.sequences for one in (got, expected))
        assert ids.equal(expected_ids)
    if "output_hidden_states" in how:
        assert len(got.hidden_states[0][0][0]) == inputs["input_ids"].shape[1]
    assert model.image_library.counts.hits == 2


def test_a_prompt_that_ends_with_an_image_uses_features() -> None:
    model = with_library(tiny_model())
    inputs = batch("ttI")
    assert model.generate(**inputs, max_new_tokens=5, do_sample=False).equal(
        without(model, **inputs, max_new_tokens=5, do_sample=False)
    )
    assert model.image_library.tiers.memory.names()[0].startswith("features-")


def test_wrong_counts_raise_what_they_raise_without_a_library() -> None:
    model = with_library(tiny_model())
    inputs = batch("tIt") | {"pixel_values": random_images(2)}
    for run in (model.generate, lambda **inputs: without(model, **inputs)):
        with pytest.raises(ValueError, match="pass as many images as the texts name"):
            run(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_later_turn(kind: Any, towers: list[int]) -> None:
    """Neither the tower nor the image tokens run again."""
    model = with_library(tiny_model())
    images = random_images(2)
    model.generate(**batch("tIIt") | {"pixel_values": images}, max_new_tokens=1)
    turns = []
    for generate in (model.generate, lambda **inputs: without(model, **inputs)):
        cache = kind(config=model.config.text_config, **({"max_cache_len": 64} if kind is StaticCache else {}))
        first = batch("ttItt") | {"pixel_values": images[:1], "past_key_values": cache}
        ids = generate(**first, max_new_tokens=3, do_sample=False)
        whole = torch.cat([ids, batch("tItt", seed=2)["input_ids"]], 1)
        towers.clear()
        turn = {"input_ids": whole, "pixel_values": images[:2], "past_key_values": cache}  # of the whole conversation
        turns.append(generate(**turn, max_new_tokens=8, do_sample=False))
        assert towers == ([] if generate == model.generate else [1])
    assert turns[0].equal(turns[1])


# ----------------------------------------------------------------------------------------------------------------------
# Weights that change


def test_changed_weights_are_never_served() -> None:
    model = with_library(tiny_model())
    inputs = batch(*LAYOUTS)
    model.generate(**inputs, max_new_tokens=1)
    with torch.no_grad():
        model.model.multi_modal_projector.get_parameter(
            next(name for name, _ in model.model.multi_modal_projector.named_parameters())
        )[0, 3] += 2.0  # a single number
    assert model.generate(**inputs, max_new_tokens=6, do_sample=False).equal(
        without(model, **inputs, max_new_tokens=6, do_sample=False)
    )
    assert model.image_library.counts.weight_changes == 1
    assert len(model.image_library.tiers.memory) == 5  # the old entries are gone


def test_every_step_of_a_training_drops_the_library() -> None:
    model = with_library(tiny_model(dtype=torch.float32))
    inputs = batch("tItt", dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert ids.equal(without(model, **inputs, max_new_tokens=4, do_sample=False))
        assert len(model.image_library.tiers.memory) == 1 and model.image_library.counts.misses == step + 1
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()


def test_adapters_that_are_switched_off_are_other_weights() -> None:
    peft = pytest.importorskip("peft")
    model = with_library(tiny_model())
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    )
    inputs = batch("tItItt")
    for _ in range(2):
        assert adapted.generate(**inputs, max_new_tokens=6, do_sample=False).equal(
            without(model, **inputs, max_new_tokens=6, do_sample=False)
        )
        with adapted.disable_adapter():
            assert adapted.generate(**inputs, max_new_tokens=6, do_sample=False).equal(
                without(model, **inputs, max_new_tokens=6, do_sample=False)
            )
    assert model.image_library.counts.weight_changes == 4  # with the adapters, and three times back and forth


def test_dropout_in_training_mode_keeps_nothing() -> None:
    model = with_library(tiny_model(attention_dropout=0.1)).train()
    model.generate(**batch("tItt"), max_new_tokens=1)
    assert len(model.image_library.tiers.memory) == 0
    model.eval().generate(**batch("tItt"), max_new_tokens=1)
    assert len(model.image_library.tiers.memory) == 1


def test_a_copy_of_a_model_shares_the_library_and_not_the_entries() -> None:
    model = with_library(tiny_model())
    other = copy.deepcopy(model)
    assert other.image_library is model.image_library
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.5
    inputs = batch("tItIt")
    for one in (model, other, model):
        assert one.generate(**inputs, max_new_tokens=6, do_sample=False).equal(
            without(one, **inputs, max_new_tokens=6, do_sample=False)
        )


# ----------------------------------------------------------------------------------------------------------------------
# Bounds


def test_the_least_recently_used_images_are_dropped() -> None:
    model = tiny_model()
    size = PER_IMAGE * ImageLibrary(model, SIZE).token_bytes(model)
    with_library(model, memory_bytes=3 * size)
    images = random_images(5)

    def show(*numbers: int) -> None:
        inputs = batch("t" + "I" * len(numbers) + "t") | {"pixel_values": images[list(numbers)]}
        model.generate(**inputs, max_new_tokens=1)

    library = model.image_library
    show(0, 1, 2)
    assert library.tiers.memory.bytes == 3 * size
    show(0)
    show(3)  # in the place of 1
    show(0, 2, 3)
    assert library.counts.misses == 4
    show(1)
    assert library.counts.misses == 5 and library.tiers.memory.bytes == 3 * size and library.tiers.memory.evicted == 2


def test_more_images_than_fit_are_encoded_as_without_a_library() -> None:
    model = tiny_model()
    size = PER_IMAGE * ImageLibrary(model, SIZE).token_bytes(model)
    with_library(model, memory_bytes=2 * size)
    inputs = batch("tIIIt")
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).equal(
        without(model, **inputs, max_new_tokens=4, do_sample=False)
    )
    assert model.image_library.counts.bypassed == 1 and len(model.image_library.tiers.memory) == 0


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("masks_dsvl.py", True),
        ("acceleration/image_reuse.py", True),
        ("acceleration/attention/kernels.py", True),
        ("acceleration/reuse/__init__.py", True),
        ("image_library/library.py", True),
        ("chat/conversation.py", False),
    ],
)
def test_the_version_of_the_code_changes_with_each_file_that_computes_images(
    name: str, counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("acceleration", "chat", "image_library"):
        shutil.copytree(content_keys.PACKAGE / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in content_keys.PACKAGE.glob("*_dsvl.py"):
        shutil.copy(path, tmp_path)
    before = content_keys.code_version()
    monkeypatch.setattr(content_keys, "PACKAGE", tmp_path)
    version = content_keys.code_version.__wrapped__  # not the one that is kept
    assert version() == before
    with (tmp_path / name).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert (version() != before) == counts
