"""`dsvl demo`: its HTTP interface, and the conversations of its visitors."""

import argparse
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'dsvl[page]'")

import httpx  # noqa: E402
from model_server import make_served_checkpoint  # noqa: E402
from page_server import LIMITS, TOKENS, eventually, image_files, load_parts, opened  # noqa: E402
from PIL import Image  # noqa: E402
from training_runs import environment, make_conversations  # noqa: E402

import dsvl  # noqa: E402
from dsvl.chat import DSVLChat  # noqa: E402
from dsvl.page import request_filter  # noqa: E402
from dsvl.page.app import open_page  # noqa: E402
from dsvl.page.commands import add_parser as page_parser  # noqa: E402
from dsvl.page.examples import read_examples  # noqa: E402
from dsvl.page.limits import Refusal  # noqa: E402
from dsvl.page.sessions import ChatSessions, PageQuestion, escape  # noqa: E402
from dsvl.serving.commands import add_parser as serve_parser  # noqa: E402

API = "/gradio_api"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_checkpoint(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def parts(checkpoint: Path) -> tuple[Any, Any]:
    return load_parts(checkpoint)


@pytest.fixture(scope="module")
def page(parts: tuple[Any, Any]) -> Iterator[tuple[httpx.Client, ChatSessions]]:
    with opened(parts) as (address, sessions), httpx.Client(base_url=address, timeout=30) as client:
        yield client, sessions


@functools.cache
def event(client: httpx.Client, name: str) -> int:
    """The index of an event handler of the page."""
    (found,) = [part["id"] for part in client.get("/config").json()["dependencies"] if part["api_name"] == name]
    return int(found)


def join(client: httpx.Client, session: str, name: str, *data: Any) -> httpx.Response:
    body = {"data": list(data), "fn_index": event(client, name), "session_hash": session}
    return client.post(f"{API}/queue/join", json=body)


def response(client: httpx.Client, session: str, name: str, *data: Any) -> str:
    """Everything that an event sends back."""
    assert join(client, session, name, *data).status_code == 200
    return client.get(f"{API}/queue/data", params={"session_hash": session}).text


def upload(client: httpx.Client, *files: str) -> list[dict[str, Any]]:
    if not files:
        return []
    sent = client.post(f"{API}/upload", files=[("files", (Path(file).name, Path(file).read_bytes())) for file in files])
    assert sent.status_code == 200, sent.text
    return [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in sent.json()]


def question(text: str, files: Any = ()) -> dict[str, Any]:
    return {"text": text, "files": list(files)}


def ask_and_wait(sessions: ChatSessions, session: str, asked: PageQuestion) -> str:
    assert sessions.ask(session, asked).done.result(timeout=60)
    return sessions.get(session).turns[-1][1]


def test_a_question_about_uploaded_images_is_answered(page: Any, parts: Any, tmp_path: Path) -> None:
    client, sessions = page
    files = image_files(tmp_path, 2)
    shown = response(client, "one", "ask", question("Which?", upload(client, *files)))
    expected = DSVLChat(*parts, max_new_tokens=TOKENS).ask("Which?", files)
    assert sessions.get("one").turns[0][1] == expected
    assert json.dumps(escape(expected))[1:-1] in shown
    assert shown.count('"process_generating"') > 2
    response(client, "one", "undo")
    assert sessions.get("one").chat.messages == [] == sessions.get("one").turns


@pytest.mark.parametrize(
    "path",
    [
        f"{API}/info",
        f"{API}/openapi.json",
        f"{API}/deep_link?session_hash=one",
        "/monitoring",
        "/monitoring/summary",
        "/docs",
        f"{API}/proxy=http://127.0.0.1:1/x",
        f"{API}/file=http://127.0.0.1:1/x",
        f"{API}/file=/etc/passwd",
        f"{API}/file={Path(dsvl.__file__).parent}/pyproject.toml",
        f"{API}/file=pyproject.toml",
        f"{API}/file=UPLOADS/../../../../../../etc/passwd",
        f"{API}/file=UPLOADS/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/static/../../../../../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets//etc/passwd",
    ],
)
def test_only_the_routes_and_files_of_the_page_can_be_read(page: Any, path: str) -> None:
    client, _ = page
    # A raw socket, because HTTP clients normalize paths.
    address = client.base_url
    with socket.create_connection((address.host, address.port), timeout=10) as connection:
        uploads = os.environ["GRADIO_TEMP_DIR"]
        request = f"GET {path.replace('UPLOADS', uploads)} HTTP/1.1\r\nHost: {address.host}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert answer.split()[1] in ("403", "404"), answer[:300]
    assert str(Path(dsvl.__file__).parent) not in answer and "Traceback" not in answer and "root:" not in answer


@pytest.mark.parametrize(
    "path", ["component_server", "process_recording", "vibe-edit", "call/ask", "stream/1", "run/predict", "cancel", "reset"]
)
def test_other_routes_cannot_be_posted_to(page: Any, path: str) -> None:
    assert page[0].post(f"{API}/{path}", json={}).status_code == 404


def test_other_host_headers_are_refused(page: Any) -> None:
    assert page[0].get("/", headers={"host": "rebound.example"}).status_code == 400


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "pyproject.toml", "http://127.0.0.1:1/x.png", "https://example.com/x.png", "", None, 3, "\0"]
)
@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
def test_files_that_were_not_uploaded_are_refused(page: Any, path: Any, meta: dict[str, Any]) -> None:
    client, _ = page
    refused = join(client, "two", "ask", question("What?", [{"path": path} | meta]))
    assert refused.status_code == 403 and refused.text == "The request names a file that was not uploaded."


def test_the_size_of_requests_is_limited(page: Any, tmp_path: Path) -> None:
    client, _ = page
    assert join(client, "two", "ask", question("x" * 1_000_000)).status_code == 413
    assert client.post(f"{API}/queue/join", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert (
        client.post(f"{API}/queue/join", content=b"[" * 60_000, headers={"content-type": "application/json"}).status_code
        == 400
    )
    large = tmp_path / "large.png"
    large.write_bytes(b"x" * (LIMITS.image_bytes + 1))
    assert client.post(f"{API}/upload", files={"files": large.read_bytes()}).status_code == 413
    flood = [("files", (f"{number}.png", b"x" * 100_000)) for number in range(10)]
    assert client.post(f"{API}/upload", files=flood).status_code == 413


def test_the_total_size_of_uploads_is_limited(parts: Any, tmp_path: Path) -> None:
    with (
        opened(parts, replace(LIMITS, upload_bytes=20_000), examples=()) as (address, _),
        httpx.Client(base_url=address) as client,
    ):
        upload(client, *image_files(tmp_path, 1))
        file = {"files": Path(*image_files(tmp_path, 1)).read_bytes()}
        assert [client.post(f"{API}/upload", files=file).status_code for _ in range(3)][-1] == 503
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.is_dir()
    assert not folder.exists()


def test_files_that_no_conversation_uses_are_deleted(parts: Any, tmp_path: Path) -> None:
    with (
        opened(parts, replace(LIMITS, idle_seconds=1), max_new_tokens=2) as (address, _),
        httpx.Client(base_url=address) as client,
    ):
        asked, forgotten = upload(client, *image_files(tmp_path, 2))
        examples = [*Path(os.environ["GRADIO_TEMP_DIR"]).glob("example*.png")]
        response(client, "one", "ask", question("What?", [asked]))
        end = time.monotonic() + 3
        while time.monotonic() < end:
            response(client, "one", "ask", question("And?"))
            time.sleep(0.2)
        served = [client.get(f"{API}/file={file}").status_code for file in (asked["path"], forgotten["path"], *examples)]
        assert served == [200, 403, 200, 200, 200]


def bomb(folder: Path) -> str:
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    return str(folder / "bomb.png")


def no_image(folder: Path) -> str:
    (folder / "no.png").write_text("<svg/>")
    return str(folder / "no.png")


@pytest.mark.parametrize(
    ("text", "make", "words"),
    [
        ("What?", lambda folder: [bomb(folder)], "bomb.png is refused"),
        ("What?", lambda folder: [no_image(folder)], "no.png is refused"),
        ("What?", lambda folder: image_files(folder, 4), "A question may have 3 images; this one has 4."),
        ("x" * 501, lambda folder: [], "A question may have 500 characters; this one has 501."),
        (" ", lambda folder: image_files(folder, 1), "Write a question about the images."),
    ],
)
def test_refusals_are_shown_with_their_reason(page: Any, tmp_path: Path, text: str, make: Any, words: str) -> None:
    client, sessions = page
    answer = response(client, "three", "ask", question(text, upload(client, *make(tmp_path))))
    assert words in answer and "Traceback" not in answer and "/tmp" not in answer
    assert sessions.get("three").as_messages() == []


@pytest.mark.parametrize("error", [RuntimeError("in /secret/place"), ValueError("in /secret/place")])
def test_a_failure_reveals_no_details_and_returns_the_question(page: Any, error: Exception) -> None:
    client, sessions = page

    def fail(*_: Any, **__: Any) -> Iterator[str]:
        yield "half"
        raise error

    sessions.get("four").chat.stream = fail  # type: ignore[method-assign,assignment]
    answer = response(client, "four", "ask", question("What?"))
    assert "could not be answered" in answer or "failed" in answer
    assert "/secret" not in answer and "Traceback" not in answer
    assert '"text":"What?"' in answer  # back in the box
    assert sessions.get("four").as_messages() == []
    sessions.clear("four")


def test_sessions_share_the_model_one_after_the_other(parts: Any) -> None:
    sessions = ChatSessions(lambda: DSVLChat(*parts, max_new_tokens=TOKENS), LIMITS)
    turns = [sessions.ask(str(number), PageQuestion(f"Number {number}?", [])) for number in range(4)]
    for number, turn in enumerate(turns):
        assert turn.done.result(timeout=60)
        (turn_,) = sessions.get(str(number)).turns
        assert turn_ == (turn.question, DSVLChat(*parts, max_new_tokens=TOKENS).ask(f"Number {number}?"))


def test_old_caches_are_freed_and_old_conversations_deleted(parts: Any) -> None:
    sessions = ChatSessions(lambda: DSVLChat(*parts, max_new_tokens=4), replace(LIMITS, caches=1, conversations=2))
    whole = DSVLChat(*parts, max_new_tokens=4)
    first = [whole.ask("One?"), whole.ask("Two?")]
    assert ask_and_wait(sessions, "a", PageQuestion("One?", [])) == first[0]
    cache = weakref.ref(sessions.get("a").chat.prompt_cache.cache)  # type: ignore[union-attr]
    ask_and_wait(sessions, "b", PageQuestion("Other?", []))
    gc.collect()
    assert cache() is None
    assert ask_and_wait(sessions, "a", PageQuestion("Two?", [])) == first[1]  # the text is kept
    ask_and_wait(sessions, "c", PageQuestion("Other?", []))
    assert [*sessions.conversations] == ["a", "c"]
    sessions.leave("a")
    gc.collect()
    assert not sessions.conversations["a"].cached and len(sessions.conversations["a"].turns) == 2


def test_idle_conversations_are_deleted(parts: Any) -> None:
    sessions = ChatSessions(lambda: DSVLChat(*parts, max_new_tokens=4), replace(LIMITS, idle_seconds=0.0))
    ask_and_wait(sessions, "a", PageQuestion("One?", []))
    sessions.get("b")
    assert [*sessions.conversations] == ["b"]


def test_one_question_at_a_time_and_a_limited_number_of_images(parts: Any, tmp_path: Path) -> None:
    sessions = ChatSessions(lambda: DSVLChat(*parts, max_new_tokens=4), LIMITS)
    files = image_files(tmp_path, 3)
    turn = sessions.ask("a", PageQuestion("One?", files))
    with pytest.raises(Refusal, match="still being generated"):
        sessions.ask("a", PageQuestion("Two?", []))
    for act in (sessions.undo, sessions.ask_again):
        with pytest.raises(Refusal, match="still being generated"):
            act("a")
    assert turn.done.result(timeout=60)
    with pytest.raises(Refusal, match="may have 4 images; with this question it would have 6"):
        sessions.ask("a", PageQuestion("Two?", files))


def pixels(sessions: ChatSessions) -> int:
    """The memory of the decoded images of all conversations, in bytes."""
    gc.collect()
    kept = {id(image.im): 3 * image.width * image.height for image in _images(sessions)}
    return sum(kept.values())


def _images(sessions: ChatSessions) -> Iterator[Image.Image]:
    for conversation in sessions.conversations.values():
        for message in conversation.chat.messages:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if "image" in part:
                    yield part["image"]


def test_the_decoded_images_of_all_sessions_share_one_limit(parts: Any, tmp_path: Path) -> None:
    one = 3 * 80 * 60
    limits = replace(LIMITS, caches=16, memory_bytes=6 * one)
    sessions = ChatSessions(lambda: DSVLChat(*parts, max_new_tokens=4), limits)
    files = image_files(tmp_path, 3)
    whole = DSVLChat(*parts, max_new_tokens=4)
    first = [whole.ask("One?", files[:2]), whole.ask("And?", files[2])]
    for number in range(8):
        assert ask_and_wait(sessions, str(number), PageQuestion("One?", files[:2])) == first[0]
        assert pixels(sessions) <= (6 + 2) * one  # plus those of the last question
    assert len(sessions.conversations) == 8 and not sessions.get("0").cached
    assert ask_and_wait(sessions, "0", PageQuestion("And?", files[2:])) == first[1]  # decoded again from the files
    assert pixels(sessions) <= (6 + 3) * one
    assert len(sessions.get("0").turns) == 2


def test_decoded_images_are_kept_once(parts: Any, tmp_path: Path) -> None:
    sessions = ChatSessions(lambda: DSVLChat(*parts, max_new_tokens=4), LIMITS)
    (file,) = image_files(tmp_path, 1, (71, 53))
    ask_and_wait(sessions, "a", PageQuestion("One?", [file]))
    gc.collect()
    size = (71, 53)
    known = [image for image in gc.get_objects() if isinstance(image, Image.Image) and image.size == size]
    assert len({id(image.im) for image in known}) == 1
    sessions.leave("a")
    del known
    gc.collect()
    assert not [image for image in gc.get_objects() if isinstance(image, Image.Image) and image.size == size]


def test_a_deleted_file_is_named(parts: Any, tmp_path: Path) -> None:
    sessions = ChatSessions(lambda: DSVLChat(*parts, max_new_tokens=4), LIMITS)
    (file,) = image_files(tmp_path, 1)
    ask_and_wait(sessions, "a", PageQuestion("One?", [file]))
    sessions.leave("a")
    os.remove(file)
    with pytest.raises(Refusal, match="image 0.png is not stored any more; add it again"):
        sessions.ask("a", PageQuestion("Two?", [])).done.result(timeout=60)
    assert len(sessions.get("a").turns) == 1


def test_uploads_are_counted_outside_the_event_loop(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    size = request_filter.folder_bytes
    monkeypatch.setattr(
        request_filter, "folder_bytes", lambda folder: threads.append(threading.current_thread().name) or size(folder)
    )
    with opened(parts, examples=()) as (address, _), httpx.Client(base_url=address) as client:
        upload(client, *image_files(tmp_path, 1))
    assert threads and all("asyncio" in name for name in threads)  # a worker of asyncio.to_thread


@pytest.mark.parametrize("way", ["the page", "the stream"])
def test_a_visitor_who_leaves_frees_the_model(parts: Any, way: str) -> None:
    with opened(parts, max_new_tokens=1900) as (address, sessions), httpx.Client(base_url=address, timeout=30) as client:
        heartbeat = socket.create_connection((client.base_url.host, client.base_url.port))
        heartbeat.sendall(f"GET {API}/heartbeat/gone HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert b"200" in heartbeat.recv(1000)
        assert join(client, "gone", "ask", question("What?")).status_code == 200
        with client.stream("GET", f"{API}/queue/data", params={"session_hash": "gone"}) as stream:
            next(line for line in stream.iter_lines() if "process_generating" in line)
            if way == "the page":
                heartbeat.close()
                eventually(lambda: sessions.get("gone").pending is None)
        conversation = sessions.get("gone")
        eventually(lambda: conversation.pending is None)
        assert conversation.cached == (way == "the stream")
        heartbeat.close()
        eventually(lambda: not conversation.cached)
        assert len(conversation.chat.messages) == 2
        assert conversation.chat.processor.tokenizer(conversation.turns[0][1]).input_ids[1800:] == []


def endless(*_: Any, **__: Any) -> Iterator[str]:
    while True:
        time.sleep(0.01)
        yield "on "


def test_questions_wait_up_to_a_limit(parts: Any) -> None:
    waiting = 45  # more than Gradio runs events at once by default
    with (
        opened(parts, replace(LIMITS, waiting=waiting)) as (address, sessions),
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        sessions.get("0").chat.stream = endless  # type: ignore[method-assign,assignment]
        for number in range(waiting + 1):
            assert join(client, str(number), "ask", question(f"Number {number}?")).status_code == 200
            eventually(lambda: sessions.get(str(number)).pending is not None)  # noqa: B023
        assert "45 questions are waiting for an answer already" in response(client, "late", "ask", question("What?"))
        assert '"text":"Number 1?"' in response(client, "1", "stop")  # back in the box
        assert sessions.get("1").as_messages() == []
        response(client, "0", "stop")
        assert sessions.get("0").turns[0][1].startswith("on on ")
        eventually(lambda: len(sessions.get("2").turns) == 1)


def test_environment_variables_do_not_open_the_page(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "SHARE": "True",
        "SERVER_NAME": "0.0.0.0",
        "ALLOWED_PATHS": "/etc",
        "MCP_SERVER": "True",
        "NUM_WORKERS": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"GRADIO_{name}", value)
    with opened(parts) as (address, _):
        port = int(address.rpartition(":")[2])
        assert address == f"http://127.0.0.1:{port}"
        assert httpx.get(f"{address}{API}/file=/etc/hostname").status_code == 404
        for other in (("127.0.0.2", port), ("127.0.0.1", port + 1)):
            with pytest.raises(OSError):
                socket.create_connection(other, 2)


def test_a_port_in_use_is_named(parts: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(OSError, match=f"Cannot listen on port {port} of 127.0.0.1: .* choose another"),
            open_page(*parts, "tiny", port=port),
        ):
            pass


def test_examples_are_the_first_questions_of_conversations(tmp_path: Path) -> None:
    data = make_conversations(tmp_path, layout="ptp")
    examples = read_examples(data)
    assert [len(images) for _, images in examples] == [1, 0, 1]
    assert all(text.endswith("?") for text, _ in examples)


@pytest.mark.parametrize(("command", "add_parser"), [("demo", page_parser), ("serve", serve_parser)])
def test_the_flag_of_version_0_1_is_accepted_with_a_warning(command, add_parser, checkpoint: Path, caplog) -> None:
    parser = argparse.ArgumentParser(prog="dsvl")
    add_parser(parser.add_subparsers())
    assert parser.parse_args([command, str(checkpoint)]).max_images == 8
    assert parser.parse_args([command, str(checkpoint), "--max-images", "3"]).max_images == 3
    assert not caplog.records
    assert parser.parse_args([command, str(checkpoint), "--max-pictures", "3"]).max_images == 3
    assert "--max-pictures is deprecated" in caplog.text and "use --max-images" in caplog.text


def test_text_is_displayed_literally() -> None:
    assert escape('a < b & <img src="http://x">') == 'a &lt; b &amp; &lt;img src="http://x"&gt;'


@pytest.mark.parametrize("way", ["command", pytest.param("space", marks=pytest.mark.slow)])
def test_the_page_starts_and_ends(checkpoint: Path, tmp_path: Path, way: str) -> None:
    """`dsvl demo`, and a Space's copy of the file, in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = environment() | {"DSVL_MODEL": str(checkpoint), "GRADIO_SERVER_PORT": str(port)}
    command = [sys.executable, "-m", "dsvl.cli", "demo", str(checkpoint), "--port", str(port), "--device", "cpu"]
    if way == "space":
        copy = tmp_path / "app.py"
        copy.write_text((Path(dsvl.__file__).parent / "page" / "app.py").read_text())
        variables |= {"SYSTEM": "spaces", "SPACE_ID": "me/talk"}
        command = [sys.executable, str(copy)]
    process = subprocess.Popen(
        command, env=variables, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def up() -> bool:
        assert process.poll() is None, process.communicate()[0]
        try:
            return httpx.get(f"http://127.0.0.1:{port}/", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        eventually(up, seconds=90)
        assert process.stdout is not None
        if way == "command":
            assert f"dsvl demo: http://127.0.0.1:{port}/; Ctrl-C ends it\n" in iter(process.stdout.readline, "")
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0 and "Traceback" not in process.stdout.read()
    finally:
        process.kill()
        process.communicate()
