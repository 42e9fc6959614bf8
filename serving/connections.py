"""Timeouts for clients that send or read too slowly."""

import asyncio
import time
from typing import Any

import h11
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from .requests import RequestError, RequestLimits

BODY_GRACE_SECONDS = 5.0  # a body may take this long, plus the time of the received bytes at this rate:
BODY_BYTES_PER_SECOND = 50_000


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with timeouts. (An ASGI application does not see incomplete headers.)

    Attributes:
        headers_seconds: timeout for the headers of a request, and for the rest of a body after its response.
        reading_seconds: timeout for a client that stops reading its response.
    """

    headers_seconds = 10.0
    reading_seconds = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._send_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_send_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_send_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE:  # otherwise uvicorn's keep-alive timer runs
            self._update_send_timer()

    def _update_send_timer(self) -> None:
        """Run the timer while the client has to send something that uvicorn sets no timeout for."""
        answered = self.cycle is not None and self.cycle.response_complete
        must_send = self.conn.their_state is h11.IDLE or (self.conn.their_state is h11.SEND_BODY and answered)
        if not must_send:
            self._send_timer = _cancel(self._send_timer)
        elif self._send_timer is None:
            self._send_timer = self.loop.call_later(self.headers_seconds, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self._read_timer or self.loop.call_later(self.reading_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read_timer = _cancel(self._read_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._send_timer, self._read_timer = _cancel(self._send_timer), _cancel(self._read_timer)
        super().connection_lost(exc)


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, if there is one; returns its new value, None."""
    if timer is not None:
        timer.cancel()
    return None


# Arguments of `uvicorn.run`, except for the address.
UVICORN: dict[str, Any] = {
    "http": BoundedProtocol,
    "log_level": "warning",
    "proxy_headers": False,
    "server_header": False,
    "timeout_graceful_shutdown": 5,
}


class BodyReader:
    """Reads request bodies and enforces the limits for each of them and for all together.

    Attributes:
        received: bytes received of incomplete bodies.
    """

    def __init__(self) -> None:
        self.received = 0

    async def read(self, request: Request, limits: RequestLimits) -> bytes:
        """Read the body of a request.

        Args:
            request: a request whose body has not been read.
            limits: `body_bytes`, `body_seconds` and `receiving_bytes` apply.

        Raises:
            RequestError: if the body is too large or too slow, or the server receives too much at once.
            ClientDisconnect: if the client disconnects.
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
                        f"Only {len(body):,} bytes of the request arrived in {allowed:.3g} s; "
                        "send it faster, or send smaller images.",
                        408,
                    ) from None
                body += chunk
                self.received += len(chunk)
                if len(body) > limits.body_bytes:
                    raise RequestError(f"The request is larger than {limits.body_bytes:,} bytes.", 413)
                if self.received > limits.receiving_bytes:
                    raise RequestError(
                        "The server receives too much data at the moment; try again later.", 429, "rate_limit_exceeded"
                    )
        finally:
            self.received -= len(body)
