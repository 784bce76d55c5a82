"""The HTTP protocol with limits that uvicorn has not: bytes and seconds of a request's head, connections.

What it refuses, and what is no HTTP, is answered with a problem document like any other error.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app import telemetry
from app.api.problems import problem_response
from app.errors import (
    BadRequestError,
    HeadersTooLargeError,
    OverloadedError,
    PrimeriskError,
    RequestTimeoutError,
)
from app.settings import Settings

HEAD_BYTES_MAX = 65_536
KEEP_ALIVE_SECONDS = 30
_LINGER_SECONDS = 1.0
"""How long a refused caller may read its answer: closing at once, with bytes unread, would take it away."""
_LINGERING_MAX = 64


class Front(HttpToolsProtocol):
    """One connection.

    While no request is being answered, either uvicorn's timer for idle connections runs or the one for heads.
    """

    head_seconds_max: ClassVar[float]
    connections_max: ClassVar[int]
    send_seconds_max: ClassVar[float] = 60.0

    _unread_bytes = 0
    """Bytes since the last of a body, or since the last request: a head, trailers, framing of chunks."""
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _refusal: PrimeriskError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Give the first request its time, or refuse the connection."""
        super().connection_made(transport)
        self._await_head()
        excess = len(self.connections) - self.connections_max
        if excess > _LINGERING_MAX:
            transport.abort()
        elif excess > 0:
            detail = f"{self.connections_max} connections are open"
            self._refuse(OverloadedError(detail, code="overloaded", headers={"Retry-After": "1"}))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers; uvicorn resumes the writing."""
        self._head_is_here()
        super().connection_lost(exc)

    # super() by its name in what every request passes: it costs half

    def data_received(self, data: bytes) -> None:
        """Read on, unless the request's head has grown too large."""
        if self._refusal is not None:
            return
        self._unread_bytes += len(data)
        HttpToolsProtocol.data_received(self, data)
        if self._is_answering() and not self.cycle.more_body:
            self._unread_bytes = 0
        elif self._unread_bytes > HEAD_BYTES_MAX:
            self._refuse(_too_large())
        elif self._head_timer is None and not self._is_answering():
            self._await_head()

    def on_headers_complete(self) -> None:
        """Measure a head that came in one piece with much else."""
        if self._head_timer is not None:
            self._head_is_here()
        if self._unread_bytes > HEAD_BYTES_MAX:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > HEAD_BYTES_MAX:
                self._refuse(error := _too_large())
                raise error  # it stops the parser
        HttpToolsProtocol.on_headers_complete(self)

    def on_body(self, body: bytes) -> None:
        """Leave the body to the limits of the application."""
        self._unread_bytes = 0
        HttpToolsProtocol.on_body(self, body)

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser refused."""
        self._refuse(BadRequestError(msg, code="not_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: what a caller would like to upgrade to is no news of ours."""

    def pause_writing(self) -> None:
        """Give a caller that does not read its answer some time before it is cut off."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.send_seconds_max, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the caller reads."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _is_answering(self) -> bool:
        # None before the first request, whatever uvicorn's type says
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds_max, self._head_is_late)

    def _head_is_here(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_answering():
            return
        if self._unread_bytes == 0:
            self.transport.close()
        else:
            detail = f"the headers did not arrive within {self.head_seconds_max:g} seconds"
            self._refuse(RequestTimeoutError(detail, code="headers_too_slow"))

    def _refuse(self, error: PrimeriskError) -> None:
        """Answer and close; only close where the answer could be taken for that to an earlier request."""
        if self._refusal is not None or self.transport.is_closing():
            return
        self._refusal = error
        self._head_is_here()
        if self._is_answering() and (self.cycle.response_started or not self.cycle.more_body):
            self.transport.close()
            return
        self.transport.write(_rendered(error))
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)


def front(settings: Settings) -> type[Front]:
    """Return the protocol under these settings, for uvicorn's `http`."""

    class Limited(Front):
        head_seconds_max = settings.header_seconds_max
        connections_max = settings.connections_max

    return Limited


def _too_large() -> PrimeriskError:
    return HeadersTooLargeError(f"the headers have at most {HEAD_BYTES_MAX} bytes", code="headers_too_large")


def _rendered(error: PrimeriskError) -> bytes:
    identifier = secrets.token_hex(8)
    token = telemetry.request_id.set(identifier)
    try:
        response = problem_response(error)
    finally:
        telemetry.request_id.reset(token)
    headers = [*response.raw_headers, (b"x-request-id", identifier.encode()), (b"connection", b"close")]
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return STATUS_LINE[error.status] + lines + b"\r\n" + bytes(response.body)
