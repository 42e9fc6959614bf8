"""`dsvl serve` under load: many clients, some of which disconnect."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from model_server import (
    LONG,
    NAME,
    SENTENCES,
    Server,
    alone,
    data_url,
    draw_image,
    eventually,
    question,
)
from training_runs import environment


def _load(server: Server, parts: tuple[Any, Any], clients: int, rounds: int) -> tuple[int, int]:
    """Run many clients and check all answers; returns the number of answers and of clients that disconnected."""
    texts = SENTENCES[:12]
    images = [draw_image(number) if number % 3 == 0 else None for number in range(12)]
    own, asked = [], []
    for text, image in zip(texts, images, strict=True):
        own.append([{"type": "image", "image": image}] * (image is not None) + [{"type": "text", "text": text}])
        asked.append(question(text, *([data_url(image)] if image else [])))
    expected = [alone(parts, [{"role": "user", "content": content}], 8) for content in own]
    assert len(set(expected)) == len(expected)
    task = {"port": server.port, "model": NAME, "clients": clients, "rounds": rounds, "long": LONG}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "serving_clients.py")],
        input=json.dumps(task | {"asked": asked, "expected": expected}),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert not result["wrong"], (len(result["wrong"]), result["wrong"][:3])
    eventually(lambda: server.chat.held == 0 and server.engine.running == 0)
    assert not server.engine.active and not server.engine.waiting
    return result["answered"], result["disconnected"]


def test_many_clients_some_of_which_disconnect(server: Server, parts: tuple[Any, Any]) -> None:
    answered, disconnected = _load(server, parts, clients=20, rounds=3)
    assert (answered, disconnected) == (39, 21)


@pytest.mark.slow
def test_a_hundred_clients(server: Server, parts: tuple[Any, Any]) -> None:
    def memory() -> int:
        gc.collect()
        return psutil.Process().memory_info().rss

    _load(server, parts, clients=100, rounds=3)  # allocates what is allocated once
    before = memory()
    answered, disconnected = _load(server, parts, clients=100, rounds=12)
    grown = (memory() - before) / 2**20
    print(f"{answered} answers, {disconnected} disconnected, {grown:+.1f} MiB")
    assert (answered, disconnected) == (12 * 66, 12 * 34)
    assert grown < 50
