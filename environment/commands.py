"""`dsvl env`."""

import argparse

from ..utils.local_paths import check_exists


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl env` to the command's parser."""
    parser = commands.add_parser("env", help="versions, devices and which attention runs, for bug reports")
    parser.add_argument(
        "model",
        nargs="?",
        metavar="DIR",
        type=check_exists,
        help="directory or Hub name of a DSVL checkpoint: say which attention it runs; its weights are not needed",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="time the fused kernels against gathered sdpa on each NVIDIA GPU, and keep on disk which is faster: processes "
        "that start later use it, until card, driver or versions change",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    import json
    import logging

    from ..utils.console_log import log_to_console
    from .report import collect, text
    from .tuning import tune_devices

    log_to_console(logging.WARNING)
    if arguments.tune:
        tune_devices()
    report = collect(arguments.model)
    print(json.dumps(report, indent=2) if arguments.json else text(report))
