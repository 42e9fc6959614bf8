"""Values in messages."""

from typing import Any

MAX_VALUE_CHARACTERS = 200


def check_complete_characters(text: str, where: str) -> None:
    """Check that a text has no half of a surrogate pair, which cannot be encoded.

    Raises:
        ValueError: If it has; the message begins with `where`.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half of a surrogate pair ({text[error.start]!a}); expected complete ones (an emoji may have "
            "been cut)."
        ) from error


def shortened(value: Any, limit: int = MAX_VALUE_CHARACTERS) -> str:
    """A value for a message: one printable line, in which dots replace the middle of a long value.

    Args:
        value: A text is shown without quotes; anything else by its `repr`, bytes by their number.
        limit (`int`, *optional*, defaults to 200): The largest number of characters.
    """
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value):,} bytes"
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception as error:  # RecursionError, for example
        text = f"{type(value).__name__} ({type(error).__name__})"
    if len(text) > limit:
        tail = limit // 3
        text = f"{text[: limit - tail - 3]}...{text[-tail:]}"
    if not text.isprintable():  # half of a surrogate pair cannot be encoded; escape sequences change the terminal
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
