"""Who screens whom: accounts in shards by the hash of the agent's id, each shard leased by one worker.

A lease saves work and nothing else: decisions are made under the lock of a book, so that two workers that screen the
same account do no harm. It is a row and not an advisory lock, because it lapses by the database's clock also where
the holder's connection hangs, and because it can be seen.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

from sqlalchemy import ColumnElement, DateTime, Integer, Text, bindparam, func, select, text, true, update

from app.db.session import Tx
from app.db.tables import screen_shards
from app.services import heartbeat

SHARDS = 64
"""A power of two: an account's shard is what a mask leaves of its hash. The migration has made as many rows."""
LEASE = timedelta(seconds=3)

ALL = frozenset(range(SHARDS))

_CLAIM = text(
    """
    UPDATE screen_shards SET worker_id = :worker_id, lease_until = :until
    WHERE shard IN (
        SELECT shard FROM screen_shards WHERE worker_id IS NULL OR lease_until <= :now
        ORDER BY shard LIMIT :most FOR UPDATE SKIP LOCKED)
    """
).bindparams(
    bindparam("worker_id", type_=Text),
    bindparam("now", type_=DateTime(timezone=True)),
    bindparam("until", type_=DateTime(timezone=True)),
    bindparam("most", type_=Integer),
)


def within(agent_id: ColumnElement[str], shards: Collection[int]) -> ColumnElement[bool]:
    """Return the condition that an agent is in one of the shards."""
    shard = func.hashtextextended(agent_id, 0).op("&")(SHARDS - 1)
    return true() if len(shards) == SHARDS else shard.in_(shards)


async def hold(tx: Tx, worker_id: str) -> frozenset[int]:
    """Renew a worker's leases and bring them to its share of the live workers; return the shards that it holds."""
    columns = screen_shards.c
    mine = columns.worker_id == worker_id
    until = tx.now + LEASE
    renewed = update(screen_shards).where(mine).values(lease_until=until).returning(columns.shard)
    held = sorted((await tx.connection.execute(renewed)).scalars())
    share = -(-SHARDS // max(1, await heartbeat.live(tx, LEASE)))
    if len(held) > share:
        await _let_go(tx, worker_id, held[share:])
    if len(held) < share:
        asked = {"worker_id": worker_id, "now": tx.now, "until": until, "most": share - len(held)}
        await tx.connection.execute(_CLAIM, asked)
    return frozenset((await tx.connection.execute(select(columns.shard).where(mine))).scalars())


async def held(tx: Tx) -> int:
    """Return how many shards somebody holds."""
    query = select(func.count()).where(screen_shards.c.lease_until > tx.now)
    found: int = (await tx.connection.execute(query)).scalar_one()
    return found


async def let_go(tx: Tx, worker_id: str) -> None:
    """Give up what a worker that ends holds, so that the others need not wait for its leases."""
    await _let_go(tx, worker_id, None)


async def _let_go(tx: Tx, worker_id: str, shards: list[int] | None) -> None:
    columns = screen_shards.c
    given = update(screen_shards).where(columns.worker_id == worker_id).values(worker_id=None, lease_until=None)
    await tx.connection.execute(given if shards is None else given.where(columns.shard.in_(shards)))
