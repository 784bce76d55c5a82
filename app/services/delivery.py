"""The loop that delivers webhooks: claim, send with no transaction open, record.

Any number of processes may run it on one database. What one of them has claimed when it dies is sent again by another
after its lease: each event arrives at least once, always under the same id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from datetime import timedelta

from app.db.session import Database
from app.domain.dispatch import UNDER_WAY_MAX
from app.errors import DatabaseUnavailableError
from app.services import outbox, webhooks
from app.services.outbox import Claim, Outcome
from app.services.sender import Sender
from app.settings import Settings
from app.telemetry import Metrics

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
GATHER_SECONDS = 0.005
"""How long an outcome waits for others, to be recorded with them."""
RECORDED_AT_ONCE_MAX = 500
LEASE_SLACK_SECONDS = 5.0
"""How much longer than the time limit of a request a lease is."""
DRAIN_SECONDS_MAX = 5.0
FAULT_PAUSE_SECONDS = 1.0
TIDY_SECONDS = 5.0
"""How often what waits for endpoints that are gone is looked for."""


async def deliver_once(database: Database, client: Sender, settings: Settings, metrics: Metrics, worker_id: str) -> int:
    """Send what is due, up to what may be under way at once, tidy up, and return how many were sent."""
    desk = _Desk(database, client, settings, metrics, worker_id)
    claimed = await desk.turn()
    await desk.finish(None)
    await desk.tidy()
    return claimed


async def run(database: Database, client: Sender, settings: Settings, metrics: Metrics, worker_id: str) -> None:
    """Deliver for ever. When it is cancelled it claims no more, and waits a little for what is under way.

    An outage of the database is logged when it begins and when it ends; outcomes are kept meanwhile. A fault of ours
    is logged and counted, and after a pause it goes on.
    """
    desk = _Desk(database, client, settings, metrics, worker_id)
    tidying = asyncio.create_task(desk.tidy_for_ever())
    turn = None
    try:
        while True:
            turn = asyncio.create_task(desk.turn())
            await asyncio.shield(turn)  # a transaction is not cut in two
            await desk.wait()
    finally:
        tidying.cancel()
        if turn is not None:
            await turn
        await desk.finish(DRAIN_SECONDS_MAX)
        await asyncio.wait([tidying])


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
        self._recording: asyncio.Task[None] | None = None
        self._untidy = asyncio.Event()
        self._failing = set[str]()

    async def turn(self) -> int:
        """Have recorded what has ended, claim what is due, and begin to send it; return how many that is.

        Nothing that happens there raises: outages are logged once, faults each time.
        """
        try:
            await self._begin_recording()
            claimed = await self._claim() if len(self._sending) < UNDER_WAY_MAX else []
        except DatabaseUnavailableError as error:
            self._fails("claimed", error)
            return 0
        except Exception:
            self._metrics.webhook_faults.inc()
            log.exception("webhooks can't be claimed")
            await asyncio.sleep(FAULT_PAUSE_SECONDS)
            return 0
        self._works("claimed")
        for claim in claimed:
            self._sending[asyncio.create_task(self._client.send(claim))] = claim
        return len(claimed)

    async def _claim(self) -> list[Claim]:
        # what has ended is under way until it is recorded: only then is it known which endpoints fail
        under_way = [*self._sending.values(), *(outcome.claim for outcome in self._ended)]
        async with self._database.transaction(self._worker) as tx:
            return await outbox.claim(tx, self._worker, self._lease_seconds, under_way)

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
            claim = self._sending.pop(task)
            if task.cancelled():
                continue
            if error := task.exception():  # its lease ends, and it is sent again
                self._metrics.webhook_faults.inc()
                log.error("delivery %s could not be sent", claim.id, exc_info=error)
                continue
            outcome = task.result()
            self._metrics.webhook_attempts.labels(_result(outcome)).inc()
            self._ended.append(outcome)

    # --- what has ended

    async def _begin_recording(self) -> None:
        """Record what has ended, beside everything else where that takes long: it must not hold up what is due."""
        if self._ended and (self._recording is None or self._recording.done()):
            self._recording = asyncio.create_task(self._record())
        if self._recording is not None:
            await asyncio.wait([self._recording], timeout=POLL_SECONDS)

    async def _record(self) -> None:
        """Record outcomes, all at once; where that fails for another reason than an outage, endpoint by endpoint."""
        batch = self._ended[:RECORDED_AT_ONCE_MAX]
        try:
            await self._write(batch)
        except DatabaseUnavailableError as error:
            self._fails("recorded", error)
            if error.code != "database_busy":
                return  # nobody can claim them either: they are kept
        except Exception:
            self._metrics.webhook_faults.inc()
            log.exception("webhooks can't be recorded at once")
        else:
            self._works("recorded")
            self._forget(batch)
            return
        by_endpoint = defaultdict[str, list[Outcome]](list)
        for outcome in batch:
            by_endpoint[outcome.claim.endpoint_id].append(outcome)
        for outcomes in by_endpoint.values():
            await self._record_alone(outcomes)

    async def _record_alone(self, outcomes: Sequence[Outcome]) -> None:
        """Record the outcomes of one endpoint. What can't be written is sent again once its lease has ended."""
        try:
            await self._write(outcomes)
        except DatabaseUnavailableError:
            lapsed = self._database.clock.now() - timedelta(seconds=self._lease_seconds)
            outcomes = [outcome for outcome in outcomes if outcome.at < lapsed]
        except Exception:
            self._metrics.webhook_faults.inc()
            log.exception("a webhook can't be recorded")
        self._forget(outcomes)

    async def _write(self, outcomes: Sequence[Outcome]) -> None:
        async with self._database.transaction(self._worker) as tx:
            disabled = await webhooks.record(tx, outcomes, _draw)
        if disabled:
            self._untidy.set()

    def _forget(self, outcomes: Sequence[Outcome]) -> None:
        done = {id(outcome) for outcome in outcomes}
        self._ended = [outcome for outcome in self._ended if id(outcome) not in done]

    async def finish(self, seconds: float | None) -> None:
        """Wait for what is under way, for so long at most, and record it; what is not done is another's to send."""
        if self._sending:
            _, late = await asyncio.wait(self._sending, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.wait(self._sending)
            self._collect()
        rest = asyncio.create_task(self._record_rest())
        await asyncio.wait([rest], timeout=seconds)
        if not rest.done():
            rest.cancel()
            await asyncio.wait([rest])
        if self._ended:
            log.warning("%s webhooks are sent again later", len(self._ended))

    async def _record_rest(self) -> None:
        if self._recording is not None:
            await self._recording  # cancelled with this
        if self._ended:
            await self._record()

    # --- what nobody waits for

    async def tidy_for_ever(self) -> None:
        """Tidy up every few seconds, and at once where there is reason to."""
        while True:
            self._untidy.clear()
            await self._unless_it_fails(self.tidy())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._untidy.wait(), TIDY_SECONDS)

    async def tidy(self) -> None:
        """End what waits for endpoints that are gone, a batch a transaction."""
        ended = outbox.ENDED_AT_ONCE_MAX
        while ended == outbox.ENDED_AT_ONCE_MAX:
            async with self._database.transaction(self._worker) as tx:
                ended = await outbox.end_abandoned(tx)

    async def _unless_it_fails(self, work: Awaitable[None]) -> None:
        try:
            await work
        except DatabaseUnavailableError as error:
            log.debug("webhooks are not tidied up: %s", error.code)  # whoever claims tells of an outage
        except Exception:
            self._metrics.webhook_faults.inc()
            log.exception("webhooks can't be tidied up")

    def _fails(self, what: str, error: DatabaseUnavailableError) -> None:
        if what not in self._failing:
            log.warning("webhooks are not %s: %s", what, error.code)
        self._failing.add(what)

    def _works(self, what: str) -> None:
        if what in self._failing:
            log.info("webhooks are %s again", what)
        self._failing.discard(what)


def _draw() -> float:
    return secrets.randbelow(1_000_000) / 1_000_000


def _result(outcome: Outcome) -> str:
    """Return the metric's label of an outcome: one of a few."""
    if outcome.status is not None:
        return "delivered" if outcome.delivered else "refused"
    return {"private address": "blocked", "timeout": "timeout"}.get(outcome.error or "", "unreachable")
