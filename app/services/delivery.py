"""The loop that delivers webhooks: claim, send with no transaction open, record.

Any number of processes may run it on one database. What one of them has claimed when it dies is sent again by another
after its lease: each event arrives at least once, always under the same id.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter

from sqlalchemy.exc import SQLAlchemyError

from app.db.session import Database, Tx
from app.errors import DatabaseUnavailableError
from app.services import outbox, webhooks
from app.services.outbox import AN_ENDPOINT_MAX, Claim, Outcome
from app.services.sender import Sender
from app.settings import Settings
from app.telemetry import Metrics

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
GATHER_SECONDS = 0.005
"""How long an outcome waits for others, to be recorded with them."""
UNDER_WAY_MAX = 128
"""Deliveries that one process sends at once."""
LEASE_SLACK_SECONDS = 5.0
"""How much longer than the time limit of a request a lease is."""
DRAIN_SECONDS_MAX = 5.0
BACKLOG_SECONDS = 5.0
"""How often the gauges of the backlog are read."""


async def deliver_once(database: Database, client: Sender, settings: Settings, metrics: Metrics, worker_id: str) -> int:
    """Send what is due, up to the number that may be under way at once, and return how many that was."""
    desk = _Desk(database, client, settings, metrics, worker_id)
    claimed = await desk.turn()
    await desk.finish(None)
    return claimed


async def run(database: Database, client: Sender, settings: Settings, metrics: Metrics, worker_id: str) -> None:
    """Deliver for ever. When it is cancelled it claims no more, and waits a little for what is under way.

    An outage of the database is logged when it begins and when it ends; outcomes are kept meanwhile.
    """
    desk = _Desk(database, client, settings, metrics, worker_id)
    turn = None
    try:
        while True:
            turn = asyncio.create_task(desk.turn())
            await asyncio.shield(turn)  # a transaction is not cut in two
            await desk.wait()
    finally:
        if turn is not None:
            await turn
        await desk.finish(DRAIN_SECONDS_MAX)


class _Desk:
    """What one process has under way."""

    def __init__(
        self, database: Database, client: Sender, settings: Settings, metrics: Metrics, worker_id: str
    ) -> None:
        self._database = database
        self._client = client
        self._lease_seconds = settings.webhook_seconds_max + LEASE_SLACK_SECONDS
        self._metrics = metrics
        self._worker = worker_id
        self._sending: dict[asyncio.Task[Outcome], Claim] = {}
        self._ended: list[Outcome] = []
        self._failing = False
        self._backlog_at = 0.0

    async def turn(self) -> int:
        """Record what has ended, claim what is due, and begin to send it; return how many. Outages are logged."""
        try:
            claimed = await self._exchange()
        except DatabaseUnavailableError as error:
            self._fail(error.code)
            return 0
        except SQLAlchemyError:
            # not an outage: what can't be recorded must not hold up the rest; its leases end, and it is sent again
            log.exception("webhooks can't be recorded or claimed")
            self._ended.clear()
            return 0
        if self._failing:
            self._failing = False
            log.info("webhooks are delivered again")
        for claim in claimed:
            self._sending[asyncio.create_task(self._client.send(claim))] = claim
        return len(claimed)

    async def _exchange(self) -> list[Claim]:
        """Return what was claimed, once that and the outcomes so far are committed."""
        ended = list(self._ended)
        under_way = Counter(claim.endpoint_id for claim in self._sending.values())
        busy = [endpoint for endpoint, count in under_way.items() if count >= AN_ENDPOINT_MAX]
        room = UNDER_WAY_MAX - len(self._sending)
        claimed: list[Claim] = []
        async with self._database.transaction(self._worker) as tx:
            if ended:
                await webhooks.record(tx, ended, _draw)
            if room:
                claimed = await outbox.claim(tx, self._worker, room, self._lease_seconds, busy)
            await self._read_backlog(tx)
        del self._ended[: len(ended)]
        return claimed

    async def _read_backlog(self, tx: Tx) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._backlog_at:
            backlog = await outbox.read_backlog(tx)
            self._metrics.webhook_oldest_seconds.set(backlog.age_seconds)
            self._metrics.webhook_lag_seconds.set(backlog.lag_seconds)
            self._backlog_at = now + BACKLOG_SECONDS

    async def wait(self) -> None:
        """Wait until something has ended, or it is time to look for more."""
        if not self._sending:
            await asyncio.sleep(POLL_SECONDS)
            return
        done, _ = await asyncio.wait(self._sending, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if done:
            await asyncio.sleep(GATHER_SECONDS)
        self._collect()

    def _collect(self) -> None:
        for task in [task for task in self._sending if task.done()]:
            del self._sending[task]
            if task.cancelled():
                continue
            outcome = task.result()
            self._metrics.webhook_attempts.labels(_result(outcome)).inc()
            self._ended.append(outcome)

    async def finish(self, seconds: float | None) -> None:
        """Wait for what is under way, for so long at most, and record it; what is not done is another's to send."""
        if self._sending:
            _, late = await asyncio.wait(self._sending, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.wait(self._sending)
            self._collect()
        if self._ended:
            try:
                async with self._database.transaction(self._worker) as tx:
                    await webhooks.record(tx, self._ended, _draw)
            except (DatabaseUnavailableError, SQLAlchemyError) as error:
                log.warning("%s webhooks are sent again later: %s", len(self._ended), type(error).__name__)

    def _fail(self, code: str) -> None:
        if not self._failing:
            log.warning("webhooks wait: %s", code)
        self._failing = True


def _draw() -> float:
    return secrets.randbelow(1_000_000) / 1_000_000


def _result(outcome: Outcome) -> str:
    """Return the metric's label of an outcome: one of a few."""
    if outcome.status is not None:
        return "delivered" if outcome.delivered else "refused"
    return {"private address": "blocked", "timeout": "timeout"}.get(outcome.error or "", "unreachable")
