"""Sending webhooks: one bounded POST to a public address, signed, and never anywhere else.

The only module that speaks HTTP to the outside. aiohttp, for its socket factory: the address that was checked is the
one that is connected to.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from app import telemetry, tracing
from app.db.session import Clock
from app.domain.dispatch import AN_AGENT_MAX, UNDER_WAY_MAX
from app.domain.webhooks import read_retry_after, signatures
from app.services.addresses import is_public
from app.services.events import body_of
from app.services.outbox import Claim, Outcome
from app.settings import Settings
from app.telemetry import package_version

log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[Sequence[tuple[Any, ...]]]]
"""A look-up of a host and a port, that gives what `getaddrinfo` gives."""

_KEEP_ALIVE_SECONDS = 2.0
"""Below the idle time of usual servers: a request on a connection that they have just closed counts as failed."""
_NAMES_KEPT_SECONDS = 10
_LOOK_UPS_MAX = UNDER_WAY_MAX
_LOOK_UPS_AN_AGENT_MAX = AN_AGENT_MAX
"""Look-ups for one agent at once. One that nobody answers outlives its request: it can't be broken off."""

_sent_for: ContextVar[str | None] = ContextVar("sent_for", default=None)
"""Whose webhook is being sent; its look-ups run in copies of its context."""


class PrivateAddressError(OSError):
    """The address is not one of the public internet."""


class LookUpsHangError(OSError):
    """As many names of an agent's are being looked up as may be."""


class Sender:
    """An HTTP client for webhooks, open between `async with`.

    No redirect is followed, no proxy of the environment used, no cookie kept, and the reply's body not read: its
    status says everything. With `webhook_allow_private` any address will do.
    """

    def __init__(self, settings: Settings, clock: Clock, resolve: Resolve | None = None) -> None:
        self._allow_private = settings.webhook_allow_private
        self._timeout = aiohttp.ClientTimeout(total=settings.webhook_seconds_max)
        self._clock = clock
        self._resolver = _Resolver(resolve, allow_private=self._allow_private)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(
            limit=0,  # whoever claims deliveries bounds them
            resolver=self._resolver,
            socket_factory=self._socket,
            keepalive_timeout=_KEEP_ALIVE_SECONDS,
            ttl_dns_cache=_NAMES_KEPT_SECONDS,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"User-Agent": f"primerisk/{package_version()}", "Content-Type": "application/json"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
        await self._resolver.close()  # aiohttp closes none that it was given

    async def send(self, claim: Claim) -> Outcome:
        """Send a delivery and return how that ended; nothing that a receiver does raises."""
        loop = asyncio.get_running_loop()
        begun, at = loop.time(), self._clock.now()
        status, error, wait = None, None, None
        _sent_for.set(claim.agent_id)
        telemetry.note(event_id=claim.event_id, **({} if claim.agent_id is None else {"agent_id": claim.agent_id}))
        try:
            with tracing.span("deliver", event_type=claim.type, event_id=claim.event_id):
                status, wait = await self._post(claim, int(at.timestamp()))
        except (aiohttp.ClientError, OSError, ValueError) as raised:
            error = _named(raised)
        except Exception:  # a receiver that finds a fault of the client's must not stop the deliveries to all others
            log.exception("a webhook could not be sent")
            error = "not HTTP"
        return Outcome(
            claim,
            at,
            round((loop.time() - begun) * 1000),
            status,
            error,
            None if wait is None else read_retry_after(wait, self._clock.now()),
        )

    async def _post(self, claim: Claim, timestamp: int) -> tuple[int, str | None]:
        if self._session is None:
            raise RuntimeError("the sender is not open")
        body = body_of(claim.type, claim.timestamp, claim.data)
        keys = [key for key in (claim.secret, claim.secret_before) if key is not None]
        headers = {
            "webhook-id": claim.event_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signatures(keys, claim.event_id, timestamp, body),
        }
        async with self._session.post(claim.url, data=body, headers=headers, allow_redirects=False) as reply:
            return reply.status, reply.headers.get("Retry-After")

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        """Return a socket for an address that is about to be connected: the last look, and the one that counts."""
        family, kind, protocol, _, where = address
        if not self._allow_private and not is_public(where[0]):
            raise PrivateAddressError("not a public address")
        return socket.socket(family, kind, protocol)


class _Resolver(AbstractResolver):
    """Gives the addresses of a name, if every one of them is public."""

    def __init__(self, look_up: Resolve | None, *, allow_private: bool) -> None:
        # not the loop's own few threads: names that nobody answers for would hold up all others
        self._threads = ThreadPoolExecutor(_LOOK_UPS_MAX, "look-up")
        self._look_up = look_up or self._ask_system
        self._asking = Counter[str | None]()
        self._allow_private = allow_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = [
            ResolveResult(
                hostname=host, host=where[0], port=port, family=kind, proto=protocol, flags=socket.AI_NUMERICHOST
            )
            for kind, _, protocol, _, where in await self._asked_fairly(host, port)
            if family in (socket.AF_UNSPEC, kind)
        ]
        if not self._allow_private and not all(is_public(result["host"]) for result in found):
            raise PrivateAddressError("not a public address")
        return found

    async def _asked_fairly(self, host: str, port: int) -> Sequence[tuple[Any, ...]]:
        """Look up a name, unless look-ups for the same agent hang already: they must not take everybody's threads."""
        agent = _sent_for.get()
        if self._asking[agent] >= _LOOK_UPS_AN_AGENT_MAX:
            raise LookUpsHangError("look-ups hang")
        self._asking[agent] += 1
        try:
            return await self._look_up(host, port)
        finally:
            self._asking[agent] -= 1
            if not self._asking[agent]:
                del self._asking[agent]

    async def _ask_system(self, host: str, port: int) -> Sequence[tuple[Any, ...]]:
        ask = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        return await asyncio.get_running_loop().run_in_executor(self._threads, ask)

    async def close(self) -> None:
        """Wait for no look-up."""
        self._threads.shutdown(wait=False, cancel_futures=True)


_NAMES: tuple[tuple[type[Exception], str], ...] = (
    (TimeoutError, "timeout"),
    (aiohttp.ClientConnectorDNSError, "the name was not found"),
    (aiohttp.ClientSSLError, "TLS failed"),
    (aiohttp.ClientConnectorError, "no connection"),
    (aiohttp.ServerDisconnectedError, "the connection was closed"),
    (OSError, "the connection was closed"),
)


def _named(error: Exception) -> str:
    """Return an error in a few words of ours: a receiver's bytes stay out of the log."""
    cause = getattr(error, "os_error", error)
    if isinstance(cause, (PrivateAddressError, LookUpsHangError)):
        return "private address" if isinstance(cause, PrivateAddressError) else "look-ups hang"
    return next((name for kind, name in _NAMES if isinstance(error, kind)), "not HTTP")
