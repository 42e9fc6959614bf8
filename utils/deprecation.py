"""Old names that are accepted for one more release."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

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
