"""`dsvl compare`: the answers of several evaluations, side by side."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answer_records import Record
    from .comparison import Duel, Summary


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl compare` to the command's parser."""
    parser = commands.add_parser("compare", help="the answers of evaluations side by side: scores, a table, a page")
    parser.add_argument("answers", nargs="+", metavar="ANSWERS", help="JSON lines that dsvl evaluate wrote")
    add_report_arguments(parser)
    parser.add_argument("--allow-urls", action="store_true", help="fetch images that are http(s) addresses for the page")
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from .answer_records import read_records
    from .comparison import duels, join, summarize

    records = {path: read_records(path) for path in dict.fromkeys(arguments.answers)}
    runs = dict(zip(labels(records), records.values(), strict=True))
    conversations = join(runs)
    summaries = summarize(conversations)
    print("\n".join(table(summaries)))
    if any(summary.missing for summary in summaries.values()):
        common = summarize(conversations, common=True)
        shared = next((summary.answered for summary in common.values()), 0)
        if shared:
            print(f"\nOver the {shared:,} round{'s' if shared > 1 else ''} that all have:")
            print("\n".join(table(common)))
        else:
            print("\nThere is no round that all have.")
    lines = standing(next(iter(runs)), duels(conversations))
    if lines:
        print("\n" + "\n".join(lines))
    write_reports(arguments, runs)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `write_reports` reads."""
    parser.add_argument("--csv", metavar="FILE", help="write a table for spreadsheets as well")
    parser.add_argument("--html", metavar="FILE", help="write a page with the images as well")


def write_reports(arguments: argparse.Namespace, runs: "Mapping[str, list[Record]]", **page: str) -> None:
    """Write the table and the page that were asked for, and say where; `page` goes to `report.write_html`."""
    if arguments.csv is None and arguments.html is None:
        return
    from .report import write_csv, write_html

    if arguments.csv is not None:
        write_csv(arguments.csv, runs)
        print(arguments.csv)
    if arguments.html is not None:
        write_html(arguments.html, runs, allow_urls=arguments.allow_urls, **page)
        print(arguments.html)


def labels(runs: Mapping[str, Sequence["Record"]]) -> list[str]:
    """Short names that tell runs apart: of the models; where those are the same, of the files; else their paths.

    Args:
        runs: a file's path -> its records.
    """
    models = ["/".join(dict.fromkeys(Path(record.model).name for record in records)) for records in runs.values()]
    for names in (models, [Path(path).stem for path in runs]):
        if len(set(names)) == len(names) and all(names):
            return names
    return list(runs)


def standing(first: str, duels: Mapping[str, Mapping[str, "Duel"]]) -> list[str]:
    """Wins, losses and ties of the first run against each other one, as lines of text."""
    rows = [
        (f"{first} against {other}", metric, f"{duel.wins:,} wins", f"{duel.losses:,} losses", f"{duel.ties:,} ties")
        for other, metrics in duels.items()
        for metric, duel in metrics.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(summaries: Mapping[str, "Summary"]) -> list[str]:
    """Mean scores with their counts, as lines of text."""
    from .comparison import score

    metrics = list(dict.fromkeys(metric for summary in summaries.values() for metric in summary.means))
    rows = [["", "rounds", "missing", *metrics]]
    for label, summary in summaries.items():
        row = [label, f"{summary.answered:,}", f"{summary.missing:,}"]
        for metric in metrics:
            mean, count = summary.means.get(metric, (None, 0))
            row.append("-" if mean is None else f"{score(mean)} ({count:,})")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
