"""Clients that send or read too slowly are cut off, so that they hold nobody else up."""

import asyncio
import time
from typing import Any

import h11
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from .requests import Limits, RequestError

BODY_GRACE_SECONDS = 5.0  # for a body, and one second more for each so many bytes that came:
BODY_BYTES_PER_SECOND = 50_000


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP, with bounds on the time that a client takes. (An ASGI application never learns of half a header.)

    Attributes:
        headers_seconds: for the headers of a request, and for what is still sent of a body after its answer.
        reading_seconds: in which a client that has fallen behind reads nothing of its answer.
    """

    headers_seconds = 10.0
    reading_seconds = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sending: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE:  # else uvicorn's own timer runs, until the next request begins
            self._watch()

    def _watch(self) -> None:
        """Run the clock while a client owes something that only this class waits for."""
        answered = self.cycle is not None and self.cycle.response_complete
        owes = self.conn.their_state is h11.IDLE or (self.conn.their_state is h11.SEND_BODY and answered)
        if not owes:
            self._sending = _stop(self._sending)
        elif self._sending is None:
            self._sending = self.loop.call_later(self.headers_seconds, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self._reading or self.loop.call_later(self.reading_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading = _stop(self._reading)

    def connection_lost(self, exc: Exception | None) -> None:
        self._sending, self._reading = _stop(self._sending), _stop(self._reading)
        super().connection_lost(exc)


def _stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Stop a clock that may be running; then there is none."""
    if timer is not None:
        timer.cancel()
    return None


# All that `uvicorn.run` needs to know but the address.
UVICORN: dict[str, Any] = {
    "http": BoundedProtocol,
    "log_level": "warning",
    "proxy_headers": False,
    "server_header": False,
    "timeout_graceful_shutdown": 5,
}


class Bodies:
    """Reads requests' bodies, each and all together within their limits.

    Attributes:
        received: bytes of the bodies that are not complete.
    """

    def __init__(self) -> None:
        self.received = 0

    async def read(self, request: Request, limits: Limits) -> bytes:
        """The body of a request.

        Args:
            request: a request, nothing of it read.
            limits: `body_bytes`, `body_seconds` and `receiving_bytes` of them.

        Raises:
            RequestError: if it is too large, comes too slowly, or others fill the memory.
            ClientDisconnect: if the client goes.
        """
        start = time.monotonic()
        body, stream = bytearray(), request.stream()
        try:
            while True:
                allowed = min(limits.body_seconds, BODY_GRACE_SECONDS + len(body) / BODY_BYTES_PER_SECOND)
                try:
                    chunk = await asyncio.wait_for(anext(stream), start + allowed - time.monotonic())
                except StopAsyncIteration:
                    return bytes(body)
                except TimeoutError:
                    raise RequestError(
                        f"Of the request, {len(body):,} bytes came in {allowed:.3g} s; send it faster, or smaller images.",
                        408,
                    ) from None
                body += chunk
                self.received += len(chunk)
                if len(body) > limits.body_bytes:
                    raise RequestError(f"The request is larger than {limits.body_bytes:,} bytes.", 413)
                if self.received > limits.receiving_bytes:
                    raise RequestError(
                        "The server receives as much as it takes; try again later.", 429, "rate_limit_exceeded"
                    )
        finally:
            self.received -= len(body)
