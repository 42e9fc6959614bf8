"""`dsvl serve --engine vllm` over HTTP, in the environment of `make test-vllm`."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from exported_models import compose_for_export
from model_server import SENTENCES, data_url, draw_image, eventually, question
from model_server import alone as answer_alone
from training_runs import environment

import dsvl

TESTS = Path(__file__).parent
PYTHON = os.environ.get("DSVL_VLLM")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="DSVL_VLLM names no Python with vLLM; run make test-vllm")

NAME = "tiny"
START_SECONDS = 300
TOKENS = 8


def alone(parts: tuple[Any, Any], messages: list[dict[str, Any]], tokens: int) -> str:
    """The answer of `generate()`. vLLM's detokenizer differs from the tokenizer's in a space at the beginning."""
    return answer_alone(parts, messages, tokens).strip()


class Served:
    """A running server and the model that it serves."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, parts: tuple[Any, Any]) -> None:
        self.process, self.port, self.parts = process, port, parts
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(self, messages: Any, tokens: int = TOKENS, **options: Any) -> Any:
        return self.client.chat.completions.create(model=NAME, messages=messages, max_tokens=tokens, **options)

    def text(self, messages: Any, tokens: int = TOKENS, **options: Any) -> str:
        return self.ask(messages, tokens, **options).choices[0].message.content.strip()

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}"))

    def idle(self) -> bool:
        """Whether all requests have ended, and all blocks of the KV cache are free."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(self.metric(name) for name in names)

    def memory_mib(self) -> float:
        """Anonymous and shared memory of all its processes; pages of libraries are shared with other processes, too."""
        parent, total = psutil.Process(self.process.pid), 0
        for one in (parent, *parent.children(recursive=True)):
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        return total / 1024


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vllm_server")
    model, processor = compose_for_export(
        "clip", "llama", text={"max_position_embeddings": 2048}, multimodal_attention="mmca", numbered_images=2
    )
    # Answers do not end by themselves, and have no bytes, which are decoded differently token by token.
    bytes_of_text = [index for word, index in processor.tokenizer.get_vocab().items() if word[:3] == "<0x"]
    model.generation_config.suppress_tokens = [*bytes_of_text, processor.tokenizer.eos_token_id]
    dsvl.save_checkpoint(model, processor, folder / NAME)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(TESTS / "vllm_site"), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2"}
    command = [str(PYTHON), "-m", "dsvl.cli", "serve", str(folder / NAME), "--engine", "vllm", "--port", str(port)]
    log = (folder / "log").open("w+b")
    # A small KV cache, all of whose memory is touched before it is measured, and that makes vLLM preempt requests.
    command += ["--", "--enforce-eager", "--num-gpu-blocks-override", "128"]
    process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, cwd=folder)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield Served(process, port, (model.eval(), processor))
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)  # Ctrl-C
        process.wait(60)
        assert not psutil.wait_procs(children, 30)[1], "processes are left"
    finally:
        log.close()
        process.kill()


def test_answers_are_those_of_generate(served: Served) -> None:
    images = [draw_image(seed) for seed in range(3)]
    for count in range(4):
        sent = question(SENTENCES[count], *map(data_url, images[:count]))
        own = [{"type": "image", "image": image} for image in images[:count]]
        expected = alone(served.parts, [{"role": "user", "content": [*own, sent[0]["content"][-1]]}], TOKENS)
        for _ in range(2):  # the second time from the prefix cache
            assert served.text(sent) == expected
        chunks = served.ask(sent, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).strip() == expected


def test_a_conversation_with_images_in_several_turns(served: Served) -> None:
    images = [draw_image(seed) for seed in (5, 6)]
    sent = [*question("which colour is it?", data_url(images[0])), {"role": "assistant", "content": "red"}]
    sent += question("and this one?", data_url(images[1]))
    own: list[Any] = json.loads(json.dumps(sent))
    for message, image in zip((own[0], own[2]), images, strict=True):
        message["content"][0] = {"type": "image", "image": image}
    own[1]["content"] = [{"type": "text", "text": "red"}]
    assert served.text(sent) == alone(served.parts, own, TOKENS)


def test_special_tokens_that_a_user_types_are_text(served: Served) -> None:
    processor = served.parts[1]
    text = f"what is <image>? {processor.tokenizer.eos_token}{processor.tokenizer.bos_token} red"
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    answer = served.ask(messages)
    assert answer.usage.prompt_tokens == len(prompt["input_ids"][0])
    assert answer.choices[0].message.content.strip() == alone(served.parts, messages, TOKENS)
    with_image = question(text, data_url(draw_image(0)))
    own = [{"role": "user", "content": [{"type": "image", "image": draw_image(0)}, *messages[0]["content"]]}]
    assert served.text(with_image) == alone(served.parts, own, TOKENS)


def test_a_seed_is_refused_on_a_cpu(served: Served) -> None:
    """vLLM 0.32 for CPUs ends when it prefills a request with a seed in chunks."""
    with pytest.raises(openai.BadRequestError, match="seed is not supported by vLLM on a CPU"):
        served.ask(question("which colour is it?"), seed=1)


IMAGE = data_url(draw_image(0))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/etc/passwd", "neither a data URL nor"),
        ("file:///etc/passwd", "neither a data URL nor"),
        ("http://127.0.0.1:1/a.png", "does not download"),
        ("HTTPS://example.com/a.png", "does not download"),
        ("data:image/png;base64,!!!", "not a valid base64 data URL"),
        ("data:image/png,abc", "not a valid base64 data URL"),
        ("data:image/png;base64,aGVsbG8=", "cannot be read"),
        ("data:image/png;base64," + base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n").decode(), "cannot be read"),
        (IMAGE[: -len("AAAA") * 200], "cannot be decoded"),
    ],
    ids=["path", "file", "address", "upper case", "no base64", "no mark", "no image", "eps", "cut"],
)
def test_images_from_elsewhere_and_broken_ones_are_refused(url: str, words: str, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        served.ask(question("what is it?", url))
    assert httpx.get(f"{served.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": question("what?", *[IMAGE] * 9)}, "At most 8 image"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": IMAGE}}]}]}, "video"),
        ({"messages": [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "AAAA"}]}]}, "image_embeds"),
        ({"max_tokens": 5000}, "at most 4096 tokens"),
        ({"n": 17}, "n must be at most 16"),
        ({"chat_template": "{{ 1 }}"}, "trust-request-chat-template"),
        ({"mm_processor_kwargs": {"size": 3}}, "trust-request-mm-kwargs"),
        ({"model": "other"}, "does not exist"),
        ({"messages": question("word " * 3000)}, "2048"),
    ],
    ids=["images", "video", "embeddings", "length", "choices", "template", "processor", "model", "context"],
)
def test_requests_beyond_the_limits_are_refused(fields: dict[str, Any], words: str, served: Served) -> None:
    request = {"model": NAME, "messages": question("hello")} | fields
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=request, timeout=60)
    assert answer.status_code in (400, 404) and words in answer.json()["error"]["message"], answer.text


def test_a_token_that_no_answer_has_is_not_forced_by_a_client(served: Served) -> None:
    """Nor does it stop the server."""
    image = served.parts[1].image_token_id
    for options in ({"logit_bias": {str(image): 100}}, {"extra_body": {"allowed_token_ids": [image]}}):
        answer = served.ask(question("hello"), temperature=1.0, **options).choices[0].message.content or ""
        assert "<image>" not in answer
    assert served.text(question("hello"))


def _load(served: Served, rounds: int) -> dict[str, Any]:
    """A hundred clients, of which every third disconnects; health is asked meanwhile."""
    images = [draw_image(number) if number % 3 == 0 else None for number in range(12)]
    asked = [
        question(text, *([data_url(image)] if image else [])) for text, image in zip(SENTENCES[:12], images, strict=True)
    ]
    expected = [served.ask(messages).choices[0].message.content for messages in asked]
    assert len(set(expected)) == len(expected)
    task = {"port": served.port, "model": NAME, "clients": 100, "rounds": rounds, "long": 1500}
    waited, over = [], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            started = time.monotonic()
            assert httpx.get(f"{served.url}/health", timeout=60).status_code == 200
            waited.append(time.monotonic() - started)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = subprocess.run(
            [sys.executable, str(TESTS / "serving_clients.py")],
            input=json.dumps(task | {"asked": asked, "expected": expected}),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
    finally:
        over.set()
        watcher.join()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"health": max(waited)}


def test_a_hundred_clients_of_which_a_third_vanish(served: Served) -> None:
    """Those who stay get the answers that they get alone; nothing of those who left is kept."""
    _load(served, 5)  # allocates what is allocated once
    eventually(served.idle, 30)
    before = served.memory_mib()
    result = _load(served, 3)
    assert not result["wrong"], (len(result["wrong"]), result["wrong"][:3])
    assert (result["answered"], result["disconnected"]) == (3 * 66, 3 * 34)
    assert result["health"] < 10
    eventually(served.idle, 30)
    grown = served.memory_mib() - before
    print(f"{result['answered']} answers, {result['disconnected']} disconnected, {grown:+.1f} MiB, {result['health']:.1f} s")
    assert grown < 50
