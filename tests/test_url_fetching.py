"""Fetching URLs of untrusted users: only public addresses, with redirects, DNS rebinding and slow servers."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsvl.serving.images import fetch_images
from dsvl.serving.requests import RequestError, RequestLimits
from dsvl.utils import url_fetching
from dsvl.utils.url_fetching import FetchError, fetch_url, is_public


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.8.8", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
    + [
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
    ]
    + ["ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::1"]
    + ["2002:7f00:1::", "2002:a00:1::", "2002:808:808::", "2001:0:7f00:1::"],
)
def test_private_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_addresses_of_the_internet_are_public() -> None:
    public = ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
    assert all(map(is_public, public))


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.com/a",
        "http://",
        "http://me:secret@example.com/a",
        "gopher://x",
        "//x/a",
        "http://[::1",
        "http:///a.png",
        "http://example.com:99999/",
    ]
    + ["http://127.0.0.1/a", "http://localhost/a", "http://2130706433/a", "http://0x7f.1/a", "http://[::1]/a"],
)
def test_urls_that_are_refused(url: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(url_fetching.socket, "socket", lambda *arguments: pytest.fail("it was connected to"))
    with pytest.raises(FetchError):
        fetch_url(url, 1000)


class Site:
    """A server that counts requests and answers them with the given function."""

    def __init__(self, serve: Callable[[Any, str], None], tls: ssl.SSLContext | None = None) -> None:
        self.serve, self.tls = serve, tls
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.visits: list[str] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):  # the client disconnected
                if self.tls is not None:
                    connection = self.tls.wrap_socket(connection, server_side=True)
                path = connection.recv(65536).split()[1].decode()
                self.visits.append(path)
                self.serve(connection, path)
                if self.tls is not None:
                    connection.close()


@pytest.fixture
def site(monkeypatch: Any) -> Iterator[Callable[..., Site]]:
    """Servers on a loopback address that counts as public, with the name site.example."""
    sites: list[Site] = []
    resolve = socket.getaddrinfo

    def lookup(host: str, port: int, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == "site.example" else host, port, *arguments, **options)

    monkeypatch.setattr(url_fetching.socket, "getaddrinfo", lookup)
    known = url_fetching.is_public
    monkeypatch.setattr(url_fetching, "is_public", lambda address: address == "127.0.0.1" or known(address))

    def start(serve: Callable[[Any, str], None], tls: ssl.SSLContext | None = None) -> Site:
        sites.append(Site(serve, tls))
        return sites[-1]

    yield start
    for one in sites:
        one.listener.close()


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


def test_a_public_url_is_fetched(site: Callable[..., Site]) -> None:
    def serve(connection: socket.socket, path: str) -> None:
        onward = answer(b"", "302 Found", "Location: /image?a=1")
        connection.sendall(onward if path == "/" else answer(b"pixels"))

    one = site(serve)
    assert fetch_url(f"http://site.example:{one.port}/", 1000) == b"pixels"
    assert one.visits == ["/", "/image?a=1"]


def test_images_are_fetched_if_that_is_allowed_and_together_within_the_limits(site: Callable[..., Site]) -> None:
    one = site(lambda connection, path: connection.sendall(answer(b"x" * 600)))

    def messages(count: int) -> list[dict[str, Any]]:
        return [{"content": [{"type": "image", "url": f"http://site.example:{one.port}/"} for _ in range(count)]}]

    with pytest.raises(RequestError, match=r"Image 1 is an http\(s\) URL, which this server does not download"):
        fetch_images(messages(1), RequestLimits())
    assert not one.visits
    asked = messages(1)
    fetch_images(asked, RequestLimits(allow_urls=True, body_bytes=1000))
    assert asked[0]["content"][0]["url"] == b"x" * 600
    with pytest.raises(RequestError, match="Image 2 was not fetched: it is larger than 400 bytes"):
        fetch_images(messages(2), RequestLimits(allow_urls=True, body_bytes=1000))


def test_redirects_are_checked_like_the_first_url(site: Callable[..., Site]) -> None:
    inner = site(lambda connection, path: connection.sendall(answer(b"secret")))
    for target in (f"http://127.0.0.2:{inner.port}/", "file:///etc/passwd", f"http://[::ffff:127.0.0.2]:{inner.port}/"):
        outer = site(lambda connection, path, target=target: connection.sendall(answer(b"", "307 x", f"Location: {target}")))
        with pytest.raises(FetchError):
            fetch_url(f"http://site.example:{outer.port}/", 1000)
        assert outer.visits and not inner.visits
    endless = site(lambda connection, path: connection.sendall(answer(b"", "301 x", "Location: /again")))
    with pytest.raises(FetchError, match="more than 5 times"):
        fetch_url(f"http://site.example:{endless.port}/", 1000)
    assert len(endless.visits) == 6


def test_a_name_with_one_private_address_is_refused(site: Callable[..., Site], monkeypatch: Any) -> None:
    one = site(lambda connection, path: connection.sendall(answer(b"secret")))
    entries = [(2, 1, 6, "", ("127.0.0.1", one.port)), (2, 1, 6, "", ("10.0.0.1", one.port))]
    monkeypatch.setattr(url_fetching.socket, "getaddrinfo", lambda *arguments, **options: entries)
    with pytest.raises(FetchError):
        fetch_url(f"http://site.example:{one.port}/", 1000)
    assert not one.visits


def test_size_and_time_are_bounded(site: Callable[..., Site]) -> None:
    large = site(lambda connection, path: connection.sendall(answer(b"x" * 3000)))
    with pytest.raises(FetchError, match="larger than 2,000 bytes"):
        fetch_url(f"http://site.example:{large.port}/", 2000)

    def drip(connection: socket.socket, path: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for _ in range(1000):  # never silent for long
            connection.sendall(b"X-More: x\r\n")
            time.sleep(0.05)

    def drip_body(connection: socket.socket, path: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(1000):
            connection.sendall(b"x")
            time.sleep(0.05)

    for serve in (drip, drip_body):
        slow = site(serve)
        begun = time.monotonic()
        with pytest.raises(FetchError):
            fetch_url(f"http://site.example:{slow.port}/", 1000, seconds=0.4)
        assert time.monotonic() - begun < 10


def test_errors_reveal_nothing_about_the_local_network(site: Callable[..., Site]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = []
    for url in (f"http://site.example:{port}/", "http://10.0.0.1/", "http://no.such.name.invalid/"):
        with pytest.raises(FetchError) as refused:
            fetch_url(url, 1000)
        said.append(str(refused.value))
    assert len(set(said)) == 1


def test_name_resolution_is_bounded_too(monkeypatch: Any) -> None:
    done = threading.Event()
    monkeypatch.setattr(url_fetching.socket, "getaddrinfo", lambda *arguments, **options: done.wait(60))
    begun = time.monotonic()
    with pytest.raises(FetchError, match="too long"):
        fetch_url("http://slow.example/", 1000, seconds=0.2)
    assert time.monotonic() - begun < 10
    done.set()


def test_every_address_of_a_name_is_tried(site: Callable[..., Site], monkeypatch: Any) -> None:
    one = site(lambda connection, path: connection.sendall(answer(b"pixels")))
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = free.getsockname()[1]
    entries = [(2, 1, 6, "", ("127.0.0.1", port)) for port in (closed, one.port)]
    monkeypatch.setattr(url_fetching.socket, "getaddrinfo", lambda *arguments, **options: entries)
    assert fetch_url("http://site.example/", 1000) == b"pixels"


def test_truncated_and_missing_files_are_errors(site: Callable[..., Site]) -> None:
    cut = site(lambda connection, path: connection.sendall(answer(b"pixels")[:-1]))
    with pytest.raises(FetchError, match="broke off"):
        fetch_url(f"http://site.example:{cut.port}/", 1000)
    missing = site(lambda connection, path: connection.sendall(answer(b"pixels", "404 Not Found")))
    with pytest.raises(FetchError, match="status 404"):
        fetch_url(f"http://site.example:{missing.port}/", 1000)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate by openssl")
def test_a_certificate_is_checked_against_the_name_in_the_url(
    site: Callable[..., Site], tmp_path: Path, monkeypatch: Any
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=site.example", "-addext", "subjectAltName=DNS:site.example", "-days", "2"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make, *subject], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve(connection: ssl.SSLSocket, path: str) -> None:
        connection.sendall(answer(b"pixels"))

    one = site(serve, context)
    with pytest.raises(FetchError, match="certificate is not valid"):
        fetch_url(f"https://site.example:{one.port}/", 1000)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # now it is trusted
    assert fetch_url(f"https://site.example:{one.port}/", 1000) == b"pixels"
    with pytest.raises(FetchError, match="certificate is not valid"):
        fetch_url(f"https://127.0.0.1:{one.port}/", 1000)
