"""The package's log messages on the console."""

import logging
import sys
from typing import Any


class StderrHandler(logging.StreamHandler):
    """Writes to the current `sys.stderr`, which notebooks and tests replace after the handler was created."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """Ignored: the stream is always `sys.stderr`."""


def log_to_console(level: int = logging.INFO) -> None:
    """Print the package's log messages of a level and above to standard error."""
    package = logging.getLogger(__package__.partition(".")[0])
    if not package.handlers:
        handler = StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
    package.setLevel(level)
