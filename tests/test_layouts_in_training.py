"""Images of several tiles and of different lengths in training: batches, packs, cached features."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from training_runs import LAYOUTS, furthest, make_layout_checkpoint, run
from transformers import AutoModelForImageTextToText, AutoProcessor

import dsvl
import dsvl.utils.image_loading
from dsvl.cli import main
from dsvl.data import complete_messages, load_conversations
from dsvl.data.packing import PackedConversations
from dsvl.data.sample_errors import BadSample
from dsvl.data.show import seen_image
from dsvl.publishing.fresh_process import check_standalone
from dsvl.publishing.travelling_code import travelling_code
from dsvl.training import ConversationCollator
from dsvl.training.data_summary import describe_data
from dsvl.training.feature_cache import FeatureCache, feature_fingerprint, fill_cache
from dsvl.training.fingerprint import RunRecord, add_model, differences
from dsvl.training.model_loading import load_checkpoint_tower
from dsvl.training.recipe import compose_arguments
from dsvl.training.recipe_plan import composed_config

SIZES = [(30, 40), (20, 20), (28, 56), (84, 28), (1, 300), (60, 60)]  # (height, width), from 1 to 5 tiles of 28 pixels
LAYOUT = [[0], [1, 2], [], [3, 4, 5], [], [2], [5, 0]]  # the images of each conversation
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    generator = np.random.default_rng(0)
    for index, (height, width) in enumerate(SIZES):
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    lines = []
    for images in LAYOUT:
        content = [*({"type": "image", "path": f"{index}.png"} for index in images), {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"{len(images)} red"}]
        messages += [{"role": "user", "content": "And green?"}, {"role": "assistant", "content": "No."}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    for layout in LAYOUTS:
        make_layout_checkpoint(folder, layout)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return load_conversations(folder / "data.jsonl")


@pytest.fixture(scope="module")
def models(folder):
    return {layout: AutoModelForImageTextToText.from_pretrained(folder / layout).double() for layout in LAYOUTS}


@pytest.fixture(scope="module")
def processors(folder):
    return {layout: AutoProcessor.from_pretrained(folder / layout) for layout in LAYOUTS}


def tiles_of(processor, images):
    """By the images' pixels."""
    inputs = processor(images=[Image.new("RGB", SIZES[index][::-1]) for index in images], return_tensors="np")
    return len(inputs["pixel_values"])


def loss_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model.train()(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_layout
@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_computes_what_its_samples_do_apart(data, models, processors, layout, packed):
    model, collator = models[layout].set_trainable(vision_tower=True), ConversationCollator(processors[layout])
    samples = [data[index] for index in (0, 1, 2, 3)]
    loss, gradients = loss_and_gradients(model, collator([samples[:3], samples[3:]] if packed else samples))
    apart = [collator([one]) for one in samples]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in apart]
    alone = [loss_and_gradients(model, batch) for batch in apart]
    expected = sum(one * count for (one, _), count in zip(alone, counts, strict=True)) / sum(counts)
    assert loss == pytest.approx(expected, abs=1e-6)
    summed = {
        name: sum(grads[name] * count for (_, grads), count in zip(alone, counts, strict=True)) / sum(counts)
        for name in gradients
    }
    assert furthest(gradients, summed) < 1e-6 and any(gradient.abs().max() > 1e-4 for gradient in gradients.values())


@every_layout
def test_sizes_are_those_of_batches(data, processors, layout):
    processor = processors[layout]
    collator = ConversationCollator(processor, max_length=1000)
    for index, images in enumerate(LAYOUT):
        batch, size = collator([data[index]]), collator.measure(data[index])
        assert collator.packed_size(data[index]) == (size.tokens, size.tiles)
        assert (
            size.tokens
            == int(batch["attention_mask"].sum())
            == collator.first_turn_length(data[index])
            + (size.tokens - processor.count_tokens(complete_messages(data[index])[:2]))
        )
        assert size.tiles == len(batch.get("pixel_values", [])) and size.images == len(images)
        if layout == "tiles" and images:
            assert batch["num_tiles"].tolist() == [tiles_of(processor, [one]) for one in images]
        if layout == "native" and images:
            assert batch["spatial_shapes"].shape == (len(images), 2) and batch["pixel_values"].dtype == torch.float32
    assert {tiles_of(processor, [index]) for index in range(len(SIZES))} == ({1, 3, 4, 5} if layout == "tiles" else {1})


def test_turns_beyond_the_length_are_dropped_with_their_tiles(folder, processors):
    """The second turn has an image of more tiles than the first."""
    content = [[{"type": "image", "path": str(folder / f"{index}.png")}] for index in (1, 5)]
    turns = [
        message
        for parts in content
        for message in ({"role": "user", "content": parts}, {"role": "assistant", "content": "red"})
    ]
    processor = processors["tiles"]
    length = processor.count_tokens(turns)
    for limit, kept in ((length, 4), (length - 1, 2)):
        collator = ConversationCollator(processor, max_length=limit)
        assert len(collator.shorten(turns)) == kept
        assert len(collator([turns])["pixel_values"]) == tiles_of(processor, [1, 5][: kept // 2])
    with pytest.raises(ValueError, match="The first turn of a conversation takes .* tokens, more than max_length=10"):
        ConversationCollator(processor, max_length=10)([turns])


def test_headers_are_read_once(folder, data, processors, monkeypatch):
    read = []
    measure = dsvl.utils.image_loading.image_size
    dsvl.utils.image_loading._size_of_file.cache_clear()
    monkeypatch.setattr(
        dsvl.utils.image_loading, "image_size", lambda *args, **kw: read.append(args) or measure(*args, **kw)
    )
    collator = ConversationCollator(processors["tiles"], max_length=500)
    for sample in itertools.chain(*[[data[index] for index in range(len(data))]] * 3):
        collator.measure(sample)
    assert len(read) == len(SIZES)
    Image.new("RGB", (200, 200)).save(folder / "changed.png")
    turn = [{"role": "user", "content": [{"type": "image", "path": str(folder / "changed.png")}]}]
    turn.append({"role": "assistant", "content": "red"})
    before = collator.measure(turn).tiles
    Image.new("RGB", (20, 20)).save(folder / "changed.png")
    assert (before, collator.measure(turn).tiles) == (5, 1)


@pytest.mark.parametrize("layout", ["tiles", "native"])
def test_a_missing_image_is_named_when_it_is_measured(folder, processors, layout):
    sample = [{"role": "user", "content": [{"type": "image", "path": "gone.png"}, {"type": "text", "text": "?"}]}]
    sample.append({"role": "assistant", "content": "red"})
    with pytest.raises(BadSample, match="gone.png"):
        ConversationCollator(processors[layout], max_length=100).packed_size({"messages": sample})
    sample[0]["content"][0]["path"] = "http://localhost:1/gone.png"
    with pytest.raises(BadSample, match="fetching is not allowed"):
        ConversationCollator(processors[layout], max_length=100).packed_size({"messages": sample})


def test_the_summary_counts_tiles(data, processors):
    tiles = sum(tiles_of(processors["tiles"], images) for images in LAYOUT if images)
    line = describe_data(data, ConversationCollator(processors["tiles"]))
    assert line.startswith(f"7 conversations, 14 turns, 9 images of {tiles} tiles, ")
    assert " 9 images, " in describe_data(data, ConversationCollator(processors["native"]))


# -- dsvl data show ------------------------------------------------------------------------------------------------------


def test_all_tiles_are_shown_in_their_grid(processors):
    """An image of 56 x 28 pixels is two tiles, pixel for pixel; its whole is half as large on the mean colour."""
    pixels = np.random.default_rng(0).integers(0, 255, (28, 56, 3), dtype=np.uint8)
    seen = seen_image(Image.fromarray(pixels), processors["tiles"])
    whole, left, right = map(np.asarray, seen.tiles)
    assert np.array_equal(left, pixels[:, :28]) and np.array_equal(right, pixels[:, 28:])
    mean = np.round(255 * np.array(processors["tiles"].image_processor.image_mean))
    assert np.array_equal(whole[:7], np.broadcast_to(mean, (7, 28, 3))) and not np.array_equal(whole[7], whole[0])
    assert seen.columns == 2 and seen.about == "28 x 28 and 1 x 2 tiles of it, 15 tokens"
    assert "and" not in seen_image(Image.new("RGB", (9, 9)), processors["tiles"]).about


def test_a_native_image_is_shown_in_its_shape(processors):
    """Of 16 x 24 pixels, which are 2 x 3 tokens of 8 x 8 pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    seen = seen_image(Image.fromarray(pixels), processors["native"])
    assert np.array_equal(np.asarray(seen.tiles[0]), pixels) and seen.about == "24 x 16, 6 tokens"


@every_layout
def test_data_show_tells_tiles_and_tokens(folder, tmp_path, capsys, layout):
    command = ["data", "show", str(folder / "data.jsonl"), "--model", str(folder / layout), "-n", "2"]
    assert main(command) == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("-- "))
    assert "1 images (40 x 30; the model sees " in first and " of each), " in first
    assert ("28 x 28 and 2 x 2 tiles of it, 25 tokens" in first) == (layout == "tiles")
    assert ("the model sees 28 x 28, 5 tokens; 28 x 28 and 1 x 2 tiles of it, 15 tokens" in second) == (layout == "tiles")
    assert main([*command, "--html", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text()
    assert html.count("data:image/jpeg;base64,") == 6 and html.count("as the model sees it: ") == 3


# -- packing -----------------------------------------------------------------------------------------------------------


def test_packs_are_bounded_in_tiles(data, processors):
    """The collator joins each pack to a row of the length that was measured."""
    collator = ConversationCollator(processors["tiles"], max_length=500)
    packs = PackedConversations(data, collator.packed_size, 500, max_tiles=14)
    assert sorted(itertools.chain(*packs.packs)) == list(range(len(data)))
    total = 0
    for index in range(len(packs)):
        batch = collator([packs[index]])
        real = batch["input_ids"][0].tolist()
        while real and real[-1] == processors["tiles"].tokenizer.pad_token_id:
            real.pop()
        assert len(batch.get("pixel_values", [])) <= 14 and len(real) <= 500
        total += len(real)
    assert total == packs.tokens
    with pytest.raises(ValueError, match="has 14 images or tiles of images, more than the 13 that a pack may have"):
        PackedConversations(data, collator.packed_size, 500, max_tiles=13)


# -- cached features -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(folder, data, models, processors):
    caches = {}
    for layout in LAYOUTS:
        config, processor = models[layout].config, processors[layout]
        tower = load_checkpoint_tower(str(folder / layout), config, torch.float64)
        fingerprint = feature_fingerprint(tower, config, processor)
        cache = FeatureCache(folder / f"features-{layout}", fingerprint)
        fill_cache(cache, [data], tower, config, processor)
        caches[layout] = FeatureCache(folder / f"features-{layout}", fingerprint)
    return caches


@every_layout
@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_features_has_the_gradients_of_a_batch_of_images(filled, data, models, processors, layout, packed):
    model = models[layout].set_trainable()
    samples = [data[index] for index in range(5)]
    samples = [samples[:3], samples[3:]] if packed else samples
    images = ConversationCollator(processors[layout])(samples)
    features = ConversationCollator(processors[layout], features=filled[layout])(samples)
    assert "pixel_values" not in features and len(features["image_features"]) == len(images["pixel_values"]) > 3
    same = images.keys() & features.keys()
    assert {"tiles": "num_tiles", "native": "spatial_shapes"}.get(layout, "labels") in same
    assert all(torch.equal(features[key], images[key]) for key in same)
    (one, gradients), (other, of_features) = (loss_and_gradients(model, batch) for batch in (images, features))
    assert other == pytest.approx(one, abs=1e-6) and furthest(gradients, of_features) < 1e-5


@every_layout
def test_features_have_the_image_s_own_shape(filled, models, layout):
    cache, width = filled[layout], models[layout].config.vision_config.hidden_size
    shapes = {tuple(cache[key].shape) for key in cache.files}
    if layout == "tiles":
        assert shapes == {(tiles, 5, width) for tiles in (1, 3, 4, 5)}
    elif layout == "pad":
        assert shapes == {(5, width)} and not cache.sizes
    else:  # patches of 4 pixels, 2 x 2 a token, 6 tokens at most
        assert len(shapes) > 1 and all(patches % 4 == 0 and patches <= 24 for patches, _ in shapes)
    if layout != "pad":
        assert sorted(cache.sizes.values()) == sorted(SIZES)


@every_layout
def test_a_batch_of_texts_has_empty_image_features(filled, data, models, processors, layout):
    model = models[layout].set_trainable()
    for sample in (data[2], [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]):
        batch = ConversationCollator(processors[layout], features=filled[layout], on_bad_sample="skip")([sample])
        with_images = ConversationCollator(processors[layout], features=filled[layout])([data[1]])
        assert batch.keys() == with_images.keys()  # processes agree on what a batch has
        assert len(batch["image_features"]) == 0
    batch = ConversationCollator(processors[layout], features=filled[layout])([data[2]])
    called = model.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("the tower was asked"))
    _, gradients = loss_and_gradients(model, batch)
    called.remove()
    projector = [gradient for name, gradient in gradients.items() if "multi_modal_projector" in name]
    assert projector and not any(gradient.any() for gradient in projector)


def test_a_cache_of_another_layout_is_refused(filled, folder, models, processors):
    model = models["tiles"]
    tower = load_checkpoint_tower(str(folder / "tiles"), model.config, torch.float64)
    other = AutoProcessor.from_pretrained(folder / "tiles")
    other.max_tiles = 3
    crop = AutoProcessor.from_pretrained(folder / "model")
    for processor in (other, crop):
        with pytest.raises(ValueError, match="features of another image layout"):
            FeatureCache(filled["tiles"].directory, feature_fingerprint(tower, model.config, processor))


# -- dsvl plan -----------------------------------------------------------------------------------------------------------


@every_layout
def test_a_recipe_composes_and_plans_every_layout(folder, models, layout):
    """`compose:` of a recipe takes what `dsvl compose` takes; the plan's model is the composed one."""
    tower = folder / ("siglip2" if layout == "native" else "tower")
    values = {"vision": str(tower), "language": str(folder / "llama")} | LAYOUTS[layout]
    planned, made = composed_config(compose_arguments(values, "out")), models[layout].config
    assert planned.processor_arguments == made.processor_arguments
    assert planned.vision_config.model_type == made.vision_config.model_type
    with pytest.raises(ValueError, match="unknown key image_layuot.*did you mean image_layout"):
        compose_arguments(values | {"image_layuot": "tiles"}, "out")


def test_the_plan_takes_tiles(folder, capsys):
    command = ["plan", "--model", str(folder / "tiles"), "--sequence-length", "64", "--images", "2", "--gpu-memory", "2.2"]
    assert main([*command, "--tiles", "3"]) == 0
    few = capsys.readouterr().out
    assert main([*command, "--tiles", "5"]) == 0
    assert "largest micro-batch" in few and few != capsys.readouterr().out
    assert main([*command, "--images", "3"]) == 1  # the most by default
    assert "3 images of 5 tiles take 75 tokens" in capsys.readouterr().err
    assert main([*command, "--model", str(folder / "native")]) == 0
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "stages:\n- name: one\n  train: [projector]\n  packing: true\n  max_length: 64\n  max_images_per_pack: 8\n"
    )
    assert main(["plan", str(recipe), "--model", str(folder / "tiles"), "--gpu-memory", "2.2"]) == 0
    assert "stage one: 64 tokens and 8 tiles a sample" in capsys.readouterr().out


# -- dsvl train ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "key"), [("config.json", "image_layout"), ("processor_config.json", "max_tiles")])
def test_a_run_with_another_layout_is_another_run(folder, tmp_path, file, key):
    """It has other packs and batches, so it must not resume a run with the first."""
    other = shutil.copytree(folder / "tiles", tmp_path / "tiles")
    before, now = RunRecord({}), RunRecord({})
    add_model(before, str(folder / "tiles")), add_model(now, str(other))
    assert before.settings == now.settings
    values = json.loads((other / file).read_text())
    assert key in values
    (other / file).write_text(json.dumps(values | {key: "pad" if key == "image_layout" else 3}))
    add_model(now, str(other))
    assert any("model (tiles, " in difference for difference in differences(before.settings, now.settings))


@pytest.mark.slow
@every_layout
def test_a_recipe_composes_trains_and_evaluates(folder, tmp_path, layout):
    values = {"vision": str(folder / ("siglip2" if layout == "native" else "tower")), "language": str(folder / "llama")}
    recipe = {
        "compose": values | LAYOUTS[layout],
        "data": str(folder / "data.jsonl"),
        "eval_data": str(folder / "data.jsonl"),
        "eval_exact_match": True,
        "eval_max_new_tokens": 3,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "learning_rate": 0.01,
        "stages": [
            {"name": "align", "train": ["projector"], "cache_image_features": str(tmp_path / "features")},
            {"name": "instruct", "train": ["projector", "language", "vision"], "packing": True, "max_length": 400},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run(str(tmp_path / "recipe.yaml"), "--output", tmp_path / "output")
    tiles = " of 36 tiles" if layout == "tiles" else ""
    assert done.stderr.count(f"7 conversations, 14 turns, 9 images{tiles}, ") == 2
    assert "Image features of 6 images" in done.stderr
    config = dsvl.DSVLConfig.from_pretrained(tmp_path / "output")
    assert config.image_layout == layout and check_standalone(tmp_path / "output")["parameters"]


# -- published checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tiles", pytest.param("native", marks=pytest.mark.slow)])
def test_a_checkpoint_answers_in_a_process_without_the_package(folder, models, layout):
    """As `dsvl push` and `dsvl migrate code` check it: with the files that travel, `image_layouts_dsvl.py` among them."""
    made = check_standalone(folder / layout)
    assert made["parameters"] == sum(parameter.numel() for parameter in models[layout].parameters())
    assert {"image_layouts_dsvl.py", "image_reading_dsvl.py"} <= travelling_code().keys()
    assert (folder / layout / "image_layouts_dsvl.py").read_bytes() == travelling_code()["image_layouts_dsvl.py"]


def test_a_checkpoint_whose_processor_writes_other_tokens_is_not_published(folder, tmp_path):
    broken = shutil.copytree(folder / "tiles", tmp_path / "broken")
    values = json.loads((broken / "processor_config.json").read_text())
    (broken / "processor_config.json").write_text(json.dumps(values | {"image_seq_length": 4}))
    with pytest.raises(ValueError, match="writes 20 image tokens for an image; the model takes 25"):
        check_standalone(broken)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("model", "5 tokens per image"),
        ("pad", "5 tokens per image"),
        ("tiles", "5 tokens per tile, up to 5 tiles per image"),
        ("native", "up to 6 tokens per image"),
    ],
)
def test_the_model_card_says_what_an_image_takes(folder, layout, said):
    card = (folder / layout / "README.md").read_text()
    assert f"tower\n({said})" in card and "None" not in card
