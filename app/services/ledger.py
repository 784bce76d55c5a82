"""The ledger: the only writer of balances, and the only place where money moves.

Each entry moves an amount of an asset out of one bucket into another, so that it balances by itself and per asset the
books sum to zero. An agent has four buckets of an asset: `free`, `reserved`, `allocated` (to an isolated position) and
`owed`, which grows by what leaves it. The house holds the other sides; their sums are read from the entries, so that
no row is shared by all agents. Entries are never changed: what was reserved is settled or released by new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from sqlalchemy import ARRAY, Numeric, Text, bindparam, insert, or_, select, text
from sqlalchemy import Sequence as DatabaseSequence

from app.db.session import Tx
from app.db.tables import balances, ledger_entries
from app.domain.moves import HOUSE, BalanceKey, Move, net_changes
from app.errors import ConflictError, FieldError

Kind = Literal[
    "deposit", "withdrawal", "reserve", "settle", "release", "allocate", "deallocate", "realized_pnl", "deficit"
]

ENTRIES_A_PAGE_MAX = 200

_NEXT_BATCH = DatabaseSequence("ledger_batches").next_value()


@dataclass(frozen=True, slots=True)
class Occasion:
    """Why money moves: whose book, by which service, what kind of event, and the caller's names for it."""

    agent_id: str
    service: str
    kind: Kind
    reference: str | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored move."""

    id: int
    batch: int
    agent_id: str
    service: str
    kind: str
    reference: str | None
    idempotency_key: str | None
    actor: str
    posted_at: datetime
    asset: str
    amount: Decimal
    from_owner: str
    from_bucket: str
    to_owner: str
    to_bucket: str


_RAISE = text(
    """
    INSERT INTO balances AS held (agent_id, asset, bucket, amount)
    SELECT * FROM unnest(:agents, :assets, :buckets, :amounts)
    ON CONFLICT (agent_id, asset, bucket) DO UPDATE SET amount = held.amount + excluded.amount
    """
)
# an insert's row is held to the CHECK before the conflict is seen: what falls can't be upserted
_LOWER = text(
    """
    UPDATE balances AS held SET amount = held.amount - lowered.amount
    FROM unnest(:agents, :assets, :buckets, :amounts) AS lowered (agent_id, asset, bucket, amount)
    WHERE (held.agent_id, held.asset, held.bucket) = (lowered.agent_id, lowered.asset, lowered.bucket)
      AND held.amount >= lowered.amount
    """
)
_COLUMNS = tuple(bindparam(name, type_=ARRAY(Text)) for name in ("agents", "assets", "buckets"))
_RAISE = _RAISE.bindparams(*_COLUMNS, bindparam("amounts", type_=ARRAY(Numeric)))
_LOWER = _LOWER.bindparams(*_COLUMNS, bindparam("amounts", type_=ARRAY(Numeric)))


async def post(tx: Tx, occasion: Occasion, moves: Sequence[Move]) -> int:
    """Write a batch of entries and the balances they change, all or none; return the batch's number.

    Raises ConflictError `insufficient_funds`, and then writes nothing, where a bucket would fall below zero. Whoever
    posts holds the lock on the accounts concerned.
    """
    if not moves:
        raise ValueError("a batch has at least one move")
    changes = net_changes(moves)
    falling = {key: -change for key, change in changes.items() if change < 0}
    rising = {key: change for key, change in changes.items() if change > 0}
    if falling:
        lowered = await tx.connection.execute(_LOWER, _arrays(falling))
        if lowered.rowcount != len(falling):
            raise insufficient_funds("the balance does not cover it")
    # after this point nothing is refused
    if rising:
        await tx.connection.execute(_RAISE, _arrays(rising))
    batch: int = (await tx.connection.execute(select(_NEXT_BATCH))).scalar_one()
    await tx.connection.execute(insert(ledger_entries), [_row(tx, batch, occasion, move) for move in moves])
    return batch


def insufficient_funds(detail: str, pointer: str = "/amount", **figures: Any) -> ConflictError:
    """Return the refusal of a move that the balance does not cover."""
    error = FieldError(pointer, "insufficient_funds", detail)
    return ConflictError(detail, code="insufficient_funds", errors=(error,), figures=figures)


def _arrays(changes: Mapping[BalanceKey, Decimal]) -> dict[str, list[Any]]:
    return {
        "agents": [key[0] for key in changes],
        "assets": [key[1] for key in changes],
        "buckets": [key[2] for key in changes],
        "amounts": list(changes.values()),
    }


def _row(tx: Tx, batch: int, occasion: Occasion, move: Move) -> dict[str, Any]:
    return {
        "batch": batch,
        "agent_id": occasion.agent_id,
        "service": occasion.service,
        "kind": occasion.kind,
        "reference": occasion.reference,
        "idempotency_key": occasion.idempotency_key,
        "actor": tx.actor,
        "posted_at": tx.now,
        "asset": move.asset,
        "amount": move.amount,
        "from_owner": move.source.owner,
        "from_bucket": move.source.bucket,
        "to_owner": move.target.owner,
        "to_bucket": move.target.bucket,
    }


async def load_balances(tx: Tx, agent_id: str) -> dict[tuple[str, str], Decimal]:
    """Return the amounts by (asset, bucket), those at zero left out."""
    columns = balances.c
    query = select(columns.asset, columns.bucket, columns.amount)
    rows = await tx.connection.execute(query.where(columns.agent_id == agent_id, columns.amount > 0))
    return {(row.asset, row.bucket): row.amount for row in rows}


async def list_entries(tx: Tx, agent_id: str, limit: int, before: int | None = None) -> list[Entry]:
    """Return an agent's entries, newest first, from below the id `before`."""
    columns = ledger_entries.c
    query = select(ledger_entries).where(or_(columns.from_owner == agent_id, columns.to_owner == agent_id))
    if before is not None:
        query = query.where(columns.id < before)
    rows = await tx.connection.execute(query.order_by(columns.id.desc()).limit(min(limit, ENTRIES_A_PAGE_MAX)))
    return [Entry(**row) for row in rows.mappings()]


_IMBALANCES = text(
    """
    WITH moved AS (
        SELECT to_owner AS agent_id, asset, to_bucket AS bucket, amount FROM ledger_entries WHERE to_owner <> :house
        UNION ALL
        SELECT from_owner, asset, from_bucket, -amount FROM ledger_entries WHERE from_owner <> :house
    ), summed AS (
        SELECT agent_id, asset, bucket, CASE bucket WHEN 'owed' THEN -sum(amount) ELSE sum(amount) END AS amount
        FROM moved GROUP BY agent_id, asset, bucket
    )
    SELECT asset, sum(abs(coalesce(summed.amount, 0) - coalesce(balances.amount, 0))) AS off
    FROM summed FULL JOIN balances USING (agent_id, asset, bucket)
    GROUP BY asset HAVING sum(abs(coalesce(summed.amount, 0) - coalesce(balances.amount, 0))) <> 0
    """
)


async def imbalances(tx: Tx) -> dict[str, Decimal]:
    """Return, per asset, by how much balances differ from the sums of the entries: empty, or something is broken."""
    rows = await tx.connection.execute(_IMBALANCES, {"house": HOUSE})
    return {row.asset: row.off for row in rows}
