"""Former names of command-line flags: accepted for one release, with a warning."""

import argparse
import logging
from typing import Any

logger = logging.getLogger(__name__)


class RenamedFlag(argparse.Action):
    """The action of a flag's former name; it sets the value of the new flag and is not shown in the help.

        parser.add_argument("--images", type=int, default=1, help="images per sample")
        parser.add_argument("--pictures", dest="images", type=int, action=RenamedFlag)

    Args:
        option_strings: the former name.
        dest: the attribute of the new flag.
        kwargs: see `argparse.Action`; `type`, `nargs` and `choices` as of the new flag.
    """

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **(kwargs | {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}))

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        new = f"--{self.dest.replace('_', '-')}"
        logger.warning("%s is deprecated and will be removed in dsvl 0.3; use %s.", option_string, new)
        setattr(namespace, self.dest, values)
