"""Event streams: an agent's events as server-sent events, from any point on, as long as the caller listens."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

from app.api.body import encoder
from app.db.session import Database
from app.errors import (
    DatabaseUnavailableError,
    NotFoundError,
    OverloadedError,
    PrimeriskError,
    RateLimitedError,
    UnauthorizedError,
)
from app.services import events
from app.services.events import Event
from app.telemetry import Metrics

MEDIA_TYPE = "text/event-stream"
AN_AGENT_MAX = 4
"""Streams of one agent that a process holds open."""
STREAM_SECONDS_MAX = 900.0
"""Then it ends, and the caller comes back where it was: no connection of a caller that is gone stays for ever."""

_POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 15.0
"""How often a quiet stream shows that it is alive, and the key of any stream's caller is looked at again."""

_OPENING = b"retry: 1000\n\n"
_HEARTBEAT = b": nothing new\n\n"

Check = Callable[[], Awaitable[object]]
"""Raises UnauthorizedError once the caller's key is no longer good, NotFoundError once the agent is not its to see."""


class Streams:
    """The streams that a process holds open. Each polls one indexed row; only news are read."""

    def __init__(self, database: Database, metrics: Metrics, streams_max: int) -> None:
        self._database = database
        self._metrics = metrics
        self._streams_max = streams_max
        self._open: Counter[str | None] = Counter()
        self._closing = asyncio.Event()
        self.heartbeat_seconds = HEARTBEAT_SECONDS

    def close(self) -> None:
        """End every stream, and those to come, so that the process can stop."""
        self._closing.set()

    def check_room(self, agent_id: str | None) -> None:
        """Raise RateLimitedError or OverloadedError where another stream is one too many."""
        if self._open[agent_id] >= AN_AGENT_MAX:
            detail = f"{AN_AGENT_MAX} event streams of this agent are open"
            raise RateLimitedError(detail, code="rate_limited", headers={"Retry-After": "5"})
        if self._open.total() >= self._streams_max:
            detail = f"{self._streams_max} event streams are open: poll instead"
            raise OverloadedError(detail, code="overloaded", headers={"Retry-After": "5"})

    @contextmanager
    def _counted(self, agent_id: str | None) -> Iterator[None]:
        self._open[agent_id] += 1
        self._metrics.event_streams.set(self._open.total())
        try:
            yield
        finally:
            self._open[agent_id] -= 1
            if not self._open[agent_id]:
                del self._open[agent_id]
            self._metrics.event_streams.set(self._open.total())

    async def follow(self, agent_id: str | None, after: int | None, check: Check) -> AsyncIterator[bytes]:
        """Yield the events past the number `after`, or (None) past now, as they come; and comments in between.

        An outage of the database is waited out.
        """
        loop = asyncio.get_running_loop()
        with self._counted(agent_id):
            yield _OPENING
            watch = _Watch(check, self.heartbeat_seconds, loop.time() + STREAM_SECONDS_MAX)
            beat = loop.time()
            while not self._closing.is_set() and await watch.is_open():
                news: list[Event] = []
                with contextlib.suppress(DatabaseUnavailableError):
                    last = await events.last_sequence(self._database, agent_id)
                    after = last if after is None else after
                    if last > after:
                        news = await self._read(agent_id, after)
                        after = news[-1].sequence if news else last  # what was deleted meanwhile does not come
                for event in news:
                    if not await watch.is_open():
                        return
                    yield _rendered(event)
                    beat = loop.time()
                if news:
                    continue
                if loop.time() - beat >= self.heartbeat_seconds:
                    yield _HEARTBEAT
                    beat = loop.time()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), _POLL_SECONDS)

    async def _read(self, agent_id: str | None, after: int) -> list[Event]:
        async with self._database.transaction("event-stream") as tx:
            return await events.list_events(tx, agent_id, events.EVENTS_A_PAGE_MAX, after)


class _Watch:
    """Whether a stream may go on: its time is not up, and the agent was its caller's to see when it was last looked at.

    That, and the key, is looked at again each period, whether the stream is busy or quiet.
    """

    def __init__(self, check: Check, seconds: float, ends: float) -> None:
        self._check = check
        self._seconds = seconds
        self._ends = ends
        self._now = asyncio.get_running_loop().time
        self._checked = self._now()

    async def is_open(self) -> bool:
        now = self._now()
        if now >= self._ends:
            return False
        if now - self._checked < self._seconds:
            return True
        self._checked = now
        try:
            await self._check()
        except (UnauthorizedError, NotFoundError):
            return False
        except PrimeriskError:
            pass  # it can't be told now: the next period asks again
        return True


def _rendered(event: Event) -> bytes:
    """Return an event of the stream: JSON has no line feeds, so that one `data` line holds it."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.sequence, event.type.encode(), encoder.encode(event.shown()))
