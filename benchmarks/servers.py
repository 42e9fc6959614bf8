"""Servers that the benchmarks start and load: the built-in one, vLLM with DSVL, and vLLM with transformers' LLaVA."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from measure import memory_of_processes
from models import Shape
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM

import dsvl
from dsvl.demo.conversations import vocabulary_texts
from dsvl.demo.tiny_models import HEADINGS, train_tokenizer

ENGINES = ("transformers", "vllm", "llava")
TITLES = {"transformers": "dsvl serve", "vllm": "dsvl serve --engine vllm", "llava": "LLaVA on vLLM"}
NAME = "model"
# 26 million parameters, 65 tokens an image.
SHAPE = Shape(
    layers=8,
    hidden=512,
    intermediate=1408,
    heads=8,
    key_value_heads=4,
    vocabulary=512,
    vision_layers=4,
    vision_hidden=128,
    vision_intermediate=256,
    vision_heads=4,
    image_size=112,
    patch_size=14,
)
START_SECONDS = 600


def save_models(folder: Path, shape: Shape = SHAPE) -> None:
    """Save a DSVL checkpoint (`dsvl`, "mmca") and LLaVA of the same shape and weights (`llava`), which is ordinary causal.

    Greedy answers do not end by themselves, and every token of them is text that can be sent at once.
    """
    tokenizer = train_tokenizer([HEADINGS["visualchat"].format(text) for text in vocabulary_texts()], shape.vocabulary)
    vision, text = shape.configs()
    text.vocab_size, text.max_position_embeddings, text.initializer_range = len(tokenizer), 4096, 0.06
    text.bos_token_id, text.eos_token_id, text.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    side = {"height": shape.image_size, "width": shape.image_size}
    image_processor = CLIPImageProcessor(size={"shortest_edge": shape.image_size}, crop_size=side)
    for attention in ("mmca", "causal"):
        torch.manual_seed(0)
        model, processor = dsvl.compose(
            CLIPVisionModel(vision),
            LlamaForCausalLM(text),
            tokenizer=tokenizer,
            image_processor=image_processor,
            projector_type="mlp",
            multimodal_attention=attention,
            vision_feature_layer=-2,
            vision_feature_select_strategy="full",
        )
        for parameter in model.model.multi_modal_projector.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # images weigh as much as text
        whole = {
            i for i in range(len(tokenizer)) if tokenizer.decode(i).isprintable() and "\ufffd" not in tokenizer.decode(i)
        }
        never = [i for i in range(model.lm_head.weight.shape[0]) if i not in whole or i in tokenizer.all_special_ids]
        with torch.no_grad():
            model.lm_head.weight[never] = 0.0  # a score of 0, below the best
        dsvl.save_checkpoint(model, processor, folder / attention)
    (folder / "mmca").rename(folder / "dsvl")
    dsvl.export_llava(folder / "causal", folder / "llava")


@dataclass
class Server:
    """A running server."""

    engine: str
    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def extra(self) -> dict[str, Any]:
        """Fields of a request that make answers as long as those of the others."""
        return {"ignore_eos": True} if self.engine == "llava" else {}

    def memory_mib(self) -> float:
        """Anonymous and shared memory of the process and its children; what they share counts once.

        Pages of files, such as libraries, are not counted: their share changes when an unrelated process opens them too.
        """
        return memory_of_processes(self.process.pid, ["Pss_Anon", "Pss_Shmem"]) / 2**20

    def held(self) -> float:
        """What the server says that it still works on: requests, and for vLLM the used share of its KV cache."""
        if self.engine == "transformers":
            state = httpx.get(f"{self.url}/health", timeout=60).json()
            return state["held"] + state["generating"]
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(names))


def server_command(engine: str, folder: Path, port: int, vllm_python: str, arguments: list[str]) -> list[str]:
    """The command that starts a server.

    Args:
        engine: one of `ENGINES`.
        folder: of `save_models`.
        port: to listen on.
        vllm_python: the Python of an environment with vLLM and this package.
        arguments: further ones of the server; those of vLLM for "vllm" and "llava".
    """
    address = ["--port", str(port)]
    if engine == "llava":
        command = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "llava")]
        limits = ["--dtype", "float32", "--max-num-seqs", "16", "--uvicorn-log-level", "warning"]
        return [*command, "--served-model-name", NAME, "--host", "127.0.0.1", *address, *limits, *arguments]
    python = vllm_python if engine == "vllm" else sys.executable
    command = [python, "-m", "dsvl.cli", "serve", str(folder / "dsvl"), "--name", NAME, "--engine", engine, *address]
    return [*command, *(["--"] if engine == "vllm" and arguments else []), *arguments]


@contextlib.contextmanager
def served(engine: str, folder: Path, vllm_python: str, arguments: list[str]) -> Iterator[Server]:
    """Start a server and wait until it answers; see `server_command`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"{engine}.log"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_WAIT_POLICY": "PASSIVE",  # as `dsvl serve --engine vllm` sets it on few cores; for all alike
    }
    with log.open("wb") as out:
        command = server_command(engine, folder, port, vllm_python, arguments)
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True, cwd=folder)
    try:
        _wait(process, port, log)
        yield Server(engine, port, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"The server did not start; its log {log} ends with:\n{log.read_text()[-2000:]}")
        time.sleep(0.5)


# -- requests ------------------------------------------------------------------------------------------------------------

WORDS = [
    "which",
    "colour",
    "is",
    "the",
    "circle",
    "square",
    "left",
    "right",
    "of",
    "image",
    "how",
    "many",
    "shapes",
    "are",
    "red",
    "green",
    "blue",
]


def draw_url(seed: int, side: int = SHAPE.image_size) -> str:
    """The data URL of an image of noise.

    It has the tower's size, as torchvision and Pillow, by which the servers' environments may resize, round differently.
    """
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def make_request(seed: int, urls: list[str], most_tokens: int) -> dict[str, Any]:
    """A question about images, whose answer has a quarter to all of `most_tokens`."""
    random = np.random.default_rng(seed)
    text = " ".join(random.choice(WORDS, random.integers(3, 12))) + "?"
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        "max_tokens": int(random.integers(max(1, most_tokens // 4), most_tokens + 1)),
        "temperature": 0,
    }


@dataclass
class Answer:
    """What came of a request: its text, seconds to the first and the last token, and the error if it failed."""

    text: str = ""
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    error: str = ""


async def ask(client: httpx.AsyncClient, server: Server, request: dict[str, Any], leave_after: int | None = None) -> Answer:
    """Send a request and read its answer as a stream.

    Args:
        client: with any number of connections.
        server: to ask.
        request: of `make_request`.
        leave_after: *optional*, pieces of the answer after which the client disconnects without a word.
    """
    body = request | server.extra | {"stream": True, "stream_options": {"include_usage": True}}
    answer, started, pieces = Answer(), time.perf_counter(), 0
    try:
        async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"status {response.status_code}: {(await response.aread()).decode()[:200]}"
                return answer
            if leave_after == 0:
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    answer.error = str(event["error"])[:200]
                    return answer
                answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)
                text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                if text:
                    answer.first = answer.first or time.perf_counter() - started
                    answer.text += text
                    pieces += 1
                    if pieces == leave_after:
                        return answer
    except httpx.HTTPError as error:
        answer.error = repr(error)
        return answer
    answer.last = time.perf_counter() - started
    if not answer.text:
        answer.error = "no text"
    return answer


def new_client(connections: int) -> httpx.AsyncClient:
    """A client for many concurrent requests, each on a connection of its own."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=600, limits=limits, trust_env=False)


async def ask_all(server: Server, requests: list[dict[str, Any]], clients: int) -> tuple[list[Answer], float]:
    """Answers to requests by so many clients at once, and the seconds that all took."""
    turns = asyncio.Semaphore(clients)
    async with new_client(clients) as client:

        async def one(request: dict[str, Any]) -> Answer:
            async with turns:
                return await ask(client, server, request)

        started = time.perf_counter()
        answers = await asyncio.gather(*map(one, requests))
        return list(answers), time.perf_counter() - started
