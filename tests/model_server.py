"""A server of a tiny checkpoint on a free loopback port, in this process, and what its clients send."""

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import uvicorn
from openai import OpenAI
from PIL import Image

from dsvl.serving.app import build_app
from dsvl.serving.requests import Limits

NAME = "tiny"


class Server:
    """Where it listens, and its parts."""

    def __init__(self, app: Any, port: int) -> None:
        self.port = port
        self.engine, self.chat = app.state.engine, app.state.chat

    def client(self, retries: int = 0) -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=retries, timeout=60)

    def raw(self, request: bytes) -> socket.socket:
        """A connection over which something was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(request)
        return connection


@contextlib.contextmanager
def served(model: Any, processor: Any, limits: Limits | None = None, max_batch: int = 16) -> Iterator[Server]:
    app = build_app(model, processor, NAME, limits, max_batch)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield Server(app, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()
        assert not thread.is_alive()


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.01)


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def question(text: str, *urls: str) -> list[dict[str, Any]]:
    """One round, as the protocol has it."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def post(body: bytes, content_type: str = "application/json", host: str = "127.0.0.1", length: int | None = None) -> bytes:
    """A POST to the chat completions, as bytes."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body
