"""`dsvl data`: convert, list, show."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..utils.local_paths import check_exists

MAX_BAD_SAMPLES_HELP = (
    "stop when more than this share of the samples had to be skipped, taken of at least 100 samples: of fewer, 5 may be "
    "(default 0.05)"
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl data` to the command's parser."""
    parser = commands.add_parser("data", help="convert raw data sets to conversations, and look at them")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    one = actions.add_parser("convert", help="a raw data set -> NAME.jsonl and NAME.report.json")
    one.add_argument("name", help="of a data set (dsvl data list)")
    one.add_argument("--root", required=True, help="the folder that holds the raw files; for the public forms, the file")
    one.add_argument("--out", required=True, help="folder for what is written; a conversion that was interrupted goes on")
    one.add_argument("--limit", type=int, help="stop after so many conversations")
    one.add_argument("--seed", type=int, default=0, help="of what is chosen at random (default 0)")
    one.add_argument("--workers", type=int, default=0, help="processes beside this one (default 0)")
    one.add_argument("--on-bad-sample", choices=("error", "skip"), default="error", help="a broken record (default error)")
    one.add_argument("--max-bad-samples", type=float, default=0.05, help=MAX_BAD_SAMPLES_HELP)
    one.set_defaults(run=_convert)

    one = actions.add_parser("list", help="the data sets that can be converted")
    one.set_defaults(run=_list)

    one = actions.add_parser("show", help="samples as the model will see them")
    one.add_argument("file", type=check_exists, help="conversations: whatever dsvl train takes as --data")
    one.add_argument("-n", "--number", type=int, default=3, help="how many (default 3)")
    one.add_argument("--model", type=check_exists, help="a checkpoint, whose template and tokens are used then")
    one.add_argument("--html", metavar="FILE", help="write a page with the images instead")
    one.add_argument("--on-bad-sample", choices=("error", "skip"), default="skip", help="a broken sample (default skip)")
    one.add_argument("--allow-urls", action="store_true", help="images may be http(s) addresses, which are fetched")
    one.set_defaults(run=_show)


def _convert(arguments: argparse.Namespace) -> None:
    from .convert import convert

    report = convert(
        arguments.name,
        arguments.root,
        arguments.out,
        limit=arguments.limit,
        seed=arguments.seed,
        workers=arguments.workers,
        on_bad_sample=arguments.on_bad_sample,
        progress=True,
        max_bad_samples=arguments.max_bad_samples,
    )
    print("\n".join(report.lines()))


def _list(arguments: argparse.Namespace) -> None:
    from .converters import CONVERTERS

    for name, one in sorted(CONVERTERS.items()):
        print(f"{name:22}{one.about}\n{'':22}reads {', '.join(one.files)}")


def _show(arguments: argparse.Namespace) -> None:
    from .show import show, show_page

    processor = None
    if arguments.model is not None:
        from transformers import AutoProcessor

        from ..configuration_dsvl import DSVLConfig

        if not Path(arguments.model).is_dir() or Path(arguments.model, "config.json").is_file():  # else a processor alone
            DSVLConfig.from_pretrained(arguments.model)  # refuses another model's directory
        processor = AutoProcessor.from_pretrained(arguments.model)
    options: dict[str, Any] = {"on_bad_sample": arguments.on_bad_sample, "allow_urls": arguments.allow_urls}
    if arguments.html is not None:
        show_page(arguments.file, arguments.html, arguments.number, processor, **options)
        print(arguments.html)
        return
    for text in show(arguments.file, arguments.number, processor, color=sys.stdout.isatty(), **options):
        print(text)
