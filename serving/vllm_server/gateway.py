"""ASGI middleware in front of vLLM's server: the limits of `dsvl serve`, and what it does not let through."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..admission import RequestSlots, error_response
from ..connections import BodyReader, BoundedProtocol
from ..requests import RequestError
from .settings import ServerSettings

CHAT = "/v1/chat/completions"
READABLE = ("/health", "/metrics", "/v1/models", "/version")


class Gateway:
    """Answers what `dsvl serve` refuses, and passes everything else on to vLLM's application.

    vLLM has no limit of concurrent requests, of their size, of the time that a client takes to send one and to read its
    answer, and none of the names under which it is reached. Its other endpoints (completions from token ids, tokenization,
    pooling, ...) are not let through: whoever trusts all clients with them starts `vllm serve` itself.

    Args:
        app: vLLM's application.
        settings (*optional*): defaults to those of the environment, as vLLM passes the application alone.

    Attributes:
        slots: the concurrent requests.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings | None = None) -> None:
        settings = settings or ServerSettings.from_environment()
        self.limits, self.settings = settings.limits, settings
        self.slots = RequestSlots(settings.limits.requests)
        self.bodies = BodyReader()
        self.parsing = ThreadPoolExecutor(2, thread_name_prefix="dsvl-serve-parse")
        self.app = app
        self.checked = TrustedHostMiddleware(self._forward, allowed_hosts=list(settings.hosts), www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self.checked(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        try:
            if path == CHAT and method == "POST":
                await self._chat(scope, receive, send)
            elif (path == CHAT and method == "OPTIONS") or (path in READABLE and method in ("GET", "HEAD")):
                await self.app(scope, receive, send)
            else:
                raise RequestError(
                    f"{method} {path[:60]} is not served; POST {CHAT}, or GET one of {', '.join(READABLE)}.", 404
                )
        except RequestError as error:
            await error_response(error.message, error.status, error.code, error.param)(scope, receive, send)
        except ClientDisconnect:
            pass

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.slots.take():
            pass  # refuse before reading the body
        body = await self.bodies.read(Request(scope, receive), self.limits)
        await asyncio.get_running_loop().run_in_executor(self.parsing, check_request, body, self.settings)
        bounded = _BoundedSend(send)
        with self.slots.take():  # after reading, so that slow senders do not occupy a slot
            try:
                await self.app(scope, _replay(body, receive), bounded)
            except Exception:  # of any type, as the application may have wrapped it
                if not bounded.expired:
                    raise
                raise ClientDisconnect from None


def check_request(body: bytes, settings: ServerSettings) -> None:
    """Check the fields of a chat completion request that vLLM would accept and this server does not.

    Args:
        body: the request. One that is not valid is left to vLLM, which says what is wrong.
        settings: `limits.new_tokens`, beyond which vLLM would shorten the answer without a word, and `takes_seeds` apply.

    Raises:
        RequestError: for the first such field.
    """
    try:
        fields = json.loads(body)
    except ValueError:
        return
    if not isinstance(fields, dict):
        return
    for name in ("max_completion_tokens", "max_tokens"):
        value = fields.get(name)
        if isinstance(value, int) and value > settings.limits.new_tokens:
            raise RequestError(f"An answer may have at most {settings.limits.new_tokens} tokens.", param=name)
    if fields.get("seed") is not None and not settings.takes_seeds:
        raise RequestError(
            "seed is not supported by vLLM on a CPU, where it can end the server; remove it.",
            code="unsupported_parameter",
            param="seed",
        )
    messages = fields.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        for index, part in enumerate(content if isinstance(content, list) else []):
            if isinstance(part, dict) and part.get("uuid") is not None:
                field = f"messages.{number}.content.{index}.uuid"
                # vLLM would take the image that any client has sent under this name.
                raise RequestError(f"{field} is not supported; remove it.", code="unsupported_parameter", param=field)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns a body that was read already, and then what the client does."""
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return rest.pop() if rest else await receive()

    return replayed


class _BoundedSend:
    """A `send` that fails, as on a closed connection, if the client stops reading.

    Attributes:
        expired: whether it has.
    """

    def __init__(self, send: Send) -> None:
        self.send = send
        self.expired = False

    async def __call__(self, message: Any) -> None:
        try:
            async with asyncio.timeout(BoundedProtocol.reading_seconds):
                await self.send(message)
        except TimeoutError:
            self.expired = True
            raise OSError("the client stopped reading") from None
