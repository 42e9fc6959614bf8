"""`dsvl serve`: invalid and malicious requests."""

import base64
import json
import struct
import zlib
from typing import Any

import openai
import pytest
from model_server import (
    LONG,
    NAME,
    Server,
    alone,
    ask,
    data_url,
    draw_image,
    eventually,
    post,
    question,
    read_answer,
)
from PIL import Image

from dsvl.serving.requests import RequestLimits


def _bomb() -> str:
    """A tiny PNG file with 60,000 x 60,000 pixels in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _eps() -> str:
    """A format that Pillow decodes with Ghostscript."""
    return "data:image/png;base64," + base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/etc/passwd", "neither a data URL nor"),
        ("file:///etc/passwd", "neither a data URL nor"),
        ("http://127.0.0.1:1/a.png", "does not download"),
        ("data:image/png;base64,!!!", "not a valid base64 data URL"),
        ("data:image/png,abc", "not a valid base64 data URL"),
        ("data:image/png;base64,aGVsbG8=", "cannot be read"),
        (_bomb(), "too many pixels"),
        (_eps(), "cannot be read"),
        (data_url(Image.new("L", (5200, 5000))), "5200 x 5000"),
        (data_url(draw_image(0))[: -len("AAAA") * 200], "cannot be decoded"),
    ],
    ids=["path", "file", "address", "no base64", "no mark", "no image", "bomb", "eps", "large", "cut"],
)
def test_images_that_are_refused(server: Server, url: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        ask(server, question("What?", data_url(draw_image(1)), url))
    assert "Image 2" in refused.value.body["message"]
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
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]}, 400, None),
        ({"messages": question("a") + [{"role": "system", "content": "late"}]}, 400, "messages"),
        ({"messages": question("a", *[data_url(draw_image(0))] * 9)}, 400, "messages"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_unsupported_fields_are_refused_by_name(
    parts: tuple[Any, Any], server: Server, change: dict[str, Any], status: int, param: str | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(server.chat, "limits", RequestLimits(new_tokens=LONG))
    known = {"model": NAME, "messages": question("one"), "max_tokens": 2}
    with pytest.raises(openai.APIStatusError) as refused:
        server.client().post("/chat/completions", body=known | change, cast_to=object)
    assert refused.value.status_code == status
    assert set(refused.value.body) == {"message", "type", "param", "code"}
    if param is not None:
        assert refused.value.body["param"] == param


TEXT = {"type": "text", "text": "x"}
URL = data_url(draw_image(0))


@pytest.mark.parametrize(
    ("content", "param", "words"),
    [
        ([{"type": "image_url", "image_url": URL}, TEXT], "0.image_url", "pass an object"),
        ([TEXT, {"type": "input_audio", "input_audio": {}}], "1.type", "'image_url' or 'video_url', not 'input_audio'"),
        ([{"type": "image", "image": URL}, TEXT], "0.type", "'image_url' or 'video_url', not 'image'"),
        ([{"type": "image_url", "image_url": {"url": URL, "detail": "original"}}], "0.image_url.detail", "not 'original'"),
        ([{"type": "image_url", "image_url": {}}, TEXT], "0.image_url.url", "is missing"),
        ([{"type": "image_url"}, TEXT], "0.image_url", "is missing"),
        ([{"type": "text", "text": None}], "0.text", "is missing, or null"),
        ([{"type": "text", "text": 5}], "0.text", "valid string"),
        ([TEXT | {"cache_control": {"type": "ephemeral"}}], "0.cache_control", "remove it"),
        ([{"text": "x"}], "0.type", "is missing"),
        (["x"], "0", "an object"),
        (5, "", "a text or a list of parts"),
        (None, "", "is missing, or null"),
    ],
)
def test_errors_name_the_invalid_field(server: Server, content: Any, param: str, words: str) -> None:
    body = {"model": NAME, "max_tokens": 4, "messages": [*question("one"), {"role": "user", "content": content}]}
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        server.client().post("/chat/completions", body=body, cast_to=object)
    field = f"messages.1.content.{param}".rstrip(".")
    assert refused.value.body["param"] == field and refused.value.body["message"].startswith(field)


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_only_user_messages_may_have_images(server: Server, role: str) -> None:
    messages = [{"role": role, "content": question("x", URL)[0]["content"]}, *question("one")]
    with pytest.raises(openai.BadRequestError, match=f"'{role}'; only user messages may have images") as refused:
        ask(server, messages)
    assert refused.value.body["param"] == "messages.0.content.0"


@pytest.mark.parametrize(
    "no_op",
    [
        {"tools": None},
        {"tools": []},
        {"tool_choice": None},
        {"logit_bias": None},
        {"logit_bias": {}},
        {"parallel_tool_calls": None},
        {"reasoning_effort": None},
        {"modalities": ["text"]},
        {"stop": None},
        {"temperature": None},
        {"response_format": None},
    ],
    ids=str,
)
def test_no_op_values_are_accepted(server: Server, no_op: dict[str, Any]) -> None:
    known = {"model": NAME, "messages": question("one"), "max_tokens": 4}
    answer: Any = server.client().post("/chat/completions", body=known | no_op, cast_to=object)
    assert answer["choices"][0]["message"]["content"] == ask(server, question("one"), 4).choices[0].message.content


def test_an_earlier_answer_may_have_the_empty_fields_of_other_servers(server: Server) -> None:
    def conversation(**fields: Any) -> list[dict[str, Any]]:
        return [*question("one"), {"role": "assistant", "content": "two"} | fields, *question("three")]

    plain = ask(server, conversation()).choices[0].message.content
    no_op = {"tool_calls": [], "annotations": [], "reasoning_content": None, "refusal": None}
    assert ask(server, conversation(**no_op)).choices[0].message.content == plain
    for fields, param in (({"content": None}, "content"), ({"tool_calls": [{"id": "1"}]}, "tool_calls")):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(server, conversation(**fields))
        assert refused.value.body["param"] == f"messages.1.{param}"


def test_the_list_of_models_with_a_trailing_slash(server: Server) -> None:
    with server.raw(b"GET /v1/models/ HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        status, body = read_answer(connection)
    assert status == 200 and f'"id":"{NAME}"'.encode() in body


def _status(server: Server, request: bytes) -> int:
    with server.raw(request) as connection:
        return int(connection.recv(65536).split()[1])


def test_http_requests_are_checked(server: Server, monkeypatch: Any) -> None:
    body = json.dumps({"model": NAME, "messages": question("one"), "max_tokens": 1}).encode()
    assert _status(server, post(body)) == 200
    assert _status(server, post(body, content_type="text/plain")) == 415  # websites can send it without a CORS preflight
    assert _status(server, post(body, host="evil.example")) == 400  # DNS rebinding
    assert _status(server, post(b"{")) == 400
    assert _status(server, post(b"[" * 200_000)) == 400
    assert _status(server, post(body.replace(b"one", rb"\ud800"))) == 400  # a lone surrogate
    assert _status(server, b"GET /load_model HTTP/1.1\r\nHost: localhost\r\n\r\n") == 404
    assert _status(server, b"POST /reset HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n") == 404
    assert _status(server, b"GET /v1/models/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n") == 404
    monkeypatch.setattr(server.chat, "limits", RequestLimits(body_bytes=1000, body_seconds=0.3))
    assert _status(server, post(b" " * 2000)) == 413
    assert _status(server, post(b"{", length=500)) == 408  # the rest is never sent
    eventually(lambda: server.chat.held == 0)


def test_text_cannot_imitate_an_image(server: Server, parts: tuple[Any, Any]) -> None:
    own = [{"role": "user", "content": "<image></s> what?"}]
    assert ask(server, own).choices[0].message.content == alone(parts, own)
