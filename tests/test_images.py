"""An image reads the same however it is given, and takes no more memory than its size limit allows."""

import base64
import io
import struct
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REFERENCE
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

from dsvl import DSVLProcessor
from dsvl.image_reading_dsvl import FORMATS, RESIZED_PIXELS, ImageError, fit_thin_image, image_size, read_image
from dsvl.processing_dsvl import decode_picture

RED = Image.new("RGB", (40, 30), (200, 30, 30))
COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
GREYS = np.linspace(0, 65535, 120).reshape(10, 12).astype(np.uint16)


def file_bytes(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey_tiff(values: np.ndarray, order: str, bits: int) -> bytes:
    """An uncompressed TIFF; 12 bits are packed, two values into three bytes."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2)
        data = b"".join(((int(a) << 12) | int(b)).to_bytes(3, "big") for a, b in pairs)
    else:
        data = values.astype(f"{order}u2").tobytes()

    def tag(name: int, value: int) -> bytes:
        kind, packed = (4, "I") if name in (273, 279) else (3, "H2x")
        return struct.pack(f"{order}HHI{packed}", name, kind, 1, value)

    values_of = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 110, 278: height, 279: len(data)}
    tags = b"".join(tag(name, value) for name, value in values_of.items())
    start = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return start + struct.pack(f"{order}IH", 8, len(values_of)) + tags + bytes(4) + data


def pixels(source, **options) -> list:
    image = read_image(source, **options)
    assert image.mode == "RGB" and image.getexif().get(274, 1) == 1
    return np.asarray(image).tolist()


@pytest.fixture(scope="module")
def processor():
    side = {"height": 28, "width": 28}
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "tokenizer")
    return DSVLProcessor(CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side), tokenizer, image_seq_length=5)


@pytest.fixture(scope="module")
def px(processor):
    return lambda image: processor(text="<image> x", images=image, return_tensors="pt")["pixel_values"]


# -- what it is given as -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """A web server on the loopback address: /a.png is an image, /a.eps a program's, all else is not there."""
    answers = {"/a.png": file_bytes(COLOURS), "/a.eps": file_bytes(COLOURS, "EPS")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = answers.get(self.path)
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body or b"no such thing")

        def log_message(self, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_an_image_is_a_file_in_any_form_text_or_an_array(tmp_path, server, monkeypatch, px):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path = tmp_path / "a b.png"
    COLOURS.save(path)
    data = path.read_bytes()
    text = base64.encodebytes(data).decode()  # with ends of lines
    array = np.asarray(COLOURS)
    sources = [COLOURS, Image.open(path), path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data)]
    sources += [{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"bytes": data, "path": "gone.png"}]
    sources += [path.as_uri(), f"{server}/a.png", text, f"data:image/png;base64,{text}", f"DATA:;base64,{text}"]
    sources += [array, torch.from_numpy(array.copy()), array.transpose(2, 0, 1), array[:, ::-1][:, ::-1]]
    expected = px(COLOURS)
    for source in sources:
        assert pixels(source) == array.tolist(), source
        assert px(source).equal(expected), source
    with path.open("rb") as file:  # a file can be read twice
        assert pixels(file) == pixels(file) == array.tolist()


def test_the_former_name_still_reads():
    with pytest.warns(DeprecationWarning, match="use read_image"):
        assert decode_picture(COLOURS).tobytes() == COLOURS.tobytes()


def test_several_images_keep_their_samples(processor, px):
    array, grey = np.asarray(COLOURS), np.asarray(COLOURS.convert("L"))
    stacked = processor(text="<image> and <image>", images=np.stack([array, array[::-1]]), return_tensors="pt")
    assert stacked["pixel_values"].equal(torch.cat([px(array), px(array[::-1])]))
    for images in ([grey, array, COLOURS], [[grey], [array, COLOURS]], [np.stack([grey] * 3)[:1], array, COLOURS]):
        texts = ["<image>", "<image> <image>"] if isinstance(images[0], list) else "<image> <image> <image>"
        together = processor(text=texts, images=images, return_tensors="pt", padding=True)["pixel_values"]
        assert together.equal(torch.cat([px(grey), px(array), px(array)]))


def test_what_is_no_image_is_refused_by_name(tmp_path, server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "words.txt").write_text("words, and no image")
    data = file_bytes(COLOURS)
    data_url = f"data:image/png;base64,{base64.b64encode(data[:60]).decode()}"
    with (tmp_path / "words.txt").open() as file:
        for source, reason in (
            (7, "of type int; pass a PIL image"),
            (None, "of type NoneType"),
            (file, "text file; pass"),
            ("gone.png", "image gone.png cannot be decoded: it is not a file"),
            (tmp_path / "gone.png", "gone.png cannot be decoded: it does not exist"),
            (tmp_path, "it does not exist, or is not a file"),
            ("", "it is not a file"),
            ({}, "neither bytes nor a path"),
            ({"bytes": data, "name": "x"}, "got name"),
            ({"path": "gone.png"}, "image gone.png cannot .* it does not exist|it is not a file"),
            (b"", "of 0 bytes cannot be decoded: cannot identify its format; pass one of PNG, JPEG"),
            (tmp_path / "words.txt", "words.txt cannot be decoded: cannot identify its format"),
            (data[:100], "cut or broken"),
            (data_url, "given as 102 characters cannot be decoded"),
            ("data:image/png,abc", "not a base64 data URL"),
            ("data:image/png;base64,????", "base64 is not valid"),
            (f"{server}/gone.png", "gone.png cannot be decoded: it was not fetched .*404"),
            (f"{server}/a.eps", "its format is EPS"),
        ):
            with pytest.raises(ImageError, match=reason) as refused:
                read_image(source)
            assert len(str(refused.value)) < 500
    for address in (f"{server}/a.png", "file:///etc/hostname"):
        with pytest.raises(ImageError, match="not allowed here"):
            read_image(address, allow_urls=False)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_the_formats_of_the_list_are_read(form, tmp_path):
    if form not in Image.SAVE and not Image.init() and form not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {form}")
    path = tmp_path / "image"
    path.write_bytes(file_bytes(RED, form))
    assert np.abs(np.asarray(read_image(path)).astype(int) - (200, 30, 30)).max() < 5
    assert image_size(path) == (40, 30) and form in FORMATS


@pytest.mark.parametrize("form", ["EPS", "TGA", "ICO", "JPEG2000", "PCX", "PDF"])
def test_other_formats_are_refused_and_start_nothing(form, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    path = tmp_path / f"image.{form}"
    path.write_bytes(file_bytes(RED, form))
    expected = {"EPS": "its format is EPS", "JPEG2000": "its format is JPEG2000", "ICO": "its format is ICO"}
    reason = f"image.{form} cannot be decoded: .*{expected.get(form, '')}.*; pass one of PNG, JPEG, MPO, WEBP"
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=reason):
            read(path)
    if form == "PDF":
        return
    opened = Image.open(path)
    if form != "ICO":  # which Pillow decodes by its readers of PNG and BMP
        with pytest.raises(ImageError, match=f"its format is {form}; pass one of"):
            read_image(opened)
    if form != "EPS":  # what the caller has decoded is pixels
        opened.load()
        assert read_image(opened).mode == "RGB"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(form, orientation):
    """The corners of a photograph, which was taken with the camera in any position."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    image = Image.fromarray(upright)
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposition that undoes it
    stored = image if orientation == 1 else image.transpose(Image.Transpose(turned[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    data = file_bytes(stored, form, exif=exif, **options)
    read = read_image(data)
    assert read.size == (48, 32) and np.abs(np.asarray(read).astype(int) - upright).max() < 40
    assert pixels(read) == pixels(Image.open(io.BytesIO(data))) == np.asarray(read).tolist()  # and are not turned again


def transparent(mode: str) -> Image.Image:
    """Red, or grey, on the left; transparent black on the right."""
    image = Image.new("RGBA", (10, 6))
    image.paste((200, 30, 30, 255), (0, 0, 5, 6))
    return image.quantize() if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode):
    image = transparent(mode)
    colour = list(image.convert("RGBA").getpixel((0, 0))[:3])
    expected = [[colour] * 5 + [[255] * 3] * 5] * 6
    for source in (image, file_bytes(image), file_bytes(image, "WEBP", lossless=True)):
        assert pixels(source) == expected
    if mode != "P":
        array = np.asarray(image)
        for source in (file_bytes(image, "TIFF"), array, array.transpose(2, 0, 1), array / 255, torch.tensor(array)):
            assert pixels(source) == expected
        assert pixels(image.convert(mode[:-1] + "a")) == expected  # premultiplied


def test_half_transparency_mixes_with_white():
    image = transparent("RGBA")
    image.putalpha(128)
    for source in (image, file_bytes(image), np.asarray(image), np.asarray(image) / 255):
        assert pixels(source)[0][0] == [227, 142, 142] and pixels(source)[0][9] == [127] * 3


def test_a_transparent_colour_lies_on_white():
    assert pixels(file_bytes(Image.new("RGB", (2, 1), (9, 8, 7)), transparency=(9, 8, 7))) == [[[255] * 3] * 2]
    greys = Image.fromarray(np.array([[300, 65535]], np.uint16))
    assert pixels(file_bytes(greys, transparency=300)) == [[[255] * 3] * 2]
    assert pixels(file_bytes(greys)) == [[[1] * 3, [255] * 3]]


def test_modes_of_other_colours():
    for mode in ("CMYK", "YCbCr", "HSV", "LAB", "RGBX", "1", "L"):
        white = Image.new("RGB", (3, 2), "white")
        assert np.asarray(read_image(white.convert(mode))).min() >= 250, mode
    for form in ("JPEG", "TIFF"):
        read = read_image(file_bytes(RED.convert("CMYK"), form))
        assert np.abs(np.asarray(read).astype(int) - (200, 30, 30)).max() < 8
    assert pixels(file_bytes(COLOURS.quantize(64))) == pixels(COLOURS.quantize(64).convert("RGB"))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_shows_its_first_frame(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = file_bytes(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert pixels(data) == pixels(frames[0])


# -- grey levels -------------------------------------------------------------------------------------------------------


def test_sixteen_bits_in_any_order(px):
    expected = (GREYS // 257)[..., None].repeat(3, -1).tolist()
    sources = {"png": file_bytes(Image.fromarray(GREYS)), "array": GREYS, "int32": GREYS.astype(np.int32)}
    sources |= {order: grey_tiff(GREYS, order, 16) for order in "<>"}
    sources |= {"swapped array": GREYS.astype(">u2"), "tensor": torch.from_numpy(GREYS.astype(np.int64))}
    sources |= {"pgm": b"P5 12 10 65535\n" + GREYS.astype(">u2").tobytes()}
    sources |= {mode: Image.frombytes(mode, (12, 10), GREYS.astype(f"{order}u2").tobytes()) for mode, order in
                (("I;16", "<"), ("I;16B", ">"), ("I;16L", "<"))}  # fmt: skip
    assert Image.open(io.BytesIO(sources[">"])).mode == "I;16B"
    for name, source in sources.items():
        assert pixels(source) == expected, name
        assert px(source).equal(px(sources["png"])), name
    dark = np.full((2, 2), 40, np.uint16)  # black, whatever its largest value is
    assert np.asarray(read_image(file_bytes(Image.fromarray(dark)))).max() == 0 == np.asarray(read_image(dark)).max()


def test_twelve_bits_of_a_tiff():
    greys = np.array([[0, 4095], [2048, 16]])
    data = grey_tiff(greys, "<", 12)
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    assert np.asarray(read_image(data))[..., 0].tolist() == (greys * 255 // 4095).tolist()


def test_floats_and_wide_integers_are_told_by_their_range(tmp_path, px):
    ramp = np.linspace(0, 1, 1200, dtype="float32").reshape(30, 40)
    Image.fromarray(ramp).save(tmp_path / "f.tif")
    assert px(tmp_path / "f.tif").equal(px(Image.fromarray(np.rint(ramp * 255).astype("uint8"))))
    assert px(tmp_path / "f.tif").amax() - px(tmp_path / "f.tif").amin() > 3.7
    levels = np.arange(1200, dtype="int32").reshape(30, 40) // 5
    Image.fromarray(levels).save(tmp_path / "i.tif")
    for source in (levels, levels.astype("uint8"), levels.astype("float64"), torch.from_numpy(levels).bfloat16()):
        assert px(source).equal(px(tmp_path / "i.tif"))
    wide = np.rint(ramp * 65535).astype("int64")
    for source in (ramp, ramp.astype("float16"), torch.from_numpy(ramp), ramp * 255, wide, torch.from_numpy(wide)):
        assert np.abs(np.asarray(read_image(source)).astype(int) - np.asarray(read_image(tmp_path / "f.tif"))).max() <= 1
    assert (px(np.asarray(RED) / 255.0) - px(RED)).abs().max() < 0.02
    assert pixels(np.array([[-0.001, 1.001]])) == [[[0] * 3, [255] * 3]]  # an interpolation's rounding
    assert pixels(np.array([[False, True]])) == [[[0] * 3, [255] * 3]]
    assert pixels(np.zeros((1, 1))) == pixels(np.zeros((1, 1), bool)) == [[[0] * 3]]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0.0, 1.5]]), "between 0 and 1.5"),
        (np.array([[-1.0, 1.0]]), "between -1 and 1.* as image_features="),
        (np.array([[0.0, 256.0]]), "between 0 and 256"),
        (np.array([[0.5, np.nan]]), "nan"),
        (np.array([[0.5, np.inf]]), "inf"),
        (np.array([[-1, 5]]), "between -1 and 5"),
        (np.array([[0, 70000]]), "between 0 and 70000"),
        (np.array([[1j]]), "complex128"),
        (np.array([["a"]]), "type <U1"),
        (np.array([[None]], object), "type object"),
        (np.full((5, 5, 4), [200.0, 30, 30, 1]), "up to 200 and its alpha to 1"),
        (np.zeros(7), "1 dimensions"),
        (np.float32(1), "0 dimensions"),
        (np.zeros((2, 5, 5, 3)), "4 dimensions"),
        (np.zeros((6, 5, 5)), r"shape \(6, 5, 5\) has no channels"),
        (np.zeros((5, 6, 7)), r"shape \(5, 6, 7\) has no channels"),
        (np.zeros((3, 9, 4)), r"shape \(3, 9, 4\) may have its channels first or last; pass input_data_format"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0 pixels"),
        (np.zeros((4, 0)), "0 x 4 pixels"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused(values, reason, px):
    with pytest.raises(ImageError, match=reason):
        read_image(values)
    if np.ndim(values) != 4:  # which are several images
        with pytest.raises(ValueError, match=reason):
            px(values)


def test_layouts_are_told_by_the_call_where_the_shape_does_not(processor):
    array = np.random.default_rng(1).integers(0, 256, (3, 9, 4), dtype=np.uint8)
    first = processor(images=array, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
    assert first.equal(processor(images=array.transpose(1, 2, 0), return_tensors="pt")["pixel_values"])
    last = processor(images=array, images_kwargs={"input_data_format": "channels_last"}, return_tensors="pt")["pixel_values"]
    assert not last.equal(first)
    with pytest.raises(ValueError, match="input_data_format='HWC' is not known"):
        read_image(array, input_data_format="HWC")
    with pytest.raises(ValueError, match="leave do_rescale=False out"):
        processor(images=np.asarray(RED) / 255.0, do_rescale=False)


TYPES = {
    "bool": lambda levels: levels > 127,
    "uint8": lambda levels: levels,
    "uint16": lambda levels: levels.astype(np.uint16) * 257,
    "int32": lambda levels: levels.astype(np.int32),
    "int64 of 16 bits": lambda levels: levels.astype(np.int64) * 257,
    "float of 1": lambda levels: levels / 255,
    "half of 1": lambda levels: (levels / 255).astype(np.float16),
    "float of 255": lambda levels: levels.astype(np.float32),
}


@given(
    data=st.data(),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    channels=st.sampled_from([None, 1, 2, 3, 4]),
    kind=st.sampled_from(sorted(TYPES)),
    first=st.booleans(),
    tensor=st.booleans(),
    order=st.sampled_from(["C", "F"]),
)
def test_levels_come_through_any_type_shape_and_layout(data, height, width, channels, kind, first, tensor, order):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    levels = rng.integers(0, 256, (height, width, channels or 1), dtype=np.uint8)
    levels.flat[0], levels.flat[-1] = 255, 255  # what the range is told by, of colours and alpha
    shown = np.where(levels > 127, 255, 0) if kind == "bool" else levels.astype(int)
    colours = shown[..., :3] if channels in (3, 4) else shown[..., :1].repeat(3, -1)
    alpha = shown[..., -1:] if channels in (2, 4) else 255
    expected = (colours * alpha + 255 * (255 - alpha)) / 255
    source = TYPES[kind](levels)
    source = source[..., 0] if channels is None else source.transpose(2, 0, 1) if first else source
    source = np.asarray(source, order=order)
    layout = None if channels is None else "channels_first" if first else "channels_last"
    given_as = torch.from_numpy(source) if tensor and source.dtype != np.uint16 else source
    read = np.asarray(read_image(given_as, input_data_format=layout))
    assert np.abs(read - expected).max() <= 1
    try:
        told = np.asarray(read_image(given_as))
    except ImageError as error:  # told by the shape alone, or refused
        assert "channels first or last" in str(error)
    else:
        assert np.array_equal(told, read) or (channels in (1, 2) and {source.shape[0], source.shape[-1]} & {3, 4})


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_damaged_files_are_read_or_refused(form):
    exif = Image.Exif()
    exif[274] = 6
    whole = file_bytes(COLOURS, form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            data[place] = rng.integers(0, 256)
        data = bytes(data[: rng.integers(1, len(data))]) if rng.random() < 0.2 else bytes(data)
        try:
            assert read_image(data, max_pixels=10**6).mode == "RGB"
        except ImageError as error:
            refused += 1
            assert "cannot be decoded" in str(error) and len(str(error)) < 500
    assert refused


# -- features ----------------------------------------------------------------------------------------------------------


def test_features_have_an_input_of_their_own(processor):
    features = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    texts = ["<image> a <image>", "<image>"]
    for given_as in (features, list(features), [[features[0], features[1]], [features[2]]], [features[:2], features[2:]]):
        inputs = processor(text=texts, image_features=given_as, padding=True, return_tensors="pt")
        assert inputs["image_features"].equal(features) and "pixel_values" not in inputs
        assert inputs["mm_token_type_ids"].sum(-1).tolist() == [10, 5]
    parts = [{"type": "image", "image_features": features[0]}, {"type": "text", "text": "?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}], **options)
    assert inputs["image_features"].equal(features[:1])
    assert "image_features" in parts[0]  # the caller's own


def test_features_that_do_not_fit_are_refused(processor):
    features = torch.zeros(2, 5, 16)
    with pytest.raises(ValueError, match=r"name \[1\] images .* but \[2\] were given"):
        processor(text="<image>", image_features=features)
    with pytest.raises(ValueError, match="images or image_features"):
        processor(text="<image>", image_features=features[:1], images=RED)
    for wrong in ([features[0], features[0, :3]], [torch.zeros(5)], torch.zeros(1, 2, 5, 16)):
        with pytest.raises(ValueError, match=r"image_features have the shapes .*expected \(tower tokens, tower width\)"):
            processor(text="<image> <image>", image_features=wrong)


# -- thin images -------------------------------------------------------------------------------------------------------


def processed(image_processor, image):
    made = image_processor(image, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"]
    return made[0].astype(int)


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (31, 57), (1, 1), (1, 150), (999, 7), (4000, 30), (301, 5003)])
def test_ordinary_images_are_left_alone(size):
    image_processor, image = CLIPImageProcessor(), Image.new("RGB", size)
    assert fit_thin_image(image, image_processor) is image


@pytest.mark.parametrize("resample", [2, 3, 1])  # bilinear, bicubic, Lanczos
@pytest.mark.parametrize("short", [1, 2, 3, 7, 13, 27])
def test_a_thin_image_gives_what_it_gave(short, resample, monkeypatch):
    if CLIPImageProcessor().backend == "torchvision" and resample == 1:
        pytest.skip("torchvision before 0.27 has no Lanczos: transformers takes bicubic in its place")
    monkeypatch.setattr("dsvl.image_reading_dsvl.RESIZED_PIXELS", 0)  # what is small enough to compare counts as thin
    rng = np.random.default_rng(short)
    for edge, crop in ((28, (28, 28)), (29, (26, 28)), (30, (33, 31)), (64, (64, 63))):
        sides = {"height": crop[0], "width": crop[1]}
        image_processor = CLIPImageProcessor(size={"shortest_edge": edge}, crop_size=sides, resample=resample)
        for length in (40 * short + 1, 51 * short, 63 * short - 1):
            for shape in ((short, length, 3), (length, short, 3)):
                image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                fitted = fit_thin_image(image, image_processor)
                assert edge == min(fitted.size) <= max(fitted.size) < max(edge, *crop) + 2 * edge
                different = np.abs(processed(image_processor, fitted) - processed(image_processor, image))
                if image_processor.backend == "pil":
                    if edge * length % short == 0:
                        assert different.max() == 0
                    assert different.max() <= 2 and different.mean() < 0.02  # of 255
                else:
                    # Pillow resizes thin images here as well. What lies between two levels it rounds otherwise than
                    # torchvision: up to a fifth of the values of one-pixel images are one level apart.
                    assert different.max() <= 2 and different.mean() < 0.25
    monkeypatch.undo()
    assert fit_thin_image(fitted, image_processor) is fitted


def test_what_the_call_asks_for_counts():
    image_processor, thin = CLIPImageProcessor(), Image.new("RGB", (1, 2 * RESIZED_PIXELS // 224**2))
    assert min(fit_thin_image(thin, image_processor).size) == 224
    assert fit_thin_image(thin, image_processor, size={"height": 224, "width": 224}) is thin
    assert fit_thin_image(thin, image_processor, do_resize=False) is thin
    torchvisions = SimpleNamespace(value="bicubic")  # its enumeration of filters
    assert fit_thin_image(thin, image_processor, resample=torchvisions) == fit_thin_image(thin, image_processor, resample=3)
    assert min(fit_thin_image(thin, image_processor, size={"shortest_edge": 300}).size) == 300
    for options in ({"do_center_crop": False}, {"do_pad": True, "size": {"shortest_edge": 5000}}):
        with pytest.raises(ValueError, match=r"of 1 x \d+ pixels is too thin: CLIPImageProcessor.* would make .* more than"):
            fit_thin_image(thin, image_processor, **options)


def test_what_an_image_takes_is_bounded(tmp_path):
    """By CLIP's image processor of 224 pixels, in training and in serving."""
    sizes = [(1, 1), (1, 2_048), (1, 20_000), (1, 100_000), (100_000, 1), (2, 4_000_000), (4_000, 3_000)]
    paths = [tmp_path / f"{width} x {height}.png" for width, height in sizes]
    for size, path in zip(sizes, paths, strict=True):
        Image.new("1", size).save(path)
    script = Path(__file__).with_name("bounded_image.py")
    done = subprocess.run([sys.executable, script, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"after {done.stdout!r}: {done.stderr[-2000:]}"
    assert done.stdout.splitlines() == [f"{path.stem}: processor, collator, features, server" for path in paths]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("read", [read_image, image_size])
def test_a_file_that_claims_no_pixels_or_too_many_is_refused_by_its_header(read, tmp_path):
    path = tmp_path / "claims.png"
    claims = {
        (0, 4): "has 0 x 4 pixels",
        (9_440, 9_440): "at most 89,000,000 are taken",
        (2**20, 2**20): "at most 89,000,000",
    }
    for size, reason in claims.items():
        header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
        packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
        with pytest.raises(ImageError, match=reason):
            read(path)
