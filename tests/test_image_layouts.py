"""Image layouts: every processor, projector and model against plain definitions, for images of any size."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_models import (
    CASES,
    NATIVE_PATCH,
    SIDE,
    SIZES,
    VARYING,
    layout_config,
    layout_parts,
    layout_processor,
    model_inputs,
    noise,
    question,
    shared_parts,
)
from PIL import Image, ImageChops
from training_runs import environment
from transformers import DynamicCache, Siglip2ImageProcessor, StaticCache
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches
from transformers.utils import is_torchvision_available

from dsvl import DSVLConfig, DSVLForConditionalGeneration, ImageKVCache
from dsvl.image_layouts_dsvl import FRAME, ImageLayout, best_grid, letterbox, mean_colour, native_size
from dsvl.image_reading_dsvl import image_size, pillow_filter, read_image
from dsvl.projectors_dsvl import pixel_shuffle
from dsvl.utils.cache_cropping import crop

every_case = pytest.mark.parametrize("case", CASES)
every_varying_case = pytest.mark.parametrize("case", VARYING)
lengths = st.integers(1, 300)
LARGE = [(1, 1), (1, 20_000), (20_000, 1), (4_000, 3_000), (3, 7), (7, 3)]


def convert(image: Image.Image, processor: Any) -> torch.Tensor:
    """(3, height, width): rescaled and normalized, value by value."""
    tower = processor.image_processor
    values = torch.tensor(np.asarray(image), dtype=torch.float64).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(one, dtype=torch.float64)[:, None, None] for one in (tower.image_mean, tower.image_std))
    return ((values - mean) / std).float()


# -- letterboxes and grids -----------------------------------------------------------------------------------------------


@given(lengths, lengths, st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_letterbox_is_the_whole_image_in_the_middle(width, height, wide, high):
    image, colour = noise((width, height)), (1, 2, 3)
    boxed = letterbox(image, (wide, high), colour, Image.Resampling.BICUBIC)
    assert boxed.size == (wide, high)
    scale = min(wide / width, high / height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    assert (inner[0] == wide or inner[1] == high) and inner[0] <= wide and inner[1] <= high
    left, top = (wide - inner[0]) // 2, (high - inner[1]) // 2
    expected = np.empty((high, wide, 3), dtype=np.uint8)
    expected[:] = colour
    expected[top : top + inner[1], left : left + inner[0]] = np.asarray(image.resize(inner, Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(boxed), expected)


def pixels_kept(height: int, width: int, rows: int, columns: int, side: int) -> float:
    scale = min(rows * side / height, columns * side / width)
    return min(1.0, scale)


@given(lengths, lengths, st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_the_grid_keeps_most_pixels_with_the_fewest_tiles(height, width, side, max_tiles):
    grids = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles + 1) if r * c <= max_tiles]
    most = max(pixels_kept(height, width, *grid, side) for grid in grids)
    best = [grid for grid in grids if pixels_kept(height, width, *grid, side) == most]
    fewest = min(r * c for r, c in best)
    squarest = min(abs(r - c) for r, c in best if r * c == fewest)
    rows, columns = best_grid(height, width, side, max_tiles)
    assert (rows, columns) in best and rows * columns == fewest and abs(rows - columns) == squarest
    # An image and the same image turned have the same tiles.
    assert sorted(best_grid(width, height, side, max_tiles)) == sorted((rows, columns))


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([4, 14, 16, 32]), st.integers(1, 1024))
@settings(max_examples=150, deadline=None)
def test_native_sizes_are_those_of_siglip_2(height, width, side, max_tokens):
    made = native_size(height, width, side, max_tokens)
    assert made == get_image_size_for_max_num_patches(height, width, side, max_tokens)
    rows, columns = made[0] // side, made[1] // side
    assert made == (rows * side, columns * side) and 1 <= rows * columns <= max_tokens


# -- tiles ---------------------------------------------------------------------------------------------------------------


@given(lengths, lengths, st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_tiles_are_parts_of_the_scaled_image(width, height, max_tiles):
    layout, colour, bicubic = ImageLayout("tiles", SIDE, max_tiles, 0), (9, 8, 7), Image.Resampling.BICUBIC
    image = noise((width, height))
    first, *others = layout.tiles(image, colour, bicubic)
    assert np.array_equal(np.asarray(first), np.asarray(letterbox(image, (SIDE, SIDE), colour, bicubic)))
    rows, columns = layout.grid(height, width)
    assert len(others) == (0 if rows * columns == 1 else rows * columns)
    joined = np.zeros((rows * SIDE, columns * SIDE, 3), dtype=np.uint8)
    for number, tile in enumerate(others):
        top, left = SIDE * (number // columns), SIDE * (number % columns)
        joined[top : top + SIDE, left : left + SIDE] = np.asarray(tile)
    if others:
        whole = letterbox(image, (columns * SIDE, rows * SIDE), colour, bicubic)
        assert np.array_equal(joined, np.asarray(whole))


@pytest.mark.parametrize("name", ["pad", "tiles", "native"])
@pytest.mark.parametrize("size", [(61, 23), (23, 61), (120, 9), (30, 30)])
def test_nothing_is_cut_off(name, size):
    """Every pixel of the source changes some tile; under "tiles" some tile of the grid, too."""
    layout = ImageLayout(name, SIDE if name != "native" else NATIVE_PATCH, 6, 36)

    def tiles(image: Image.Image) -> list[Image.Image]:
        return layout.tiles(image, (0, 0, 0), Image.Resampling.BICUBIC)

    black = Image.new("RGB", size)
    before = tiles(black)
    for x in range(0, size[0]):
        for y in {0, size[1] // 2, size[1] - 1}:
            changed = black.copy()
            # A patch of three pixels: a single one may round to nothing where the image shrinks a lot.
            changed.paste((255, 255, 255), (max(0, x - 1), max(0, y - 1), min(size[0], x + 2), min(size[1], y + 2)))
            differ = [ImageChops.difference(a, b).getbbox() is not None for a, b in zip(before, tiles(changed), strict=True)]
            assert differ[0] and (len(differ) == 1 or any(differ[1:])), (x, y)


def test_a_frame_of_a_video_is_one_tile():
    layout, frame = ImageLayout("tiles", SIDE, 6, 0), noise((100, 60))
    assert len(layout.tiles(frame, (0, 0, 0), 3)) > 1
    frame.info[FRAME] = True
    assert len(layout.tiles(frame, (0, 0, 0), 3)) == 1
    processor = layout_processor("tiles")
    assert processor(images=[frame], return_tensors="pt")["num_tiles"].tolist() == [1]


def test_the_texts_of_tiles_stand_behind_them_in_reading_order():
    processor = layout_processor("tiles")
    image = noise((3 * SIDE, SIDE))
    text = processor.decode(model_inputs(processor, [question([image])])["input_ids"][0])
    tile = "<image>" * processor.image_seq_length
    places = ["whole", "row 1 column 1", "row 1 column 2", "row 1 column 3"]
    assert "".join(text.split()).count("".join("\n".join(tile + place for place in places).split())) == 1
    alone = processor.decode(model_inputs(processor, [question([noise((5, 5))])])["input_ids"][0])
    assert alone.count("<image>") == processor.image_seq_length and "whole" not in alone


def test_borders_have_the_colour_that_becomes_zero():
    processor = layout_processor("pad")
    tall = processor(images=[noise((2, 28))], return_tensors="pt")["pixel_values"][0]
    assert tall[:, :, 0].abs().max() < 0.02 and tall[:, :, 13].abs().max() > 0.1
    assert mean_colour(SimpleNamespace(image_mean=0.5)) == (128, 128, 128)
    assert mean_colour(SimpleNamespace(image_mean=[1, 0, 0.2], do_normalize=True)) == (255, 0, 51)
    assert mean_colour(SimpleNamespace(image_mean=[1, 1, 1], do_normalize=False)) == (0, 0, 0)
    assert mean_colour(SimpleNamespace()) == (0, 0, 0)


@pytest.mark.parametrize("case", ["pad", "tiles", "native"])
@pytest.mark.parametrize("resample", [None, 0, 2])
def test_pixel_values_are_the_tiles_rescaled_and_normalized(case, resample):
    processor = layout_processor(case)
    images = [noise(size, seed) for seed, size in enumerate(SIZES)]
    options = {} if resample is None else {"resample": resample}
    made = processor(images=images, return_tensors="pt", **options)
    used = pillow_filter(processor.image_processor.resample if resample is None else resample)
    tiles = [processor.layout.tiles(image, mean_colour(processor.image_processor), used) for image in images]
    flat = [convert(tile, processor) for one in tiles for tile in one]
    if case == "native":
        for patches, mask, shape, tile in zip(
            made["pixel_values"], made["pixel_attention_mask"], made["spatial_shapes"].tolist(), flat, strict=True
        ):
            rows, columns = shape
            assert int(mask.sum()) == rows * columns and not patches[rows * columns :].any()
            for number in range(rows * columns):
                top, left = NATIVE_PATCH * (number // columns), NATIVE_PATCH * (number % columns)
                patch = tile[:, top : top + NATIVE_PATCH, left : left + NATIVE_PATCH].permute(1, 2, 0).flatten()
                torch.testing.assert_close(patches[number], patch, atol=1e-6, rtol=1e-6)
        return
    torch.testing.assert_close(made["pixel_values"], torch.stack(flat), atol=1e-6, rtol=1e-6)
    assert ("num_tiles" in made) == (case == "tiles")
    if case == "tiles":
        assert made["num_tiles"].tolist() == list(map(len, tiles))


def test_native_images_are_siglip_2s_own():
    processor = layout_processor("native")
    for seed, size in enumerate([*SIZES, (1, 50), (200, 3)]):
        image = noise(size, seed)
        own = Siglip2ImageProcessor(patch_size=NATIVE_PATCH, max_num_patches=12)([image], return_tensors="pt")
        made = processor(images=[image], return_tensors="pt")
        for name in own:
            assert made[name].equal(own[name]), name


def test_arguments_that_the_layout_decides_are_refused():
    with pytest.raises(ValueError, match="size, do_center_crop cannot be chosen in a call: image_layout='tiles'"):
        layout_processor("tiles")(images=[noise((5, 5))], size={"height": 3, "width": 3}, do_center_crop=True)


@pytest.mark.parametrize("case", ["pad", "tiles", "native"])
def test_both_forms_of_image_processors_make_nearly_the_same(case):
    if not is_torchvision_available():
        pytest.skip("torchvision is not installed; without it there is one form alone")
    from transformers import CLIPImageProcessor, CLIPImageProcessorPil, Siglip2ImageProcessorPil

    processor = layout_processor(case)
    images = [noise(size) for size in SIZES]
    made = processor(images=images, return_tensors="pt")
    form = Siglip2ImageProcessorPil if case == "native" else CLIPImageProcessorPil
    assert not isinstance(processor.image_processor, form) and CLIPImageProcessor is not CLIPImageProcessorPil
    processor.image_processor = form(**{k: v for k, v in processor.image_processor.to_dict().items() if k[0] != "_"})
    other = processor(images=images, return_tensors="pt")
    for name in other:
        torch.testing.assert_close(made[name], other[name], atol=1e-5, rtol=1e-5)


# -- sizes of files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_the_size_by_the_header_is_that_of_the_upright_image(tmp_path, form):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        noise((30, 20)).save(tmp_path / "one", form, exif=exif)
        for source in (tmp_path / "one", (tmp_path / "one").read_bytes(), Image.open(tmp_path / "one")):
            assert image_size(source) == read_image(tmp_path / "one").size == ((30, 20) if orientation < 5 else (20, 30))


def test_a_png_that_turns_itself_behind_its_pixels_is_measured_right(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((30, 20)).save(tmp_path / "before.png", exif=exif)
    whole = (tmp_path / "before.png").read_bytes()
    start = whole.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    end = whole.index(b"IEND") - 4
    (tmp_path / "after.png").write_bytes(whole[:start] + whole[stop:end] + whole[start:stop] + whole[end:])
    assert read_image(tmp_path / "after.png").size == image_size(tmp_path / "after.png") == (20, 30)


def test_the_pixels_of_a_file_are_not_decoded_to_measure_it(tmp_path, monkeypatch):
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        noise((30, 20)).save(tmp_path / f"one.{form}", form)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for file in tmp_path.iterdir():
        assert image_size(file) == (30, 20)


# -- counting --------------------------------------------------------------------------------------------------------------


@every_case
def test_tokens_are_counted_as_they_are(case, tmp_path):
    _, processor = shared_parts(case)
    paths = []
    for seed, size in enumerate(SIZES):
        noise(size, seed).save(tmp_path / f"{seed}.png")
        paths.append(str(tmp_path / f"{seed}.png"))
    for count in range(len(SIZES) + 1):
        conversation = question([noise(size, seed) for seed, size in enumerate(SIZES[:count])])
        real = model_inputs(processor, [conversation])["input_ids"].shape[1]
        named = [{"role": "user", "content": [{"type": "image", "path": path} for path in paths[:count]]}]
        named[0]["content"].append(conversation[0]["content"][-1])
        assert processor.count_tokens(conversation, add_generation_prompt=True) == real
        assert processor.count_tokens(named, add_generation_prompt=True) == real


@every_case
def test_what_vllm_asks_for_is_what_an_image_takes(case):
    model, processor = shared_parts(case)
    sizes = [(height, width) for width, height in SIZES]
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    for size, tokens, tiles in zip(SIZES, counted["num_image_tokens"], counted["num_image_patches"], strict=True):
        made = processor(text="<image>", images=[noise(size)], return_tensors="pt", add_special_tokens=False)
        assert made["input_ids"].shape[1] == tokens and len(made["pixel_values"]) == tiles
        lengths = processor.tile_lengths(size[1], size[0])
        assert len(lengths) == tiles and int(made["mm_token_type_ids"].sum()) == sum(lengths)
        named = {name: made[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes") if name in made}
        named["pixel_values"] = named["pixel_values"].double()
        assert [len(tile) for tile in model.get_image_features(**named).pooler_output] == lengths
        assert max(lengths) <= model.config.image_seq_length


# -- projectors ------------------------------------------------------------------------------------------------------------


def plain_shuffle(features: torch.Tensor, rows: int, columns: int, side: int) -> torch.Tensor:
    made = []
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            square = []
            for row in range(top, top + side):
                for column in range(left, left + side):
                    inside = row < rows and column < columns
                    square.append(features[row * columns + column] if inside else torch.zeros_like(features[0]))
            made.append(torch.cat(square))
    return torch.stack(made)


@pytest.mark.parametrize(("rows", "columns", "side"), [(4, 4, 2), (3, 5, 2), (1, 7, 2), (6, 6, 3), (2, 2, 4), (5, 3, 1)])
def test_pixel_shuffle_joins_squares(rows, columns, side):
    features = torch.randn(2, rows * columns, 3)
    made = pixel_shuffle(features, rows, columns, side)
    for one, expected in zip(made, features, strict=True):
        assert one.equal(plain_shuffle(expected, rows, columns, side))
    assert made.shape[1] == math.ceil(rows / side) * math.ceil(columns / side)


def test_pixel_shuffle_has_the_order_of_idefics_3_smolvlm_and_internvl():
    """Their weights fit as they are: squares row by row, and in a square the features row by row."""
    features = torch.randn(2, 36, 5)
    assert pixel_shuffle(features, 6, 6, 2).equal(Idefics3Connector.pixel_shuffle(None, features, 2))
    assert pixel_shuffle(features, 6, 6, 3).equal(Idefics3Connector.pixel_shuffle(None, features, 3))
    features = torch.randn(2, 36, 4)  # whose width it halves on the way
    theirs = InternVLModel.pixel_shuffle(None, features.unflatten(1, (6, 6)), 0.5)
    assert pixel_shuffle(features, 6, 6, 2).equal(theirs.flatten(1, 2))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """SigLIP 2 resizes its positions by a product in float32, whose rounding depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@every_varying_case
def test_each_image_is_projected_as_if_it_were_alone(case, one_thread):
    model, processor = shared_parts(case)
    made = processor(images=[noise(size, seed) for seed, size in enumerate(SIZES)], return_tensors="pt")
    inputs = {n: made[n] for n in ("pixel_values", "pixel_attention_mask", "spatial_shapes") if n in made}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    together = model.get_image_features(**inputs)
    for number in range(len(inputs["pixel_values"])):
        alone = {name: values[number : number + 1] for name, values in inputs.items()}
        if "spatial_shapes" in alone:  # without any padding
            patches = int(alone["spatial_shapes"].prod())
            alone |= {name: alone[name][:, :patches] for name in ("pixel_values", "pixel_attention_mask")}
        one = model.get_image_features(**alone).pooler_output[0]
        torch.testing.assert_close(together.pooler_output[number], one, atol=1e-10, rtol=1e-10)
    # The tower's features, computed earlier, become the same.
    again = model.model.project_features(together.last_hidden_state, inputs.get("spatial_shapes"))
    for one, other in zip(again.pooler_output, together.pooler_output, strict=True):
        assert one.equal(other)


# -- the whole model -------------------------------------------------------------------------------------------------------


def conversations() -> list[Any]:
    counts = (2, 1, 0, 3)
    return [question([noise(size, i) for i, size in enumerate(SIZES[:count])], f"{count}?") for count in counts]


def positions(inputs: dict[str, Any]) -> torch.Tensor:
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


@every_case
def test_a_padded_batch_of_any_images_is_each_row_alone(case):
    model, processor = shared_parts(case)
    with torch.no_grad():
        for side in ("left", "right"):
            inputs = model_inputs(processor, conversations(), side)
            logits = model(**inputs, position_ids=positions(inputs)).logits
            for row, conversation in enumerate(conversations()):
                alone = model(**model_inputs(processor, [conversation])).logits[0]
                own = logits[row][inputs["attention_mask"][row].bool()]
                torch.testing.assert_close(own, alone, atol=1e-9, rtol=1e-9)


@every_case
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_step_by_step_is_the_whole_sequence(case, kind):
    model, processor = shared_parts(case)
    inputs = model_inputs(processor, conversations())
    more = torch.randint(3, 300, (len(inputs["input_ids"]), 3), generator=torch.Generator().manual_seed(0))
    whole = dict(inputs, input_ids=torch.cat([inputs["input_ids"], more], 1))
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    del whole["mm_token_type_ids"]
    text = model.config.text_config
    cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=512)
    with torch.no_grad():
        expected = model(**whole, position_ids=positions(whole)).logits
        length = inputs["input_ids"].shape[1]
        got = [model(**inputs, position_ids=positions(inputs), past_key_values=cache, use_cache=True).logits[:, -1]]
        for step in range(3):
            mask = whole["attention_mask"][:, : length + step + 1]
            here = positions(whole)[:, length + step : length + step + 1]
            got.append(
                model(more[:, step : step + 1], attention_mask=mask, position_ids=here, past_key_values=cache).logits[:, -1]
            )
    for step, logits in enumerate(got):
        torch.testing.assert_close(logits, expected[:, length - 1 + step], atol=1e-9, rtol=1e-9)


@every_case
def test_batches_beams_and_image_caches_answer_as_each_alone(case):
    model, processor = shared_parts(case)
    batch = model_inputs(processor, conversations())
    options = {"max_new_tokens": 5, "do_sample": False}
    names = [n for n in ("pixel_values", "pixel_attention_mask", "spatial_shapes", "num_tiles") if n in batch]
    cache = model.encode_images(**{name: batch[name] for name in names}, image_numbers=[1, 2, 1, 1, 2, 3])
    assert len(cache) == 6 and sum(map(len, cache.tile_lengths)) == len(batch["pixel_values"])
    for beams in (1, 2):
        together = model.generate(**batch, **options, num_beams=beams)[:, -5:]
        over = {name: value for name, value in batch.items() if name not in names}
        assert model.generate(**over, image_cache=cache, **options, num_beams=beams)[:, -5:].equal(together)
        # Those who pass on everything else that the processor gave need not know what belongs to images.
        over = {name: value for name, value in batch.items() if name != "pixel_values"}
        assert model.generate(**over, image_cache=cache, **options, num_beams=beams)[:, -5:].equal(together)
        for row, conversation in enumerate(conversations()):
            alone = model.generate(**model_inputs(processor, [conversation]), **options, num_beams=beams)
            assert alone[0, -5:].equal(together[row]), row


@every_varying_case
def test_image_caches_serve_models_whose_images_share_positions(case):
    model, processor = layout_parts(case, image_positions="image")
    # Images next to each other, with no text between them, in one row; padding in the other.
    texts = [f"{processor.image_token * 3} and?", "no image?", f"{processor.image_token} this"]
    images = [[noise(size, seed) for seed, size in enumerate(SIZES[:3])], [], [noise(SIZES[3], 3)]]
    made = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    inputs = dict(made, pixel_values=made["pixel_values"].double())
    names = [n for n in ("pixel_values", "pixel_attention_mask", "spatial_shapes", "num_tiles") if n in inputs]
    cache = model.encode_images(**{name: inputs[name] for name in names}, image_numbers=[1, 2, 3, 1])
    text = {name: value for name, value in inputs.items() if name not in names}
    for beams in (1, 2):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        assert model.generate(**text, image_cache=cache, **options).equal(model.generate(**inputs, **options))
    with torch.no_grad():
        expected = model(**inputs, logits_to_keep=1).logits
    del text["mm_token_type_ids"]
    torch.testing.assert_close(model.prefill(**text, image_cache=cache).logits, expected, atol=1e-9, rtol=1e-9)
    twice = {name: value.repeat_interleave(2, 0) for name, value in text.items()}
    got = model.prefill(**twice, image_cache=cache, copies=2).logits
    torch.testing.assert_close(got, expected.repeat_interleave(2, 0), atol=1e-9, rtol=1e-9)


@every_varying_case
def test_an_image_cache_is_taken_apart_by_images(case, tmp_path):
    model, processor = shared_parts(case)
    one = model_inputs(processor, [question([noise(size, seed) for seed, size in enumerate(SIZES[:3])])])
    names = [n for n in ("pixel_values", "pixel_attention_mask", "spatial_shapes", "num_tiles") if n in one]
    cache = model.encode_images(**{name: one[name] for name in names}, chunk_size=2)
    assert cache.num_tiles == (one["num_tiles"].tolist() if "num_tiles" in one else [1, 1, 1])
    cache.save(tmp_path / "images.safetensors")
    for same in (
        ImageKVCache.load(tmp_path / "images.safetensors"),
        ImageKVCache.cat([cache[2], cache[:2]])[[1, 2, 0]],
        ImageKVCache.cat(list(cache)),
        cache[torch.tensor([0, 1, 2])],
        cache.to(torch.float64),
    ):
        assert same.tile_lengths == cache.tile_lengths and same.numbers == cache.numbers == (1, 2, 3)
        assert same.keys.equal(cache.keys) and same.values.equal(cache.values)
    # Other orders are other prompts, and other numbers.
    order = [2, 0]
    turned = model_inputs(processor, [question([noise(SIZES[number], number) for number in order])])
    expected = model.generate(**turned, max_new_tokens=4, do_sample=False)
    text = {name: value for name, value in turned.items() if name not in names}
    with pytest.raises(ValueError, match=r"hold the numbers \[3, 1\], but the first image of a prompt is 1"):
        model.generate(**text, image_cache=cache[order], max_new_tokens=4)
    numbered = model.encode_images(**{name: one[name] for name in names}, image_numbers=[2, 3, 1])[order]
    assert model.generate(**text, image_cache=numbered, max_new_tokens=4, do_sample=False).equal(expected)
    with pytest.raises(ValueError, match="but there are 3 images of .* tokens in the image KV cache"):
        model.generate(**text, image_cache=cache, max_new_tokens=4)
    if "num_tiles" in one:
        with pytest.raises(ValueError, match="num_tiles name 1 tiles in all, but pixel_values hold"):
            model.encode_images(one["pixel_values"], num_tiles=[1])


@every_varying_case
def test_a_second_turn_encodes_new_images_alone(case):
    model, processor = shared_parts(case)
    first = question([noise(size, seed) for seed, size in enumerate(SIZES[:2])])
    cache = DynamicCache(config=model.config.text_config)
    options = {"max_new_tokens": 4, "do_sample": False}
    opening = model_inputs(processor, [first])
    ids = model.generate(**opening, **options, past_key_values=cache)
    answer = processor.decode(ids[0, opening["input_ids"].shape[1] :])
    second = [*first, {"role": "assistant", "content": answer}, *question([noise(SIZES[3], 3)], "And this?")]
    whole = model_inputs(processor, [second])
    expected = model.generate(**whole, **options)
    held = int(cache.get_seq_length())
    common = int((ids[0, :held] == whole["input_ids"][0, :held]).cumprod(0).sum())
    crop(cache, common)
    images = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: images.append(len(args[0])), with_kwargs=True
    )
    assert model.generate(**whole, **options, past_key_values=cache).equal(expected)
    assert sum(images) == len(processor.tile_lengths(SIZES[3][1], SIZES[3][0]))
    model.model.vision_tower._forward_pre_hooks.clear()


@every_varying_case
def test_images_that_do_not_match_their_tokens_are_refused(case):
    model, processor = shared_parts(case)
    inputs = model_inputs(processor, [question([noise(SIZES[0]), noise(SIZES[1])])])
    names = [name for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes") if name in inputs]
    fewer = inputs | {name: inputs[name][:1] for name in names}
    fewer.pop("num_tiles", None)
    with pytest.raises(ValueError, match="image embeddings"):
        model(**fewer)
    if "num_tiles" in inputs:
        with pytest.raises(ValueError, match="num_tiles name 7 tiles in all"):
            model(**(inputs | {"num_tiles": torch.tensor([7])}))
        with pytest.raises(ValueError, match="num_tiles name 7 tiles in all"):
            model.generate(**(inputs | {"num_tiles": torch.tensor([7])}), max_new_tokens=2)
    else:
        with pytest.raises(ValueError, match="spatial_shapes are missing with image_layout='native'"):
            model(**{name: value for name, value in inputs.items() if name != "spatial_shapes"})


def test_the_number_of_queries_is_the_number_of_tokens():
    for queries in (1, 4, 16):
        config = layout_config("tiles, perceiver", 401, 400, num_queries=queries)
        assert config.image_seq_length == queries == config.processor_arguments["image_seq_length"]
        model = DSVLForConditionalGeneration(config)
        assert model.get_image_features(torch.zeros(2, 3, SIDE, SIDE)).pooler_output[0].shape == (queries, 32)
    with pytest.raises(ValueError, match="num_queries=5 is not a square number"):
        layout_config("tiles, perceiver", 401, 400, num_queries=5)


# -- checkpoints -----------------------------------------------------------------------------------------------------------

ANSWER = """
import json, sys
class NotInstalled:  # however the package is installed
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "dsvl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled)
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
answers = []
for checkpoint in sys.argv[2:]:
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float64).eval()
    parts = [{"type": "image", "path": path} for path in json.loads(sys.argv[1])]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    count = processor.count_tokens(messages, add_generation_prompt=True)
    assert count == inputs["input_ids"].shape[1]
    answers.append(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist())
print(json.dumps(answers))
"""


def test_checkpoints_of_any_layout_work_without_the_package(tmp_path):
    from dsvl import save_checkpoint

    paths = []
    for seed, size in enumerate(SIZES[:3]):
        noise(size, seed).save(tmp_path / f"{seed}.png")
        paths.append(str(tmp_path / f"{seed}.png"))
    expected, folders = [], []
    for case in ("tiles, downsample", "native"):
        model, processor = shared_parts(case)
        folders.append(str(save_checkpoint(model, processor, tmp_path / case.replace(", ", "_"))))
        inputs = model_inputs(processor, [question([noise(size, seed) for seed, size in enumerate(SIZES[:3])], "What?")])
        expected.append(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist())
    (tmp_path / "answer.py").write_text(ANSWER)
    arguments = [sys.executable, str(tmp_path / "answer.py"), json.dumps(paths), *folders]
    run = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == expected


def test_a_checkpoint_of_before_loads_and_computes_the_same(tmp_path):
    """Its files lack the fields of image layouts."""
    model, processor = shared_parts("crop")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    fields = ("image_layout", "max_tiles", "max_image_tokens", "downsample", "num_queries")
    for name, more in (("config.json", ()), ("processor_config.json", ("tile_size", "fixed_length"))):
        values = json.loads((tmp_path / name).read_text())
        assert [values.pop(field, None) for field in (*fields, *more)][0] == "crop"
        (tmp_path / name).write_text(json.dumps(values))
    again = DSVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    read = type(processor).from_pretrained(tmp_path)
    config = DSVLConfig.from_pretrained(tmp_path)
    assert (config.image_layout, config.downsample, read.image_layout, read.layout) == ("crop", 1, "crop", None)
    inputs = model_inputs(read, [question([noise(SIZES[0])])])
    for name, value in model_inputs(processor, [question([noise(SIZES[0])])]).items():
        assert inputs[name].equal(value)
    with torch.no_grad():
        assert again(**inputs).logits.equal(model(**inputs).logits)


# -- any size --------------------------------------------------------------------------------------------------------------


@every_case
@given(st.lists(st.tuples(st.integers(1, 130), st.integers(1, 130)), min_size=1, max_size=3))
@settings(max_examples=12, deadline=None)
def test_images_of_any_size_go_through_processor_and_model(case, sizes):
    model, processor = shared_parts(case)
    conversation = question([noise(size, seed) for seed, size in enumerate(sizes)])
    inputs = model_inputs(processor, [conversation])
    assert inputs["input_ids"].shape[1] == processor.count_tokens(conversation, add_generation_prompt=True)
    with torch.no_grad():
        assert model(**inputs, logits_to_keep=1).logits.isfinite().all()


def status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("case", ["crop", "pad", "tiles", "native"])
def test_large_and_thin_images_take_bounded_memory_and_time(case):
    """At most about four times the decoded pixels, of which there are 36 MB in 4,000 x 3,000."""
    model, processor = shared_parts(case)
    processor(images=[Image.new("RGB", (50, 50))], return_tensors="pt")
    for size in LARGE:
        image = Image.new("RGB", size, "red")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = status_mib("VmRSS"), time.process_time()
        processor(images=[image], return_tensors="pt")
        grown, seconds = status_mib("VmHWM") - before, time.process_time() - start
        assert grown < 150 and seconds < 5, (size, grown, seconds)
        inputs = model_inputs(processor, [question([image])])
        with torch.no_grad():
            assert model(**inputs, logits_to_keep=1).logits.isfinite().all()
