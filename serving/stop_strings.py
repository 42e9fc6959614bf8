"""Stop strings for streamed text."""


class StopStrings:
    """Passes text on up to the first stop string, and holds back text that may be the beginning of one.

    Args:
        stop: the stop strings.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = stop
        self.held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Add text; returns the text that can be sent, and whether a stop string was found."""
        self.held += piece
        found = [index for text in self.stop if (index := self.held.find(text)) >= 0]
        if found:
            return self.held[: min(found)], True
        partial = [size for text in self.stop for size in range(1, len(text)) if self.held.endswith(text[:size])]
        keep = len(self.held) - max(partial, default=0)
        ready, self.held = self.held[:keep], self.held[keep:]
        return ready, False
