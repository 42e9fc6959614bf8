"""Let autodoc read docstrings that contain Markdown code spans.

The docstrings of this package use single backticks for code, as those of transformers do, and may contain names such as
`labels_` or `*args` that reStructuredText would treat as markup. Everything outside code spans is escaped before napoleon
reads the sections `Args:`, `Returns:` and `Raises:`.
"""

import re
from typing import Any

_CODE = re.compile(r"(``.+?``|`[^`\n]+`)")
_MARKUP = re.compile(r"(?<!\\)(\*|\||(?<=\w)_(?=\W|$))")
_EMPHASIS = re.compile(r"(?<![\w*])\*(optional|\w[\w -]*\w)\*(?![\w*])")


def escape(line: str) -> str:
    """Escape reStructuredText markup outside code spans, except for simple emphasis such as `*optional*`."""
    pieces = _CODE.split(line)
    for index in range(0, len(pieces), 2):
        marked = _EMPHASIS.sub("\0\\1\0", pieces[index])
        pieces[index] = _MARKUP.sub(r"\\\1", marked).replace("\0", "*")
    for index in range(1, len(pieces), 2):  # a code span directly before a letter ends only after an escape
        if index + 1 < len(pieces) and re.match(r"[\w]", pieces[index + 1]):
            pieces[index + 1] = "\\ " + pieces[index + 1]
    return "".join(pieces)


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape a docstring in place (an `autodoc-process-docstring` handler)."""
    lines[:] = [escape(line) for line in lines]


def setup(app: Any) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon, whose priority is 500
    return {"parallel_read_safe": True}
