"""The command `dsvl`."""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from .utils.command_line import CommandParser
from .utils.missing_packages import import_error_message
from .utils.third_party_output import silence_third_party_output

# What each does, and the module that reads its arguments; only that of the command that is called is imported.
COMMANDS = {
    "compose": ("vision tower + language model -> one checkpoint directory", "composition.commands"),
    "train": ("fine-tune a checkpoint; also python -m dsvl.training under a launcher", "training.run"),
    "merge": ("a checkpoint + trained adapters -> one checkpoint directory", "training.merge"),
    "plan": ("the memory of training, per GPU, from the configuration alone", "training.plan"),
    "chat": ("talk to a checkpoint in the terminal", "chat.commands"),
    "data": ("convert raw data sets to conversations, and look at them", "data.commands"),
    "compare": ("the answers of evaluations side by side: scores, a table, a page", "evaluation.compare_command"),
    "evaluate": ("ask a checkpoint what a data set asks, and score its answers", "evaluation.commands"),
    "migrate": ("weights of DeepSpeed-VisualChat and of Qwen-VL -> checkpoints", "migration.commands"),
    "demo": ("talk to a checkpoint on a page in the browser", "page.commands"),
    "push": ("a checkpoint directory -> a repository on the Hub", "publishing.commands"),
    "serve": ("a checkpoint behind the OpenAI chat-completions protocol", "serving.commands"),
}
INTERRUPTED = 130  # the exit status of a command that Ctrl-C has ended, as shells have it
# What is kept then, and how to go on, where the command itself does not know it better.
KEPT = {
    "train": "Checkpoints that were complete are kept; the same command goes on from the last one, or starts over.",
    "data": "What was converted is kept; the same command goes on from there.",
    "evaluate": "Answers that were written are kept; the same command goes on from there.",
    "push": "Nothing was committed; the same command starts over.",
    "chat": "Nothing was saved; the same command starts over.",
    "serve": "The same command starts it again.",
    "demo": "The same command starts it again.",
}


def main(argv: Sequence[str] | None = None, import_package: Callable[[], None] = lambda: None) -> int:
    """Run the command.

    Args:
        argv: its arguments; by default the process's.
        import_package: called before a command runs, where `dsvl/__init__.py` was not executed yet.

    Returns:
        its exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        _parser(None).print_help()
        return 0
    silence_third_party_output()
    named = argv[0] if argv[0] in COMMANDS else None
    try:
        if named == "train":  # a YAML file may stand before its flags, which are those of three dataclasses
            import_package()
            import_module(".training.run", __package__).main(argv[1:])
        else:
            arguments = _parser(named).parse_args(argv)
            import_package()
            arguments.run(arguments)
    except KeyboardInterrupt as interruption:
        kept = KEPT.get(str(named), "Nothing was written; the same command starts over.")
        message = str(interruption) or f"Interrupted. {kept}"
    except ImportError as error:
        print(f"dsvl {named}: {import_error_message(error, named)}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:  # what a user can mend; anything else is ours, and shows where it is
        print(f"dsvl {named}: {error}", file=sys.stderr)
        return 1
    else:
        return 0
    gc.collect()  # progress bars end, with a line of their own
    if os.environ.get("RANK", "0") == "0":  # once, of the processes of a launcher
        print(f"\ndsvl {named}: {message}", file=sys.stderr)
    return INTERRUPTED


def _parser(named: str | None) -> CommandParser:
    """The parser, which knows the flags of one command alone."""
    parser = CommandParser(prog="dsvl", description="Compose, train and share vision-language models.")
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (about, module) in COMMANDS.items():
        if name == named:
            import_module(f".{module}", __package__).add_parser(commands)
        else:
            commands.add_parser(name, help=about, add_help=False)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version of the package")

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            installed = version("dsvl")
        except PackageNotFoundError:
            installed = "(not installed)"
        print(f"dsvl {installed}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
