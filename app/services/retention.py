"""What is kept for a time and then deleted: in batches, each its own transaction, by one process at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError

from app.db.session import Database, Tx
from app.errors import DatabaseUnavailableError
from app.services import events, idempotency, outbox, price_history, snapshots

log = logging.getLogger(__name__)

IDEMPOTENCY_KEY_HOURS = 48
EVERY_SECONDS = 3_600.0
FIRST_AFTER_SECONDS = 60.0
"""Soon after the start, so that a process that lives less than an hour deletes as well."""

LOCK = 0x7072_696D_6570_7572  # "primepur"
"""The first of as many advisory locks as there are things to delete."""

Purge = Callable[[Tx, datetime], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Retention:
    """How long what is kept: a deleter, which tells whether there may be more, and an age."""

    purge: Purge
    age: timedelta


def retentions(price_history_days: int, event_days: int, snapshot_days: int) -> tuple[Retention, ...]:
    """Return everything that has a time to be kept; an event goes after its deliveries."""
    told = timedelta(days=event_days)
    return (
        Retention(outbox.purge, told),
        Retention(events.purge, told),
        Retention(price_history.purge, timedelta(days=price_history_days)),
        Retention(idempotency.purge, timedelta(hours=IDEMPOTENCY_KEY_HOURS)),
        Retention(snapshots.purge, timedelta(days=snapshot_days)),
    )


async def run(
    database: Database,
    kept: tuple[Retention, ...],
    first_after_seconds: float = FIRST_AFTER_SECONDS,
    every_seconds: float = EVERY_SECONDS,
) -> None:
    """Delete what is past its time once an hour, for ever; an outage is logged, and waited out."""
    await asyncio.sleep(first_after_seconds)
    while True:
        try:
            await purge_all(database, kept)
        except (DatabaseUnavailableError, SQLAlchemyError) as error:
            log.warning("what is past its time is not deleted now: %s", type(error).__name__)
        await asyncio.sleep(every_seconds)


async def purge_all(database: Database, kept: tuple[Retention, ...]) -> None:
    """Delete what is past its time, batch by batch; leave it to another process that is at it."""
    for place, retention in enumerate(kept):
        while await _purge_batch(database, retention, LOCK + place):
            pass


async def _purge_batch(database: Database, retention: Retention, lock: int) -> bool:
    async with database.transaction("retention") as tx:
        if not (await tx.connection.execute(select(func.pg_try_advisory_xact_lock(lock)))).scalar_one():
            return False
        # the one word that the trigger of events and attempts takes; it ends with the transaction
        await tx.connection.execute(text("SET LOCAL primerisk.past_its_time = 'yes'"))
        return await retention.purge(tx, tx.now - retention.age)
