"""What every request passes: id, limits, metrics, and the last line of defence. Plain ASGI, for speed."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import telemetry, tracing
from app.api.problems import internal_error, problem_response
from app.errors import NotFoundError, OverloadedError, PayloadTooLargeError, PrimeriskError, RequestTimeoutError
from app.settings import Settings
from app.telemetry import Metrics

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CLIENT_CLOSED = 499
"""Counted where a caller hangs up before its answer; nobody receives it."""
_LENGTH_DIGITS_MAX = 15
_UNLIMITED = ("/healthz", "/readyz", "/metrics")
"""Answered also when the process is full: they are how an operator finds out."""


class Guard:
    """Gives each request an id, bounds its body in bytes and time, counts it, and hides our faults."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.bytes_max = settings.body_bytes_max
        self.seconds_max = settings.body_seconds_max
        self.under_way_max = settings.requests_under_way_max
        self.metrics = metrics
        self.under_way = 0
        self.under_way_each_max = max(1, settings.requests_under_way_max // 4)
        self._under_way_each: dict[bytes, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request; pass everything else through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        token, nobody = telemetry.request_id.set(_identifier(scope)), telemetry.concerned.set({})
        exchange = _Exchange(scope, send, telemetry.request_id.get())
        started = time.perf_counter()
        credential = _credential(scope)
        self.under_way += 1
        self._under_way_each[credential] = self._under_way_each.get(credential, 0) + 1
        self.metrics.requests_under_way.set(self.under_way)
        try:
            with tracing.request_span(scope["method"], scope["headers"]):
                await self._answer(scope, receive, exchange)
                tracing.name_request(scope["method"], _template(scope), exchange.status, exchange.identifier)
        finally:
            self.under_way -= 1
            self._leave(credential)
            self.metrics.requests_under_way.set(self.under_way)
            self._count(scope, exchange.status, time.perf_counter() - started)
            telemetry.concerned.reset(nobody)
            telemetry.request_id.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, exchange: _Exchange) -> None:
        try:
            self._check_room(scope)
            self._check_path(scope["path"])
            self._check_length(scope)
            await self.app(scope, self._bounded(receive), exchange.send)
        except PrimeriskError as error:
            await exchange.refuse(error)
        except ClientDisconnect:
            exchange.status = _CLIENT_CLOSED
        except Exception:
            log.exception("unhandled error on %s", scope["path"])
            await exchange.refuse(internal_error())

    def _check_room(self, scope: Scope) -> None:
        """Refuse what is too much at once, in all or of one key: one that withholds bodies leaves room to others."""
        if scope["path"] in _UNLIMITED:
            return
        if self.under_way > self.under_way_max:
            detail = f"{self.under_way_max} requests are under way"
            raise OverloadedError(detail, code="overloaded", headers={"Retry-After": "1"})
        if self._under_way_each[_credential(scope)] > self.under_way_each_max:
            detail = f"{self.under_way_each_max} requests with this key are under way"
            raise OverloadedError(detail, code="overloaded", headers={"Retry-After": "1"})

    def _leave(self, credential: bytes) -> None:
        left = self._under_way_each[credential] - 1
        if left:
            self._under_way_each[credential] = left
        else:
            del self._under_way_each[credential]

    def _check_path(self, path: str) -> None:
        """Refuse control characters: a router's `$` ends before a line feed, and Postgres takes no NUL."""
        if not path.isprintable():
            raise NotFoundError("a path has no control characters", code="no_such_route")

    def _check_length(self, scope: Scope) -> None:
        """Refuse a declared length past the limit before a byte of the body is read."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():
                digits = value.lstrip(b"0")
                if len(digits) > _LENGTH_DIGITS_MAX or int(digits or b"0") > self.bytes_max:
                    raise self._too_large()

    def _too_large(self) -> PayloadTooLargeError:
        detail = f"a request body has at most {self.bytes_max} bytes"
        return PayloadTooLargeError(detail, code="body_too_large", headers={"Connection": "close"})

    def _bounded(self, receive: Receive) -> Receive:
        """Return a `receive` that counts bytes and stops a body that trickles in."""
        received = 0
        deadline: float | None = None

        async def bounded() -> Message:
            nonlocal received, deadline
            loop = asyncio.get_running_loop()
            deadline = deadline or loop.time() + self.seconds_max
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                detail = f"the body did not arrive within {self.seconds_max:g} seconds"
                raise RequestTimeoutError(detail, code="body_too_slow", headers={"Connection": "close"}) from None
            received += len(message.get("body", b""))
            if received > self.bytes_max:
                raise self._too_large()
            if not message.get("more_body"):
                deadline = float("inf")
            return message

        return bounded

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = _template(scope)
        method = scope["method"] if scope["method"] in _METHODS else "-"
        self.metrics.requests.labels(method, route, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s %s %d %.1f ms", method, route, status, 1_000.0 * seconds)


class _Exchange:
    """The way out of one request: adds the id, remembers the status, refuses only what has not begun."""

    def __init__(self, scope: Scope, send: Send, identifier: str) -> None:
        self._send = send
        self._scope = scope
        self.identifier = identifier
        self._header = (b"x-request-id", identifier.encode())
        self.status = 500
        self.begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.status = True, message["status"]
            message["headers"] = [*message["headers"], self._header]
        await self._send(message)

    async def refuse(self, error: PrimeriskError) -> None:
        if self.begun:  # too late for another answer: cutting the connection tells the caller
            raise error
        await problem_response(error)(self._scope, _nothing_more, self.send)


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}


def _credential(scope: Scope) -> bytes:
    """Return what the request authenticates with, checked or not; empty for nothing."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            return bytes(value)
    return b""


def _identifier(scope: Scope) -> str:
    """Return the caller's own X-Request-Id where it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(text := value.decode("latin-1")):
            return str(text)
    return secrets.token_hex(8)


_NO_ROUTE = "none"


def _template(scope: MutableMapping[str, Any]) -> str:
    """Return the route's template, so that ids in paths make no series of their own."""
    route = scope.get("route")
    return getattr(route, "path", _NO_ROUTE)
