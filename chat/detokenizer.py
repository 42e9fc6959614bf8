"""Tokens to pieces of text, as they come, in time that is linear in their number."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

_A_BYTE = re.compile("<0x[0-9A-F]{2}>")  # as sentencepiece names the tokens of single bytes
MAX_WAITING = 32  # tokens that make no whole character: such a text never becomes one, and is given as it is


class Detokenizer:
    """The text that each token adds; what may still change, a character of which only some bytes are there, waits.

    Together the pieces are what the tokens decode to, special tokens skipped. Only the tokens of the last piece are decoded
    again beside the new ones, as spaces depend on neighbours. (tokenizers' `DecodeStream` raises where a model writes bytes
    that are no UTF-8.)

    Args:
        tokenizer: a tokenizer of transformers'.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._skipped = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._window: list[int] = []  # the tokens of the last piece, and after them the new ones
        self._read = 0  # tokens of the window whose text was given

    def feed(self, token_id: int) -> str:
        """The text that is certain with this token; "" if there is none."""
        token = None if token_id in self._skipped else self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a row of the embedding that has no token decodes to nothing, too
            return ""
        self._window.append(token_id)
        # Single bytes are a character once the last of them is there, and none if one does not fit.
        if _A_BYTE.fullmatch(token):
            return ""
        return self._new(complete=len(self._window) - self._read > MAX_WAITING)

    def rest(self) -> str:
        """What still waits, at the end."""
        return self._new(complete=True)

    def _new(self, complete: bool) -> str:
        known = self._decode(self._window[: self._read])
        text = self._decode(self._window)
        if len(text) <= len(known) or (text.endswith("\ufffd") and not complete):
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return text[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of_text(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Text as soon as it is certain, never half a character. Together the pieces are what the tokens decode to."""
    detokenizer = Detokenizer(tokenizer)
    for token in tokens:
        if piece := detokenizer.feed(token):
            yield piece
    if piece := detokenizer.rest():
        yield piece
