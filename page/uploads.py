"""Opening of uploaded image and video files."""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from ..utils.image_loading import open_image
from ..utils.video_loading import VIDEO_SUFFIXES
from ..video_decoding_dsvl import VideoLimits, VideoSampling
from ..video_reading_dsvl import Video, VideoError
from .limits import PageLimits, Refusal

MAX_SIDE = 2048  # pixels; vision towers take smaller images


def open_upload(name: str, limits: PageLimits, sampling: VideoSampling | None = None) -> Image.Image | Video:
    """Open an uploaded image or video.

    Args:
        name: the path of the file.
        limits: the limits of the page.
        sampling (*optional*): which frames of a video are read.

    Returns:
        An image, scaled down to at most `MAX_SIDE` pixels per side; or a video, whose frames are decoded.

    Raises:
        Refusal: if the file is gone, is too large, or cannot be read. The message has the file name, without its directory.
    """
    if is_video_file(name):
        return _open_video(Path(name), limits, sampling or VideoSampling(shortest_edge=MAX_SIDE))
    return _open_image(Path(name), limits)


def is_video_file(name: str) -> bool:
    """Whether an uploaded file is a video, by its name."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def _open_video(file: Path, limits: PageLimits, sampling: VideoSampling) -> Video:
    if not file.is_file():
        raise Refusal(f"{file.name} is not stored any more; add it again.")
    bounds = VideoLimits(
        seconds=limits.video_seconds,
        bytes=limits.video_bytes,
        pixels=limits.image_pixels,
        decode_seconds=limits.decode_seconds,
    )
    try:
        video = Video(file, replace(sampling, max_frames=min(sampling.max_frames, limits.video_frames)), limits=bounds)
        video.frames  # noqa: B018  # decoded now, so that a broken file is refused here
    except ImportError:
        raise Refusal(f"{file.name} is refused: this server lacks PyAV (pip install 'dsvl[video]').") from None
    except VideoError as error:
        raise Refusal(f"{file.name} {error.words}.") from None
    return video


def _open_image(file: Path, limits: PageLimits) -> Image.Image:
    try:
        size = file.stat().st_size
        data = file.read_bytes() if size <= limits.image_bytes else b""
    except OSError:
        raise Refusal(f"{file.name} is not stored any more; add it again.") from None
    if size > limits.image_bytes:
        raise Refusal(f"{file.name} has {size / 2**20:.3g} MB; the limit is {limits.image_bytes / 2**20:.3g} MB.")
    try:
        image = open_image(data, max_pixels=limits.image_pixels)
    except ValueError:
        raise Refusal(
            f"{file.name} is refused: it is not a supported image (PNG, JPEG, WebP, ...), or has more than "
            f"{limits.image_pixels / 1e6:g} megapixels."
        ) from None
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image
