"""How vLLM's server gets the images of requests: as the built-in server does."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaIO, MediaWithBytes

from ...utils.image_loading import ImageReadError, decode_image_file
from ...utils.url_fetching import FetchError, fetch_url
from ...utils.urls import decode_data_url, is_data_url
from ..images import EXAMPLES, FETCH_SECONDS, FORMATS
from .settings import CONNECTOR, ServerSettings

# Few threads decode images, which limits memory; more of them wait for slow addresses.
READING = ThreadPoolExecutor(2, thread_name_prefix="dsvl-serve-read")
FETCHING = ThreadPoolExecutor(16, thread_name_prefix="dsvl-serve-fetch")


class ImageFile(MediaIO[MediaWithBytes[Image.Image]]):
    """Decodes an image file within the limits of the server."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        try:
            image = decode_image_file(data, self.max_pixels, FORMATS)
        except ImageReadError as error:
            raise VLLMValidationError(f"An image {error}.") from None
        return MediaWithBytes(image, data)  # the bytes are hashed to recognize the image

    def load_base64(self, media_type: str, data: str) -> MediaWithBytes[Image.Image]:
        return self.load_bytes(decode_data_url(f"data:{media_type};base64,{data}"))

    def load_file(self, filepath: Path) -> MediaWithBytes[Image.Image]:
        return self.load_bytes(filepath.read_bytes())


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class Media(MediaConnector):
    """Reads the images of one request; see `vllm.multimodal.media.MediaConnector`.

    Data URLs are decoded by the reader of this package: five formats, upright RGB on white, limited pixels. http(s) URLs are
    fetched with `--allow-urls` only, from public addresses, which are checked for every redirect. Files are read only below
    vLLM's `--allowed-local-media-path`. There are no videos and no audio.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        limits = ServerSettings.from_environment().limits
        self.allow_urls, self.remaining = limits.allow_urls, limits.body_bytes
        self.file = ImageFile(limits.image_pixels)
        self.deadline: float | None = None  # of all downloads of the request
        self._turn = asyncio.Lock()

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> MediaWithBytes[Image.Image]:
        """Read an image; `image_mode` has no effect, as images are always RGB."""
        data = self._download(image_url) if self._may_download(image_url) else None
        return self._decode(image_url, data)

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> MediaWithBytes[Image.Image]:
        """Read an image without blocking the event loop; see `fetch_image`."""
        run = asyncio.get_running_loop().run_in_executor
        data = None
        if self._may_download(image_url):
            async with self._turn:  # one after the other, as they share a limit
                data = await run(FETCHING, self._download, image_url)
        return await run(READING, partial(self._decode, image_url, data))

    def fetch_video(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise VLLMValidationError("Videos are not served by vLLM; use dsvl serve --engine transformers.")

    async def fetch_video_async(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.fetch_video()

    def fetch_audio(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise VLLMValidationError("The model takes no audio; remove it.")

    async def fetch_audio_async(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.fetch_audio()

    def _may_download(self, url: str) -> bool:
        """Whether this is an http(s) address that the server may fetch.

        Raises:
            VLLMValidationError: if it is one that it may not fetch.
        """
        if url.split(":", 1)[0].lower() not in ("http", "https"):
            return False
        if not self.allow_urls:
            _refuse("is an http(s) URL, which this server does not download")
        if self.allowed_media_domains and urlsplit(url).hostname not in self.allowed_media_domains:
            _refuse("is on a server that is not in --allowed-media-domains")
        return True

    def _download(self, url: str) -> bytes:
        self.deadline = self.deadline or time.monotonic() + FETCH_SECONDS
        try:
            data = fetch_url(url, max_bytes=self.remaining, seconds=self.deadline - time.monotonic())
        except FetchError as error:
            raise VLLMValidationError(f"An image was not fetched: {error}; pass it as a data URL.") from None
        self.remaining -= len(data)
        return data

    def _decode(self, url: str, data: bytes | None) -> MediaWithBytes[Image.Image]:
        if data is not None:
            return self.file.load_bytes(data)
        if is_data_url(url):
            try:
                data = decode_data_url(url)
            except ValueError:
                _refuse("is not a valid base64 data URL")
            return self.file.load_bytes(data)
        if self.allowed_local_media_path is not None and url[:5].lower() == "file:":
            return self.load_from_url(url, self.file)
        _refuse("is neither a data URL nor an http(s) URL")


def _refuse(what: str) -> NoReturn:
    raise VLLMValidationError(f"An image {what}; pass {EXAMPLES['image']}.")
