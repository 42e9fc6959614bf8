"""Reports of answers: a CSV table, and a self-contained HTML page with the images."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..utils.image_loading import open_image, thumbnail_data_url
from ..utils.video_loading import VIDEO_SUFFIXES, open_video
from ..video_decoding_dsvl import VideoSampling
from .comparison import ComparedTurn, Runs, join, metrics_of, score, summarize, win_loss_tie

# A page should fit into a mail: the limit is often 25 MB, and base64 adds a third.
PAGE_BYTES = 12 * 2**20
WIDTHS = {480: 250, 320: 500, 200: None}  # width of images in pixels -> maximum number of images on a page

# Answers with more characters or lines are collapsed to their first characters.
MAX_CHARACTERS, MAX_LINES, COLLAPSED_CHARACTERS = 800, 16, 400

# Spreadsheets evaluate a cell that begins with one of these: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def write_csv(path: str | Path, runs: Runs) -> None:
    """Write the answers as a CSV table with a row for each conversation, turn and run.

    The file opens in spreadsheets (UTF-8 with a byte order mark). A text that a spreadsheet would evaluate as a formula gets
    an apostrophe in front; the exact texts are in the answer files.

    Args:
        path: of the file.
        runs: label -> records. A turn that a run did not answer is a row with `answered` "no".

    Raises:
        ValueError: see `comparison.join`.
    """
    conversations = join(runs)
    metrics = metrics_of(conversations)
    with open(path, "w", encoding="utf-8-sig", errors="replace", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "turn", "model", "answered", "question", "images", "answer", "references", *metrics])
        for one in (one for turns in conversations.values() for one in turns):
            asked = one.asked
            for label, record in one.answers.items():
                scores = record.scores if record else {}
                texts = [asked.question, _to_json(asked.images), record.answer if record else "", _to_json(asked.references)]
                table.writerow(
                    [_escape_formula(asked.id), asked.turn, _escape_formula(label), "yes" if record else "no"]
                    + [_escape_formula(text) for text in texts]
                    + [scores.get(metric, "") for metric in metrics]
                )


def write_html(path: str | Path, runs: Runs, title: str | None = None, allow_urls: bool = False) -> None:
    """Write the answers as a self-contained HTML page: images beside questions and answers, runs side by side.

    The size of images depends on their number. For an image that cannot be read, or beyond `PAGE_BYTES` of images, the page
    shows the file name and the reason. It contains no paths of this machine.

    Args:
        path: of the file.
        runs: label -> records.
        title: of the page; *optional*, defaults to the labels of the runs.
        allow_urls: whether images with http(s) URLs are fetched.

    Raises:
        ValueError: see `comparison.join`.
    """
    conversations = join(runs)
    turns = [one for several in conversations.values() for one in several]
    count = sum(len(one.asked.images) for one in turns)
    embedder = _ImageEmbedder(next(width for width, most in WIDTHS.items() if most is None or count <= most), allow_urls)
    # Images come first: the head of the page says how many are not shown.
    shown = {name: [_shown(one, embedder) for one in several] for name, several in conversations.items()}
    page = _environment().from_string(files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8"))
    text = page.render(
        title=title or _title(list(runs)),
        labels=list(runs),
        metrics=metrics_of(conversations),
        summaries=summarize(conversations),
        missing=any(one.missing for one in turns),
        common=summarize(conversations, common=True),
        win_loss_tie=win_loss_tie(conversations),
        conversations=shown,
        turns=len(turns),
        images=count,
        not_shown=embedder.not_shown,
        differing=sum(one.differs for one in turns),
        imperfect=sum(one.imperfect for one in turns),
    )
    Path(path).write_text(text, encoding="utf-8", errors="replace")


class _ImageEmbedder:
    """Embeds images into a page, up to `PAGE_BYTES`."""

    def __init__(self, width: int, allow_urls: bool) -> None:
        self.width, self.allow_urls = width, allow_urls
        self.bytes = self.not_shown = 0

    def image(self, source: str) -> dict[str, str]:
        """The `name` of an image, and its `data` URL or the `reason` why there is none."""
        name = source.rstrip("/").rpartition("/")[2] or source
        reason = ""
        if self.bytes < PAGE_BYTES:
            try:
                data = thumbnail_data_url(self._opened(source), self.width)
            except ValueError as error:
                reason = str(error).removeprefix(f"The image {source[:300]} ")
            else:
                self.bytes += len(data)
                return {"name": name, "data": data, "reason": ""}
        else:
            reason = f"is not shown: the page has {PAGE_BYTES / 2**20:.0f} MB of images already."
        self.not_shown += 1
        return {"name": name, "data": "", "reason": reason}

    def _opened(self, source: str) -> Any:
        """An image, or the frame in the middle of a video."""
        if not source.lower().endswith(VIDEO_SUFFIXES):
            return open_image(source, self.allow_urls)
        return open_video(source, VideoSampling(max_frames=1), self.allow_urls).frames[0]


def _shown(one: ComparedTurn, embedder: _ImageEmbedder) -> dict[str, Any]:
    """The variables of a turn for the template."""
    return {
        "number": one.asked.turn + 1,
        "question": one.asked.question,
        "images": [embedder.image(source) for source in one.asked.images],
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
    """The best mean of a metric; None if all means are equal."""
    means = {summary.means[metric][0] for summary in summaries.values() if metric in summary.means}
    return max(means) if len(means) > 1 else None


def _title(labels: list[str]) -> str:
    """The default title."""
    if len(labels) == 1:
        return f"Answers of {labels[0]}"
    return f"{labels[0]} compared with {' and '.join(labels[1:])}"


def _beginning(text: str) -> str | None:
    """What is shown of a long text while it is collapsed; None for a short text."""
    if len(text) <= MAX_CHARACTERS and text.count("\n") < MAX_LINES:
        return None
    lines = text[:COLLAPSED_CHARACTERS].split("\n")
    return "\n".join(lines[: MAX_LINES // 2]).rstrip() + " ..."


def _to_json(values: Sequence[str]) -> str:
    return json.dumps(values, ensure_ascii=False) if values else ""


def _escape_formula(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text
