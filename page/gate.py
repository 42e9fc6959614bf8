"""What of a page's HTTP interface is open, and how much may come in through it."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import Limits

# What the page in the browser uses of Gradio's routes. The others serve programs, other pages, monitoring and editing.
API = "/gradio_api/"
FILE = API + "file="
READ = ("/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
READ_BELOW = ("/assets/", "/static/", "/svelte/", "/pwa_icon", API + "heartbeat/", FILE)
READ_API = tuple(API + name for name in ("startup-events", "queue/data", "upload_progress", "theme.css"))
UPLOAD = API + "upload"
JOIN = API + "queue/join"
BYTES_PER_CHARACTER = 12  # a character outside of the first plane, escaped in JSON
BYTES_OF_A_FRAME = 64 * 1024  # of a request around the question's text: names of files, numbers


class Gate:
    """An ASGI middleware that refuses routes that the page does not use, bodies beyond the limits, and names of files
    that were not uploaded.

    Args:
        app: what lies behind it.
        limits: see `Limits`.
        uploads: the folder of uploaded files.
    """

    def __init__(self, app: ASGIApp, limits: Limits, uploads: Path) -> None:
        self.app, self.limits, self.uploads = app, limits, uploads.resolve()
        self.receiving = 0  # bytes of uploads that are under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # the page opens no web socket
        path, method = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") or "/", scope["method"]
        if method in ("GET", "HEAD") and self._may_read(path):
            await self.app(scope, receive, send)
        elif method == "POST" and path == UPLOAD:
            await self._upload(scope, receive, send)
        elif method == "POST" and path == JOIN:
            await self._post(scope, receive, send)
        else:
            await PlainTextResponse("Not found.", 404)(scope, receive, send)

    def _may_read(self, path: str) -> bool:
        if path.startswith(FILE):
            return self._is_upload(path[len(FILE) :])
        return path == "/" or path in READ + READ_API or path.startswith(READ_BELOW)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        kept = await asyncio.to_thread(_size, self.uploads)
        if kept + self.receiving >= self.limits.upload_bytes:
            await PlainTextResponse("The server holds as many files as it takes; try again later.", 503)(
                scope, receive, send
            )
            return
        limit, received = self.limits.images * self.limits.image_bytes + BYTES_OF_A_FRAME, 0
        begun = False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received, self.receiving = received + size, self.receiving + size
            if received > limit:
                raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLarge:
            if not begun:
                await PlainTextResponse("These files are larger than the server takes.", 413)(scope, receive, send)
        finally:
            self.receiving -= received

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        """JSON must be called so: a page elsewhere can send it here by that name only if it is asked first."""
        headers = dict(scope["headers"])
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            await PlainTextResponse("Send JSON.", 415)(scope, receive, send)
            return
        limit = self.limits.characters * BYTES_PER_CHARACTER + BYTES_OF_A_FRAME
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > limit:
                await PlainTextResponse(f"The request is larger than {limit:,} bytes.", 413)(scope, receive, send)
                return
            more = message.get("more_body", False)
        try:
            paths = list(_paths(json.loads(body)))
        except (ValueError, RecursionError):
            await PlainTextResponse("The request is no JSON.", 400)(scope, receive, send)
            return
        if not all(isinstance(path, str) and self._is_upload(path) for path in paths):
            await PlainTextResponse("The request names a file that was not uploaded.", 403)(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)

    def _is_upload(self, path: str) -> bool:
        """Whether it names a file in the uploads' folder; an address names none."""
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self.uploads)
        except (OSError, ValueError):  # too long, or a NUL in it
            return False


class _TooLarge(Exception):
    pass


def _paths(value: Any) -> Iterator[Any]:
    """Whatever is called a path in a request."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _paths(part)


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except OSError:  # deleted in the meantime
            continue
    return total
