"""Runs a server of a tiny checkpoint on a free loopback port in this process, and creates requests for it."""

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from openai import OpenAI
from PIL import Image
from training_runs import WORDS, make_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor

from dsvl.image_library import ImageLibrary
from dsvl.serving.app import build_app
from dsvl.serving.connections import UVICORN
from dsvl.serving.requests import RequestLimits

NAME = "tiny"
LONG = 1500  # tokens; no test waits for all of them
SENTENCES = [" ".join(WORDS[start : start + size]) for size in (2, 3, 4, 6) for start in range(8)]


class Server:
    """A running server."""

    def __init__(self, app: Any, port: int) -> None:
        self.port = port
        self.engine, self.chat = app.state.engine, app.state.chat

    def client(self, retries: int = 0) -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=retries, timeout=60)

    def raw(self, request: bytes) -> socket.socket:
        """Open a connection and send a request."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(request)
        return connection


@contextlib.contextmanager
def served(
    model: Any,
    processor: Any,
    limits: RequestLimits | None = None,
    max_batch: int = 16,
    library: ImageLibrary | None = None,
) -> Iterator[Server]:
    app = build_app(model, processor, NAME, limits, max_batch, library=library)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, **UVICORN | {"log_level": "error", "timeout_graceful_shutdown": 1}))
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
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


def draw_image(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def question(text: str, *urls: str) -> list[dict[str, Any]]:
    """The messages of a conversation with one question."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Read a response; returns its status and body."""
    answer = HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.read()


def post(body: bytes, content_type: str = "application/json", host: str = "127.0.0.1", length: int | None = None) -> bytes:
    """The bytes of a POST request to the chat completions."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def make_served_checkpoint(folder: Path) -> Path:
    return make_checkpoint(folder, max_position_embeddings=2048, initializer_range=0.3)


def load_parts(checkpoint: Path, device: str = "cpu") -> tuple[Any, Any]:
    """In float64, so that batches give the same answers as single requests; answers do not end by themselves."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float64, device_map=device).eval()
    model.generation_config.eos_token_id = None
    processor = AutoProcessor.from_pretrained(checkpoint)
    # Invalid UTF-8 is decoded differently token by token.
    model.generation_config.suppress_tokens = [i for word, i in processor.tokenizer.get_vocab().items() if word[:3] == "<0x"]
    return model, processor


def alone(parts: tuple[Any, Any], messages: list[dict[str, Any]], tokens: int = 12) -> str:
    """The answer computed without a server."""
    model, processor = parts
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs.to(model.device), max_new_tokens=tokens, do_sample=False)
    return processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ask(server: Server, messages: Any, tokens: int = 12, **options: Any) -> Any:
    return server.client().chat.completions.create(model=NAME, messages=messages, max_tokens=tokens, **options)


def streamed(server: Server, messages: Any, tokens: int = 12, **options: Any) -> str:
    chunks = ask(server, messages, tokens, stream=True, **options)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
