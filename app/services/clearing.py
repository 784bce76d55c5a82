"""The timers of clearing: which escrows and agreements are due, each moved on in a transaction of its own.

A timer carries no decision: what is due is judged anew under its locks, so that two workers that fire the same one do
no harm, and one that was killed in between has done nothing. What fails for a fault of ours is put off and holds up
no other.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from app.db.session import Database, Tx
from app.errors import DatabaseUnavailableError
from app.services import agreements, escrows, netting
from app.services.margin import Scenes
from app.services.netting import Ran
from app.telemetry import Metrics

log = logging.getLogger(__name__)

DUE_AT_ONCE_MAX = 50

PutOff = Callable[[Tx, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Timers:
    """Fires what is due, as one worker."""

    worker_id: str
    database: Database
    scenes: Scenes
    metrics: Metrics

    async def fire(self, within: Collection[int]) -> None:
        """Move on what is due of these shards. Raises DatabaseUnavailableError."""
        async with self.database.transaction(self.worker_id) as tx:
            over = await escrows.due(tx, DUE_AT_ONCE_MAX, within)
            cut_off = await agreements.due(tx, DUE_AT_ONCE_MAX, within)
        for escrow_id in over:
            await self._one(escrow_id, self._time_out, escrows.put_off)
        for agreement_id in cut_off:
            await self._one(agreement_id, self._settle, agreements.put_off)

    async def _one(self, contract: str, work: Callable[[str], Awaitable[None]], put_off: PutOff) -> None:
        try:
            await work(contract)
        except DatabaseUnavailableError as error:
            if error.code != "database_busy":
                raise
            await self._leave_alone(contract, put_off)  # somebody holds an account: the others need not wait for it
        except Exception:
            self.metrics.clearing_failures.inc()
            log.exception("%s can't be moved on", contract)
            await self._leave_alone(contract, put_off)

    async def _leave_alone(self, contract: str, put_off: PutOff) -> None:
        async with self.database.transaction(self.worker_id) as tx:
            await put_off(tx, contract)

    async def _time_out(self, escrow_id: str) -> None:
        async with self.database.transaction(self.worker_id) as tx:
            done = await escrows.fire(tx, self.scenes, escrow_id)
        if done is not None:
            count_escrow(self.metrics, done.told)

    async def _settle(self, agreement_id: str) -> None:
        async with self.database.transaction(self.worker_id) as tx:
            ran = await netting.run(tx, self.scenes, agreement_id)
        count_run(self.metrics, ran)


def count_escrow(metrics: Metrics, told: str | None) -> None:
    """Count what has become of an escrow."""
    if told is not None:
        metrics.escrow_events.labels(told.partition(".")[2]).inc()


def count_run(metrics: Metrics, ran: Ran | None) -> None:
    """Count a run and what it spared."""
    if ran is None:
        return
    metrics.netting_runs.labels(ran.run.outcome).inc()
    metrics.netting_movements_saved.inc(ran.movements_saved)
    metrics.netting_fees_saved.inc(max(0.0, ran.fees_saved))
