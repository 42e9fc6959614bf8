"""Which frames a video has, and decoding some of them: of files by PyAV, of animations by Pillow, of given frames."""

import hashlib
import io
import math
import os
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from .image_reading_dsvl import ImageError, Refused, open_file, read_image, resolve_text

try:
    from PIL import Image
except ImportError:  # not needed for text alone
    Image = None  # type: ignore[assignment]

VIDEO_FPS = 2.0  # as Qwen2-VL and its successors sample: an event of a second is on two frames
MAX_FRAMES = 64  # as SmolVLM2 has it; every frame takes a whole image's tokens, so Qwen's 768 would fill any context

# Containers that hold their frames themselves. Others (HLS, DASH, concat, image sequences) open further files and addresses.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,ivf"
SEEKABLE = ("mov", "matroska")  # have an index; in others a seek may end anywhere
DECLARES_LENGTH = ("mov", "matroska", "avi")  # in the header; the length of others is estimated
ANIMATIONS = {b"GIF8": "GIF", b"RIFF": "WEBP", b"\x89PNG": "PNG"}  # read by Pillow, which applies how frames are disposed of

_CUT = "the file is cut or broken, pass it whole"
_PNG_END, _GIF_END = b"IEND\xaeB`\x82", b"\x00;"
_TURNS = {  # the signs of a display matrix (a, b, c, d): x' = a x + c y, y' = b x + d y
    (0, 1, -1, 0): "ROTATE_270",
    (-1, 0, 0, -1): "ROTATE_180",
    (0, -1, 1, 0): "ROTATE_90",
    (-1, 0, 0, 1): "FLIP_LEFT_RIGHT",
    (1, 0, 0, -1): "FLIP_TOP_BOTTOM",
    (0, 1, 1, 0): "TRANSPOSE",
    (0, -1, -1, 0): "TRANSVERSE",
}


@dataclass(frozen=True)
class VideoSampling:
    """Which frames of a video are read, and how large.

    Args:
        fps: frames per second, *optional*, defaults to 2.0.
        max_frames: of a video, *optional*, defaults to 64. Of a longer video, as many at equal distances.
        shortest_edge: pixels to which the shorter side of a larger frame is reduced, *optional*, defaults to its own size.
        resample: Pillow's filter for it, *optional*, defaults to bicubic.

    Raises:
        ValueError: for a rate or number that is not positive.
    """

    fps: float = VIDEO_FPS
    max_frames: int = MAX_FRAMES
    shortest_edge: int | None = None
    resample: int = 3

    def __post_init__(self) -> None:
        if not _is_number(self.fps) or not 0 < self.fps <= 1000:
            raise ValueError(f"fps={self.fps!r} is not a rate of frames; pass a number above 0, such as {VIDEO_FPS}.")
        if isinstance(self.max_frames, bool) or not isinstance(self.max_frames, int) or self.max_frames < 1:
            raise ValueError(f"max_frames={self.max_frames!r} is not a number of frames; pass a whole number of at least 1.")


@dataclass(frozen=True)
class VideoLimits:
    """What is refused.

    Args:
        seconds: length of a video.
        bytes: size of its file; of one that is fetched, `fetched_bytes`.
        frames: frames of the file, sampled or not.
        streams: video, audio and other streams of the file.
        pixels: of a frame as it is stored or shown.
        kept_pixels: of all sampled frames together.
        decode_seconds: for reading the file once.
    """

    seconds: float = 4 * 3600.0
    bytes: int = 8 * 2**30
    fetched_bytes: int = 256 * 2**20
    frames: int = 1_000_000
    streams: int = 32
    pixels: int = 36_000_000  # 8K
    kept_pixels: int = 2**28  # 0.8 GB
    decode_seconds: float = 120.0


def open_reader(source: Any, frame_rate: float | None, limits: VideoLimits, allow_urls: bool) -> Any:
    """The reader of a source; for the arguments see `read_video`."""
    if isinstance(source, (list, tuple)) or getattr(source, "ndim", 0) == 4:
        return FrameList(source, frame_rate)
    if frame_rate is not None:
        raise Refused("a frame_rate is given", "leave it out for a file, which has its own timestamps")
    if isinstance(source, dict):
        source = source.get("bytes") if source.get("bytes") is not None else source.get("path")
    if isinstance(source, str):
        source = resolve_text(source, allow_urls, "video", limits.fetched_bytes)
    if isinstance(source, (bytearray, memoryview)):
        source = bytes(source)
    if not isinstance(source, (bytes, os.PathLike)) and not (hasattr(source, "read") and hasattr(source, "seek")):
        raise Refused(
            f"it is of type {type(source).__name__}",
            "pass a video file's path or bytes, a file in binary mode, or a list of frames with frame_rate",
        )
    with _opened(source) as file:
        try:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
        except (OSError, ValueError) as error:
            raise Refused(f"its file cannot seek ({error})", "pass its bytes") from error
        kind = ANIMATIONS.get(start[:4], "") if isinstance(start := file.read(12), bytes) else None
    if kind is None:
        raise Refused("it is a text file", "open it in binary mode")
    if size == 0:
        raise Refused("its file is empty", "pass a video")
    if size > limits.bytes:
        raise Refused(f"it has {size:,} bytes", f"at most {limits.bytes:,} are taken, pass a smaller file")
    if kind == "WEBP" and start[8:] != b"WEBP":
        kind = ""
    return Animation(source, kind, limits) if kind else ContainerFile(source, limits)


# -- readers ---------------------------------------------------------------------------------------------------------------
# Each has `scan`, which gives when each frame is shown and when the last one ends, in seconds; `read`, which gives the
# frames of ascending indices; and `digest`, a hash of the file.


class Clock:
    """Counts the time that reading takes."""

    def __init__(self, limits: VideoLimits) -> None:
        self.limits, self.end = limits, time.monotonic() + limits.decode_seconds

    def check(self, seconds: float | None = None) -> None:
        if time.monotonic() > self.end:
            where = "" if seconds is None else f"at {seconds:.1f} s "
            raise Refused(
                f"{where}reading it has taken longer than {self.limits.decode_seconds:g} s",
                "pass a shorter or smaller video",
            )


class FrameList:
    """Given frames."""

    def __init__(self, frames: Any, frame_rate: float | None) -> None:
        if not _is_number(frame_rate) or not 0 < frame_rate <= 1000:  # type: ignore[operator]
            raise Refused(f"it is a list of frames with frame_rate={frame_rate!r}", "pass their number per second")
        self.given, self.rate = frames, float(frame_rate)  # type: ignore[arg-type]

    def scan(self, clock: Clock) -> tuple[np.ndarray, float]:
        return np.arange(len(self.given)) / self.rate, len(self.given) / self.rate

    def digest(self) -> bytes | None:
        return None

    def read(self, chosen: list[int], sampling: VideoSampling, clock: Clock) -> Iterator["Image.Image"]:
        for index in chosen:
            clock.check(index / self.rate)
            try:
                image = read_image(self.given[index], max_pixels=clock.limits.pixels)
            except ImageError as error:
                raise Refused(f"its frame {index} {error.words}", "pass images") from error
            yield _shrunk(image, 1.0, sampling, clock.limits).copy()  # what is noted on it does not reach the caller's


class _File:
    """A file, or its bytes."""

    source: Any

    def digest(self) -> bytes:
        """A hash of the file."""
        with _opened(self.source) as file:
            return hashlib.file_digest(file, "blake2b").digest()  # type: ignore[arg-type]


class Animation(_File):
    """A GIF, an animated WebP or PNG."""

    def __init__(self, source: Any, kind: str, limits: VideoLimits) -> None:
        self.source, self.kind, self.limits = source, kind, limits

    def scan(self, clock: Clock) -> tuple[np.ndarray, float]:
        self._check_end()
        starts, end = [], 0.0
        for image in self._decoded(clock):
            starts.append(end)
            milliseconds = float(image.info.get("duration") or 0)
            end += milliseconds / 1000 if milliseconds > 10 else 0.1  # as browsers show them
        return np.array(starts), end

    def read(self, chosen: list[int], sampling: VideoSampling, clock: Clock) -> Iterator["Image.Image"]:
        wanted = set(chosen)
        for index, image in enumerate(self._decoded(clock, chosen[-1])):
            if index in wanted:
                yield _shrunk(read_image(image.copy(), max_pixels=self.limits.pixels), 1.0, sampling, self.limits)

    def _decoded(self, clock: Clock, last: int | None = None) -> Iterator["Image.Image"]:
        index = 0
        with _opened(self.source) as file:
            try:
                with Image.open(file, formats=[self.kind]) as image:
                    _check_pixels(*image.size, self.limits)
                    while last is None or index <= last:
                        clock.check()
                        if index >= self.limits.frames:
                            raise _too_many_frames(self.limits)
                        if index:
                            image.seek(index)
                        image.load()
                        yield image
                        index += 1
            except EOFError:
                if last is not None and index <= last:
                    raise Refused(f"it ends before its frame {index}", _CUT) from None
            except (Refused, MemoryError, GeneratorExit):
                raise
            except Exception as error:  # a broken file can make Pillow's readers raise anything
                raise Refused(f"its frame {index} cannot be decoded ({error})", _CUT) from error

    def _check_end(self) -> None:
        """Pillow takes a file that is cut between two frames for a shorter one."""
        with _opened(self.source) as file:
            start = file.read(12)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1024))
            end = file.read()
        whole = {"GIF": _GIF_END in end, "PNG": _PNG_END in end}
        if not whole.get(self.kind, size >= int.from_bytes(start[4:8], "little") + 8):
            raise Refused("its end is missing", _CUT)


class ContainerFile(_File):
    """A file that PyAV decodes."""

    def __init__(self, source: Any, limits: VideoLimits) -> None:
        _pyav()
        self.source, self.limits = source, limits
        self.stamps: list[int] = []  # of the shown frames, ascending, in the stream's time base
        self.keys: list[int] = []  # of the frames from which decoding can start, ascending
        self.base = 1.0  # seconds of a tick

    def scan(self, clock: Clock) -> tuple[np.ndarray, float]:
        with self._container(clock) as (container, stream, at):
            self.base = float(stream.time_base)
            ends, number, last = [0.0], 0, 0
            declared = (container.duration or 0) / 1e6
            if container.format.name == "avi":  # of which FFmpeg gives what is left of a file that is cut
                declared = stream.frames * self.base
            if declared > self.limits.seconds:
                raise too_long(declared, self.limits)
            begin = min((container.start_time or 0) / 1e6, (stream.start_time or 0) * self.base)
            for packet in container.demux():
                if not packet.size:
                    continue
                if packet.pts is not None:
                    ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index != stream.index:
                    continue
                number += 1
                if number % 256 == 0:
                    clock.check(at.seconds)
                if number > self.limits.frames:
                    raise _too_many_frames(self.limits)
                if packet.pts is None:
                    raise Refused(f"its frame {number} has no timestamp", "convert it to MP4 or WebM")
                at.seconds = (packet.pts - (stream.start_time or 0)) * self.base
                if packet.is_corrupt:
                    raise Refused(f"at {at.seconds:.1f} s it is broken", _CUT)
                if not packet.is_discard:
                    self.stamps.append(packet.pts)
                    last = max(last, packet.pts + (packet.duration or 0))
                if packet.is_keyframe:
                    self.keys.append(packet.pts)
            if container.format.name.startswith(DECLARES_LENGTH):
                missing = declared - (max(ends) - begin)
                # MP4's index, without the frames that an edit list cuts off.
                shorter = container.format.name.startswith("mov") and number < len(stream.index_entries)
                if shorter or (self.stamps and missing > max(0.5, 0.02 * declared)):
                    raise Refused(
                        f"it ends at {max(ends) - begin:.1f} s, before the {declared:.1f} s that its header declares", _CUT
                    )
        self.stamps, self.keys = sorted(set(self.stamps)), sorted(self.keys)
        starts = np.array(self.stamps, dtype=np.float64) * self.base
        if len(starts) and last <= self.stamps[-1]:  # the last frame has no duration: that of the others
            last = self.stamps[-1] + (self.stamps[-1] - self.stamps[0]) // max(1, len(starts) - 1)
        return starts, last * self.base

    def read(self, chosen: list[int], sampling: VideoSampling, clock: Clock) -> Iterator["Image.Image"]:
        wanted = [self.stamps[index] for index in chosen]
        images: list[Image.Image] = []
        with self._container(clock) as (container, stream, at):
            if container.format.name.startswith(SEEKABLE):
                # After a seek a decoder may miss what frames refer to that come before the key frame.
                with suppress(_pyav().FFmpegError):
                    for frame in self._decoded(container, stream, at, wanted, seek=True):
                        images.append(self._image(frame, stream, sampling))
                        yield images[-1]
        if len(images) < len(wanted):  # no index, or a seek ended behind the frame
            with self._container(clock) as (container, stream, at):
                rest = wanted[len(images) :]
                for frame in self._decoded(container, stream, at, rest, seek=False):
                    yield self._image(frame, stream, sampling)

    def _decoded(self, container: Any, stream: Any, at: "_Position", wanted: list[int], seek: bool) -> Iterator[Any]:
        """The frames with these timestamps; with `seek`, those before the first that is missing or broken."""
        found, position = 0, -math.inf
        while found < len(wanted):
            before, key = found, self._key_before(wanted[found])
            if seek and key is not None and key > position:
                container.seek(key, stream=stream)
            for frame in container.decode(stream):
                position = -math.inf if frame.pts is None else frame.pts
                at.check(None if frame.pts is None else (position - self.stamps[0]) * self.base)
                if position < wanted[found]:
                    continue
                if position > wanted[found] or frame.is_corrupt:
                    break
                yield frame
                found += 1
                if found == len(wanted):
                    return
                key = self._key_before(wanted[found])
                if seek and key is not None and key > position:
                    break
            if found == before and seek:
                return
            if found == before:
                seconds = (wanted[found] - self.stamps[0]) * self.base
                raise Refused(f"its frame at {seconds:.1f} s cannot be decoded", _CUT)

    def _key_before(self, stamp: int) -> int | None:
        index = bisect_right(self.keys, stamp)
        return self.keys[index - 1] if index else None

    def _image(self, frame: Any, stream: Any, sampling: VideoSampling) -> "Image.Image":
        _check_pixels(frame.width, frame.height, self.limits)
        mode = "rgba" if any(component.is_alpha for component in frame.format.components) else "rgb24"
        image = read_image(Image.fromarray(frame.to_ndarray(format=mode)), max_pixels=self.limits.pixels)
        image = _shrunk(image, float(stream.sample_aspect_ratio or 1), sampling, self.limits)
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return image
        a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
        if abs(a) + abs(d) >= abs(b) + abs(c):
            b = c = 0
        else:
            a = d = 0
        turn = _TURNS.get((_sign(a), _sign(b), _sign(c), _sign(d)))
        return image if turn is None else image.transpose(Image.Transpose[turn])

    @contextmanager
    def _container(self, clock: Clock) -> Iterator[tuple[Any, Any, "_Position"]]:
        at = _Position(clock)
        av = _pyav()
        options = {"format_whitelist": CONTAINERS, "max_streams": str(self.limits.streams)}
        with _opened(self.source) as file:
            try:
                with av.open(file, container_options=options, metadata_errors="replace") as container:
                    stream = _video_stream(container)
                    _check_pixels(stream.codec_context.width, stream.codec_context.height, self.limits)
                    stream.codec_context.options = {"err_detect": "explode"}  # nothing is concealed
                    yield container, stream, at
            except (av.FFmpegError, UnicodeDecodeError) as error:
                where = "" if at.seconds is None else f"after {at.seconds:.1f} s "
                reason = getattr(error, "strerror", None) or type(error).__name__
                remedy = _CUT if where else "pass a whole video of a known format, such as MP4, WebM or GIF"
                raise Refused(f"{where}it cannot be decoded ({reason})", remedy) from error


def _pyav() -> Any:
    """PyAV, the extra `video`. It is imported late, as that takes longer than the rest of this file."""
    try:
        import av
    except ImportError as error:
        raise ImportError("Reading this video needs PyAV: pip install 'dsvl[video]' (or av).", name="av") from error
    return av


class _Position:
    """Where in the video reading is, in seconds; None before the first frame."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds: float | None = None

    def check(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.clock.check(seconds)


def _video_stream(container: Any) -> Any:
    cover = _pyav().stream.Disposition.attached_pic
    streams = [one for one in container.streams.video if not (one.disposition & cover)]
    if not streams:
        kinds = sorted({one.type for one in container.streams})
        raise Refused(f"it has no video stream ({', '.join(kinds) or 'no stream at all'})", "pass a file with frames")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise Refused("no decoder is known for its video stream", "convert it to H.264 or VP9")
    return stream


@contextmanager
def _opened(source: Any) -> Iterator[BinaryIO]:
    """A file from its beginning; one of the caller's stays open."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, os.PathLike):
        with open_file(source, "video") as file:
            yield file
    else:
        with suppress(OSError, ValueError):  # reported where it is opened
            source.seek(0)
        yield source


def _check_pixels(width: int, height: int, limits: VideoLimits) -> None:
    if width < 1 or height < 1:
        raise Refused(f"its frames have {width} x {height} pixels", "pass a video with frames")
    if width * height > limits.pixels:
        raise Refused(f"its frames have {width} x {height} pixels", f"at most {limits.pixels:,} are taken, scale it")


def too_long(seconds: float, limits: VideoLimits) -> Refused:
    """The refusal of a video of this length."""
    return Refused(f"it lasts {seconds:,.0f} s", f"at most {limits.seconds:,.0f} s are taken, cut it")


def _too_many_frames(limits: VideoLimits) -> Refused:
    return Refused(f"it has more than {limits.frames:,} frames", "cut it")


def _shrunk(image: "Image.Image", ratio: float, sampling: VideoSampling, limits: VideoLimits) -> "Image.Image":
    """A frame with square pixels, its shorter side at most `shortest_edge`.

    Args:
        ratio: width of a pixel divided by its height.
    """
    width, height = image.size
    if ratio > 1:
        width = max(1, round(width * ratio))
    elif ratio < 1:
        height = max(1, round(height / ratio))
    _check_pixels(width, height, limits)
    edge, short = sampling.shortest_edge, min(width, height)
    if edge is not None and edge < short:
        long = int(edge * max(width, height) / short)  # as transformers computes it
        width, height = (edge, long) if width <= height else (long, edge)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling(sampling.resample))


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
