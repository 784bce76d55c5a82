"""Which workers are alive: each writes the time every second, and how the accounts stand that it screens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert

from app.db.session import Tx
from app.db.tables import workers
from app.domain.tally import Tally

EVERY = timedelta(seconds=1)
SILENT_AFTER = timedelta(seconds=10)
FORGOTTEN_AFTER = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker last told: when, and its `Tally` as JSON holds it, None where it has not looked yet."""

    seen_at: datetime
    figures: Mapping[str, Any] | None


async def beat(tx: Tx, worker_id: str, tally: Tally | None = None) -> None:
    """Write that a worker is alive, with its tally where there is a new one; forget those long silent."""
    await tx.connection.execute(delete(workers).where(workers.c.seen_at < tx.now - FORGOTTEN_AFTER))
    change: dict[str, Any] = {"seen_at": tx.now} | ({} if tally is None else {"figures": asdict(tally)})
    statement = insert(workers).values(id=worker_id, started_at=tx.now, **change)
    await tx.connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=change))


async def told(tx: Tx) -> list[Told]:
    """Return what each worker last told."""
    rows = await tx.connection.execute(select(workers.c.seen_at, workers.c.figures))
    return [Told(seen_at, figures) for seen_at, figures in rows]


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
