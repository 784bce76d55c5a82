"""Which workers are alive: each writes the time every second."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert

from app.db.session import Tx
from app.db.tables import workers

EVERY = timedelta(seconds=1)
SILENT_AFTER = timedelta(seconds=10)
FORGOTTEN_AFTER = timedelta(hours=1)


async def beat(tx: Tx, worker_id: str) -> None:
    """Write that a worker is alive, and forget those that have been silent for long."""
    await tx.connection.execute(delete(workers).where(workers.c.seen_at < tx.now - FORGOTTEN_AFTER))
    statement = insert(workers).values(id=worker_id, started_at=tx.now, seen_at=tx.now)
    change = {"seen_at": tx.now}
    await tx.connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=change))


async def leave(tx: Tx, worker_id: str) -> None:
    """Write that a worker has ended."""
    await tx.connection.execute(delete(workers).where(workers.c.id == worker_id))


async def last_beat(tx: Tx) -> datetime | None:
    """Return when any worker was last seen."""
    found: datetime | None = (await tx.connection.execute(select(func.max(workers.c.seen_at)))).scalar_one()
    return found


async def live(tx: Tx, within: timedelta) -> int:
    """Return how many workers were seen within this time."""
    query = select(func.count()).where(workers.c.seen_at > tx.now - within)
    found: int = (await tx.connection.execute(query)).scalar_one()
    return found
