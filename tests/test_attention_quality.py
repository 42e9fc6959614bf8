"""The experiment on attention and quality: its data, its arms, its rule, and how it goes on after an interruption."""

import importlib
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, CLIPImageProcessor

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a module of the experiment by name, as it is run on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(importlib.import_module("attention_quality.rule"), "RESAMPLES", 1000)
    return lambda name: importlib.import_module(f"attention_quality.{name}")


@pytest.fixture
def scenes(load):
    return load("scenes")


@pytest.fixture
def small(load):
    return load("sizes").SIZES_OF_EXPERIMENT["tiny"]


# ----------------------------------------------------------------------------------------------------------------------
# Scenes and questions


def test_training_and_held_out_scenes_and_drawings_are_disjoint(scenes, small):
    for world in (scenes.World(), small.world):
        by_split = {}
        for split in ("train", "held out"):
            rng = random.Random(1)
            drawn = [scenes.draw_scene(world, rng, split) for _ in range(400)]
            assert all(scenes.split_of(scene) == split for scene in drawn)
            sprites = set(scenes.cells_of(world, drawn, split, rng)[scenes.cells_of(world, drawn, split, rng) > 0].tolist())
            by_split[split] = {scene.contents for scene in drawn}, sprites
        (train, drawn), (held_out, drawn_held_out) = by_split.values()
        assert train.isdisjoint(held_out) and drawn.isdisjoint(drawn_held_out)
    moved = replace(
        drawn_scene := scenes.draw_scene(small.world, random.Random(0), "train"), things=drawn_scene.things[::-1]
    )
    assert scenes.split_of(moved) == "train", "the order of things does not move a scene into the other split"


def test_texts_conversations_and_items_take_the_scenes_of_their_split(scenes, small, monkeypatch):
    taken = []
    monkeypatch.setattr(scenes, "draw_scene", lambda *args, _draw=scenes.draw_scene: taken.append(args[2]) or _draw(*args))
    scenes.training_conversation(small.world, 0, 0, 2, 2)
    scenes.text_document(small.world, random.Random(0), "train", 2, 2)
    assert set(taken) == {"train"}
    taken.clear()
    for task in (*scenes.IMAGE_KINDS, "distractors"):
        scenes.held_out_conversation(small.world, task, 3, 0)
    assert set(taken) == {"held out"}


def answer_by_search(world, question, told):
    """The answer to a question's words, found by looking at all things of the scenes."""
    words = list(question.words)
    images = [int(word[7:-1]) - 1 for word in words if word.startswith("(image")]

    def having(index, *values):
        return [t for t in told[index].things if set(values) <= {t.colour, t.shape, t.size}]

    if question.kind == "attribute":
        [value] = [word for word in words[3:] if word in (*world.colour_names, *world.shape_names)]
        [thing] = having(images[0], value)
        return (f"(image {images[0] + 1})", getattr(thing, words[1]))
    if question.kind == "which":
        value = " ".join(words[4:-1]).replace("-", " ").split()
        [index] = [index for index in range(len(told)) if having(index, *value)]
        return (f"(image {index + 1})",)
    if question.kind == "two_hop":
        second, first = images
        [thing] = having(first, words[10])
        [other] = having(second, getattr(thing, words[7]))
        return (f"(image {second + 1})", getattr(other, words[4]))
    if question.kind == "print":
        return (f"(image {images[0] + 1})", *told[images[0]].printed)
    if question.kind == "count":
        count = len(having(images[0], *words[4 : words.index("in")]))
        return (f"(image {images[0] + 1})", ("one", "two", "three", "four", "five")[count - 1])
    if question.kind == "comparison":
        one, other = (len(told[index].things) for index in images)
        return (f"(image {images[0 if one > other else 1] + 1})",)
    colours = [word for word in words if word in world.colour_names]
    one, other = (having(images[0], colour)[0].cell for colour in colours)
    word = words[words.index("one") + 1]
    (y, x), (v, u) = divmod(one, world.grid), divmod(other, world.grid)
    holds = {"left": x < u, "right": x > u, "above": y < v, "below": y > v}[word]
    return (f"(image {images[0] + 1})", "yes" if holds else "no")


def test_every_answer_is_the_one_that_a_search_finds(scenes):
    world, rng, asked = scenes.World(), random.Random(3), dict.fromkeys(scenes.TEXT_KINDS, 0)
    for _ in range(40):
        told = [scenes.draw_scene(world, rng, "train") for _ in range(4)]
        for kind in scenes.TEXT_KINDS:
            question = scenes.ask(world, kind, told, rng)
            if question is not None:
                asked[kind] += 1
                assert question.answer == answer_by_search(world, question, told), question
    assert min(asked.values()) > 20, asked


def test_two_hop_takes_both_images(scenes):
    """Neither image alone tells the answer: in the second there are things with another answer."""
    world, guesses = scenes.World(), []
    for index in range(60):
        item = scenes.held_out_conversation(world, "two_hop", 5, index)
        [question] = item.questions
        first, second = question.scenes
        assert first != second
        wanted = question.words[4]
        assert question.answer[1] != question.words[10]
        values = [getattr(thing, wanted) for thing in item.scenes[second].things]
        guesses.append(values.count(question.answer[1]) / len(values))
    assert np.mean(guesses) < 0.5


def test_every_word_is_a_token_and_the_ids_are_those_of_the_chat_template(load, scenes, small):
    language = load("language")
    for size in (small, load("sizes").SIZES_OF_EXPERIMENT["full"]):
        rng, tokenizer = random.Random(0), language.make_tokenizer(size.world)
        for index in range(30):
            spans = scenes.text_document(size.world, rng, "train", 1 + index % 6, 8)
            ids, answers = language.Encoder(tokenizer, 0).spans(spans)
            words = " ".join(word for span, _ in spans for word in span)
            plain = [one for one in ids[1:] if one != tokenizer.eos_token_id]
            assert plain == tokenizer(words)["input_ids"] and tokenizer.unk_token_id not in plain
            assert sum(answers) == sum(len(span) + 1 for span, is_answer in spans if is_answer)
    model, processor = load("runs").compose_arm(shared(load, small), "mmca", seed=0)
    conversation = scenes.training_conversation(small.world, 0, 0, 3, 2)
    ids, answers = language.Encoder(processor.tokenizer, small.tokens_per_image).conversation(conversation)
    image = processor_image(small)
    messages = [{"role": "system", "content": scenes.SYSTEM}]
    for index, question in enumerate(conversation.questions):
        images = [{"type": "image", "image": image}] * (3 if index == 0 else 0)
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": " ".join(question.words)}]})
        messages.append({"role": "assistant", "content": " ".join(question.answer)})
    rendered = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert rendered["input_ids"][0] == ids
    assert [bool(one) for one in rendered["assistant_masks"][0]] == answers


def test_images_show_what_their_scene_has(scenes):
    world, rng = scenes.World(), random.Random(5)
    sprites = scenes.Sprites(world)
    told = [scenes.draw_scene(world, rng, "train") for _ in range(20)]
    cells = torch.from_numpy(scenes.cells_of(world, told, "train", rng))
    images, labels = sprites.images(cells), scenes.labels_of(world, cells)
    assert images.shape == (20, 3, 96, 96) and images.dtype == torch.uint8
    for scene, image, label in zip(told, images, labels, strict=True):
        for cell in range(16):
            top, left = 24 * (cell // 4), 24 * (cell % 4)
            shown = image[:, top : top + 24, left : left + 24].flatten(1).int()
            thing = next((thing for thing in scene.things if thing.cell == cell), None)
            if thing is not None:
                ink = shown[:, (shown != 255).any(0)].float().mean(1)
                near = min(scenes.COLOURS, key=lambda name: (ink - torch.tensor(scenes.COLOURS[name])).abs().sum().item())
                assert near == thing.colour
                values = (world.colour_names, world.shape_names, scenes.SIZES)
                assert [names[i] for names, i in zip(values, label[cell, :3], strict=True)] == [
                    thing.colour, thing.shape, thing.size,
                ]  # fmt: skip
                assert (label[cell, 3:] == -1).all()
            elif cell == scene.printed_at:
                assert label[cell].tolist() == [-1, -1, -1, *map(int, scene.printed)] and shown.min() < 60
            else:
                assert (shown == 255).all() and (label[cell] == -1).all()


def test_the_hash_tells_data_apart(scenes, small, monkeypatch):
    hash_of = scenes.generator_hash.__wrapped__  # which does not remember
    before = hash_of(small.world)
    assert before == hash_of(small.world) == scenes.generator_hash(small.world)
    assert before != hash_of(replace(small.world, colours=4))
    monkeypatch.setattr(scenes, "kind_words", lambda colour, shape, rng: [colour, shape])
    assert hash_of(small.world) != before


# ----------------------------------------------------------------------------------------------------------------------
# Arms


def processor_image(size):
    from PIL import Image

    return Image.new("RGB", (size.world.image_size,) * 2, "white")


def shared(load, size, dtype=torch.float32):
    """Parts of random weights."""
    language, tasks = load("language"), importlib.import_module("trained_tasks")
    torch.manual_seed(0)
    tokenizer = language.make_tokenizer(size.world)
    side = {"height": size.world.image_size, "width": size.world.image_size}
    return SimpleNamespace(
        size=size,
        tokenizer=tokenizer,
        language=language.make_language_model(size, tokenizer).to(dtype),
        tower=tasks.random_tower(tasks.Parts(size.world.image_size, size.patch_size, size.tower_width, size.tower_layers)),
        image_processor=CLIPImageProcessor(size={"shortest_edge": size.world.image_size}, crop_size=side),
    )


def keys_by_definition(arm, layer, layers, i, types, image):
    """The keys of each softmax of query i, from the definition of an arm."""
    past = range(i + 1)
    text, images = [j for j in past if not types[j]], [j for j in past if types[j]]
    own_image = [j for j in range(len(types)) if types[j] and image[j] == image[i]]
    if arm == "mmca_upper":
        arm = "mmca" if layer >= layers / 2 else "causal"
    if arm == "causal":
        return [list(past)]
    if arm == "bidirectional":
        return [sorted({*past, *own_image})] if types[i] else [list(past)]
    if arm == "alpha":
        return [[i]] if types[i] else [list(past)]
    if arm == "alpha_own_image":
        return [own_image] if types[i] else [list(past)]
    if arm.startswith("block"):
        if not types[i] and not (i + 1 < len(types) and types[i + 1]):
            return [list(past)]
        if not types[i]:
            return [[i]]
        number = own_image[0] - 1
        own = {"block": range(own_image[0], i + 1), "block_number": [i], "block_bidirectional": own_image}[arm]
        return [[number, *own]]
    if not types[i]:
        return [text, images]
    return {"mmca": [[i]], "mmca_own_image": [own_image], "mmca_sees_text": [text, [i]]}[arm]


class Loop:
    """An arm query by query, as an attention function of transformers."""

    def __init__(self, arm, layers, types, image):
        self.arm, self.layers, self.types, self.image = arm, layers, types, image
        AttentionInterface.register("plain_loop_of_arms", self)

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        output = torch.zeros_like(query)
        for row in range(len(query)):
            for i in range(query.shape[2]):
                types, image = self.types[row], self.image[row]
                for keys in keys_by_definition(self.arm, module.layer_idx, self.layers, i, types, image):
                    if keys:
                        scores = (query[row, :, i, None] * key[row][:, keys]).sum(-1) * scaling
                        output[row, :, i] += (scores.softmax(-1)[..., None] * value[row][:, keys]).sum(1)
        return output.transpose(1, 2), None


@pytest.fixture
def batch(load, scenes, small):
    """Two rows of different lengths, of two images of 4 tokens each, and a size for that."""
    size = replace(small, patch_size=16, width=32, head_dim=16, tower_layers=1, tower_width=32)
    parts, sprites = shared(load, size, torch.float64), scenes.Sprites(size.world)
    model, processor = load("runs").compose_arm(parts, "causal", seed=0)
    batches = load("runs").Batches(size, processor.tokenizer, sprites)
    conversations = [scenes.training_conversation(size.world, 0, index, 2, 1 + index) for index in range(2)]
    inputs, _ = batches.make(conversations)
    return size, inputs | {"pixel_values": inputs["pixel_values"].double()}


ARMS = (
    "causal",
    "mmca",
    "alpha",
    "block",
    "block_number",
    "mmca_title",
    "block_bidirectional",
    "bidirectional",
    "mmca_own_image",
    "mmca_upper",
    "alpha_own_image",
    "mmca_sees_text",
)


def hidden_states(load, size, arm, inputs):
    model, _ = load("runs").compose_arm(shared(load, size, torch.float64), arm, seed=0)
    if arm == "mmca_title":  # which begins as mmca
        torch.nn.init.normal_(model.model.title.map.weight, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model, model(**inputs, use_cache=False, output_hidden_states=True)


def with_titles_added(model, weight, inputs, image):
    """The inputs as embeddings, those of an image's tokens with the mapped embedding of the token before the image."""
    with torch.no_grad():
        ids, table = inputs["input_ids"], model.get_input_embeddings().weight
        features = iter(torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output)))
        embeds, types = table[ids], ids == model.config.image_token_id
        for row in range(len(ids)):
            for i in types[row].nonzero().flatten().tolist():
                first = min(j for j in range(len(ids[row])) if types[row, j] and image[row][j] == image[row][i])
                embeds[row, i] = next(features) + weight @ table[ids[row, first - 1]]
    return {"inputs_embeds": embeds, "mm_token_type_ids": types.long()}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_what_a_loop_over_queries_and_keys_gives(load, batch, arm):
    size, inputs = batch
    model, outputs = hidden_states(load, size, arm, inputs)
    ids = inputs["input_ids"]
    is_image = ids == model.config.image_token_id
    assert is_image.sum(1).tolist() == [8, 8]
    image = [[int(count - 1) // 4 for count in row] for row in is_image.cumsum(-1)]
    by_loop, _ = load("runs").compose_arm(shared(load, size, torch.float64), "causal", seed=0)
    Loop(arm.replace("_title", ""), size.layers, is_image.tolist(), image)
    by_loop.model.language_model.set_attn_implementation("plain_loop_of_arms")
    if arm == "mmca_title":
        inputs = with_titles_added(by_loop, model.model.title.map.weight, inputs, image)
    with torch.no_grad():
        expected = by_loop(**inputs, use_cache=False)
    real = ids != 2  # a padded query is nobody's
    torch.testing.assert_close(outputs.logits[real], expected.logits[real], rtol=0, atol=1e-9)


def test_the_arms_differ(load, batch):
    size, inputs = batch
    logits = [hidden_states(load, size, arm, inputs)[1].logits for arm in ARMS]
    for index, one in enumerate(logits):
        assert all((one - other)[:, -1].abs().max() > 1e-6 for other in logits[:index])


@pytest.mark.parametrize("arm", ARMS)
def test_what_the_keys_of_an_image_depend_on(load, batch, arm):
    """Whether the states of the second image change with the text and the image before it, and with its number."""
    size, inputs = batch
    model, one = hidden_states(load, size, arm, inputs)
    second = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()[4:]
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    before["input_ids"][:, 1] += 1
    before["pixel_values"][0] = before["pixel_values"][2]
    number = {name: tensor.clone() for name, tensor in inputs.items()}
    number["input_ids"][0, second[0] - 1] += 1

    def moved(changed):
        other = hidden_states(load, size, arm, changed)[1].hidden_states
        return max(float((a - b)[0, second].abs().max()) for a, b in zip(one.hidden_states, other, strict=True)) > 0

    found = {(False, False): "the image alone", (False, True): "the image and its number", (True, True): "all before it"}
    assert found[moved(before), moved(number)] == load("arms").ARMS[arm].depends_on


def test_a_title_begins_as_the_model_without_it_and_is_trained(load, batch):
    size, inputs = batch
    without, _ = load("runs").compose_arm(shared(load, size, torch.float64), "mmca", seed=0)
    for mode in ("frozen", "lora", "full"):
        model, _ = load("runs").compose_arm(shared(load, size, torch.float64), "mmca_title", seed=0, mode=mode)
        outputs = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        torch.testing.assert_close(outputs.logits, without(**inputs, use_cache=False).logits, rtol=0, atol=0)
        outputs.loss.backward()
        titles = {name: p for name, p in model.named_parameters() if "title" in name}
        assert len(titles) == 1 and all(p.requires_grad and p.grad.abs().max() > 0 for p in titles.values())


def test_a_form_trains_and_refuses_what_it_would_ignore(load, batch):
    size, inputs = batch
    model, _ = load("runs").compose_arm(shared(load, size, torch.float64), "mmca_own_image", seed=0)
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.multi_modal_projector.parameters())
    trained = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"multi_modal_projector", "language_model"} and not model.lm_head.weight.requires_grad
    with pytest.raises(ValueError, match="without attention_mask and KV cache"):
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False)
    with pytest.raises(ValueError, match="multimodal_attention='causal', not of 'mmca'"):
        load("arms").Form("alpha", load("runs").compose_arm(shared(load, size), "mmca", seed=0)[0])


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_other_modes_train_the_decoder_and_keep_the_arm(load, batch, mode):
    if mode == "lora":
        pytest.importorskip("peft")
    size, inputs = batch
    inputs = inputs | {"pixel_values": inputs["pixel_values"].float()}
    frozen, _ = load("runs").compose_arm(shared(load, size), "alpha", seed=0)
    model, _ = load("runs").compose_arm(shared(load, size), "alpha", seed=0, mode=mode)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, frozen(**inputs, use_cache=False).logits)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("q_proj" in name for name in names) and any("multi_modal_projector" in name for name in names)
    assert not any("vision_tower" in name for name in names)
    if mode == "lora":
        assert all("lora_" in name for name in names if "q_proj" in name)


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_the_weights_of_a_loss_are_those_of_answers_and_tellings(load, small):
    language = load("language")
    tokenizer = language.make_tokenizer(small.world)
    documents = language.Documents(small, tokenizer, 0)
    for index in (0, small.language_steps - 1):
        ids, weights = documents.batch(index)
        assert ids.shape == weights.shape and ids.size >= small.language_tokens
        ends = ids == tokenizer.eos_token_id
        assert (weights[ends] == 1).all() and set(np.unique(weights[~ends]).tolist()) <= {0.0, np.float32(0.1), 1.0}
        assert (weights[ids == tokenizer.unk_token_id] == 0).all()
    again = language.Documents(small, tokenizer, 0).batch(3)[0]
    assert (documents.batch(3)[0] == again).all()
    assert (
        documents.batch(0)[0].shape != language.Documents(small, tokenizer, 1).batch(0)[0].shape
        or (documents.batch(0)[0] != language.Documents(small, tokenizer, 1).batch(0)[0]).any()
    )


def test_a_seed_gives_the_same_parts_however_many_processes_draw_documents(load, scenes, small):
    parts, language, towers = load("parts"), load("language"), load("tower")
    size = replace(
        small,
        language_steps=3,
        tower_steps=2,
        documents=2,
        items=1,
        distractor_items=1,
        world=replace(small.world, most_images=4),
    )
    size = replace(size, width=32, layers=1, language_tokens=256, tower_images=4)
    tokenizer, sprites, hashes = language.make_tokenizer(size.world), scenes.Sprites(size.world), []
    for seed, workers in ((0, 0), (0, 2), (1, 0)):
        with parts.deterministic():
            trained, _ = language.train_language_model(size, tokenizer, seed, workers)
            tower, figures = towers.train_tower(size, sprites, seed)
        assert figures["steps"] == 2
        hashes.append((parts.weights_hash(trained), parts.weights_hash(tower)))
    assert hashes[0] == hashes[1] and not set(hashes[0]) & set(hashes[2])
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_language_model_is_trained_until_it_answers_enough_or_the_rounds_end(load, small, monkeypatch):
    language = load("language")
    size = replace(small, language_steps=4, documents=2, width=32, layers=1, language_tokens=256, enough=0.9)
    tokenizer = language.make_tokenizer(size.world)
    fit = language.fit
    monkeypatch.setattr(language, "fit", lambda *args, check, **more: fit(*args, check=None, **more))
    for answered, steps in (([0.8, 0.89, 0.9], [4, 2, 2]), ([0.8] * 9, [4, 2, 2, 2]), ([1.0], [4])):
        found = iter(answered)
        monkeypatch.setattr(
            language,
            "text_accuracy",
            lambda *args, found=found: dict.fromkeys(language.TEXT_KINDS, 1.0) | {"which": next(found)},
        )
        _, figures = language.train_language_model(size, tokenizer, 0, 0)
        assert [one["steps"] for one in figures["rounds"]] == steps
        assert figures["accuracy"]["which"] == answered[len(steps) - 1]


def test_parts_that_were_stopped_go_on_with_the_tower(load, scenes, small, tmp_path, monkeypatch):
    parts, trained = load("parts"), []
    size = replace(small, language_steps=2, tower_steps=2, documents=2, items=1, distractor_items=1, width=32, layers=1)
    monkeypatch.setattr(parts, "SIZES_OF_EXPERIMENT", {"tiny": replace(size, language_tokens=256, tower_images=4)})
    train_tower = parts.train_tower
    monkeypatch.setattr(parts, "train_tower", lambda *args: (_ for _ in ()).throw(RuntimeError("stopped")))
    with pytest.raises(RuntimeError, match="stopped"):
        parts.make_parts("tiny", tmp_path, 0, 0)
    monkeypatch.setattr(parts, "train_tower", train_tower)
    language = parts.LlamaForCausalLM.from_pretrained(tmp_path / "language")
    monkeypatch.setattr(parts, "train_language_model", lambda *args: trained.append(args))
    with pytest.raises(ValueError, match="'seed': 0.*not of.*'seed': 1"):
        parts.make_parts("tiny", tmp_path, 1, 0)
    record = parts.make_parts("tiny", tmp_path, 0, 0)
    assert record == parts.read_record(tmp_path) and not trained
    loaded = parts.load_parts(tmp_path)
    assert (
        record["weights"] == parts.weights_hash(language, loaded.tower) == parts.weights_hash(loaded.language, loaded.tower)
    )


def test_an_answer_is_right_if_greedy_decoding_gives_all_of_it(load):
    language = load("language")
    ids = torch.tensor([[5, 6, 7, 8, 1], [5, 6, 7, 1, 2]])
    answers = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0]]).bool()

    def logits(wrong=None, **kept):
        best = torch.nn.functional.one_hot(ids.roll(-1, 1), 10).float()
        if wrong is not None:
            best[wrong] = 0
        return best[:, -kept["logits_to_keep"] :]

    assert language.answers_right(logits, ids, answers) == [True, True]
    assert language.answers_right(lambda **kept: logits((0, 2), **kept), ids, answers) == [False, True]
    assert language.answers_right(lambda **kept: logits((1, 3), **kept), ids, answers) == [True, True], "after the answer"
    assert language.answers_right(lambda **kept: logits((1, 2), **kept), ids, answers) == [True, False], "its end counts"


@pytest.mark.slow
def test_an_arm_is_trained_with_frozen_weights_in_8_bits(load, scenes, small, tmp_path, monkeypatch):
    parts, plan = load("parts"), load("plan")
    sizes = dict(language_steps=1, language_tokens=256, tower_steps=1, tower_images=4, items=3, distractor_items=2)
    size = replace(small, **sizes, distractors=(2,))
    for name in ("parts", "runs"):
        monkeypatch.setattr(load(name), "SIZES_OF_EXPERIMENT", {"tiny": size})
    load("runs").held_out_items.cache_clear()
    parts.make_parts("tiny", tmp_path / "parts", 0, 0)
    flags = ["--parts", str(tmp_path / "parts"), "--seeds", "1", "--steps", "2", "--conversations", "16", "--keep", "none"]
    importlib.import_module("frozen_accuracy").main([*flags, "--out", str(tmp_path / "figures.json")])
    load("runs").held_out_items.cache_clear()
    found = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert list(found) == ["float32, seed 1", "fp8, seed 1", "int8, seed 1"]
    whole, fp8, _ = found.values()
    assert whole["held_out"] == whole["saved"] and fp8["layers"].startswith("fp8 in ")
    assert whole["losses"] != fp8["losses"]
    assert set(fp8["held_out"]) == {*plan.TASKS, "overall"}


def test_parts_are_refused_that_are_weak_or_of_other_data(load, scenes, tmp_path, monkeypatch):
    parts = load("parts")
    with pytest.raises(ValueError, match="holds no parts.json; make the parts first"):
        parts.read_record(tmp_path)
    good = dict.fromkeys((*scenes.TEXT_KINDS, "distractors"), 0.97)
    record = {"size": "full", "generator": scenes.generator_hash(scenes.World()), "language": {"accuracy": good}}
    (tmp_path / "parts.json").write_text(json.dumps(record))
    assert parts.read_record(tmp_path) == record
    (tmp_path / "parts.json").write_text(json.dumps(record | {"language": {"accuracy": good | {"two_hop": 0.5}}}))
    with pytest.raises(ValueError, match="too little in text \\(two_hop 50.0%; expected 90%\\)"):
        parts.read_record(tmp_path)
    (tmp_path / "parts.json").write_text(json.dumps(record | {"generator": "other"}))
    with pytest.raises(ValueError, match="of the generator other"):
        parts.read_record(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Plan, rule and report


def made_up(plan, arm, accuracy, seed, rng, **more):
    """A record in which the fraction of its task's items is right, or by `by_chance` each with this probability."""
    counts = dict.fromkeys((*plan.TASKS[:-1], plan.ALONE), 200) | {"distractors_4": 50, "distractors_64": 50}
    chance = {key: accuracy.get(key.partition("_")[0] if key.startswith("dis") else key, accuracy["all"]) for key in counts}
    by_chance, items = more.pop("by_chance", False), {}
    for key, count in counts.items():
        right = round(chance[key] * count)
        bits = (
            [rng.random() < chance[key] for _ in range(count)]
            if by_chance
            else rng.sample([True] * right + [False] * (count - right), count)
        )
        items[key] = "".join("01"[bit] for bit in bits)
    run = plan.Run(arm, "frozen", plan.CONVERSATIONS, seed, more.pop("rate", 1e-3), more.pop("share", 1.0))
    few = {key: bits[:20] for key, bits in items.items()}
    return {
        "run": plan.as_json(run), "items": items, "curve": [{"step": 8, "items": few}, {"step": 16, "items": few}],
        "perplexity": 3.0, "parts": "p", "generator": "g", "code": "c", "size": "full", "device": "d", "torch": "t",
        "transformers": "f",
    } | more  # fmt: skip


def made_up_experiment(plan, of_mmca, of_causal=None, seeds=6, **more):
    rng, records = random.Random(0), []
    for seed in range(seeds):
        records.append(made_up(plan, "causal", of_causal or {"all": 0.7}, seed, rng))
        records.append(made_up(plan, "mmca", of_mmca, seed, rng, **more))
    return records


def test_mmca_pays_in_data_if_it_wins_clearly(load):
    plan, rule = load("plan"), load("rule")
    verdict = rule.data_verdict(made_up_experiment(plan, {"all": 0.8}))
    assert verdict.pays and verdict.difference.low > 0 and 0.07 < verdict.difference.mean < 0.13
    assert rule.loses(verdict) is False


@pytest.mark.parametrize(
    ("of_mmca", "of_causal", "reason", "lost"),
    [
        ({"all": 0.6}, None, "not 2 points above causal", True),
        ({"all": 0.7}, None, "interval is not above 0", False),
        ({"all": 0.9, "two_hop": 0.6}, {"all": 0.7, "two_hop": 0.7}, "Two-hop loses", True),
    ],
)
def test_mmca_does_not_pay_if_it_loses_or_nothing_differs_or_two_hop_suffers(load, of_mmca, of_causal, reason, lost):
    rule = load("rule")
    verdict = rule.data_verdict(made_up_experiment(load("plan"), of_mmca, of_causal))
    assert verdict.pays is False and any(reason in line for line in verdict.reasons)
    assert rule.loses(verdict) is lost


def test_the_form_with_numbers_is_the_best_or_the_first_of_equal_ones(load):
    plan, rule, report = load("plan"), load("rule"), load("report")

    def best(*accuracies):
        rng, records = random.Random(0), made_up_experiment(plan, {"all": 0.4})
        for arm, accuracy in zip(plan.NUMBERED, accuracies, strict=True):
            records += [made_up(plan, arm, {"all": accuracy}, seed, rng) for seed in range(6)]
        return rule.best_numbered(records), records

    assert best(0.6, 0.7, 0.65)[0] == "block_number"
    assert best(0.695, 0.7, 0.65)[0] == "block", "one point is a tie"
    found, records = best(0.7, 0.6, 0.6)
    assert found == "block" and rule.best_numbered(records[:-1]) is None
    assert rule.best_numbered([*records[:-1], records[-1] | {"parts": "others"}]) is None
    lines = "\n".join(report.verdicts(records, None))
    assert "block pays in data: no.** block less causal" in lines
    assert "block becomes the default: yes.** block less mmca" in lines
    assert "form in which" not in "\n".join(report.verdicts(records[:-1], None))


def test_a_small_gain_does_not_pay_however_certain(load, monkeypatch):
    plan, rule = load("plan"), load("rule")
    records = made_up_experiment(plan, {"all": 0.5}, {"all": 0.5})
    for one, other in zip(records[::2], records[1::2], strict=True):
        other["items"] = {key: "1" + bits[1:] for key, bits in one["items"].items()}
        one["items"] = {key: "0" + bits[1:] for key, bits in one["items"].items()}
    verdict = rule.data_verdict(records)
    assert 0 < verdict.difference.mean < rule.GAIN and verdict.pays is False


def test_missing_and_unpaired_seeds_decide_nothing(load):
    plan, rule = load("plan"), load("rule")
    assert rule.data_verdict(made_up_experiment(plan, {"all": 0.9}, seeds=5)).pays is None
    other_parts = made_up_experiment(plan, {"all": 0.9}, parts="q")
    verdict = rule.data_verdict(other_parts)
    assert verdict.pays is None and "0 of 6 paired seeds" in verdict.reasons[0]
    assert rule.loses(verdict) is None


def test_the_interval_covers_the_truth_as_often_as_it_says(load, monkeypatch):
    plan, rule = load("plan"), load("rule")
    monkeypatch.setattr(rule, "RESAMPLES", 400)
    inside, rng, times = 0, random.Random(7), 50
    for _ in range(times):
        one, other = {}, {}
        for seed in range(6):
            one[seed] = made_up(plan, "mmca", {"all": 0.75}, seed, rng, by_chance=True)
            other[seed] = made_up(plan, "causal", {"all": 0.70}, seed, rng, by_chance=True)
        gap = rule.difference(one, other)
        inside += gap.low <= 0.05 <= gap.high
    assert inside >= 0.8 * times


def test_seeds_that_differ_widen_the_interval(load):
    plan, rule, rng = load("plan"), load("rule"), random.Random(1)
    one, other, shaky = {}, {}, {}
    for seed in range(6):
        other[seed] = made_up(plan, "causal", {"all": 0.7}, seed, rng)
        one[seed] = made_up(plan, "mmca", {"all": 0.75}, seed, rng)
        shaky[seed] = made_up(plan, "mmca", {"all": 0.95 if seed % 2 else 0.55}, seed, rng)
    steady, wide = rule.difference(one, other), rule.difference(shaky, other)
    assert wide.high - wide.low > 3 * (steady.high - steady.low)


@pytest.mark.parametrize(("accuracy", "pays"), [(0.8, True), (0.5, False)])
def test_compute_compares_at_equal_device_time(load, accuracy, pays):
    plan, rule, rng = load("plan"), load("rule"), random.Random(2)
    times = {"causal": 50.0, "mmca": 40.0, "alpha": 60.0}
    assert plan.equal_time(times) == ("causal", 0.8)
    records = made_up_experiment(plan, {"all": accuracy}, {"all": 0.99})
    assert rule.compute_verdict(records, times).pays is None, "causal with all of its steps took longer"
    assert rule.compute_verdict(records, None).pays is None
    records += [made_up(plan, "causal", {"all": 0.7}, seed, rng, share=0.8) for seed in range(6)]
    assert rule.compute_verdict(records, times).pays is pays


def test_the_learning_rate_is_chosen_on_the_seed_that_is_not_reported(load):
    plan, rule, rng = load("plan"), load("rule"), random.Random(0)
    records = [
        made_up(plan, "mmca", {"all": 0.8 if rate == 2e-3 else 0.5}, plan.RATE_SEED, rng, rate=rate)
        for rate in plan.LEARNING_RATES["frozen"]
    ]
    assert plan.chosen_rates(records) == {("frozen", "mmca"): 2e-3}
    assert plan.chosen_rates(records[:-1]) == {}, "one rate was not tried"
    assert rule.by_seed(records, "mmca", "frozen", plan.CONVERSATIONS) == {}
    with pytest.raises(ValueError, match="No learning rate of 'causal'"):
        plan.runs_of(plan.STAGES["primary"], plan.chosen_rates(records))


def test_the_plan_is_the_one_of_the_issue(load):
    plan = load("plan")
    arms = (*plan.PRIMARY, *plan.NUMBERED)
    tried = zip(arms, (1e-3, 2e-3, 4e-3, 5e-3, 6e-3, 7e-3), strict=True)
    rates = {(mode, arm): rate for arm, rate in tried for mode in plan.MODES}
    runs = {name: plan.runs_of(stage, rates, {"causal": 2.0, "mmca": 1.0}) for name, stage in plan.STAGES.items()}
    primary = runs["primary"]
    assert len(primary) == 18 and {run.arm for run in primary} == {"causal", "mmca", "alpha"}
    assert {(run.mode, run.conversations, run.share) for run in primary} == {("frozen", 16384, 1.0)}
    assert [run.seed for run in primary] == sorted(run.seed for run in primary), "the runs of a seed follow each other"
    assert {run.share for run in runs["compute"]} == {0.5} and {run.arm for run in runs["compute"]} == {"causal"}
    explored = {(run.mode, run.conversations, run.arm, run.seed) for name in runs for run in runs[name] if run.is_reported}
    for conversations in (1024, 4096, 65536):
        assert {("frozen", conversations, arm, seed) for arm in plan.PRIMARY for seed in (0, 1)} <= explored
    for mode in ("lora", "full"):
        assert {(mode, 16384, arm, seed) for arm in plan.PRIMARY for seed in (0, 1)} <= explored
    assert {("frozen", 16384, arm, seed) for arm in load("arms").ARMS for seed in (0, 1)} <= explored
    varied = {run.arm: run.learning_rate for run in runs["arms"]}
    assert varied["bidirectional"] == 1e-3 and varied["mmca_upper"] == 2e-3 and varied["alpha_own_image"] == 4e-3
    assert varied["block_bidirectional"] == 5e-3
    numbered = runs["number"]
    assert len(numbered) == 18 and {run.seed for run in numbered} == {run.seed for run in primary}
    assert len(runs["rates-number"]) == 12 and not any(run.is_reported for run in runs["rates-number"])
    names = [run.name for stage in runs.values() for run in stage]
    assert len(set(names)) == len(names)


def save_records(plan, folder, records):
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for record in records:
        plan.path_of(plan.Run(**record["run"]), folder).write_text(json.dumps(record))


def test_the_report_shows_every_arm_and_what_is_missing(load, tmp_path):
    plan, rng = load("plan"), random.Random(4)
    records = made_up_experiment(plan, {"all": 0.8}) + [made_up(plan, "bidirectional", {"all": 0.4}, 0, rng)]
    save_records(plan, tmp_path, records)
    (tmp_path / "runs" / "frozen-1024-mmca-seed0-rate0.001.failed").write_text("OutOfMemoryError: too large\n")
    text = load("report").write_report(tmp_path, tmp_path)
    assert "**MMCA pays in data: yes.**" in text and "**MMCA pays in compute: not decided.**" in text
    rows = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")]
    assert {"causal", "mmca", "bidirectional", "guess: all images read, none told apart"} <= set(rows)
    assert "| mean | one image |" in text
    assert "Run `frozen-1024-mmca-seed0-rate0.001` failed: OutOfMemoryError: too large" in text
    assert "Stage `lora`, exploratory: LoRA: not begun." in text
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml") and not (tmp_path / "data.svg").exists()
    less = plan.as_json(plan.Run("causal", "frozen", 1024, 0, 1e-3))
    save_records(plan, tmp_path, [made_up(plan, "causal", {"all": 0.3}, 0, rng, run=less)])
    assert "## frozen, 1,024 conversations (exploratory)" in load("report").write_report(tmp_path, tmp_path)
    assert (tmp_path / "data.svg").exists()


def test_a_report_compares_runs_of_one_version(load, tmp_path):
    plan = load("plan")
    save_records(plan, tmp_path, made_up_experiment(plan, {"all": 0.8}, code="other"))
    with pytest.raises(ValueError, match="2 values of 'code'"):
        load("report").write_report(tmp_path, tmp_path)
    before, after = next(iter(load("versions").SAME_CODE.items()))
    earlier = [record | {"code": before} for record in made_up_experiment(plan, {"all": 0.8}, seeds=3)]
    now = [record | {"code": after} for record in made_up_experiment(plan, {"all": 0.8})[6:]]
    save_records(plan, tmp_path / "added", earlier + now)
    assert "**MMCA pays in data: yes.**" in load("report").write_report(tmp_path / "added", tmp_path)
    with pytest.raises(ValueError, match="holds no reported run"):
        load("report").write_report(tmp_path / "empty", tmp_path)


def test_the_results_are_those_of_this_code(load):
    """If a change of the code means other runs, it needs another folder; if it does not, `versions.py` has to say so."""
    plan, versions = load("plan"), load("versions")
    records = plan.read_records(FOLDER / "results" / "h200" / "attention_quality")
    assert len(records) >= 36 and {versions.comparable(record)["code"] for record in records} == {plan.code_hash()}


def test_a_guess_knows_all_images_but_not_which_is_which(load):
    scenes, guess = load("scenes"), load("guess")
    red, blue = (scenes.Thing(0, colour, "circle", "small") for colour in ("red", "blue"))
    square = scenes.Thing(1, "blue", "square", "large")
    told = [scenes.Scene((red, square), "12", 5), scenes.Scene((blue,), "34", 5), scenes.Scene((red,), "12", 5)]

    def chance(kind, words, *answer):
        return guess.chance(scenes.Question(kind, tuple(words.split("|")), ("(image 1)", *answer), (0,)), told)

    assert chance("attribute", "what|colour|is|the|circle|in|(image 1)|?", "red") == 2 / 3
    assert chance("attribute", "what|size|is|the|blue|one|in|(image 1)|?", "large") == 1 / 2
    assert chance("which", "which|image|shows|a|blue|square|?") == 1 / 3
    assert chance("print", "which|number|is|printed|in|(image 1)|?", "1", "2") == 2 / 3
    # Red circles, of the first and the third image; another image has a circle of another colour: the second.
    words = "in|(image 2)|,|what|colour|is|the|shape|that|is|red|in|(image 1)|?"
    assert chance("two_hop", words, "blue") == 1


def test_the_readme_states_the_rule_of_the_code(load):
    rule, plan = load("rule"), load("plan")
    text = " ".join((FOLDER / "attention_quality" / "README.md").read_text().split())
    for value in (f"at least {100 * rule.GAIN:g} points", f"at most {100 * rule.TWO_HOP_LOSS:g} points"):
        assert value in text
    assert f"{len(plan.PRIMARY_SEEDS)} paired seeds" in text and f"{plan.CONVERSATIONS:,} conversations" in text
    for rates in plan.LEARNING_RATES.values():
        assert ", ".join(f"{rate:g}" for rate in rates) in text
    for arm, what in load("arms").ARMS.items():
        assert f"`{arm}`" in text and what.about.split(";")[-1].split("(")[0].strip() in text
    for stage in plan.STAGES:
        assert f"`{stage}`" in text


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def fake_runs(load, monkeypatch, tmp_path):
    """Runs that take no time: their files, and what was done."""
    runs, plan, done, rng = load("runs"), load("plan"), [], random.Random(0)
    monkeypatch.setattr(runs, "read_record", lambda folder: {"size": "tiny", "weights": "p"})
    monkeypatch.setattr(runs, "fingerprints", lambda record: {"generator": "g", "code": "c", "parts": "p"})

    def do_run(run, parts):
        done.append(run)
        if run.learning_rate == 2e-3:
            raise RuntimeError("out of memory")
        return made_up(plan, run.arm, {"all": 0.5}, run.seed, rng, rate=run.learning_rate)

    monkeypatch.setattr(runs, "do_run", do_run)
    return runs, tmp_path, done


def test_a_run_is_skipped_if_its_file_exists_and_a_failed_one_is_tried_again(fake_runs, capsys):
    runs, folder, done = fake_runs
    missing = runs.missing_runs("rates", folder)
    assert len(missing) == 12
    assert runs.do_runs(missing, folder, folder) == 3 and len(done) == 12
    failures = sorted((folder / "runs").glob("*.failed"))
    assert len(failures) == 3 and failures[0].read_text() == "RuntimeError: out of memory\n"
    again = runs.missing_runs("rates", folder)
    assert {run.learning_rate for run in again} == {2e-3} and len(again) == 3
    done.clear()
    assert runs.do_runs(missing, folder, folder) == 3 and done == again
    assert not list((folder / "runs").glob("*.tmp"))


def test_no_run_begins_that_would_end_after_the_budget(fake_runs, monkeypatch, capsys):
    runs, folder, done = fake_runs
    now = [0.0]
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    inner = runs.do_run

    def slow(run, parts):
        now[0] += 40
        return inner(run, parts)

    monkeypatch.setattr(runs, "do_run", slow)
    chosen = [run for run in runs.missing_runs("rates", folder) if run.learning_rate != 2e-3]
    runs.do_runs(chosen, folder, folder, deadline=100)
    assert len(done) == 2 and "not started, 20 s are left" in capsys.readouterr().out


def test_processes_take_turns_on_the_gpus(load, tmp_path, monkeypatch):
    runs, written = load("runs"), tmp_path / "written"
    monkeypatch.setattr(runs.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(
        f'#!/bin/sh\nfor last; do :; done\necho "$last on ${{CUDA_VISIBLE_DEVICES-all}}" >> {written}\n'
    )
    (tmp_path / "python").chmod(0o755)
    made = load("plan").runs_of(load("plan").STAGES["rates"], {})[:5]

    def placed(visible, count):
        written.unlink(missing_ok=True)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        assert runs.do_side_by_side(made, [], 4, float("inf")) == 0
        by_name = dict(line.split(" on ") for line in written.read_text().splitlines())
        return [by_name.get(run.name) for run in made]

    # The first of four processes does two runs, and names the second of them last.
    assert placed("", 2) == [None, "1", "0", "1", "0"]
    assert placed("4,6", 2) == [None, "6", "4", "6", "4"]
    assert placed("", 0) == [None, "all", "all", "all", "all"]


def test_results_of_another_version_are_not_added_to(fake_runs):
    runs, folder, _ = fake_runs
    [first, second, *_] = runs.missing_runs("rates", folder)
    runs.do_runs([first], folder, folder)
    path = next((folder / "runs").glob("*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "older"}))
    with pytest.raises(ValueError, match="another code"):
        runs.do_runs([second], folder, folder)


def test_fewer_conversations_are_the_first_of_more_and_every_one_is_seen(load, small):
    runs, plan = load("runs"), load("plan")
    for conversations, steps in ((16, small.least_steps), (small.batch * 20, 20)):
        run = plan.Run("mmca", "frozen", conversations, 3, 1e-3)
        order = runs.order_of_batches(small, run)
        assert len(order) == steps and {index for batch in order for index in batch} == set(range(conversations))
        assert order == runs.order_of_batches(small, replace(run, arm="causal")), "paired arms see the same data"
        assert order != runs.order_of_batches(small, replace(run, seed=4))
        half = runs.order_of_batches(small, replace(run, share=0.5))
        assert half == order[: steps // 2]


def test_the_command_stops_after_rates_that_are_missing_and_refuses_unknown_names(fake_runs, load, capsys):
    _, folder, done = fake_runs
    main = load("__main__").main
    flags = ["runs", "--parts", str(folder), "--results", str(folder)]
    assert main([*flags, "--stage", "rates", "primary"]) == 1 and len(done) == 12
    assert "rates: 3 runs are missing; call this again" in capsys.readouterr().out
    assert main([*flags, "--stage", "primary"]) == 2
    assert "No learning rate of 'causal' (frozen) was chosen" in capsys.readouterr().err
    assert main([*flags, "--stage", "rates", "--only", "frozen-1-mmca"]) == 2
    assert "--only frozen-1-mmca: the stages rates have no such run" in capsys.readouterr().err
    done.clear()
    assert main([*flags, "--stage", "rates", "--only", "frozen-16384-mmca-seed1000-rate0.002"]) == 1
    assert [run.name for run in done] == ["frozen-16384-mmca-seed1000-rate0.002"]


@pytest.mark.slow
def test_the_tiny_version_runs_on_a_cpu_and_goes_on_where_it_was(tmp_path):
    """Parts, step times, learning rates, a primary comparison and the report, as `make` runs them."""
    root, ready = FOLDER.parent, str(tmp_path / "venv" / "ready")
    command = ["make", "-C", str(root), "attention-quality-tiny", f"VENV={tmp_path / 'venv'}", "-o", ready]
    command += [f"BIN={Path(sys.executable).parent}", f"RESULTS={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "attention_quality"
    record = json.loads((folder / "parts" / "parts.json").read_text())
    [trained] = record["language"]["rounds"]  # one is enough, as no accuracy is wanted
    assert trained["loss"] < 2 and set(record["language"]["accuracy"]) > {"two_hop", "distractors"}
    times = json.loads((folder / "step_times.json").read_text())["results"]
    assert times["parts"] == record["weights"] and times["image_share"] > 0.3
    assert len(list((folder / "runs").glob("*.json"))) == 12 + 18 + 6 and not list((folder / "runs").glob("*.failed"))
    report = (folder / "report.md").read_text()
    assert "64 conversations (exploratory)" in report and "| alpha | 6 |" in report and "not decided" in report
    one = next((folder / "runs").glob("*seed3*"))
    kept = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir() if path != one}
    one.unlink()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert one.exists() and kept == {path: path.stat().st_mtime_ns for path in kept}
