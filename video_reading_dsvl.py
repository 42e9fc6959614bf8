"""Reading a video in any form as a few upright RGB frames with their times, within limits.

All code that needs frames reads them here. Which frames are sampled is decided by the presentation timestamps of the file's
packets, which are read without decoding, so that the length of a prompt is known before a frame is decoded. transformers'
own `load_video` counts frames instead, divides by the average rate, ignores rotation, and holds all frames at full size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .image_layouts_dsvl import FRAME
from .image_reading_dsvl import ImageError, Refused, read_image, source_name
from .video_decoding_dsvl import MAX_FRAMES, VIDEO_FPS, Clock, VideoLimits, VideoSampling, open_reader, too_long

try:
    from PIL import Image
except ImportError:  # not needed for text alone
    Image = None  # type: ignore[assignment]

SOURCES = ("video", "path", "url", "base64")  # the keys of a video part
IMAGE_SOURCES = ("image", "path", "url", "base64")  # the keys of an image part that transformers reads
SETTINGS = ("fps", "max_frames", "frame_rate")  # further keys of a video part


class VideoError(ImageError):
    """A video that is refused; for `words` see `ImageError`."""


def read_video(
    source: Any,
    *,
    fps: float = VIDEO_FPS,
    max_frames: int = MAX_FRAMES,
    shortest_edge: int | None = None,
    frame_rate: float | None = None,
    limits: VideoLimits | None = None,
    allow_urls: bool = True,
) -> tuple[list["Image.Image"], list[float]]:
    """Read a few frames of a video as upright 8-bit RGB.

    The number of frames is the one that comes closest to `fps`, at most `max_frames` and what the video has. They are
    those that are shown at equal distances from the first frame to the last, both included; a single one is from the middle.
    Rotation and sample aspect ratio are applied, and transparent pixels are blended with white.

    Args:
        source: one of
            - a file: its path, its bytes, a binary file object that can seek, or `{"bytes", "path"}`;
            - text: an http(s) or file URL, a data URL, or base64;
            - frames: a list of what `read_image` takes, or an array of shape (frames, height, width, 3); with `frame_rate`.
        fps, max_frames, shortest_edge: see `VideoSampling`.
        frame_rate: at how many frames per second given frames follow each other.
        limits: see `VideoLimits`.
        allow_urls: whether http(s) URLs are fetched and file URLs opened.

    Returns:
        The frames, and when each is shown, in seconds from the first frame.

    Raises:
        VideoError: (a `ValueError`) naming the source, the reason with the time in the video, and the remedy.
        ImportError: for a file that is decoded by PyAV, if that is not installed.
    """
    video = Video(source, VideoSampling(fps, max_frames, shortest_edge), frame_rate, limits, allow_urls)
    return video.frames, video.times


def video_size(source: Any, **options: Any) -> tuple[float, int]:
    """The length of a video in seconds, and how many frames `read_video` gives of it. No frame of PyAV's is decoded.

    Args:
        source: as for `read_video`.
        options: `fps`, `max_frames`, `frame_rate`, `limits` and `allow_urls` of `read_video`.

    Raises:
        VideoError: as `read_video`, for what is found without decoding.
    """
    sampling = VideoSampling(options.pop("fps", VIDEO_FPS), options.pop("max_frames", MAX_FRAMES))
    video = Video(source, sampling, **options)
    return video.duration, len(video.times)


class Video:
    """A video of which it is known which frames are sampled. They are decoded when they are first asked for.

    Args:
        source, frame_rate, limits, allow_urls: see `read_video`.
        sampling: which frames.

    Attributes:
        duration: in seconds, from the first frame to the end of the last one.
        times: of the sampled frames, in seconds from the first frame.

    Raises:
        VideoError, ImportError: see `read_video`.
    """

    def __init__(
        self,
        source: Any,
        sampling: VideoSampling | None = None,
        frame_rate: float | None = None,
        limits: VideoLimits | None = None,
        allow_urls: bool = True,
    ) -> None:
        self.sampling, self.limits, self.name = sampling or VideoSampling(), limits or VideoLimits(), source_name(source)
        self._frames: list[Image.Image] | None = None
        self._digest: bytes | None = None
        with self._named():
            self._reader = open_reader(source, frame_rate, self.limits, allow_urls)
            starts, end = self._reader.scan(Clock(self.limits))
            if not len(starts):
                raise Refused("it has no frame", "pass a video with at least one")
            self.duration = float(end - starts[0])
            if self.duration > self.limits.seconds:
                raise too_long(self.duration, self.limits)
            self._chosen = sampled_frames(starts, self.sampling.fps, self.sampling.max_frames)
            self.times = [float(starts[index] - starts[0]) for index in self._chosen]

    @property
    def frames(self) -> list["Image.Image"]:
        """The sampled frames."""
        if self._frames is None:
            kept, frames = 0, []
            with self._named():
                for image in self._reader.read(self._chosen, self.sampling, Clock(self.limits)):
                    kept += image.width * image.height
                    if kept > self.limits.kept_pixels:
                        raise Refused(
                            f"its frames have more than {self.limits.kept_pixels:,} pixels together",
                            "pass fewer frames (max_frames) or smaller ones (shortest_edge)",
                        )
                    image.info = {FRAME: True}
                    frames.append(image)
            self._frames = frames
        return self._frames

    def frame_sources(self) -> list["VideoFrame"]:
        """The sampled frames as sources of images, which are not decoded yet."""
        return [VideoFrame(self, index) for index in range(len(self.times))]

    def parts(self) -> list[dict[str, Any]]:
        """The sampled frames as parts of a message, each with its time as text."""
        distance = min((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=1.0)
        digits = next((digits for digits in (1, 2) if distance >= 10.0**-digits), 3)
        labels = [f"{seconds:.{digits}f} s" for seconds in self.times]
        return [
            {"type": "image", "image": source, "time": label, "frame": number, "frames": len(labels)}
            for number, (source, label) in enumerate(zip(self.frame_sources(), labels, strict=True), 1)
        ]

    def digest(self) -> bytes | None:
        """A hash of the file and of what is read of it; None for given frames."""
        if self._digest is None:
            self._digest = self._reader.digest()
            if self._digest is not None:
                self._digest += f" {self.sampling} ".encode()
        return self._digest

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_frames": None}  # another process decodes them again

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Refused as refused:
            error = VideoError(f"The video {self.name} cannot be read: {refused.detail}; {refused.remedy}.")
            error.words = refused.words
            raise error from refused.__cause__


class VideoFrame:
    """One sampled frame of a video, as a source of an image: `read_image` takes it.

    Attributes:
        video: the video, whose frames are decoded together and kept as long as it is.
        index: the frame's index among the sampled ones.
    """

    def __init__(self, video: Video, index: int) -> None:
        self.video, self.index = video, index

    def read_frame(self) -> "Image.Image":
        """The decoded frame; raises `VideoError`."""
        return self.video.frames[self.index]

    def digest(self) -> bytes | None:
        """What the pixels follow from: a hash of the file, what is read of it, and the index; None for given frames."""
        digest = self.video.digest()
        return None if digest is None else digest + str(self.index).encode()

    def __repr__(self) -> str:
        return f"frame at {self.video.times[self.index]:.2f} s of the video {self.video.name}"


class StoredFrame:
    """A frame that was stored as an image, as a source of an image.

    Attributes:
        source: what `read_image` takes.
    """

    def __init__(self, source: Any) -> None:
        self.source = source

    def read_frame(self) -> "Image.Image":
        """The decoded frame; raises `ImageError`."""
        image = read_image(self.source).copy()
        image.info = {FRAME: True}
        return image

    def digest(self) -> bytes | None:
        """None: its pixels are to be compared."""
        return None


def expand_videos(
    messages: Sequence[dict[str, Any]],
    sampling: VideoSampling | None = None,
    fetch: Callable[[Any], Any] | None = None,
    limits: VideoLimits | None = None,
) -> list[dict[str, Any]]:
    """Replace each video of a conversation by its frames, which are images with a time.

    Args:
        messages: with parts `{"type": "video", "video" | "path" | "url" | "base64"}`, and optionally `fps`, `max_frames` and
            `frame_rate`, which take precedence over `sampling`.
        sampling: which frames.
        fetch: replaces a source before it is opened, *optional*: by default http(s) URLs are fetched.
        limits: see `VideoLimits`.

    Returns:
        The messages with parts `{"type": "image", "image": VideoFrame, "time", "frame", "frames"}`.

    Raises:
        ValueError: for a part without a source or with several, an unknown key, or a video that cannot be read.
    """
    expanded = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, (list, tuple)) and any(map(is_video, content)):
            parts: list[Any] = []
            for part in content:
                parts += open_part(part, sampling, fetch, limits).parts() if is_video(part) else [part]
            message = message | {"content": parts}
        expanded.append(message)
    return expanded


def open_part(
    part: dict[str, Any],
    sampling: VideoSampling | None = None,
    fetch: Callable[[Any], Any] | None = None,
    limits: VideoLimits | None = None,
) -> Video:
    """The video of a part; for the arguments see `expand_videos`."""
    given = {key: value for key, value in part.items() if key != "type" and value is not None}
    named = [key for key in SOURCES if key in given]
    if len(named) != 1 or set(given) - {*SOURCES, *SETTINGS}:
        raise ValueError(
            f"A video part has the keys {', '.join(map(str, given)) or 'type only'}; expected one of {', '.join(SOURCES)}, "
            f"and optionally {', '.join(SETTINGS)}."
        )
    base = sampling or VideoSampling()
    own = VideoSampling(
        given.get("fps", base.fps), given.get("max_frames", base.max_frames), base.shortest_edge, base.resample
    )
    source = given[named[0]]
    if fetch is None:
        return Video(source, own, given.get("frame_rate"), limits)
    return Video(fetch(source), own, given.get("frame_rate"), limits, allow_urls=False)


def mark_frames(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a `StoredFrame` for each image that has a time and is no frame of a video that was opened here."""
    marked = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if has_times([message]):
            message = message | {"content": [_marked(part) for part in content]}  # type: ignore[union-attr]
        marked.append(message)
    return marked


def _marked(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image" or not part.get("time"):
        return part
    named = [key for key in IMAGE_SOURCES if part.get(key) is not None]
    if len(named) != 1 or hasattr(part[named[0]], "read_frame"):
        return part
    rest = {key: value for key, value in part.items() if key not in IMAGE_SOURCES}
    return rest | {"image": StoredFrame(part[named[0]])}


def has_times(conversation: Any) -> bool:
    """Whether a conversation, or one of a batch, has images with a time: frames of a video."""
    if isinstance(conversation, (list, tuple)):
        return any(map(has_times, conversation))
    if not isinstance(conversation, dict):
        return False
    return bool(conversation.get("time")) or has_times(conversation.get("content"))


def is_video(part: Any) -> bool:
    """Whether a part of a message is a video."""
    return isinstance(part, dict) and part.get("type") == "video"


def sampled_frames(starts: Sequence[float] | np.ndarray, fps: float, max_frames: int) -> list[int]:
    """The indices of the frames that are shown at equal distances from the first frame to the last; see `read_video`.

    Args:
        starts: when each frame is shown, in seconds, ascending.
    """
    first, last = float(starts[0]), float(starts[-1])
    number = min(max_frames, round((last - first) * fps) + 1)
    moments = np.linspace(first, last, number) if number > 1 else np.array([(first + last) / 2])
    shown = np.searchsorted(starts, moments + 1e-6, side="right") - 1
    return [int(index) for index in np.unique(shown)]


__all__ = [
    "StoredFrame",
    "Video",
    "VideoError",
    "VideoFrame",
    "VideoLimits",
    "VideoSampling",
    "expand_videos",
    "read_video",
    "video_size",
]
