"""Answers to show: a table for spreadsheets, and a page that holds its images."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..utils.image_loading import open_image, thumbnail_data_url
from .comparison import Round, Runs, duels, join, metrics_of, score, summarize

# A page is sent to somebody: mail takes about 25 MB, in an encoding that takes a third more.
PAGE_BYTES = 12 * 2**20
WIDTHS = {480: 250, 320: 500, 200: None}  # pixels of an image -> up to how many images of a page

# Longer answers are folded: in characters, and in lines; and what of them is seen then.
LONG, LONG_LINES, SHOWN = 800, 16, 400

# Spreadsheets compute a cell that begins with one of these: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def write_csv(path: str | Path, runs: Runs) -> None:
    """Write the answers as a table, a row for each conversation, round and run.

    It opens in spreadsheets as it is (UTF-8 with a mark). A text that such a program would compute, because it begins
    with = + - @, a tab or a line's end, gets an apostrophe in front; the exact texts are in the JSON lines.

    Args:
        path: of the file.
        runs: label -> records. A round that a run has not answered is a row with `answered` no.

    Raises:
        ValueError: see `comparison.join`.
    """
    conversations = join(runs)
    metrics = metrics_of(conversations)
    with open(path, "w", encoding="utf-8-sig", errors="replace", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "round", "model", "answered", "question", "images", "answer", "references", *metrics])
        for one in (one for rounds in conversations.values() for one in rounds):
            asked = one.asked
            for label, record in one.answers.items():
                scores = record.scores if record else {}
                texts = [asked.question, _listed(asked.images), record.answer if record else "", _listed(asked.references)]
                table.writerow(
                    [_inert(asked.id), asked.round, _inert(label), "yes" if record else "no"]
                    + [_inert(text) for text in texts]
                    + [scores.get(metric, "") for metric in metrics]
                )


def write_html(path: str | Path, runs: Runs, title: str | None = None, allow_urls: bool = False) -> None:
    """Write the answers as one page that needs nothing else: images beside questions and answers, runs side by side.

    Images are made smaller, the more there are; beyond `PAGE_BYTES` of them, and where one cannot be opened, the page
    shows its name and why. Paths of this machine are not on it.

    Args:
        path: of the file.
        runs: label -> records.
        title: of the page; by default the runs that are compared.
        allow_urls: fetch images that are http(s) addresses, to put them onto the page.

    Raises:
        ValueError: see `comparison.join`.
    """
    conversations = join(runs)
    rounds = [one for several in conversations.values() for one in several]
    count = sum(len(one.asked.images) for one in rounds)
    shelf = _Shelf(next(width for width, most in WIDTHS.items() if most is None or count <= most), allow_urls)
    # Images are opened before the page's head is written, which counts those that are not shown.
    shown = {name: [_shown(one, shelf) for one in several] for name, several in conversations.items()}
    page = _environment().from_string(files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8"))
    text = page.render(
        title=title or _title(list(runs)),
        labels=list(runs),
        metrics=metrics_of(conversations),
        summaries=summarize(conversations),
        missing=any(one.missing for one in rounds),
        common=summarize(conversations, common=True),
        duels=duels(conversations),
        conversations=shown,
        rounds=len(rounds),
        images=count,
        unseen=shelf.unseen,
        differing=sum(one.differs for one in rounds),
        imperfect=sum(one.imperfect for one in rounds),
    )
    Path(path).write_text(text, encoding="utf-8", errors="replace")


class _Shelf:
    """The images of a page, as far as they find room on it."""

    def __init__(self, width: int, allow_urls: bool) -> None:
        self.width, self.allow_urls = width, allow_urls
        self.bytes = self.unseen = 0

    def image(self, source: str) -> dict[str, str]:
        """An image's `name`, and its `data`, or `reason` why there is none."""
        name = source.rstrip("/").rpartition("/")[2] or source
        reason = ""
        if self.bytes < PAGE_BYTES:
            try:
                data = thumbnail_data_url(open_image(source, self.allow_urls), self.width)
            except ValueError as error:
                reason = str(error).removeprefix(f"The image {source[:300]} ")
            else:
                self.bytes += len(data)
                return {"name": name, "data": data, "reason": ""}
        else:
            reason = f"is left out: there are {PAGE_BYTES / 2**20:.0f} MB of images on this page already."
        self.unseen += 1
        return {"name": name, "data": "", "reason": reason}


def _shown(one: Round, shelf: _Shelf) -> dict[str, Any]:
    """A round as the page's template takes it."""
    return {
        "number": one.asked.round + 1,
        "question": one.asked.question,
        "images": [shelf.image(source) for source in one.asked.images],
        "references": Counter(one.asked.references),
        "answers": one.answers,
        "differs": one.differs,
        "imperfect": one.imperfect,
    }


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["score"] = score
    environment.filters["best"] = _best
    environment.filters["beginning"] = _beginning
    return environment


def _best(summaries: Mapping[str, Any], metric: str) -> float | None:
    """The best mean of a metric, if there is a worse one."""
    means = {summary.means[metric][0] for summary in summaries.values() if metric in summary.means}
    return max(means) if len(means) > 1 else None


def _title(labels: list[str]) -> str:
    """What is compared."""
    if len(labels) == 1:
        return f"Answers of {labels[0]}"
    return f"{labels[0]} compared with {' and '.join(labels[1:])}"


def _beginning(text: str) -> str | None:
    """What is shown of a long text until it is unfolded; None for a text that is shown whole."""
    if len(text) <= LONG and text.count("\n") < LONG_LINES:
        return None
    lines = text[:SHOWN].split("\n")
    return "\n".join(lines[: LONG_LINES // 2]).rstrip() + " ..."


def _listed(values: Sequence[str]) -> str:
    return json.dumps(values, ensure_ascii=False) if values else ""


def _inert(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text
