"""Old names that are accepted for one more release."""

import argparse
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def renamed_argument(old: str, new: str) -> Callable[[F], F]:
    """Decorate a function to accept a keyword argument under its old name, with a `DeprecationWarning`.

    Args:
        old (`str`): The old name.
        new (`str`): The name of the argument in the function's signature.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                message = f"The argument {old!r} of {function.__name__} is deprecated; use {new!r}."
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


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
