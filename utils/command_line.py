"""An argument parser with short errors that suggest the closest known word."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .deprecation import RenamedFlag

_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")


class CommandParser(argparse.ArgumentParser):
    """The parser of `dsvl` and of its subcommands.

    Attributes:
        remainder: the attribute of the parsed arguments that receives a list of everything after `--`, for a subcommand that
            passes it to another program; None for the others.
    """

    remainder: str | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Report unknown flags in the subcommand's parser, which knows the valid ones.

        An unknown flag is reported before missing arguments: a mistyped flag may be the cause of these.
        """
        args = list(sys.argv[1:] if args is None else args)
        if self.remainder is not None:  # argparse would take it for positional arguments
            end = args.index("--") if "--" in args else len(args)
            namespace = argparse.Namespace() if namespace is None else namespace
            setattr(namespace, self.remainder, args[end + 1 :])
            args = args[:end]
        if self._subparsers is None:
            for argument in args[: args.index("--")] if "--" in args else args:
                flag = argument.partition("=")[0]
                if flag.startswith("--") and not self._knows(flag):
                    actions = self._option_string_actions.items()
                    known = [name for name, action in actions if "_" not in name and not isinstance(action, RenamedFlag)]
                    self.error(f"unrecognized argument: {flag}{did_you_mean(flag.replace('_', '-'), known)}")
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def _knows(self, flag: str) -> bool:
        return flag in self._option_string_actions or (
            self.allow_abbrev and any(option.startswith(flag) for option in self._option_string_actions)
        )

    def error(self, message: str) -> NoReturn:
        """Print the error without the list of all flags, and exit with status 2."""
        if match := _CHOICE.search(message):
            message += did_you_mean(match[1], re.findall(r"[\w.-]+", match[2]))
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help lists what it takes.\n")


def did_you_mean(written: str, known: Sequence[str]) -> str:
    """A suggestion to append to a message about an unknown word; "" if no known word is similar."""
    close = difflib.get_close_matches(written, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
