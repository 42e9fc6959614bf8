"""`dsvl serve` with an image library: the answers of a server without one, and nothing of another visitor's."""

import functools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pytest
import torch
from model_server import (
    LONG,
    SENTENCES,
    Server,
    alone,
    ask,
    data_url,
    draw_image,
    eventually,
    load_parts,
    question,
    served,
    streamed,
)
from training_runs import make_checkpoint

import dsvl
from dsvl.image_library import ImageLibrary
from dsvl.serving import engine
from dsvl.serving.app import ChatCompletions
from dsvl.serving.requests import RequestLimits

SIZE = 2**28


def with_library(parts: Any, **options: Any) -> Any:
    return served(*parts, library=ImageLibrary(parts[0], options.pop("memory_bytes", SIZE)), **options)


def statistics(server: Server) -> dict[str, int]:
    connection = HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())["image_library"]


def own_messages(text: str, *seeds: int) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": draw_image(seed)} for seed in seeds]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def test_a_repeated_image_is_neither_decoded_nor_encoded_again(parts: Any, monkeypatch: Any) -> None:
    read: list[int] = []
    preprocess = ChatCompletions.preprocess_image

    def counted(self: Any, part: Any, number: int, lengths: Any) -> Any:
        read.append(number)
        return preprocess(self, part, number, lengths)

    monkeypatch.setattr(ChatCompletions, "preprocess_image", counted)
    with with_library(parts) as server:
        for text in ("one", "two", "three"):
            messages = question(text, data_url(draw_image(1)), data_url(draw_image(2)))
            assert ask(server, messages).choices[0].message.content == alone(parts, own_messages(text, 1, 2))
        assert read == [1, 2]
        figures = statistics(server)
        assert (figures["misses"], figures["hits"], figures["images"]) == (2, 4, 2) and figures["bytes"] > 0
        # In another order, beside a new one, in another turn.
        messages = [
            *question("one", data_url(draw_image(2)), data_url(draw_image(3))),
            {"role": "assistant", "content": "A dog."},
            *question("two", data_url(draw_image(1))),
        ]
        own = [*own_messages("one", 2, 3), {"role": "assistant", "content": "A dog."}, *own_messages("two", 1)]
        assert ask(server, messages).choices[0].message.content == alone(parts, own)
        assert read == [1, 2, 2]


def test_two_visitors_with_the_same_image_get_the_answers_of_a_fresh_server(parts: Any) -> None:
    """Interleaved in the same batches, with other texts, in other turns, greedy and sampled."""
    image, other = data_url(draw_image(5)), data_url(draw_image(6))
    conversations = []
    for number, text in enumerate(SENTENCES[:12]):
        secret = f"{text} {SENTENCES[(number * 7 + 3) % len(SENTENCES)]}"
        urls = [image] if number % 3 else [other, image]
        conversations.append(
            [*question(secret, *urls), {"role": "assistant", "content": text}, *question("one")]
            if number % 2
            else question(secret, *urls)
        )

    def answer(server: Server, number: int) -> str:
        how: dict[str, Any] = {"temperature": 1.3, "seed": number} if number % 4 == 3 else {}
        return ask(server, conversations[number], 12, **how).choices[0].message.content

    expected = []
    for number in range(12):
        if number % 4 == 0:  # a server that has seen three others, without a library
            fresh = served(*parts)
            server = fresh.__enter__()
        expected.append(answer(server, number))
        if number % 4 == 3:
            fresh.__exit__(None, None, None)
    with with_library(parts) as server:
        server.engine.max_steps = 3
        for _ in range(2):
            order = random.Random(0).sample(range(12), 12)
            with ThreadPoolExecutor(12) as pool:
                got = dict(zip(order, pool.map(lambda number: answer(server, number), order), strict=True))
            assert [got[number] for number in range(12)] == expected
        names = server.engine.library.tiers.memory.names()
        assert len(names) == 2  # of images, whatever was said about them
        kept = {part for name in names for part in server.engine.library.tiers.memory.get(name)}
        assert kept == {"keys", "values"}


@pytest.mark.parametrize("together", [pytest.param(engine.PREFILL_BYTES, marks=pytest.mark.slow), 1])
def test_batches_of_hits_misses_and_texts(parts: Any, monkeypatch: Any, together: int) -> None:
    """Also if the images of each request are prefilled on their own."""
    monkeypatch.setattr(engine, "PREFILL_BYTES", together)
    seeds = [[], [1], [2, 1], [3], [], [1, 4, 1], [5, 6]]
    expected = [alone(parts, own_messages(SENTENCES[number], *own)) for number, own in enumerate(seeds)]
    with with_library(parts) as server:
        ask(server, question("one", data_url(draw_image(1)), data_url(draw_image(5))))

        def one(number: int) -> str:
            return streamed(server, question(SENTENCES[number], *(data_url(draw_image(seed)) for seed in seeds[number])))

        for _ in range(2):
            with ThreadPoolExecutor(len(seeds)) as pool:
                assert list(pool.map(one, range(len(seeds)))) == expected


def test_a_library_that_is_too_small_changes_no_answer(parts: Any) -> None:
    """Images are dropped while requests wait for them, and some requests do not fit at all."""
    size = sum(ImageLibrary(parts[0], SIZE).token_bytes(parts[0]) * 5 for _ in range(2))
    seeds = [[number % 5] * (1 + number % 2) + [number % 3] * (number % 4 == 0) for number in range(16)]
    expected = [alone(parts, own_messages(SENTENCES[number], *own)) for number, own in enumerate(seeds)]
    with with_library(parts, memory_bytes=size) as server:

        def one(number: int) -> str:
            messages = question(SENTENCES[number], *(data_url(draw_image(seed)) for seed in seeds[number]))
            return ask(server, messages).choices[0].message.content

        for _ in range(2):
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(one, range(16))) == expected
        eventually(lambda: server.engine.library.tiers.memory.leased == 0)
        assert server.engine.library.tiers.memory.bytes <= size
        for seed in (7, 8, 9):
            assert ask(server, question("one", data_url(draw_image(seed)))).choices[0].message.content
        assert server.engine.library.tiers.memory.evicted > 0


def test_clients_that_vanish_leave_no_leases(parts: Any) -> None:
    with with_library(parts) as server:
        url = data_url(draw_image(1))
        ask(server, question("one", url))
        streams = [ask(server, question(text, url), LONG, stream=True) for text in SENTENCES[:6]]
        next(iter(streams[0]))
        for stream in streams:
            stream.close()
        eventually(lambda: server.chat.held == 0 and server.engine.running == 0)
        library = server.engine.library
        eventually(lambda: library.tiers.memory.leased == 0)
        assert ask(server, question("two", url)).choices[0].message.content == alone(parts, own_messages("two", 1))


def test_causal_attention_keeps_features(tmp_path: Any) -> None:
    make_checkpoint(tmp_path)
    model, processor = dsvl.compose(tmp_path / "tower", tmp_path / "llama", multimodal_attention="causal")
    parts = load_parts(dsvl.save_checkpoint(model, processor, tmp_path / "causal"))
    with with_library(parts) as server:
        for text in ("one", "two"):
            answer = ask(server, question(text, data_url(draw_image(1)))).choices[0].message.content
            assert answer == alone(parts, own_messages(text, 1))
        assert (statistics(server)["misses"], statistics(server)["hits"]) == (1, 1)
        assert server.engine.library.tiers.memory.names()[0].startswith("features-")


def test_pixels_that_the_library_cannot_take_answer_alike(parts: Any, monkeypatch: Any) -> None:
    """Beside requests that it takes, in one batch."""
    monkeypatch.setattr(ImageLibrary, "takes", lambda self, model, ids, lengths: len(lengths) < 2)
    seeds = [[1], [1, 2], [], [3, 3], [2]]
    expected = [alone(parts, own_messages(SENTENCES[number], *own)) for number, own in enumerate(seeds)]
    with with_library(parts) as server, ThreadPoolExecutor(5) as pool:
        first = ask(server, question("one"), LONG, stream=True)  # the others wait for it, and start together
        got = pool.map(
            lambda number: (
                ask(server, question(SENTENCES[number], *(data_url(draw_image(seed)) for seed in seeds[number])))
                .choices[0]
                .message.content
            ),
            range(5),
        )
        assert list(got) == expected
        first.close()


# ----------------------------------------------------------------------------------------------------------------------
# Paused requests


@pytest.fixture
def prefills(monkeypatch: Any, parts: Any) -> list[int]:
    """The number of tokens of every forward call of more than one."""
    calls: list[int] = []
    forward = parts[0].forward

    @functools.wraps(forward)  # generate() reads the signature
    def counted(*args: Any, **inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] > 1:
            calls.append(len(inputs["input_ids"]))
        return forward(*args, **inputs)

    monkeypatch.setattr(parts[0], "forward", counted)
    return calls


@pytest.mark.parametrize("kept_bytes", [None, pytest.param(0, marks=pytest.mark.slow), 60_000])
def test_paused_requests_go_on_as_if_they_had_not_paused(parts: Any, prefills: list[int], kept_bytes: int | None) -> None:
    def one(number: int) -> str:
        options: dict[str, Any] = {"temperature": 1.2, "seed": number} if number % 2 else {}
        messages = question(SENTENCES[number], *[data_url(draw_image(number))] * (number % 3))
        return ask(server, messages, 24 + number, **options).choices[0].message.content

    with served(*parts) as server:
        whole = [one(number) for number in range(8)]
    with served(*parts) as server:
        server.engine.max_batch, server.engine.max_steps = 3, 4
        if kept_bytes is not None:
            server.engine.kept_bytes = kept_bytes
        prefills.clear()
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(one, range(8))) == whole
        assert server.engine.batches > 8
    if kept_bytes is None:
        assert sum(prefills) == 8  # each prompt once
    elif kept_bytes == 0:
        assert sum(prefills) > 30
    else:
        assert sum(prefills) > 8


def test_out_of_memory_drops_what_is_kept(parts: Any, monkeypatch: Any) -> None:
    model, failures = parts[0], []
    forward = model.forward

    @functools.wraps(forward)
    def failing(*args: Any, **inputs: Any) -> Any:
        ids = inputs["input_ids"]
        if ids.shape[1] == 1 and len(ids) > 1 and any(one.kept for one in server.engine.waiting) and len(failures) < 2:
            failures.append([one.kept for one in server.engine.waiting])
            raise torch.OutOfMemoryError("full")
        return forward(*args, **inputs)

    def one(number: int) -> str:
        return ask(server, question(SENTENCES[number]), 20, temperature=1.2, seed=number).choices[0].message.content

    with served(*parts) as server:
        whole = [one(number) for number in range(6)]
    with served(*parts) as server:
        server.engine.max_batch, server.engine.max_steps = 2, 3
        monkeypatch.setattr(model, "forward", failing)
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(one, range(6))) == whole
        assert failures


def test_a_finished_or_cancelled_request_keeps_nothing(parts: Any) -> None:
    with served(*parts, limits=RequestLimits(requests=8)) as server:
        server.engine.max_batch, server.engine.max_steps = 1, 2
        streams = [ask(server, question(text), LONG, stream=True) for text in SENTENCES[:3]]
        eventually(lambda: any(one.kept for one in list(server.engine.active.values())))
        requests = list(server.engine.active.values())
        for stream in streams:
            stream.close()
        eventually(lambda: all(one.done for one in requests))
        assert all(one.kept is None and not one.inputs for one in requests)
