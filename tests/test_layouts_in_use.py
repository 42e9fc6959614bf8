"""Images of any size in chat, server, web page, evaluation and pipelines: answers are those of the whole conversation."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from layout_models import SIZES, VARYING, layout_parts, model_inputs, noise, question, shared_parts
from model_server import NAME, data_url, served
from model_server import question as openai_question
from openai import BadRequestError
from PIL import Image
from transformers import pipeline
from transformers.utils import is_torchvision_available

from dsvl.chat import DSVLChat
from dsvl.chat.prompts import read_prompt
from dsvl.chat.terminal import Terminal
from dsvl.evaluation.answer_file import AnswerFile
from dsvl.evaluation.evaluator import Evaluator
from dsvl.evaluation.questions import Questions
from dsvl.page.limits import PageLimits
from dsvl.page.sessions import ChatSessions, PageQuestion
from dsvl.serving.engine import collate
from dsvl.serving.requests import RequestLimits

NEW = 5
CASES = ["pad", "tiles", "native, downsample"]
every_case = pytest.mark.parametrize("case", CASES)


def from_scratch(model: Any, processor: Any, messages: list[dict[str, Any]], tokens: int = NEW) -> list[int]:
    inputs = model_inputs(processor, [messages])
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


# -- chat ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VARYING)
def test_a_prompt_knows_where_its_images_are(case):
    _, processor = shared_parts(case)
    messages = question([noise(size, seed) for seed, size in enumerate(SIZES)])
    prompt = read_prompt(processor, messages)
    assert prompt.ids == model_inputs(processor, [messages])["input_ids"][0].tolist()
    assert prompt.tile_lengths == [processor.tile_lengths(height, width) for width, height in SIZES]
    ends = [0]
    for where, tiles in zip(prompt.images, prompt.tile_lengths, strict=True):
        inside = prompt.ids[where.start : where.stop]
        assert inside[0] == inside[-1] == processor.image_token_id and inside.count(processor.image_token_id) == sum(tiles)
        assert processor.image_token_id not in prompt.ids[ends[-1] : where.start]
        ends.append(where.stop)
    assert processor.image_token_id not in prompt.ids[ends[-1] :]


@every_case
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_each_turn_answers_as_from_scratch_and_encodes_only_new_images(case, kind):
    model, processor = shared_parts(case)
    chat = DSVLChat(model, processor, max_new_tokens=NEW, do_sample=False, cache_implementation=kind, context_length=1024)
    for turn, seeds in enumerate([[0, 1], [], [3], [2, 4]]):
        images = [noise(SIZES[seed], seed) for seed in seeds]
        chat.ask(f"Question {turn}?", images)
        stats = chat.last_turn
        assert stats.encoded_images == len(seeds)
        assert stats.encoded_tiles == sum(len(processor.tile_lengths(image.height, image.width)) for image in images)
        assert stats.answer_ids == from_scratch(model, processor, chat.messages[:-1])
        assert (stats.reused_tokens > 0) == (turn > 0)
    # An image that is exchanged for one of another size is computed again, with all that follows.
    chat.messages[0]["content"][1] = {"type": "image", "image": noise((90, 91), 7)}
    chat.ask("And now?")
    assert chat.last_turn.answer_ids == from_scratch(model, processor, chat.messages[:-1])
    second = read_prompt(processor, chat.messages[:-1]).images[1]
    assert chat.last_turn.encoded_images == 4 and chat.last_turn.reused_tokens == second.start


@every_case
def test_a_saved_conversation_goes_on(case, tmp_path):
    model, processor = shared_parts(case)
    options = {"max_new_tokens": NEW, "do_sample": False}
    chat = DSVLChat(model, processor, **options)
    chat.ask("One?", [noise(SIZES[1], 1)])
    chat.save(tmp_path / "saved")
    again = DSVLChat(model, processor, **options)
    again.load(tmp_path / "saved")
    assert again.ask("Two?") == chat.ask("Two?")


def test_the_context_counts_all_tiles():
    model, processor = shared_parts("tiles")
    image = noise(SIZES[0])
    needed = len(read_prompt(processor, question([image], "?")).ids) + NEW
    assert DSVLChat(model, processor, context_length=needed, max_new_tokens=NEW, do_sample=False).ask("?", image)
    with pytest.raises(ValueError, match=f"holds {needed - 1} tokens, but {needed - NEW} tokens"):
        DSVLChat(model, processor, context_length=needed - 1, max_new_tokens=NEW).ask("?", image)


def test_the_terminal_says_what_images_take(tmp_path, capsys):
    for case, taken in (("pad", ""), ("tiles", ": 6 tiles of 5 tokens"), ("native, downsample", ": %d tokens")):
        model, processor = shared_parts(case)
        for seed, size in enumerate(SIZES[1:3]):
            noise(size, seed).save(tmp_path / f"{seed}.png")
        if "%d" in taken:
            taken %= sum(sum(processor.tile_lengths(height, width)) for width, height in SIZES[1:3])
        terminal = Terminal(DSVLChat(model, processor, max_new_tokens=2, do_sample=False), input, stats=True)
        terminal.handle(f"/image {tmp_path / '0.png'} {tmp_path / '1.png'}")
        terminal.handle("Which?")
        said = capsys.readouterr().out
        assert f"(2 images added to the next question{taken})" in said
        assert ("2 images of 6 tiles encoded" if case == "tiles" else "2 images encoded") in said


# -- the server ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiles", "native, downsample"])
def server(request):
    model, processor = layout_parts(request.param)
    model.generation_config.suppress_tokens = [i for word, i in processor.tokenizer.get_vocab().items() if word[:3] == "<0x"]
    with served(model, processor, RequestLimits(tiles=12)) as one:
        yield one, model, processor


def test_requests_with_images_of_any_size_are_answered_together(server):
    one, model, processor = server
    client = one.client()
    before, asked, expected = one.engine.batches, [], []
    for seeds in ([0], [1, 2], [], [3]):
        images = [noise(SIZES[seed], seed) for seed in seeds]
        asked.append(openai_question(f"About {len(seeds)}?", *map(data_url, images)))
        messages = question(images, f"About {len(seeds)}?")
        expected.append((len(read_prompt(processor, messages).ids), from_scratch(model, processor, messages)))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda m: client.chat.completions.create(model=NAME, messages=m, max_tokens=NEW), asked))
    for answer, (tokens, ids) in zip(answers, expected, strict=True):
        assert answer.choices[0].message.content == processor.decode(ids, skip_special_tokens=True)
        assert answer.usage.prompt_tokens == tokens
    assert one.engine.batches > before


def test_rows_of_a_batch_are_joined_with_all_that_their_images_need(server):
    _, model, processor = server
    conversations = [question([noise(SIZES[seed], seed) for seed in seeds]) for seeds in ([0], [1, 2], [], [3])]
    rows = [model_inputs(processor, [conversation]) for conversation in conversations]
    joined, whole = collate(rows, processor.tokenizer.pad_token_id), model_inputs(processor, conversations)
    assert joined.keys() == whole.keys()
    for name, value in whole.items():
        assert joined[name].equal(value), name
    assert collate(rows[2:3], 0).keys() == {"input_ids", "attention_mask", "mm_token_type_ids"}


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 7), (4_000, 3_000)])
def test_the_server_takes_any_size(server, size):
    one, _, processor = server
    answer = one.client().chat.completions.create(
        model=NAME, messages=openai_question("?", data_url(Image.new("RGB", size, "red"))), max_tokens=2
    )
    assert answer.usage.prompt_tokens == len(read_prompt(processor, question([Image.new("RGB", size)], "?")).ids)


def test_tiles_of_a_request_are_bounded(server):
    one, _, processor = server
    limit = 12 if processor.image_layout == "tiles" else 2  # a native image is one tile
    one.chat.limits = replace(one.chat.limits, tiles=limit)
    urls = [data_url(noise((90, 90), seed)) for seed in range(3)]
    with pytest.raises(BadRequestError, match=f"take {15 if limit == 12 else 3} tiles; the limit is {limit}"):
        one.client().chat.completions.create(model=NAME, messages=openai_question("?", *urls), max_tokens=2)


def test_images_are_measured_as_carefully_as_they_are_read(server):
    one, *_ = server
    for url, words in (
        ("data:image/png;base64,AAAA", "Image 1 "),
        ("data:image/png;base64,!", "is not a valid base64 data URL"),
        ("file:///etc/passwd", "is neither a data URL nor an http"),
        ("http://127.0.0.1/x.png", "is an http.s. URL, which this server does not download"),
    ):
        with pytest.raises(BadRequestError, match=words):
            one.client().chat.completions.create(model=NAME, messages=openai_question("?", url), max_tokens=2)


# -- page, evaluation, pipelines -------------------------------------------------------------------------------------------


@every_case
def test_the_page_answers_as_from_scratch(case, tmp_path):
    model, processor = shared_parts(case)
    files = []
    for seed in (0, 1):
        noise(SIZES[seed], seed).save(tmp_path / f"{seed}.png")
        files.append(str(tmp_path / f"{seed}.png"))
    sessions = ChatSessions(lambda: DSVLChat(model, processor, max_new_tokens=NEW, do_sample=False), PageLimits())
    for asked in (PageQuestion("One?", files[:1]), PageQuestion("Two?", files[1:]), PageQuestion("Three?", [])):
        assert sessions.ask("a", asked).done.result(60)
    chat = sessions.get("a").chat
    for turn in range(3):
        expected = processor.decode(from_scratch(model, processor, chat.messages[: 2 * turn + 1]), skip_special_tokens=True)
        assert chat.messages[2 * turn + 1]["content"] == expected
    sessions.close()


@every_case
def test_evaluation_groups_by_real_lengths_and_answers_as_alone(case, tmp_path):
    model, processor = shared_parts(case)
    lines = []
    for number, seeds in enumerate([[0], [2], [1, 3], [4]]):
        messages = question([noise(SIZES[seed], seed) for seed in seeds])
        for index, part in enumerate(messages[0]["content"][: len(seeds)]):
            part.pop("image").save(tmp_path / f"{number}_{index}.png")
            part["path"] = f"{number}_{index}.png"
        lines.append(json.dumps({"id": str(number), "messages": [*messages, {"role": "assistant", "content": "x"}]}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    questions = Questions(tmp_path / "data.jsonl")
    evaluator = Evaluator(model, processor, questions, batch_size=3, max_new_tokens=NEW)
    tokens = []
    for index, sizes in enumerate(SIZED):
        tokens.append(sum(sum(processor.tile_lengths(*size)) for size in sizes))
        assert evaluator._image_tokens(index) == [tokens[-1]]
    order = [index for group in evaluator._groups() for index, _ in group]
    assert [tokens[index] for index in order] == sorted(tokens, reverse=True)
    file = AnswerFile(tmp_path / "out", {"model": "tiny"})
    evaluator.run(file)
    for index in range(4):
        messages = questions[index].turns[0].messages
        ids = from_scratch(model, processor, messages)
        assert file.answers[str(index), 0].answer == processor.decode(ids, skip_special_tokens=True)


SIZED = [[SIZES[seed][::-1] for seed in seeds] for seeds in ([0], [2], [1, 3], [4])]


@every_case
@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines_answer_as_the_model(case, task, monkeypatch):
    if task == "any-to-any" and not is_torchvision_available():
        pytest.skip("torchvision is not installed, which this pipeline of transformers requires")
    model, processor = shared_parts(case)
    words = processor.tokenizer.get_vocab().items()
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [i for word, i in words if word[:3] == "<0x"])
    messages = question([noise(SIZES[0]), noise(SIZES[1], 1)])
    made = pipeline(task, model=model, processor=processor)(
        text=messages, max_new_tokens=NEW, do_sample=False, return_full_text=False
    )
    expected = processor.decode(from_scratch(model, processor, messages), skip_special_tokens=True)
    assert made[0]["generated_text"].strip() == expected.strip()
