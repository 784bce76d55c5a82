"""The ledger: the only writer of balances, and the only place where money moves.

Each entry moves an amount of an asset out of one bucket into another, so that it balances by itself and per asset the
books sum to zero. An agent's buckets of an asset are `free`, `reserved`, `allocated` (to an isolated position),
`offered`, `lent` and `pledged` (of loans), and its debts `owed` and `borrowed`, which grow by what leaves them. The
house holds the other sides; their sums are read from the entries, so that no row is shared by all agents. Entries are
never changed: what was reserved is settled or released by new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Numeric,
    Select,
    Text,
    bindparam,
    func,
    insert,
    select,
    text,
    union_all,
)
from sqlalchemy import Sequence as DatabaseSequence
from sqlalchemy.exc import IntegrityError

from app.db.session import Tx
from app.db.tables import balances, ledger_entries
from app.domain.money import AMOUNT_MAX, plain
from app.domain.moves import HOUSE, BalanceKey, Move, net_changes
from app.errors import ConflictError, conflict, invalid
from app.services import audit

Kind = Literal[
    "deposit",
    "withdrawal",
    "reserve",
    "settle",
    "release",
    "allocate",
    "deallocate",
    "realized_pnl",
    "deficit",
    "fee",
    "offer",
    "offer_cancelled",
    "loan_opened",
    "loan_interest",
    "loan_returned",
    "loan_collateral",
    "loan_liquidated",
    "escrow",
    "netting",
    "delegate",
    "undelegate",
    "sweep",
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
    """Write a batch of entries and the balances they change; return the batch's number.

    Raises ConflictError `insufficient_funds` where a bucket would fall below zero, InvalidError where one would grow
    too large: the transaction is then to be rolled back, as an error that leaves it does. Whoever posts holds the
    lock on the accounts concerned.
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
    batch: int = (await tx.connection.execute(select(_NEXT_BATCH))).scalar_one()
    try:
        if rising:
            await tx.connection.execute(_RAISE, _arrays(rising))
        await tx.connection.execute(insert(ledger_entries), [_row(tx, batch, occasion, move) for move in moves])
    except IntegrityError as error:
        if "amount_check" not in str(error.orig):
            raise
        raise invalid("/amount", "number_out_of_range", f"a balance stays below {AMOUNT_MAX:f}") from error
    await audit.record(tx, f"money.{occasion.kind}", str(batch), occasion.agent_id, **_detail(occasion, moves))
    return batch


def insufficient_funds(detail: str, pointer: str = "/amount", **figures: Any) -> ConflictError:
    """Return the refusal of a move that the balance does not cover."""
    return conflict(pointer, "insufficient_funds", detail, **figures)


def _arrays(changes: Mapping[BalanceKey, Decimal]) -> dict[str, list[Any]]:
    return {
        "agents": [key[0] for key in changes],
        "assets": [key[1] for key in changes],
        "buckets": [key[2] for key in changes],
        "amounts": list(changes.values()),
    }


def _detail(occasion: Occasion, moves: Sequence[Move]) -> dict[str, Any]:
    shown = [f"{plain(move.amount):f} {move.asset} {move.source.bucket} to {move.target.bucket}" for move in moves]
    return {"service": occasion.service, "reference": occasion.reference, "moves": shown}


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
    columns, size = ledger_entries.c, min(limit, ENTRIES_A_PAGE_MAX)

    def side(owner: Column[str], other: ColumnElement[bool] | None = None) -> Select[Any]:
        query = select(ledger_entries).where(owner == agent_id).order_by(columns.id.desc()).limit(size)
        query = query if before is None else query.where(columns.id < before)
        return query if other is None else query.where(other)

    # each side by its own index: a planner that is asked for either one walks all entries since
    sides = side(columns.from_owner), side(columns.to_owner, columns.from_owner != agent_id)
    found = union_all(*(select(part.subquery()) for part in sides)).subquery()
    rows = await tx.connection.execute(select(found).order_by(found.c.id.desc()).limit(size))
    return [Entry(**row) for row in rows.mappings()]


_DIFFERENCES = """
    WITH moved AS (
        SELECT to_owner AS agent_id, asset, to_bucket AS bucket, amount FROM ledger_entries
        WHERE to_owner <> :house {to}
        UNION ALL
        SELECT from_owner, asset, from_bucket, -amount FROM ledger_entries WHERE from_owner <> :house {source}
    ), summed AS (
        SELECT agent_id, asset, bucket,
               CASE WHEN bucket IN ('owed', 'borrowed') THEN -sum(amount) ELSE sum(amount) END AS amount
        FROM moved GROUP BY agent_id, asset, bucket
    ), kept AS (
        SELECT * FROM balances WHERE true {kept}
    )
    SELECT asset, sum(abs(coalesce(summed.amount, 0) - coalesce(kept.amount, 0))) AS off
    FROM summed FULL JOIN kept USING (agent_id, asset, bucket)
    GROUP BY asset
    """
_OF_ALL = text(_DIFFERENCES.format(to="", source="", kept=""))
_OF_SOME = text(
    _DIFFERENCES.format(
        to="AND to_owner = ANY (:agents)", source="AND from_owner = ANY (:agents)", kept="AND agent_id = ANY (:agents)"
    )
).bindparams(bindparam("agents", type_=ARRAY(Text)))


async def differences(tx: Tx, agents: Sequence[str] | None = None) -> dict[str, Decimal]:
    """Return, for each asset, by how many units balances differ from the sums of their entries, of all or of some."""
    if agents is None:
        rows = await tx.connection.execute(_OF_ALL, {"house": HOUSE})
    else:
        rows = await tx.connection.execute(_OF_SOME, {"house": HOUSE, "agents": list(agents)})
    return {row.asset: row.off for row in rows}


async def imbalances(tx: Tx) -> dict[str, Decimal]:
    """Return, per asset, by how much balances differ from the sums of the entries: empty, or something is broken."""
    return {asset: off for asset, off in (await differences(tx)).items() if off}


async def owed(tx: Tx) -> dict[str, Decimal]:
    """Return the units by asset that agents owe the house."""
    columns = balances.c
    query = select(columns.asset, func.sum(columns.amount)).where(columns.bucket == "owed", columns.amount > text("0"))
    return {row.asset: row.sum for row in await tx.connection.execute(query.group_by(columns.asset))}
