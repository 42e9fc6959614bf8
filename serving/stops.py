"""Where a text stops."""


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
