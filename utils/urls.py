"""URLs of images, and the content of data URLs."""

import base64
import binascii
import re
from typing import Any

from .text import shortened

_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


def is_url(source: Any) -> bool:
    """Whether an image's source is a URL with a host or a file, `SCHEME://...`; data URLs are not."""
    return isinstance(source, str) and "://" in source[:20]


def is_data_url(source: Any) -> bool:
    """Whether an image's source is a data URL."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def decode_data_url(url: str) -> bytes:
    """Decode a base64 data URL.

    Raises:
        ValueError: If it is not a data URL, or its base64 is not valid.
    """
    head = _DATA_URL.match(url)
    try:
        if head is None:
            raise ValueError("it has no ';base64,'")
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data URL {shortened(url, 60)} is broken: {error}.") from error
