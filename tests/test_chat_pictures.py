"""What a conversation opens and fetches: within bounds, and nothing that was not asked for."""

import io
import shutil
import ssl
import struct
import subprocess
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from dsvl.chat import addresses
from dsvl.chat.addresses import fetch, is_public
from dsvl.chat.pictures import open_picture

PICTURE = Image.fromarray(np.arange(75, dtype=np.uint8).reshape(5, 5, 3))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims to be side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_pictures_come_from_paths_bytes_arrays_and_pil(tmp_path):
    file = tmp_path / "one two.png"
    PICTURE.save(file)
    for source in (PICTURE, file, str(file), png(PICTURE), np.asarray(PICTURE)):
        assert open_picture(source).tobytes() == PICTURE.tobytes()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_440, 30_000, 2_000_000_000])  # just above the bound; what Pillow warns of; refuses
def test_decompression_bombs_are_refused_before_they_are_decoded(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"the largest that is opened has 89,000,000|is refused"):
        open_picture(bomb(side))


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")  # Pillow starts a program
    with pytest.raises(ValueError, match="is none of PNG, JPEG"):
        open_picture(tmp_path / "page.eps")
    with pytest.raises(ValueError, match="does not exist, or is no file"):
        open_picture("/dev/zero")
    with pytest.raises(ValueError, match=r"missing.png does not exist"):
        open_picture(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="not int"):
        open_picture(7)
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="1,073,741,824 bytes"):
        open_picture(tmp_path / "large.png")


@pytest.mark.parametrize("address", ["http://example.org/a.png", "file:///etc/passwd", "ftp://example.org/a.png"])
def test_no_address_is_fetched_unless_asked(address, monkeypatch):
    monkeypatch.setattr(addresses, "_public_socket", lambda *args: pytest.fail("a connection was made"))
    with pytest.raises(ValueError, match="fetching is not allowed here"):
        open_picture(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "127.8.8.8",
        "169.254.169.254",
        "172.16.0.1",
        "192.168.1.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
        "2002:a00:1::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
        "ff02::1",
    ],
)
def test_addresses_of_inner_networks_are_not_public(address):
    assert not is_public(address)


def test_addresses_of_the_internet_are_public():
    assert all(map(is_public, ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]))


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        name, _, to = self.path[1:].partition("?to=")
        if name == "moved":
            self.send_response(302)
            self.send_header("Location", to)
            self.end_headers()
        elif name == "picture.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(PICTURE))
        elif name == "endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(2**16))
            except OSError:
                pass
        elif name == "trickle":
            try:
                self.wfile.write(b"HTTP/1.0 200 OK\r\n")
                while True:
                    self.wfile.write(b"X: y\r\n")
                    time.sleep(0.1)
            except OSError:
                pass
        else:
            self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch):
    """A server on 127.0.0.1, which passes for public here; 127.0.0.2 does not."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def at(site: ThreadingHTTPServer, path: str, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{site.server_address[1]}/{path}"


def test_an_address_is_fetched_where_that_is_asked_for(site):
    moved = at(site, "moved?to=" + at(site, "moved?to=/picture.png"))
    for address in (at(site, "picture.png"), moved):
        assert open_picture(address, allow_urls=True).tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize(
    "to", ["file:///etc/passwd", "http://127.0.0.2:{port}/picture.png", "gopher://127.0.0.1/", "//127.0.0.2/"]
)
def test_a_redirection_is_checked_as_the_address_is(site, to):
    to = to.format(port=site.server_address[1])
    with pytest.raises(ValueError, match=r"not on the public internet|not a plain http|cannot be fetched"):
        fetch(at(site, f"moved?to={to}"), 1000)
    assert len(site.asked) == 1


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("endless", "more than 100,000 bytes"),
        ("moved?to=/missing", "answers 404"),
        ("trickle", "did not come within 1 seconds"),
    ],
)
def test_what_is_fetched_is_bounded(site, path, reason):
    began = time.monotonic()
    with pytest.raises(ValueError, match=reason):
        fetch(at(site, path), 100_000, seconds=1)
    assert time.monotonic() - began < 5


def test_endless_redirections_end(site, monkeypatch):
    monkeypatch.setattr(addresses, "urljoin", lambda url, location: url)
    with pytest.raises(ValueError, match="more than 5 redirections"):
        fetch(at(site, "moved?to=/"), 1000)
    assert len(site.asked) == 6


@pytest.mark.parametrize(
    "url", ["http://user:password@127.0.0.1/a.png", "http:///a.png", "https://127.0.0.2/", "http://[::1]/"]
)
def test_addresses_that_are_refused(site, url):
    with pytest.raises(ValueError, match="cannot be fetched"):
        fetch(url, 1000)
    assert not site.asked


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate by openssl")
def test_a_certificate_is_checked_against_the_address_that_was_typed(site, tmp_path, monkeypatch):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make, *subject], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site.socket = context.wrap_socket(site.socket, server_side=True)
    monkeypatch.setattr(addresses, "is_public", lambda address: address in ("127.0.0.1", "::1"))
    port = site.server_address[1]
    with pytest.raises(ValueError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(f"https://localhost:{port}/picture.png", 1000)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # now somebody vouches for it
    assert fetch(f"https://localhost:{port}/picture.png", 1000) == png(PICTURE)
    with pytest.raises(ValueError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(f"https://127.0.0.1:{port}/picture.png", 1000)
