"""Small encoded videos for tests: frame `i` of every one of them is a grey that says which it is (`grey_of`)."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

STEP = 10  # grey levels between two frames; encoding changes them by less than half


def grey_of(index: int) -> int:
    """The grey level of a frame; those of 24 frames differ."""
    return 20 + STEP * (index % 24)


def index_of(image: Image.Image) -> int:
    """Which frame an image is, by its grey level in the middle."""
    return round((image.getpixel((image.width // 2, image.height // 2))[1] - 20) / STEP)


def frame(index: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """A frame: grey, with a red corner at the top left, which tells how it is turned. (height, width, 3)"""
    width, height = size
    array = np.full((height, width, 3), grey_of(index), dtype=np.uint8)
    array[: height // 4, : width // 4] = (255, 0, 0)
    return array


def encoded(
    stamps: Sequence[float] | int = 10,
    codec: str = "libx264",
    container: str = "mp4",
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    pix_fmt: str = "yuv420p",
    gop: int = 5,
    rotation: tuple[int, bool] = (0, False),
    aspect: Fraction | None = None,
    audio: float = 0.0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> bytes:
    """An encoded video.

    Args:
        stamps: when each frame is shown, in seconds; or the number of frames, `1 / rate` apart.
        gop: frames from one key frame to the next.
        rotation: degrees counterclockwise by which a player turns it, and whether it then mirrors it.
        aspect: width of a pixel divided by its height.
        audio: seconds of silence beside it.
    """
    import av

    if isinstance(stamps, int):
        stamps = [index / rate for index in range(stamps)]
    folder = tempfile.TemporaryDirectory()  # some options of the container read the file again
    path = Path(folder.name, "video")
    with _same_scheduling(), folder, av.open(str(path), "w", format=container, options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size = gop
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation != (0, False):
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        sound: Any = output.add_stream("libopus" if container == "webm" else "aac", rate=48000) if audio else None
        for index, seconds in enumerate(stamps):
            picture = av.VideoFrame.from_ndarray(frame(index, size), format="rgb24")
            picture.pts, picture.time_base = round(seconds * 1000), Fraction(1, 1000)
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
        if audio:
            for start in range(0, int(48000 * audio), 960):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
                silence.rate, silence.pts = 48000, start
                output.mux(sound.encode(silence))
            output.mux(sound.encode())
        output.close()
        return path.read_bytes()


@contextlib.contextmanager
def _same_scheduling() -> Iterator[None]:
    """Undo what SVT-AV1 does to a process of root's that encodes: it schedules the process, and all that it starts later,
    as `SCHED_FIFO` above everything else. py-cpuinfo, which DeepSpeed runs, waits actively for a child; in real time that
    child never runs.
    """
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def animation(kind: str, milliseconds: Sequence[int], size: tuple[int, int] = (32, 24)) -> bytes:
    """A GIF, WEBP or PNG with a frame for each duration."""
    file = io.BytesIO()
    first, *others = [Image.fromarray(frame(index, size)) for index in range(len(milliseconds))]
    first.save(file, kind, save_all=True, append_images=others, duration=list(milliseconds), **{"lossless": True})
    return file.getvalue()
