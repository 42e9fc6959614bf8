"""The middleware that `dsvl serve --engine vllm` puts in front of vLLM's application; any application will do."""

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dsvl.serving.connections import BoundedProtocol
from dsvl.serving.requests import RequestError, RequestLimits
from dsvl.serving.vllm_server.gateway import CHAT, READABLE, Gateway, check_request
from dsvl.serving.vllm_server.settings import ServerSettings
from dsvl.utils.hosts import LOOPBACK

URL = "http://127.0.0.1"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class Behind:
    """An application that answers with what it got, once `open` is set."""

    def __init__(self, limits: RequestLimits | None = None, hosts: tuple[str, ...] = LOOPBACK) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.bodies: list[bytes] = []
        every = [Route("/{path:path}", self._answer, methods=["GET", "POST", "OPTIONS", "DELETE"])]
        settings = ServerSettings(limits or RequestLimits())
        self.gateway = Gateway(
            Starlette(routes=every), settings if hosts is None else ServerSettings(settings.limits, hosts)
        )
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.gateway), base_url=URL)

    async def _answer(self, request: Request) -> Response:
        self.bodies.append(await request.body())
        await self.open.wait()
        return JSONResponse({"path": request.url.path})

    async def post(self, fields: Any, path: str = CHAT, **options: Any) -> httpx.Response:
        return await self.client.post(path, json=fields, **options)


def error(answer: httpx.Response) -> str:
    return answer.json()["error"]["message"]


def test_a_request_passes_unchanged() -> None:
    async def run() -> None:
        behind = Behind()
        answer = await behind.post(HELLO)
        assert answer.status_code == 200 and answer.json() == {"path": CHAT}
        assert json.loads(behind.bodies[0]) == HELLO
        for path in READABLE:
            assert (await behind.client.get(path)).json() == {"path": path}
        assert (await behind.client.options(CHAT)).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/tokenize"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/health"),
        ("GET", "/docs"),
        ("DELETE", CHAT),
        ("POST", CHAT + "/"),
    ],
)
def test_other_endpoints_are_not_served(method: str, path: str) -> None:
    async def run() -> None:
        behind = Behind()
        answer = await behind.client.request(method, path, json=HELLO)
        assert answer.status_code == 404 and f"{method} {path} is not served; POST {CHAT}" in error(answer)
        assert not behind.bodies

    asyncio.run(run())


def test_other_names_of_this_machine_are_refused() -> None:
    async def run() -> None:
        behind = Behind()
        for host in ("example.com", "evil.localhost.example"):
            assert (await behind.post(HELLO, headers={"host": host})).status_code == 400
            assert (await behind.client.get("/health", headers={"host": host})).status_code == 400
        assert not behind.bodies
        assert (await behind.post(HELLO, headers={"host": "localhost:8000"})).status_code == 200
        anyone = Behind(hosts=("*",))
        assert (await anyone.post(HELLO, headers={"host": "example.com"})).status_code == 200

    asyncio.run(run())


def test_more_requests_than_slots_are_refused_while_health_answers() -> None:
    async def run() -> None:
        behind = Behind(RequestLimits(requests=2))
        behind.open.clear()
        held = [asyncio.create_task(behind.post(HELLO)) for _ in range(2)]
        while len(behind.bodies) < 2:
            await asyncio.sleep(0.01)
        refused = await behind.post(HELLO)
        assert refused.status_code == 429 and "limit of 2 concurrent requests" in error(refused)
        assert refused.headers["retry-after"] == "1"
        health = asyncio.create_task(behind.client.get("/health"))
        await asyncio.sleep(0.05)
        behind.open.set()
        assert [(await one).status_code for one in (*held, health)] == [200, 200, 200]
        assert behind.gateway.slots.held == 0
        assert (await behind.post(HELLO)).status_code == 200

    asyncio.run(run())


def test_a_large_or_a_slow_request_is_refused_and_holds_no_slot() -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(2)
        yield b"}"

    async def run() -> None:
        behind = Behind(RequestLimits(body_bytes=1000, body_seconds=0.2))
        large = await behind.post(HELLO | {"user": "x" * 1000})
        assert large.status_code == 413 and "larger than 1,000 bytes" in error(large)
        late = await behind.client.post(CHAT, content=slow())
        assert late.status_code == 408 and "send it faster" in error(late)
        assert not behind.bodies and behind.gateway.slots.held == 0 and behind.gateway.bodies.received == 0

    asyncio.run(run())


def test_an_answer_longer_than_the_limit_is_refused_not_shortened() -> None:
    limits = RequestLimits(new_tokens=10)
    for name in ("max_tokens", "max_completion_tokens"):
        check_request(json.dumps(HELLO | {name: 10}).encode(), ServerSettings(limits))
        with pytest.raises(RequestError, match="at most 10 tokens") as caught:
            check_request(json.dumps(HELLO | {name: 11}).encode(), ServerSettings(limits))
        assert caught.value.param == name


def test_an_image_cannot_be_named_by_its_client() -> None:
    """vLLM would give it to everyone who uses the name."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for body in (
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": '"uuid"'}, image | {"uuid": "a"}]}]}),
        '{"messages": [{"role": "user", "content": [{}, {"type": "image_url", "\\u0075uid": "a"}]}]}',
    ):
        with pytest.raises(RequestError, match=r"messages\.0\.content\.1\.uuid is not supported") as caught:
            check_request(body.encode(), ServerSettings())
        assert caught.value.code == "unsupported_parameter"
    check_request(
        json.dumps({"messages": [{"role": "user", "content": [image | {"uuid": None}]}]}).encode(), ServerSettings()
    )


def test_seeds_are_refused_where_vllm_cannot_take_them() -> None:
    body = json.dumps(HELLO | {"seed": 1}).encode()
    check_request(body, ServerSettings())
    with pytest.raises(RequestError, match="seed is not supported by vLLM on a CPU"):
        check_request(body, ServerSettings(takes_seeds=False))
    check_request(json.dumps(HELLO | {"seed": None}).encode(), ServerSettings(takes_seeds=False))


@pytest.mark.parametrize(
    "body", ["", "[1]", "{", '{"messages": 3}', '{"messages": [3, {"content": {"uuid": "a"}}]}', "\udcff"]
)
def test_what_is_not_a_request_is_left_to_vllm(body: str) -> None:
    check_request(body.encode("utf-8", "surrogateescape"), ServerSettings())


@pytest.mark.parametrize("version", ["2.3", "2.4"])  # by which Starlette handles a connection that is lost
def test_who_stops_reading_releases_the_slot(version: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(BoundedProtocol, "reading_seconds", 0.1)
    closed = []

    async def words() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 1000
        finally:
            closed.append(True)

    async def run() -> None:
        async def answer(request: Request) -> Response:
            return StreamingResponse(words())

        async def failed(request: Request, error: Exception) -> Response:
            return JSONResponse({}, 500)

        routes = [Route(CHAT, answer, methods=["POST"])]
        gateway = Gateway(Starlette(routes=routes, exception_handlers={OSError: failed}), ServerSettings())
        sent = 0

        async def send(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent > 3:
                await asyncio.sleep(60)  # as uvicorn waits for the client

        requests = [{"type": "http.request", "body": json.dumps(HELLO).encode(), "more_body": False}]

        async def receive() -> Any:
            if requests:
                return requests.pop()
            await asyncio.sleep(60)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": version},
            "method": "POST",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        await asyncio.wait_for(gateway(scope, receive, send), 5)
        gc.collect()
        await asyncio.sleep(0.1)  # asyncio closes the generator that was collected
        assert gateway.slots.held == 0 and closed

    asyncio.run(run())


def test_a_websocket_is_closed() -> None:
    async def run() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def never(*parts: Any) -> None:
            raise AssertionError("it was reached")

        await Gateway(never, ServerSettings())({"type": "websocket", "path": "/v1/realtime"}, receive, send)
        assert [one["type"] for one in sent] == ["websocket.close"]

    asyncio.run(run())
