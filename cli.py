"""The command line interface, `dsvl`."""

import _thread
import argparse
import gc
import os
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from .utils.command_line import CommandParser
from .utils.compiled_code import keep_compiled_code
from .utils.missing_packages import import_error_message
from .utils.third_party_output import silence_third_party_output

# Command -> help and the module that defines its arguments. Only the module of the called command is imported.
COMMANDS = {
    "compose": ("compose a vision tower and a language model into a checkpoint", "composition.commands"),
    "train": ("fine-tune a checkpoint; also python -m dsvl.training under a launcher", "training.commands"),
    "merge": ("merge trained adapters into a checkpoint", "training.merge"),
    "plan": ("estimate the memory of a training per GPU", "training.plan"),
    "chat": ("chat with a checkpoint in the terminal", "chat.commands"),
    "data": ("convert raw data sets to conversations, and show them", "data.commands"),
    "compare": ("compare the answers of several evaluations", "evaluation.compare_command"),
    "evaluate": ("generate and score a checkpoint's answers to a data set", "evaluation.commands"),
    "migrate": ("convert weights of DeepSpeed-VisualChat and Qwen-VL; update a checkpoint's code", "migration.commands"),
    "export": ("export a checkpoint to a model of transformers' own", "export.commands"),
    "demo": ("chat with a checkpoint on a web page", "page.commands"),
    "push": ("publish a checkpoint directory on the Hub", "publishing.commands"),
    "serve": ("serve a checkpoint with the OpenAI chat completions API", "serving.commands"),
    "env": ("versions, devices and which attention runs, for bug reports", "environment.commands"),
}
COMPILING = ("train", "chat", "evaluate", "demo", "serve", "env")  # commands that may compile, and the one that says where
INTERRUPTED = 130  # exit status after Ctrl-C, as in shells
# Messages after Ctrl-C for commands without a message of their own: what is kept, and how to resume.
KEPT = {
    "train": "Complete checkpoints are kept; run the same command to resume from the last one, or to start again.",
    "data": "Converted data is kept; run the same command to resume.",
    "evaluate": "Written answers are kept; run the same command to resume.",
    "push": "Nothing was committed; run the same command to start again.",
    "chat": "Nothing was saved.",
    "serve": "The server was stopped.",
    "demo": "The server was stopped.",
}


def main(argv: Sequence[str] | None = None, import_package: Callable[[], None] = lambda: None) -> int:
    """Run the command.

    Args:
        argv: *optional*, its arguments; defaults to those of the process.
        import_package: executes `dsvl/__init__.py` before a command runs, if it was not executed yet.

    Returns:
        The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        _parser(None).print_help()
        return 0
    silence_third_party_output()
    hook, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    named = argv[0] if argv[0] in COMMANDS else None
    if named in COMPILING:
        keep_compiled_code()
    try:
        if named == "train":  # its flags are the fields of three dataclasses, and a YAML file may come first
            import_package()
            import_module(".training.commands", __package__).main(argv[1:])
        else:
            arguments = _parser(named).parse_args(argv)
            import_package()
            arguments.run(arguments)
    except KeyboardInterrupt as interruption:
        kept = KEPT.get(str(named), "Nothing was written; run the same command to start again.")
        message = str(interruption) or f"Interrupted. {kept}"
    except ImportError as error:
        print(f"dsvl {named}: {import_error_message(error, named)}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:  # errors that a user can fix; others are bugs, with a traceback
        print(f"dsvl {named}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        print(f"dsvl {named}: a weights file is damaged ({error}); copy or download the checkpoint again.", file=sys.stderr)
        return 1
    else:
        return 0
    finally:
        sys.unraisablehook = hook
    gc.collect()  # closes progress bars, so that the message starts on a new line
    if os.environ.get("RANK", "0") == "0":  # only one of the processes of a launcher
        print(f"\ndsvl {named}: {message}", file=sys.stderr)
    return INTERRUPTED


def _interrupt_again(unraisable: Any) -> None:
    """A hook for errors that nothing can catch. Python drops a Ctrl-C that comes while a finalizer runs: send it again."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
    elif not sys.is_finalizing():
        threading.Timer(0.05, _thread.interrupt_main).start()


def _parser(named: str | None) -> CommandParser:
    """The parser with the flags of one command."""
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
        from .utils.installed_packages import installed_version

        print(f"dsvl {installed_version('dsvl') or '(not installed)'}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
