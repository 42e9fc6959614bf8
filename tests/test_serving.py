"""`dsvl serve` with the official OpenAI client."""

import functools
import json
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from model_server import (
    LONG,
    NAME,
    SENTENCES,
    Server,
    alone,
    ask,
    data_url,
    draw_image,
    eventually,
    load_parts,
    make_served_checkpoint,
    post,
    question,
    served,
    streamed,
)
from training_runs import environment

from dsvl.serving.requests import RequestLimits
from dsvl.utils import url_fetching


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_checkpoint(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def parts(checkpoint: Path) -> tuple[Any, Any]:
    return load_parts(checkpoint)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_answers_equal_those_of_generate(server: Server, parts: tuple[Any, Any], count: int) -> None:
    images = [draw_image(seed) for seed in range(count)]
    own = [{"type": "image", "image": image} for image in images]
    expected = alone(parts, [{"role": "user", "content": [*own, {"type": "text", "text": "What is this?"}]}])
    messages = question("What is this?", *map(data_url, images))
    answer = ask(server, messages)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert streamed(server, messages) == expected
    assert expected != alone(parts, [{"role": "user", "content": "What else?"}])


def test_a_conversation_of_several_turns(server: Server, parts: tuple[Any, Any]) -> None:
    first, second = draw_image(1), draw_image(2)
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
    messages = question("What is this?", data_url(draw_image(0)))
    usage = ask(server, messages, 7).usage
    prompt = (
        parts[1]
        .apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": draw_image(0)}, {"type": "text", "text": "What is this?"}],
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


def test_a_stream_ends_with_done(server: Server) -> None:
    body = {"model": NAME, "messages": question("one"), "max_tokens": 2, "stream": True}
    with server.raw(post(json.dumps(body).encode())) as connection:
        received = b""
        while b"[DONE]" not in received:
            assert (chunk := connection.recv(65536))
            received += chunk
    assert b"text/event-stream" in received


def test_stop_strings_end_an_answer_and_are_not_part_of_it(server: Server) -> None:
    whole = ask(server, question("one"), 40).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 5]
    expected = whole[: whole.index(stop)]
    answer = ask(server, question("one"), 40, stop=[stop, "never said"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
    assert answer.usage.completion_tokens < 40
    assert streamed(server, question("one"), 40, stop=stop) == expected
    assert streamed(server, question("one"), 40, stop=whole[-3:] + "?") == whole  # only its beginning occurs


def test_an_answer_with_an_end_of_text_token_has_the_finish_reason_stop(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "one"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    end = next(index for index in range(1, 6) if ids[index] not in ids[:index])
    model.generation_config.eos_token_id = ids[end]
    try:
        with served(model, processor) as server:
            for tokens in (end + 1, end + 5):  # also if it is the last token allowed
                answer = ask(server, question("one"), tokens)
                assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", end + 1)
    finally:
        model.generation_config.eos_token_id = None


def test_each_request_samples_with_its_own_seed(server: Server) -> None:
    def sampled(seed: int) -> str:
        return ask(server, question("one"), 20, temperature=1.5, top_p=0.9, seed=seed).choices[0].message.content

    alone_ = [sampled(seed) for seed in range(4)]
    assert len(set(alone_)) == 4
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(sampled, [0, 1, 2, 3, 3, 2, 1, 0]))
    assert together == alone_ + alone_[::-1]
    assert torch.equal(torch.get_rng_state(), state)  # the global seed is not used
    greedy = ask(server, question("one"), 20, temperature=0).choices[0].message.content
    assert ask(server, question("one"), 20, temperature=2, top_p=1e-6).choices[0].message.content == greedy


def test_concurrent_requests_are_batched(server: Server, parts: tuple[Any, Any]) -> None:
    texts = SENTENCES[:24]
    urls = [[data_url(draw_image(number))] * (number % 3) for number in range(24)]
    own = [
        [{"type": "image", "image": draw_image(number)}] * (number % 3) + [{"type": "text", "text": texts[number]}]
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


def test_requests_beyond_the_limit_are_refused(parts: tuple[Any, Any]) -> None:
    with served(*parts, limits=RequestLimits(requests=2), max_batch=1) as server:
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
def test_a_client_that_disconnects_frees_its_slot(server: Server, stream: bool) -> None:
    body = json.dumps({"model": NAME, "messages": question("one"), "max_tokens": LONG, "stream": stream}).encode()
    with server.raw(post(body)) as connection:
        eventually(lambda: any(one.total_tokens > 3 for one in list(server.engine.active.values())))
        (one,) = server.engine.active.values()
        if stream:
            assert connection.recv(1)
    eventually(lambda: server.chat.held == 0 and server.engine.running == 0)
    eventually(lambda: one.done)
    assert one.total_tokens < LONG - 100
    assert ask(server, question("two")).choices[0].message.content


def test_short_answers_do_not_wait_for_long_ones(parts: tuple[Any, Any]) -> None:
    with served(*parts, max_batch=1) as server:
        long = ask(server, question("one"), LONG, stream=True)
        assert ask(server, question("two"), 3).usage.completion_tokens == 3
        assert server.engine.running == 1
        long.close()


def test_pausing_does_not_change_an_answer(parts: tuple[Any, Any], monkeypatch: Any) -> None:
    def one(number: int) -> str:
        options: dict[str, Any] = {"temperature": 1.2, "seed": number} if number % 2 else {}
        messages = question(SENTENCES[number], *[data_url(draw_image(number))] * (number % 3))
        return ask(server, messages, 30, **options).choices[0].message.content

    with served(*parts) as server:
        whole = [one(number) for number in range(8)]
        monkeypatch.setattr(server.engine, "max_batch", 3)
        monkeypatch.setattr(server.engine, "max_steps", 4)
        before = server.engine.batches
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(one, range(8))) == whole
        assert server.engine.batches - before > 8


def test_a_waiting_request_can_be_cancelled(parts: tuple[Any, Any]) -> None:
    with served(*parts, max_batch=1) as server:
        server.engine.max_steps = LONG
        first = ask(server, question("one"), LONG, stream=True)
        waiting = ask(server, question("two"), LONG, stream=True)
        eventually(lambda: server.engine.running == 2)
        waiting.close()
        eventually(lambda: server.engine.running == 1)
        first.close()
        eventually(lambda: server.engine.running == 0)
        assert server.engine.batches == 1


def test_a_failing_request_fails_alone_and_reveals_no_details(
    server: Server, parts: tuple[Any, Any], monkeypatch: Any
) -> None:
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


def test_an_image_is_downloaded_if_the_server_allows_it(parts: tuple[Any, Any], tmp_path: Path, monkeypatch: Any) -> None:
    draw_image(1).save(tmp_path / "one.png")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(url_fetching, "is_public", lambda address: address == "127.0.0.1")
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as site,
        served(*parts, limits=RequestLimits(allow_urls=True)) as server,
    ):
        threading.Thread(target=site.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{site.server_port}/one.png"
        answers = [ask(server, question("one", one)).choices[0].message.content for one in (url, data_url(draw_image(1)))]
        site.shutdown()
    assert answers[0] == answers[1]


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
                messages: Any = question("What?", data_url(draw_image(0)))
                answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=4)
                assert answer.usage is not None and answer.usage.completion_tokens >= 1
        finally:
            process.send_signal(signal.SIGINT)  # Ctrl-C
            said = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    assert "Traceback" not in said and f"http://127.0.0.1:{port}/v1" in said
