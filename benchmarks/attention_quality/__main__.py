"""The command of the experiment; README.md shows it in use.

cd benchmarks
python -m attention_quality parts --parts DIR
python -m attention_quality runs --parts DIR --results DIR --stage primary
python -m attention_quality step-times --parts DIR --results DIR
python -m attention_quality report --results DIR
"""

import argparse
import os
import sys
import time
from pathlib import Path

from measure import write
from transformers.utils import logging

from attention_quality.arms import ARMS, PRIMARY
from attention_quality.parts import make_parts
from attention_quality.plan import STAGES, path_of
from attention_quality.runs import do_runs, do_side_by_side, missing_runs
from attention_quality.sizes import SIZES_OF_EXPERIMENT
from attention_quality.step_times import measure_steps


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m attention_quality", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    parts = commands.add_parser("parts", help="train the language model and the vision tower")
    parts.add_argument("--size", choices=SIZES_OF_EXPERIMENT, default="full")
    parts.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    parts.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="that draw documents")

    runs = commands.add_parser("runs", help="do the runs of stages that are missing")
    runs.add_argument("--stage", nargs="+", choices=STAGES, required=True, help="one after the other")
    runs.add_argument("--at-once", type=int, default=1, help="runs side by side, in turn on each GPU (default 1)")
    runs.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which nothing runs (default: no limit)"
    )
    runs.add_argument("--conversations", type=int, help="instead of those of the stages, for a tiny version")
    runs.add_argument("--only", nargs="+", help="names of runs of the stages (default: all)")

    timed = commands.add_parser("step-times", help="time a step of each arm, with nothing else on the device")
    timed.add_argument("--arms", nargs="+", choices=ARMS, default=list(PRIMARY))
    timed.add_argument("--rounds", type=int, default=20)

    report = commands.add_parser("report", help="table, curves and verdict")
    report.add_argument("--out", type=Path, help="output directory (default: that of the results)")

    for command in (parts, runs, timed):
        command.add_argument("--parts", type=Path, required=True, help="folder of the shared parts")
    for command in (runs, timed, report):
        command.add_argument("--results", type=Path, required=True, help="folder of the results")
    return parser


def main(argv: list[str] | None = None) -> int:
    logging.disable_progress_bar()  # of the parts, which each run loads
    try:
        return run_command(make_parser().parse_args(argv))
    except ValueError as error:  # parts or results that do not fit, which say what to do
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_command(options: argparse.Namespace) -> int:
    if options.command == "parts":
        if (options.parts / "parts.json").exists():
            print(f"{options.parts} holds the parts already.")
            return 0
        print(make_parts(options.size, options.parts, options.seed, options.workers))
    elif options.command == "step-times":
        if (options.results / "step_times.json").exists():  # the runs at equal time were chosen by them
            print(f"{options.results} holds the step times already.")
            return 0
        write(
            str(options.results / "step_times.json"),
            options_as_text(options),
            measure_steps(options.parts, options.arms, options.rounds),
        )
    elif options.command == "report":
        from attention_quality.report import write_report  # matplotlib is not needed where runs are made

        print(write_report(options.results, options.out or options.results))
    else:
        return run_stages(options)
    return 0


def options_as_text(options: argparse.Namespace) -> argparse.Namespace:
    """For a JSON file."""
    return argparse.Namespace(
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    )


def run_stages(options: argparse.Namespace) -> int:
    """Do the missing runs of stages; the exit status is 1 if some failed.

    Raises:
        ValueError: if parts, results or names do not fit.
    """
    deadline, failed = time.monotonic() + options.budget, 0
    unknown = set(options.only or ())
    for stage in options.stage:
        runs = missing_runs(stage, options.results, options.conversations)
        if options.only is not None:
            runs = [run for run in runs if run.name in options.only]
        unknown -= {run.name for run in runs}
        if not runs:
            print(f"{stage}: nothing is missing.", flush=True)
        elif options.at_once == 1:
            failed += do_runs(runs, options.parts, options.results, deadline)
        else:
            flags = ["--stage", stage, "--parts", str(options.parts), "--results", str(options.results)]
            flags += ["--budget", str(deadline - time.monotonic())]
            if options.conversations is not None:
                flags += ["--conversations", str(options.conversations)]
            failed += do_side_by_side(runs, flags, options.at_once, deadline)
        left = [run for run in runs if not path_of(run, options.results).exists()]
        if left:
            print(f"{stage}: {len(left)} runs are missing; call this again to do them.", flush=True)
            if STAGES[stage].chooses_rates or deadline <= time.monotonic():
                break  # the stages that follow need its rates, or have no time
    names = [name for name in unknown if not (options.results / "runs" / f"{name}.json").exists()]
    if names and options.stage[-1] == stage:
        raise ValueError(
            f"--only {' '.join(sorted(names))}: the stages {', '.join(options.stage)} have no such run; names are those of "
            "the files, without .json."
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
