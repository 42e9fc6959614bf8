"""Loading images from untrusted sources: bounds, formats and URLs."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dsvl.utils import image_loading
from dsvl.utils.image_loading import ImageReadError, decode_image_file, open_image
from dsvl.utils.url_fetching import FetchError

IMAGE = Image.fromarray(np.arange(75, dtype=np.uint8).reshape(5, 5, 3))


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


def test_images_come_from_paths_bytes_arrays_and_pil(tmp_path):
    file = tmp_path / "one two.png"
    IMAGE.save(file)
    for source in (IMAGE, file, str(file), png(IMAGE), np.asarray(IMAGE)):
        assert open_image(source).tobytes() == IMAGE.tobytes()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_440, 30_000, 2_000_000_000])  # just above the bound; what Pillow warns of; refuses
def test_decompression_bombs_are_refused_before_they_are_decoded(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="at most 89,000,000 are taken"):
        open_image(bomb(side))


def test_a_smaller_bound_can_be_set():
    assert open_image(IMAGE, max_pixels=25) is IMAGE
    for source in (IMAGE, png(IMAGE)):
        with pytest.raises(ValueError, match="5 x 5 pixels; at most 24"):
            open_image(source, max_pixels=24)
    with pytest.raises(ImageReadError, match="pass one of JPEG, GIF"):
        decode_image_file(png(IMAGE), formats=("JPEG", "GIF"))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")  # Pillow starts a program
    with pytest.raises(ValueError, match=r"page.eps cannot be read: its format is EPS; pass one of PNG, JPEG"):
        open_image(tmp_path / "page.eps")
    (tmp_path / "cut.png").write_bytes(png(IMAGE)[:48])
    with pytest.raises(ValueError, match=r"cut.png cannot be decoded"):
        open_image(tmp_path / "cut.png")
    with pytest.raises(ValueError, match="does not exist, or is not a file"):
        open_image("/dev/zero")
    with pytest.raises(ValueError, match=r"missing.png does not exist"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="of type int"):
        open_image(7)
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="1,073,741,824 bytes"):
        open_image(tmp_path / "large.png")


@pytest.mark.parametrize("url", ["http://example.org/a.png", "file:///etc/passwd", "ftp://example.org/a.png"])
def test_urls_are_not_fetched_by_default(url, monkeypatch):
    monkeypatch.setattr(image_loading, "fetch_url", lambda *args: pytest.fail("it was fetched"))
    with pytest.raises(ValueError, match="fetching is not allowed here"):
        open_image(url)


def test_urls_are_fetched_if_allowed(monkeypatch):
    def fetch(url: str, max_bytes: int) -> bytes:
        assert max_bytes == image_loading.MAX_BYTES
        if url != "https://example.org/a.png":
            raise FetchError("it took too long")
        return png(IMAGE)

    monkeypatch.setattr(image_loading, "fetch_url", fetch)
    assert open_image("https://example.org/a.png", allow_urls=True).tobytes() == IMAGE.tobytes()
    with pytest.raises(ValueError, match=r"The image http://slow.org/ was not fetched: it took too long\."):
        open_image("http://slow.org/", allow_urls=True)
