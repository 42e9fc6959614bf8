"""`dsvl compare`: scores and answers of several evaluations side by side."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.local_paths import check_outputs

if TYPE_CHECKING:
    from .answer_records import AnswerRecord
    from .comparison import Summary, WinLossTie


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl compare` to the command's parser."""
    parser = commands.add_parser("compare", help="compare the answers of several evaluations")
    parser.add_argument(
        "answers",
        nargs="+",
        metavar="ANSWERS",
        help="answer files that dsvl evaluate wrote, or CSV tables of DeepSpeed-VisualChat's eval/results",
    )
    add_report_arguments(parser)
    parser.add_argument("--allow-urls", action="store_true", help="fetch images with http(s) URLs for the HTML report")
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from .comparison import join, summarize, win_loss_tie

    check_outputs(report_outputs(arguments), arguments.answers)
    records = _read(list(dict.fromkeys(arguments.answers)))
    runs = dict(zip(labels(records), records.values(), strict=True))
    conversations = join(runs)
    summaries = summarize(conversations)
    print("\n".join(table(summaries)))
    if any(summary.missing for summary in summaries.values()):
        common = summarize(conversations, common=True)
        shared = next((summary.answered for summary in common.values()), 0)
        if shared:
            print(f"\nOver the {shared:,} turn{'s' if shared > 1 else ''} that all runs answered:")
            print("\n".join(table(common)))
        else:
            print("\nNo turn was answered by all runs.")
    lines = win_loss_lines(next(iter(runs)), win_loss_tie(conversations))
    if lines:
        print("\n" + "\n".join(lines))
    write_reports(arguments, runs)


def _read(paths: Sequence[str]) -> "dict[str, list[AnswerRecord]]":
    """Read files of both kinds; a table's questions that contradict those of answer files are left out, and counted."""
    from .answer_records import read_records
    from .visualchat_answers import match_questions, read_visualchat_answers

    tables = [path for path in paths if path.lower().endswith(".csv")]
    records = {path: read_visualchat_answers(path) if path in tables else read_records(path) for path in paths}
    others = {path: found for path, found in records.items() if path not in tables}
    for path in tables if others else ():
        matched = match_questions(records[path], others)
        lines = [f"{path}: {matched.common:,} of {len(records[path]):,} questions are those of the other files"]
        if matched.others:
            lines.append(f"  {matched.others:,} at turns that the other files do not have")
        if matched.dropped:
            first = matched.dropped[0]
            lines.append(
                f"  {len(matched.dropped):,} left out: another question at the same turn (first: conversation {first.id!r}, "
                f"turn {first.turn})"
            )
        print("\n".join(lines))
        if not matched.common:
            raise ValueError(
                f"no question of {path} is in {', '.join(others)}; evaluate the file that the table answers "
                "(DeepSpeed-VisualChat's eval/eval_data)."
            )
        records[path] = matched.records
    if tables and others:
        print()
    return records


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `write_reports` reads."""
    parser.add_argument("--csv", metavar="FILE", help="also write the answers as a CSV table")
    parser.add_argument("--html", metavar="FILE", help="also write an HTML report with the images")


def report_outputs(arguments: argparse.Namespace) -> dict[str, str | None]:
    """The files that `write_reports` writes, for `check_outputs`."""
    return {"--csv": arguments.csv, "--html": arguments.html}


def write_reports(arguments: argparse.Namespace, runs: "Mapping[str, list[AnswerRecord]]", **page: str) -> None:
    """Write the requested CSV and HTML files, and print their paths; `page` is passed to `report.write_html`."""
    if arguments.csv is None and arguments.html is None:
        return
    from .report import write_csv, write_html

    if arguments.csv is not None:
        write_csv(arguments.csv, runs)
        print(arguments.csv)
    if arguments.html is not None:
        write_html(arguments.html, runs, allow_urls=arguments.allow_urls, **page)
        print(arguments.html)


def labels(runs: Mapping[str, Sequence["AnswerRecord"]]) -> list[str]:
    """Short unique names of runs: of the models if these differ, else of the files if these differ, else the paths.

    Args:
        runs: path of the answer file -> its records.
    """
    models = ["/".join(dict.fromkeys(Path(record.model).name for record in records)) for records in runs.values()]
    for names in (models, [Path(path).stem for path in runs]):
        if len(set(names)) == len(names) and all(names):
            return names
    return list(runs)


def win_loss_lines(first: str, win_loss_tie: Mapping[str, Mapping[str, "WinLossTie"]]) -> list[str]:
    """Format wins, losses and ties of the first run against each other run, as lines of text."""
    rows = [
        (f"{first} against {other}", metric, f"{counts.wins:,} wins", f"{counts.losses:,} losses", f"{counts.ties:,} ties")
        for other, metrics in win_loss_tie.items()
        for metric, counts in metrics.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(summaries: Mapping[str, "Summary"]) -> list[str]:
    """Format mean scores with their counts, as lines of text."""
    from .comparison import score

    metrics = list(dict.fromkeys(metric for summary in summaries.values() for metric in summary.means))
    rows = [["", "turns", "missing", *metrics]]
    for label, summary in summaries.items():
        row = [label, f"{summary.answered:,}", f"{summary.missing:,}"]
        for metric in metrics:
            mean, count = summary.means.get(metric, (None, 0))
            row.append("-" if mean is None else f"{score(mean)} ({count:,})")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
