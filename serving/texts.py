"""Tokens to pieces of text, as they come, up to a stop text."""

from typing import Any


class TextPieces:
    """The text that each token adds; what may still change, a character of which only some bytes are there, waits.

    (tokenizers' `DecodeStream` would do the same, but raises where a model writes bytes that are no UTF-8.)
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.start = 0  # of the tokens before the new ones that are decoded along, as spaces depend on neighbours
        self.read = 0  # tokens whose text was passed on

    def feed(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        return self._new(complete=False)

    def rest(self) -> str:
        """What still waits, at the end."""
        return self._new(complete=True)

    def _new(self, complete: bool) -> str:
        known = self._decode(self.token_ids[self.start : self.read])
        text = self._decode(self.token_ids[self.start :])
        if len(text) <= len(known) or (text.endswith("\ufffd") and not complete):
            return ""
        self.start, self.read = self.read, len(self.token_ids)
        return text[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopTexts:
    """Passes a text on piece by piece up to the first stop text, and holds back what may be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = stop
        self.held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """The text that may be passed on, and whether a stop text was found."""
        self.held += piece
        found = [place for text in self.stop if (place := self.held.find(text)) >= 0]
        if found:
            return self.held[: min(found)], True
        begun = [size for text in self.stop for size in range(1, len(text)) if self.held.endswith(text[:size])]
        keep = len(self.held) - max(begun, default=0)
        ready, self.held = self.held[:keep], self.held[keep:]
        return ready, False
