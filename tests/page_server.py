"""Runs the page of a tiny checkpoint on a free loopback port in this process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_server import draw_image, eventually, load_parts

from dsvl.page.app import open_page
from dsvl.page.limits import PageLimits
from dsvl.page.sessions import ChatSessions

TOKENS = 24
LIMITS = PageLimits(
    images=3, conversation_images=4, image_bytes=200_000, video_bytes=100_000, image_pixels=1_000_000, characters=500
)

__all__ = ["LIMITS", "TOKENS", "eventually", "load_parts", "opened", "image_files"]


@contextlib.contextmanager
def opened(parts: tuple[Any, Any], limits: PageLimits = LIMITS, **options: Any) -> Iterator[tuple[str, ChatSessions]]:
    """Yields the address without a trailing slash, and the sessions."""
    with open_page(*parts, "tiny", limits, port=None, **{"max_new_tokens": TOKENS} | options) as (address, sessions):
        yield address.rstrip("/"), sessions


def image_files(folder: Path, count: int, size: tuple[int, int] = (80, 60)) -> list[str]:
    files = [folder / f"image {number}.png" for number in range(count)]
    for number, file in enumerate(files):
        draw_image(number, size).save(file)
    return [str(file) for file in files]
