"""Adding a section to a model card that was written before."""

import re

LICENCE = "## Licence"


def with_section(card: str, title: str, body: str) -> str:
    """A model card with a section: in the place of a former one with this title, else before the licence.

    Args:
        card: the whole README.md.
        title: heading of the section, without "## ".
        body: its Markdown.
    """
    section = f"## {title}\n\n{body.strip()}\n\n"
    former = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if former.search(card):
        return former.sub(lambda _: section, card, count=1).rstrip() + "\n"
    licence = re.search(rf"^{LICENCE}$", card, re.MULTILINE)
    if licence is None:
        return f"{card.rstrip()}\n\n{section.rstrip()}\n"
    return card[: licence.start()] + section + card[licence.start() :]
