"""`dsvl data`: convert, list, show."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..utils.local_paths import check_exists

MAX_BAD_SAMPLES_HELP = (
    "stop when more than this share of the samples was skipped; the share is taken of at least 100 samples (default 0.05, "
    "so that 5 may be skipped in a small data set)"
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl data` to the command's parser."""
    parser = commands.add_parser("data", help="convert raw data sets to conversations; preview samples")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    one = actions.add_parser("convert", help="convert a raw data set to NAME.jsonl and NAME.report.json")
    one.add_argument("name", help="the name of a data set (dsvl data list)")
    one.add_argument("--root", required=True, help="the folder of the raw files; for the public formats, the file")
    one.add_argument("--out", required=True, help="the output folder; an interrupted conversion is resumed")
    one.add_argument("--limit", type=int, help="stop after this number of conversations")
    one.add_argument("--seed", type=int, default=0, help="the seed of random choices (default 0)")
    one.add_argument("--workers", type=int, default=0, help="additional processes (default 0)")
    one.add_argument(
        "--on-bad-sample", choices=("error", "skip"), default="error", help="for broken records (default error)"
    )
    one.add_argument("--max-bad-samples", type=float, default=0.05, help=MAX_BAD_SAMPLES_HELP)
    one.set_defaults(run=_convert)

    one = actions.add_parser("list", help="list the data sets that can be converted")
    one.set_defaults(run=_list)

    one = actions.add_parser("show", help="show samples as the model sees them")
    one.add_argument("file", type=check_exists, help="conversations, as for dsvl train --data")
    one.add_argument("-n", "--number", type=int, default=3, help="the number of samples (default 3)")
    one.add_argument("--model", type=check_exists, help="a checkpoint whose chat template and tokens are used")
    one.add_argument("--html", metavar="FILE", help="write an HTML page with the images instead")
    one.add_argument("--on-bad-sample", choices=("error", "skip"), default="skip", help="for broken samples (default skip)")
    one.add_argument("--allow-urls", action="store_true", help="fetch images from http(s) URLs")
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

        # A directory without config.json may contain a processor alone.
        if not Path(arguments.model).is_dir() or Path(arguments.model, "config.json").is_file():
            DSVLConfig.from_pretrained(arguments.model)  # raises an error for other models
        processor = AutoProcessor.from_pretrained(arguments.model)
    options: dict[str, Any] = {"on_bad_sample": arguments.on_bad_sample, "allow_urls": arguments.allow_urls}
    if arguments.html is not None:
        show_page(arguments.file, arguments.html, arguments.number, processor, **options)
        print(arguments.html)
        return
    for text in show(arguments.file, arguments.number, processor, color=sys.stdout.isatty(), **options):
        print(text)
