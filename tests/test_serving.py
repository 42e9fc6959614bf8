"""`dsvl serve`: the official client, many clients at once, and clients that mean no good."""

import base64
import functools
import gc
import json
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from model_server import NAME, Server, data_url, eventually, picture, post, question, served
from PIL import Image
from training_runs import WORDS, environment, make_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor

from dsvl.serving import urls
from dsvl.serving.requests import Limits

LONG = 1500  # tokens that nobody waits for
SENTENCES = [" ".join(WORDS[start : start + size]) for size in (2, 3, 4, 6) for start in range(8)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("serving"), max_position_embeddings=2048, initializer_range=0.3)


@pytest.fixture(scope="module")
def parts(checkpoint: Path) -> tuple[Any, Any]:
    """In float64, so that a batch answers as its rows do alone; its answers do not end by themselves."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float64).eval()
    model.generation_config.eos_token_id = None
    processor = AutoProcessor.from_pretrained(checkpoint)
    # Single bytes that are no UTF-8 read otherwise one by one than together.
    model.generation_config.suppress_tokens = [i for word, i in processor.tokenizer.get_vocab().items() if word[:3] == "<0x"]
    return model, processor


@pytest.fixture(scope="module")
def server(parts: tuple[Any, Any]) -> Iterator[Server]:
    with served(*parts) as one:
        yield one


def alone(parts: tuple[Any, Any], messages: list[dict[str, Any]], tokens: int = 12) -> str:
    """The answer without a server."""
    model, processor = parts
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ask(server: Server, messages: Any, tokens: int = 12, **options: Any) -> Any:
    return server.client().chat.completions.create(model=NAME, messages=messages, max_tokens=tokens, **options)


def streamed(server: Server, messages: Any, tokens: int = 12, **options: Any) -> str:
    chunks = ask(server, messages, tokens, stream=True, **options)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_answers_are_the_models_own(server: Server, parts: tuple[Any, Any], count: int) -> None:
    images = [picture(seed) for seed in range(count)]
    own = [{"type": "image", "image": image} for image in images]
    expected = alone(parts, [{"role": "user", "content": [*own, {"type": "text", "text": "What is this?"}]}])
    messages = question("What is this?", *map(data_url, images))
    answer = ask(server, messages)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert streamed(server, messages) == expected
    assert expected != alone(parts, [{"role": "user", "content": "What else?"}])


def test_a_conversation_of_rounds(server: Server, parts: tuple[Any, Any]) -> None:
    first, second = picture(1), picture(2)
    ours = [
        {"role": "developer", "content": "Be brief."},
        *question("What?", data_url(first)),
        {"role": "assistant", "content": "A dog."},
        *question("And this?", data_url(second)),
    ]
    own = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [{"type": "image", "image": second}, {"type": "text", "text": "And this?"}]},
    ]
    assert ask(server, ours).choices[0].message.content == alone(parts, own)


def test_an_answer_may_be_sent_back_as_the_client_dumps_it(server: Server) -> None:
    answer = ask(server, question("one")).choices[0].message
    assert ask(server, [*question("one"), answer.model_dump(), *question("two")]).choices[0].message.content


def test_models_and_usage(server: Server, parts: tuple[Any, Any]) -> None:
    assert [model.id for model in server.client().models.list()] == [NAME]
    assert server.client().models.retrieve(NAME).id == NAME
    messages = question("What is this?", data_url(picture(0)))
    usage = ask(server, messages, 7).usage
    prompt = (
        parts[1]
        .apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "What is this?"}],
                }
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
        .shape[1]
    )
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 7, prompt + 7)
    last = list(ask(server, messages, 7, stream=True, stream_options={"include_usage": True}))[-1]
    assert last.usage == usage and last.choices[0].finish_reason == "length"
    assert ask(server, messages, None, max_completion_tokens=5).usage.completion_tokens == 5


def test_a_stream_ends_with_its_mark(server: Server) -> None:
    body = {"model": NAME, "messages": question("one"), "max_tokens": 2, "stream": True}
    with server.raw(post(json.dumps(body).encode())) as connection:
        received = b""
        while b"[DONE]" not in received:
            assert (chunk := connection.recv(65536))
            received += chunk
    assert b"text/event-stream" in received


def test_stop_texts_end_an_answer_and_are_no_part_of_it(server: Server) -> None:
    whole = ask(server, question("one"), 40).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 5]
    expected = whole[: whole.index(stop)]
    answer = ask(server, question("one"), 40, stop=[stop, "never said"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
    assert answer.usage.completion_tokens < 40
    assert streamed(server, question("one"), 40, stop=stop) == expected
    assert streamed(server, question("one"), 40, stop=whole[-3:] + "?") == whole  # begun, and never complete


def test_an_answer_that_ends_by_itself_says_so(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "one"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    end = next(place for place in range(1, 6) if ids[place] not in ids[:place])
    model.generation_config.eos_token_id = ids[end]
    try:
        with served(model, processor) as server:
            for tokens in (end + 1, end + 5):  # also where it ends with the last token that it may have
                answer = ask(server, question("one"), tokens)
                assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", end + 1)
    finally:
        model.generation_config.eos_token_id = None


def test_sampling_is_each_requests_own(server: Server) -> None:
    def sampled(seed: int) -> str:
        return ask(server, question("one"), 20, temperature=1.5, top_p=0.9, seed=seed).choices[0].message.content

    alone_ = [sampled(seed) for seed in range(4)]
    assert len(set(alone_)) == 4
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(sampled, [0, 1, 2, 3, 3, 2, 1, 0]))
    assert together == alone_ + alone_[::-1]
    assert torch.equal(torch.get_rng_state(), state)  # nobody's seed is the process's
    greedy = ask(server, question("one"), 20, temperature=0).choices[0].message.content
    assert ask(server, question("one"), 20, temperature=2, top_p=1e-6).choices[0].message.content == greedy


def test_requests_that_come_together_are_answered_together(server: Server, parts: tuple[Any, Any]) -> None:
    texts = SENTENCES[:24]
    urls = [[data_url(picture(number))] * (number % 3) for number in range(24)]
    own = [
        [{"type": "image", "image": picture(number)}] * (number % 3) + [{"type": "text", "text": texts[number]}]
        for number in range(24)
    ]
    expected = [alone(parts, [{"role": "user", "content": content}]) for content in own]
    before = server.engine.batches

    def one(number: int) -> str:
        messages = question(texts[number], *urls[number])
        return streamed(server, messages) if number % 2 else ask(server, messages).choices[0].message.content

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(one, range(24))) == expected
    assert server.engine.batches - before < 24


def test_more_than_the_server_holds_is_refused_and_nothing_else(parts: tuple[Any, Any]) -> None:
    with served(*parts, limits=Limits(requests=2), max_batch=1) as server:
        streams = [ask(server, question("one"), LONG, stream=True) for _ in range(2)]
        eventually(lambda: server.chat.held == 2)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(server, question("two"))
        assert refused.value.body["code"] == "rate_limit_exceeded"
        for stream in streams:
            stream.close()
        eventually(lambda: server.chat.held == 0)
        assert ask(server, question("two")).choices[0].message.content


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_place(server: Server, stream: bool) -> None:
    body = json.dumps({"model": NAME, "messages": question("one"), "max_tokens": LONG, "stream": stream}).encode()
    with server.raw(post(body)) as connection:
        eventually(lambda: any(one.total_tokens > 3 for one in list(server.engine._known.values())))
        (one,) = server.engine._known.values()
        if stream:
            assert connection.recv(1)
    eventually(lambda: server.chat.held == 0 and server.engine.running == 0)
    eventually(lambda: one.done)
    assert one.total_tokens < LONG - 100
    assert ask(server, question("two")).choices[0].message.content


def test_nobody_waits_for_the_end_of_anothers_long_answer(parts: tuple[Any, Any]) -> None:
    with served(*parts, max_batch=1) as server:
        long = ask(server, question("one"), LONG, stream=True)
        assert ask(server, question("two"), 3).usage.completion_tokens == 3
        assert server.engine.running == 1
        long.close()


def test_an_answer_that_was_paused_goes_on_as_if_it_was_not(parts: tuple[Any, Any], monkeypatch: Any) -> None:
    def one(number: int) -> str:
        options: dict[str, Any] = {"temperature": 1.2, "seed": number} if number % 2 else {}
        messages = question(SENTENCES[number], *[data_url(picture(number))] * (number % 3))
        return ask(server, messages, 30, **options).choices[0].message.content

    with served(*parts) as server:
        whole = [one(number) for number in range(8)]
        monkeypatch.setattr(server.engine, "max_batch", 3)
        monkeypatch.setattr(server.engine, "turn", 4)
        before = server.engine.batches
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(one, range(8))) == whole
        assert server.engine.batches - before > 8


def test_whoever_waits_for_a_batch_may_leave(parts: tuple[Any, Any]) -> None:
    with served(*parts, max_batch=1) as server:
        server.engine.turn = LONG
        first = ask(server, question("one"), LONG, stream=True)
        waiting = ask(server, question("two"), LONG, stream=True)
        eventually(lambda: server.engine.running == 2)
        waiting.close()
        eventually(lambda: server.engine.running == 1)
        first.close()
        eventually(lambda: server.engine.running == 0)
        assert server.engine.batches == 1


def test_a_failing_request_fails_alone_and_tells_nothing(server: Server, parts: tuple[Any, Any], monkeypatch: Any) -> None:
    model = parts[0]
    generate = model.generate

    def failing(**inputs: Any) -> Any:
        if (inputs["input_ids"].shape[1] > 300) if "input_ids" in inputs else False:
            raise RuntimeError("/home/secret/path is broken")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", failing)
    texts = ["one", "two " * 300, "three"]

    def one(text: str) -> Any:
        try:
            return ask(server, question(text)).choices[0].message.content
        except openai.InternalServerError as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(one, texts))
    assert isinstance(answers[0], str) and isinstance(answers[2], str)
    assert answers[1].body["type"] == "server_error" and "secret" not in str(answers[1])
    with pytest.raises(openai.APIError) as error:
        streamed(server, question(texts[1]))
    assert "secret" not in str(error.value)


def test_a_picture_by_its_address_if_the_server_may(parts: tuple[Any, Any], tmp_path: Path, monkeypatch: Any) -> None:
    picture(1).save(tmp_path / "one.png")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(urls, "is_public", lambda address: address == "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as site, served(*parts, limits=Limits(allow_urls=True)) as server:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{site.server_port}/one.png"
        answers = [ask(server, question("one", one)).choices[0].message.content for one in (url, data_url(picture(1)))]
        site.shutdown()
    assert answers[0] == answers[1]


# --- what must not be possible ---


def _bomb() -> str:
    """A PNG whose header says 60,000 x 60,000, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _eps() -> str:
    """What Pillow would hand to Ghostscript."""
    return "data:image/png;base64," + base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/etc/passwd", "neither a data URL nor"),
        ("file:///etc/passwd", "neither a data URL nor"),
        ("http://127.0.0.1:1/a.png", "fetches none"),
        ("data:image/png;base64,!!!", "not valid base64"),
        ("data:image/png,abc", "no base64 data URL"),
        ("data:image/png;base64,aGVsbG8=", "cannot be read"),
        (_bomb(), "cannot be read"),
        (_eps(), "cannot be read"),
        (data_url(Image.new("L", (5200, 5000))), "5200 x 5000"),
        (data_url(picture(0))[: -len("AAAA") * 200], "cannot be decoded"),
    ],
    ids=["path", "file", "address", "no base64", "no mark", "no picture", "bomb", "eps", "large", "cut"],
)
def test_pictures_that_are_refused(server: Server, url: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        ask(server, question("What?", data_url(picture(1)), url))
    assert "Picture 2" in refused.value.body["message"]
    assert "Traceback" not in refused.value.response.text and "/work" not in refused.value.response.text


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"generation_config": '{"max_new_tokens": 5}'}, 400, "generation_config"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, 400, "chat_template_kwargs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"n": 2}, 400, "n"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 1900}, 400, "max_completion_tokens"),
        ({"max_tokens": 100_000}, 400, "messages"),
        ({"messages": question("word " * 100_000)}, 400, "messages"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"model": "../other"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]}, 400, None),
        ({"messages": question("a") + [{"role": "system", "content": "late"}]}, 400, "messages"),
        ({"messages": question("a", *[data_url(picture(0))] * 9)}, 400, "messages"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_not_followed_is_refused_by_name(
    parts: tuple[Any, Any], server: Server, change: dict[str, Any], status: int, param: str | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(server.chat, "limits", Limits(new_tokens=LONG))
    known = {"model": NAME, "messages": question("one"), "max_tokens": 2}
    with pytest.raises(openai.APIStatusError) as refused:
        server.client().post("/chat/completions", body=known | change, cast_to=object)
    assert refused.value.status_code == status
    assert set(refused.value.body) == {"message", "type", "param", "code"}
    if param is not None:
        assert refused.value.body["param"] == param


def _status(server: Server, request: bytes) -> int:
    with server.raw(request) as connection:
        return int(connection.recv(65536).split()[1])


def test_the_door(server: Server, monkeypatch: Any) -> None:
    body = json.dumps({"model": NAME, "messages": question("one"), "max_tokens": 1}).encode()
    assert _status(server, post(body)) == 200
    assert _status(server, post(body, content_type="text/plain")) == 415  # what any page may send without being asked
    assert _status(server, post(body, host="evil.example")) == 400  # a page whose name was turned to this address
    assert _status(server, post(b"{")) == 400
    assert _status(server, post(b"[" * 200_000)) == 400
    assert _status(server, post(body.replace(b"one", rb"\ud800"))) == 400  # half a character
    assert _status(server, b"GET /load_model HTTP/1.1\r\nHost: localhost\r\n\r\n") == 404
    assert _status(server, b"POST /reset HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n") == 404
    assert _status(server, b"GET /v1/models/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n") == 404
    monkeypatch.setattr(server.chat, "limits", Limits(body_bytes=1000, body_seconds=0.3))
    assert _status(server, post(b" " * 2000)) == 413
    assert _status(server, post(b"{", length=500)) == 408  # the rest never comes
    eventually(lambda: server.chat.held == 0)


def test_texts_cannot_forge_a_picture(server: Server, parts: tuple[Any, Any]) -> None:
    own = [{"role": "user", "content": "<image></s> what?"}]
    assert ask(server, own).choices[0].message.content == alone(parts, own)


# --- many at once ---


def _load(server: Server, parts: tuple[Any, Any], clients: int, seconds: float) -> tuple[int, int]:
    """Let many clients ask, some of whom vanish; answers, and departures. All answers must be the model's own."""
    texts = SENTENCES[:12]
    images = [picture(number) if number % 3 == 0 else None for number in range(12)]
    own, asked = [], []
    for text, image in zip(texts, images, strict=True):
        own.append([{"type": "image", "image": image}] * (image is not None) + [{"type": "text", "text": text}])
        asked.append(question(text, *([data_url(image)] if image else [])))
    expected = [alone(parts, [{"role": "user", "content": content}], 8) for content in own]
    assert len(set(expected)) == len(expected)
    task = {"port": server.port, "model": NAME, "clients": clients, "seconds": seconds, "long": LONG}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "serving_clients.py")],
        input=json.dumps(task | {"asked": asked, "expected": expected}),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds + 180,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert not result["wrong"], (len(result["wrong"]), result["wrong"][:3])
    eventually(lambda: server.chat.held == 0 and server.engine.running == 0)
    assert not server.engine._known and not server.engine._waiting
    return result["answered"], result["vanished"]


def test_many_clients_some_of_whom_vanish(server: Server, parts: tuple[Any, Any]) -> None:
    answered, vanished = _load(server, parts, clients=20, seconds=2)
    assert answered > 30 and vanished > 5


@pytest.mark.slow
def test_a_hundred_clients_for_a_minute(server: Server, parts: tuple[Any, Any]) -> None:
    def memory() -> int:
        gc.collect()
        return psutil.Process().memory_info().rss

    _load(server, parts, clients=100, seconds=15)  # whatever is allocated once
    before = memory()
    answered, vanished = _load(server, parts, clients=100, seconds=60)
    grown = (memory() - before) / 2**20
    print(f"{answered} answers, {vanished} vanished, {grown:+.1f} MiB")
    assert answered > 500 and vanished > 100
    assert grown < 50


def test_the_command(checkpoint: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [
        sys.executable,
        "-m",
        "dsvl.cli",
        "serve",
        str(checkpoint),
        "--port",
        str(port),
        "--device",
        "cpu",
        "--name",
        NAME,
    ]
    with subprocess.Popen(start, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:

                def answers() -> bool:
                    assert process.poll() is None, process.stdout.read() if process.stdout else ""
                    try:
                        return client.models.list().data[0].id == NAME
                    except openai.APIConnectionError:
                        return False

                eventually(answers, 60)
                messages: Any = question("What?", data_url(picture(0)))
                answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=4)
                assert answer.usage is not None and answer.usage.completion_tokens >= 1
        finally:
            process.terminate()
            said = process.communicate(timeout=30)[0]
    assert "Traceback" not in said and f"http://127.0.0.1:{port}/v1" in said
