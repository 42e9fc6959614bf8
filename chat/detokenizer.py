"""Incremental detokenization in linear time, for `dsvl chat`, the web page and `dsvl serve`."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's names of single-byte tokens
MAX_PENDING = 32  # tokens without a complete character; more are invalid UTF-8, and decoded as they are


class Detokenizer:
    """Returns the text that each new token adds, and holds back incomplete UTF-8 characters.

    The pieces add up to the decoded text of all tokens without special tokens. Each step decodes only the new tokens and
    those of the previous piece, because spaces depend on the preceding token.
    (`DecodeStream` of tokenizers raises on invalid UTF-8, and `TextStreamer` of transformers prints words only when the next
    one begins.)

    Args:
        tokenizer: a tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._window: list[int] = []  # the tokens of the previous piece, followed by the pending ones
        self._read = 0  # tokens of the window that belong to the previous piece

    def feed(self, token_id: int) -> str:
        """Add a token; returns the text that is now complete, possibly ""."""
        token = None if token_id in self._special else self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a special token, or a padding row of the embedding
            return ""
        self._window.append(token_id)
        # The text of a sequence of single-byte tokens is known only when the sequence ends.
        if _BYTE_TOKEN.fullmatch(token):
            return ""
        return self._next_piece(final=len(self._window) - self._read > MAX_PENDING)

    def flush(self) -> str:
        """The text that is still held back. Call it after the last token."""
        return self._next_piece(final=True)

    def _next_piece(self, final: bool) -> str:
        previous = self._decode(self._window[: self._read])
        text = self._decode(self._window)
        if len(text) <= len(previous) or (text.endswith("\ufffd") and not final):
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return text[len(previous) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream_text(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Decode a stream of tokens into pieces of text, each of whole characters. They add up to the decoded tokens."""
    detokenizer = Detokenizer(tokenizer)
    for token in tokens:
        if piece := detokenizer.feed(token):
            yield piece
    if piece := detokenizer.flush():
        yield piece
