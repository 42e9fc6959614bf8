"""The cache of image features: training with it equals training without it."""

import shutil

import pytest
import torch
from PIL import Image
from training_runs import furthest, losses, make_checkpoint, make_conversations, run, weights
from transformers import AutoModelForImageTextToText, AutoProcessor

from dsvl.data import load_conversations
from dsvl.training import ConversationCollator
from dsvl.training.feature_cache import FeatureCache, feature_fingerprint, fill_cache, image_key
from dsvl.training.model_loading import load_checkpoint_tower

STEPS = ["--max-steps", 6, "--save-steps", 3, "--logging-steps", 1, "--learning-rate", 1e-2, "--use-cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_conversations(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def processor(model):
    return AutoProcessor.from_pretrained(model)


@pytest.fixture(scope="module")
def loaded(model):
    return AutoModelForImageTextToText.from_pretrained(model)


@pytest.fixture
def fresh(tmp_path, model, loaded, processor):
    """Open the cache again, as a later run does."""

    def opened(dtype=torch.float32, processor=processor):
        tower = load_checkpoint_tower(str(model), loaded.config, dtype)
        return FeatureCache(tmp_path / "cache", feature_fingerprint(tower, loaded.config, processor)), tower

    return opened


@pytest.fixture
def filled(fresh, data, loaded, processor):
    cache, tower = fresh()
    fill_cache(cache, [load_conversations(data)], tower, loaded.config, processor)
    cache.refresh()
    return cache


def same_gradients(loaded, *batches):
    """The loss of each batch; their gradients must be equal."""
    seen = []
    for batch in batches:
        loaded.zero_grad()
        loss = loaded.train()(**batch).loss
        loss.backward()
        seen.append((loss.item(), {n: p.grad.clone() for n, p in loaded.named_parameters() if p.grad is not None}))
    for loss, gradients in seen[1:]:
        assert loss == seen[0][0] and furthest(gradients, seen[0][1]) == 0
    return [loss for loss, _ in seen]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_features_has_the_gradients_of_a_batch_of_images(filled, data, processor, loaded, packed):
    loaded.set_trainable()
    samples = list(load_conversations(data))[:5]  # images and texts
    samples = [samples[:3], samples[3:]] if packed else samples
    images = ConversationCollator(processor)(samples)
    features = ConversationCollator(processor, features=filled)(samples)
    assert "pixel_values" not in features and len(features["image_features"]) == len(images["pixel_values"]) > 3
    assert all(torch.equal(features[key], images[key]) for key in images if key != "pixel_values")
    same_gradients(loaded, images, features)


def test_a_batch_of_texts_has_empty_image_features(filled, processor, loaded):
    """Its projector must have gradients, which other processes reduce; its tower must not run."""
    loaded.set_trainable()
    batch = ConversationCollator(processor, features=filled)(
        [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]]
    )
    assert batch["image_features"].shape == (0, 5, 32)
    loaded.zero_grad(set_to_none=True)
    called = loaded.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("the tower was asked"))
    loaded.train()(**batch).loss.backward()
    called.remove()
    assert all(p.grad is not None and not p.grad.any() for p in loaded.model.multi_modal_projector.parameters())


def test_generation_from_features_is_generation_from_images(filled, data, processor, loaded):
    (message, *_) = next(sample for sample in load_conversations(data) if "image" in str(sample))["messages"]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    answers = []
    for sources in ({}, {"image_features": filled.part(message["content"][0]["path"])["image_features"]}):
        content = [message["content"][0] if not sources else {"type": "image"} | sources, *message["content"][1:]]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        answers.append(loaded.eval().generate(**inputs, max_new_tokens=8, do_sample=False))
    assert torch.equal(*answers)


def test_images_and_features_do_not_mix(filled, data, processor):
    (message, *_) = next(sample for sample in load_conversations(data) if "image" in str(sample))["messages"]
    image = message["content"][0]
    content = [image, {"type": "image"} | filled.part(image["path"])]
    with pytest.raises(ValueError, match="1 of 2 images are given as features"):
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)


# -- on the disk -------------------------------------------------------------------------------------------------------


def test_an_image_is_identified_by_its_file(tmp_path, photographs):
    path = tmp_path / "cup.png"
    photographs[1].save(path)
    assert image_key(str(path)) == image_key(path.read_bytes())
    shutil.copy(path, tmp_path / "copy.png")
    assert image_key(str(tmp_path / "copy.png")) == image_key(str(path)) != image_key(photographs[1])
    assert image_key(photographs[1]) == image_key(Image.open(path)) != image_key(photographs[2])


def test_only_what_is_missing_is_computed(filled, fresh, tmp_path, data, loaded, processor):
    cache, tower = fresh()
    assert len(cache) == len(filled) == len(set(cache.files)) > 10
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    calls = []
    tower.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    fill_cache(cache, [load_conversations(data)], tower, loaded.config, processor)
    assert calls == [] and sorted((tmp_path / "cache").glob("*.safetensors")) == files
    more = make_conversations(tmp_path / "more", layout="p" * 26)  # the first images are in the cache
    fill_cache(cache, [load_conversations(more)], tower, loaded.config, processor)
    cache.refresh()
    assert sum(calls) == len(cache) - len(filled) > 0


def test_several_processes_and_workers_fill_the_same_cache(filled, tmp_path, data, loaded, processor, model):
    tower = load_checkpoint_tower(str(model), loaded.config, torch.float32)
    cache = FeatureCache(tmp_path / "shared", feature_fingerprint(tower, loaded.config, processor))
    for rank, workers in ((0, 0), (1, 2)):
        fill_cache(cache, [load_conversations(data)], tower, loaded.config, processor, workers, rank, 2)
    cache.refresh()
    assert sorted(cache.files) == sorted(filled.files)
    assert all(torch.allclose(cache[key], filled[key], atol=1e-6) for key in cache.files)


def test_a_cache_of_another_model_is_refused(filled, fresh, processor, loaded, model, tmp_path):
    with pytest.raises(ValueError, match=r"cache contains image features of another tower \(or precision\); pass an empty"):
        fresh(dtype=torch.bfloat16)
    other = AutoProcessor.from_pretrained(model)
    other.image_processor.do_normalize = False
    with pytest.raises(ValueError, match=r"features of another image processor \("):
        fresh(processor=other)
    padded = AutoProcessor.from_pretrained(model)
    padded.image_layout, padded.tile_size = "pad", 28
    with pytest.raises(ValueError, match=r"features of another image layout \("):
        fresh(processor=padded)
    tower = load_checkpoint_tower(str(model), loaded.config, torch.float32)
    next(tower.parameters()).data += 1e-3
    with pytest.raises(ValueError, match=r"features of another tower \("):
        FeatureCache(tmp_path / "cache", feature_fingerprint(tower, loaded.config, processor))
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs/cat.png").touch()
    with pytest.raises(ValueError, match="photographs contains files that are not image features; pass an empty"):
        FeatureCache(tmp_path / "photographs", {})


def test_broken_and_changed_images_are_named(fresh, tmp_path, loaded, processor, photographs):
    path = make_conversations(tmp_path, layout="pp")
    broken, changed = (str(tmp_path / "images" / f"{number}_0.png") for number in (0, 1))
    with open(broken, "wb") as file:
        file.write(b"no image")
    cache, tower = fresh()
    data = load_conversations(path)
    fill_cache(cache, [data], tower, loaded.config, processor)
    cache.refresh()
    photographs[0].save(changed)
    collator = ConversationCollator(processor, features=cache)
    with pytest.raises(ValueError, match="0_0.png cannot be decoded"):
        collator([data[0]])
    with pytest.raises(ValueError, match="1_0.png is not in .*cache: it has changed since its features were computed"):
        collator([data[1]])


# -- dsvl train --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [{}, {"processes": 2}], ids=["one process", "two processes"])
def test_a_run_from_the_cache_is_the_run_without_it(tmp_path, model, data, start):
    common = ["--model", model, "--data", data, *STEPS, "--eval-share", 0.2, "--per-device-train-batch-size", 1]
    cache = ["--cache-image-features", tmp_path / "cache"]
    run(*common, "--output", tmp_path / "plain", **start)
    run(*common, *cache, "--output", tmp_path / "cached", **start)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
    assert furthest(weights(tmp_path / "cached"), weights(tmp_path / "plain")) < 1e-5
    # interrupted and continued, with packs
    flags = [*common, *cache, "--packing", "--max-length", 256, "--output", tmp_path / "packed"]
    run(*flags, "--dataloader-num-workers", 1, **start)
    shutil.copytree(tmp_path / "packed/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    run(*flags[:-1], tmp_path / "resumed", **start)
    assert furthest(weights(tmp_path / "resumed"), weights(tmp_path / "packed")) == 0


@pytest.mark.slow
def test_zero3_runs_the_tower_in_all_processes_or_in_none(tmp_path, model, data):
    """One process has only texts where the other has images; a layer that only one process gathers deadlocks."""
    common = ["--model", model, "--data", data, *STEPS, "--eval-share", 0.2, "--per-device-train-batch-size", 1]
    common += ["--deepspeed", "zero3"]
    run(*common, "--output", tmp_path / "plain", processes=2, launcher="deepspeed")
    run(
        *common,
        "--cache-image-features",
        tmp_path / "cache",
        "--output",
        tmp_path / "cached",
        processes=2,
        launcher="deepspeed",
    )
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
