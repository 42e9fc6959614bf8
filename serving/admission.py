"""What both servers do with a request before anything is computed: a slot for it, and how errors are sent."""

import contextlib
from collections.abc import Iterator

from openai.types.shared import ErrorObject
from starlette.responses import JSONResponse, Response

from .requests import RequestError


class RequestSlots:
    """Limits the number of concurrent requests.

    Args:
        limit: the number of slots.

    Attributes:
        held: the number of requests in progress.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Hold a slot.

        Raises:
            RequestError: with status 429 if all are taken.
        """
        if self.held >= self.limit:
            raise RequestError(
                f"The server is at its limit of {self.held} concurrent requests; try again later.",
                429,
                "rate_limit_exceeded",
            )
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1


def error_response(message: str, status: int, code: str | None = None, param: str | None = None) -> Response:
    """An error in OpenAI's format.

    Args:
        message: for the client.
        status: the HTTP status.
        code, param: see `RequestError`.
    """
    kind = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
    body = ErrorObject(message=message, type=kind, code=code, param=param).model_dump(
        include={"message", "type", "code", "param"}
    )
    headers = {429: {"Retry-After": "1"}, 408: {"Connection": "close"}}.get(status)
    return JSONResponse({"error": body}, status, headers=headers)
