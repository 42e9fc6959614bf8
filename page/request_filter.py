"""ASGI middleware that restricts Gradio's HTTP interface to what the page uses, and limits the size of requests."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import PageLimits

# The routes of Gradio that the page in the browser uses. The others are for API clients, embedding, monitoring and editing.
API = "/gradio_api/"
FILE = API + "file="
GET_PATHS = ("/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
GET_PREFIXES = ("/assets/", "/static/", "/svelte/", "/pwa_icon", API + "heartbeat/", FILE)
GET_API_PATHS = tuple(API + name for name in ("startup-events", "queue/data", "upload_progress", "theme.css"))
UPLOAD = API + "upload"
JOIN = API + "queue/join"
MAX_BYTES_PER_CHARACTER = 12  # a character beyond the Basic Multilingual Plane, escaped in JSON
OVERHEAD_BYTES = 64 * 1024  # of a request beside the question's text, such as file names


class RequestFilter:
    """Refuses routes that the page does not use, oversized bodies, and file names that were not uploaded.

    Args:
        app: the wrapped application.
        limits: the limits of the page.
        uploads: the folder of uploaded files.
    """

    def __init__(self, app: ASGIApp, limits: PageLimits, uploads: Path) -> None:
        self.app, self.limits, self.uploads = app, limits, uploads.resolve()
        self.receiving = 0  # bytes of uploads in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # the page uses no WebSocket
        path, method = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") or "/", scope["method"]
        if method in ("GET", "HEAD") and self._may_get(path):
            await self.app(scope, receive, send)
        elif method == "POST" and path == UPLOAD:
            await self._upload(scope, receive, send)
        elif method == "POST" and path == JOIN:
            await self._join_queue(scope, receive, send)
        else:
            await PlainTextResponse("Not found.", 404)(scope, receive, send)

    def _may_get(self, path: str) -> bool:
        if path.startswith(FILE):
            return self._is_upload(path[len(FILE) :])
        return path == "/" or path in GET_PATHS + GET_API_PATHS or path.startswith(GET_PREFIXES)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        stored = await asyncio.to_thread(folder_bytes, self.uploads)
        if stored + self.receiving >= self.limits.upload_bytes:
            await PlainTextResponse("The server's storage for uploads is full; try again later.", 503)(scope, receive, send)
            return
        largest = max(self.limits.image_bytes, self.limits.video_bytes)
        limit, received = self.limits.images * largest + OVERHEAD_BYTES, 0
        response_started = False

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received, self.receiving = received + size, self.receiving + size
            if received > limit:
                raise _TooLarge
            return message

        async def tracking_send(message: Message) -> None:
            nonlocal response_started
            response_started = True
            await send(message)

        try:
            await self.app(scope, counting_receive, tracking_send)
        except _TooLarge:
            if not response_started:
                await PlainTextResponse("These files exceed the server's limit.", 413)(scope, receive, send)
        finally:
            self.receiving -= received

    async def _join_queue(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a JSON request.

        Its content type must be application/json, because browsers send that across origins only after a CORS preflight.
        """
        headers = dict(scope["headers"])
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            await PlainTextResponse("Send JSON with content-type application/json.", 415)(scope, receive, send)
            return
        limit = self.limits.characters * MAX_BYTES_PER_CHARACTER + OVERHEAD_BYTES
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
            await PlainTextResponse("The request is not valid JSON.", 400)(scope, receive, send)
            return
        if not all(isinstance(path, str) and self._is_upload(path) for path in paths):
            await PlainTextResponse("The request names a file that was not uploaded.", 403)(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    def _is_upload(self, path: str) -> bool:
        """Whether a path is in the folder of uploads. URLs and relative paths are not."""
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self.uploads)
        except (OSError, ValueError):  # too long, or with a NUL character
            return False


class _TooLarge(Exception):
    pass


def _paths(value: Any) -> Iterator[Any]:
    """All values of the key "path" in a request."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _paths(part)


def folder_bytes(folder: Path) -> int:
    """The total size of the files in a folder."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except OSError:  # deleted in the meantime
            continue
    return total
