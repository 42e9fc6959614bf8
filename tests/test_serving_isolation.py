"""`dsvl serve`: failing requests and slow clients do not affect others."""

import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from model_server import (
    LONG,
    NAME,
    SENTENCES,
    Server,
    ask,
    data_url,
    draw_image,
    eventually,
    post,
    question,
    read_answer,
    served,
)
from PIL import Image

from dsvl.serving import connections
from dsvl.serving.app import ChatCompletions
from dsvl.serving.connections import BoundedProtocol
from dsvl.serving.engine import Generation
from dsvl.serving.requests import RequestLimits


def _sampled(server: Server, seed: int, tokens: int = 20) -> str:
    return ask(server, question("one"), tokens, temperature=1.5, seed=seed).choices[0].message.content


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-38, 1e-8, 1e-4])
def test_an_extreme_temperature_is_greedy(server: Server, temperature: float) -> None:
    greedy = ask(server, question("one"), 20, temperature=0).choices[0].message.content
    assert ask(server, question("one"), 20, temperature=temperature).choices[0].message.content == greedy


def test_a_failing_sampling_step_changes_no_seeded_answer(server: Server, monkeypatch: Any) -> None:
    alone = {seed: _sampled(server, seed) for seed in (7, 8)}
    sample = Generation.sample

    def failing(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        if self.sampling.temperature == 1.75 and self.total_tokens == 2:
            raise RuntimeError("caused by this row")
        return sample(self, input_ids, scores)

    monkeypatch.setattr(Generation, "sample", failing)
    monkeypatch.setattr(server.engine, "max_steps", 2 * LONG)
    long = ask(server, question("two"), LONG, stream=True)  # the others wait until it ends

    def stranger() -> int:
        body = {"model": NAME, "messages": question("two"), "max_tokens": 4, "temperature": 1.75}
        with server.raw(post(json.dumps(body).encode())) as connection:
            return int(connection.recv(65536).split()[1])

    with ThreadPoolExecutor(12) as pool:
        seeded = [pool.submit(_sampled, server, 7 + number % 2) for number in range(8)]
        eventually(lambda: server.engine.running == 9)
        strange = [pool.submit(stranger) for _ in range(4)]
        eventually(lambda: server.engine.running == 13)
        long.close()
        assert [future.result() for future in seeded] == [alone[7 + number % 2] for number in range(8)]
        assert [future.result() for future in strange] == [500] * 4


def test_a_batch_that_fails_half_way_changes_no_answer(server: Server, parts: tuple[Any, Any], monkeypatch: Any) -> None:
    """Its requests are continued one by one."""
    model = parts[0]
    alone = {seed: _sampled(server, seed) for seed in range(4)}
    greedy = ask(server, question("one"), 20).choices[0].message.content
    forward, failures = model.forward, []

    def failing(*args: Any, **inputs: Any) -> Any:
        ids = inputs["input_ids"]
        if len(ids) > 1 and ids.shape[1] == 1 and len(failures) < 3:  # a step in the middle of an answer
            failures.append(1)
            raise torch.OutOfMemoryError("full")
        return forward(*args, **inputs)

    monkeypatch.setattr(model, "forward", failing)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(_sampled, server, seed) for seed in range(4)]
        others = [pool.submit(ask, server, question("one"), 20) for _ in range(4)]
        assert [future.result() for future in futures] == list(alone.values())
        assert {future.result().choices[0].message.content for future in others} == {greedy}
    assert failures


def test_slow_bodies_block_nobody_and_time_out(parts: tuple[Any, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(connections, "BODY_GRACE_SECONDS", 1.0)
    with served(*parts, limits=RequestLimits(requests=8)) as server:
        slow = [server.raw(post(b"{", length=1000)) for _ in range(32)]
        try:
            begun = time.monotonic()
            assert ask(server, question("one"), 3).usage.completion_tokens == 3
            assert time.monotonic() - begun < 5
            for connection in slow:
                assert _all(connection).split()[1] == b"408"
        finally:
            for connection in slow:
                connection.close()
        assert server.chat.held == 0 and server.chat.bodies.received == 0


def test_a_body_that_keeps_arriving_does_not_time_out(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(connections, "BODY_GRACE_SECONDS", 0.5)
    body = json.dumps(
        {"model": NAME, "messages": question("one", data_url(draw_image(0, (150, 150)))), "max_tokens": 1}
    ).encode()
    request = post(body)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        for start in range(0, len(request), len(request) // 12):
            connection.sendall(request[start : start + len(request) // 12])
            time.sleep(0.1)
        assert connection.recv(65536).split()[1] == b"200"


def test_the_total_size_of_bodies_is_limited(parts: tuple[Any, Any]) -> None:
    with served(*parts, limits=RequestLimits(receiving_bytes=3000)) as server:
        with server.raw(post(b" " * 2000, length=4000)):
            eventually(lambda: server.chat.bodies.received == 2000)
            with server.raw(post(b" " * 2000, length=4000)) as second:
                assert second.recv(65536).split()[1] == b"429"
        eventually(lambda: server.chat.bodies.received == 0)
        assert ask(server, question("one"), 3).usage.completion_tokens == 3


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127"])
def test_an_incomplete_header_times_out(parts: tuple[Any, Any], monkeypatch: Any, sent: bytes) -> None:
    monkeypatch.setattr(BoundedProtocol, "headers_seconds", 1.0)
    with served(*parts) as server, server.raw(sent) as connection:
        begun = time.monotonic()
        connection.settimeout(0.3)
        while time.monotonic() - begun < 10:  # sending a byte now and then does not help
            try:
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                connection.sendall(b"7" if sent else b"")
            except ConnectionError:
                break
        assert 0.5 < time.monotonic() - begun < 5


def test_sending_after_a_refusal_times_out(parts: tuple[Any, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(BoundedProtocol, "headers_seconds", 1.0)
    with served(*parts) as server, server.raw(post(b"x", content_type="text/plain", length=10_000)) as connection:
        assert connection.recv(65536).split()[1] == b"415"
        begun = time.monotonic()
        connection.settimeout(0.3)
        while time.monotonic() - begun < 10:
            try:
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                connection.sendall(b"x")
            except ConnectionError:
                break
        assert time.monotonic() - begun < 5


def test_a_kept_alive_connection_does_not_time_out(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(BoundedProtocol, "headers_seconds", 0.5)
    request = post(json.dumps({"model": NAME, "messages": question("one"), "max_tokens": 2}).encode())
    with server.raw(request) as connection:
        for _ in range(3):
            assert read_answer(connection)[0] == 200
            time.sleep(0.7)
            connection.sendall(request)
        assert read_answer(connection)[0] == 200


def test_a_client_that_does_not_read_its_response_frees_its_slot(parts: tuple[Any, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(BoundedProtocol, "reading_seconds", 1.0)
    body = json.dumps({"model": NAME, "messages": question("one"), "max_tokens": LONG, "stream": True}).encode()
    with served(*parts, limits=RequestLimits(requests=1)) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        send = server.engine.active
        monkeypatch.setattr(
            ChatCompletions, "_build_chunk_sse", lambda self, *args, **kwargs: "data: " + "x" * 100_000 + "\n\n"
        )
        connection.sendall(post(body))
        eventually(lambda: bool(send))
        eventually(lambda: server.chat.held == 0 and server.engine.running == 0)


def test_text_requests_do_not_wait_for_the_images_of_others(server: Server, monkeypatch: Any) -> None:
    release, taken = threading.Event(), []
    pixels = server.chat.preprocess_image

    def slow(part: dict[str, Any], number: int, lengths: list[int]) -> dict[str, torch.Tensor]:
        taken.append(number)
        release.wait(20)
        return pixels(part, number, lengths)

    monkeypatch.setattr(server.chat, "preprocess_image", slow)
    with ThreadPoolExecutor(4) as pool:
        urls = [data_url(draw_image(seed)) for seed in range(8)]
        many = [pool.submit(ask, server, question("one", *urls)) for _ in range(3)]
        eventually(lambda: len(taken) == 2)
        assert ask(server, question("two"), 3).usage.completion_tokens == 3
        few = pool.submit(ask, server, question("one", urls[0]))
        release.set()
        eventually(few.done)
        assert taken.index(8) > 10  # requests alternate, image by image
        assert [future.result().usage.completion_tokens for future in many] == [12] * 3


def test_a_thin_image(server: Server) -> None:
    url = "data:image/png;base64," + base64.b64encode(_png(Image.new("1", (1, 20_000)))).decode()
    body = {"model": NAME, "messages": question("one", url), "max_tokens": 2}
    with server.raw(post(json.dumps(body).encode())) as connection:
        assert connection.recv(65536).split()[1] in (b"200", b"400")
    assert ask(server, question(SENTENCES[0]), 3).usage.completion_tokens == 3


def _all(connection: socket.socket) -> bytes:
    """Everything received until the connection is closed."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def _png(image: Image.Image) -> bytes:
    return base64.b64decode(data_url(image).partition(",")[2])
