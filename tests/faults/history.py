"""What there is to check when all has settled: rows as the database has them, and what the receiver was sent."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import text

from app.db.session import Database, Tx
from app.services import ledger

LIVE = ("noticed", "open", "expired", "liquidating")


@dataclass(frozen=True, slots=True)
class CallRow:
    id: str
    agent_id: str
    state: str
    noticed_at: datetime
    deadline_at: datetime | None
    expired_at: datetime | None
    ended_at: datetime | None
    slices: int

    def overlaps(self, since: datetime, until: datetime) -> bool:
        return self.noticed_at <= until and (self.ended_at is None or self.ended_at >= since)


@dataclass(frozen=True, slots=True)
class OrderRow:
    id: str
    agent_id: str
    symbol: str
    signed_size: Decimal
    reason: str
    call_id: str | None
    request: str | None


@dataclass(frozen=True, slots=True)
class EventRow:
    event_id: str
    agent_id: str
    sequence: int
    type: str
    call_id: str | None
    order_id: str | None


@dataclass(frozen=True, slots=True)
class Sent:
    """A webhook as it arrived."""

    event_id: str
    agent_id: str
    sequence: int
    type: str
    is_genuine: bool


@dataclass(slots=True)
class Asked:
    """A request with a name, and every answer that was given to it: it was sent until there was one."""

    key: str
    agent_id: str
    kind: str
    answers: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Window:
    """A time of constant prices, and the agents that were found in breach at its beginning."""

    agents: frozenset[str]
    since: datetime
    until: datetime


@dataclass(frozen=True, slots=True)
class Rows:
    """The database's part."""

    calls: Sequence[CallRow]
    orders: Sequence[OrderRow]
    """In the order in which they were filled."""
    events: Sequence[EventRow]
    positions: Mapping[tuple[str, str], Decimal]
    """Signed size of what is open, by agent and symbol."""
    deposits: Sequence[str]
    """The name of the request of each deposit in the ledger."""
    last_sequences: Mapping[str, int]
    imbalances: Mapping[str, Decimal]


@dataclass(frozen=True, slots=True)
class History:
    rows: Rows
    sent: Sequence[Sent]
    asked: Sequence[Asked]
    windows: Sequence[Window]
    faults: Sequence[str] = ()
    """Answers that no client should ever see, 500 for one."""


_CALLS = (
    "SELECT id, agent_id, state, noticed_at, deadline_at, expired_at, ended_at, slices FROM margin_calls ORDER BY seq"
)
_ORDERS = """
    SELECT id, agent_id, symbol, CASE side WHEN 'buy' THEN filled_size ELSE -filled_size END AS signed_size, reason,
           meta->>'margin_call_id' AS call_id, meta->>'request' AS request
    FROM orders ORDER BY seq"""
_EVENTS = """
    SELECT event_id, agent_id, sequence, type, data->>'margin_call_id' AS call_id, data->>'order_id' AS order_id
    FROM events ORDER BY agent_id, sequence"""
_POSITIONS = """
    SELECT agent_id, symbol, CASE side WHEN 'long' THEN size ELSE -size END AS size
    FROM positions WHERE closed_at IS NULL"""
_DEPOSITS = "SELECT idempotency_key AS key FROM ledger_entries WHERE kind = 'deposit'"


async def read_rows(database: Database) -> Rows:
    """Read it all in one transaction. Raises DatabaseUnavailableError."""
    async with database.transaction("faults") as tx:
        positions = {(row["agent_id"], row["symbol"]): row["size"] for row in await _all(tx, _POSITIONS)}
        lasts = await _all(tx, "SELECT agent_id, last FROM event_sequences")
        return Rows(
            calls=[CallRow(**row) for row in await _all(tx, _CALLS)],
            orders=[OrderRow(**row) for row in await _all(tx, _ORDERS)],
            events=[EventRow(**row) for row in await _all(tx, _EVENTS)],
            positions=positions,
            deposits=[row["key"] for row in await _all(tx, _DEPOSITS)],
            last_sequences={row["agent_id"]: row["last"] for row in lasts},
            imbalances=await ledger.imbalances(tx),
        )


async def _all(tx: Tx, query: str) -> Sequence[Mapping[str, Any]]:
    return [dict(row) for row in (await tx.connection.execute(text(query))).mappings()]


# --- who is in breach, worked out anew from what is stored

RATE = Decimal("0.30")
"""Initial margin of every market of the scenario, as seeded."""

_BOOKS = """
    SELECT p.agent_id, p.symbol, CASE p.side WHEN 'long' THEN p.size ELSE -p.size END AS size, p.entry_price,
           (SELECT coalesce(sum(CASE WHEN bucket IN ('owed', 'borrowed') THEN -amount ELSE amount END), 0)
            FROM balances b WHERE b.agent_id = p.agent_id AND b.asset = 'USDC') AS cash, clock_timestamp() AS at
    FROM positions p WHERE p.closed_at IS NULL"""


@dataclass(frozen=True, slots=True)
class Standing:
    """Equity and required initial margin of an account under cross margin, USD."""

    equity: Decimal
    required: Decimal

    @property
    def is_breached(self) -> bool:
        return self.equity <= 0 or self.required / self.equity >= Decimal("0.85")


async def read_standings(database: Database, prices: Mapping[str, Decimal]) -> tuple[datetime, dict[str, Standing]]:
    """Return when, and how each account with positions stands at these prices; the sums are done here."""
    async with database.transaction("faults") as tx:
        rows = await _all(tx, _BOOKS)
        at: datetime = (await tx.connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
    cash: dict[str, Decimal] = {}
    profit: dict[str, Decimal] = defaultdict(Decimal)
    exposure: dict[str, Decimal] = defaultdict(Decimal)
    for row in rows:
        agent, price = row["agent_id"], prices[row["symbol"].removesuffix("-PERP")]
        cash[agent] = row["cash"]
        profit[agent] += row["size"] * (price - row["entry_price"])
        exposure[agent] += abs(row["size"] * price)  # one market an underlying: nothing nets
    return at, {agent: Standing(cash[agent] + profit[agent], RATE * exposure[agent]) for agent in cash}


async def breached_without_call(database: Database, agents: frozenset[str], since: datetime) -> set[str]:
    """Return those of the agents that have had no call since."""
    async with database.transaction("faults") as tx:
        calls = [CallRow(**row) for row in await _all(tx, _CALLS)]
        now = tx.now
    return set(agents) - {call.agent_id for call in calls if call.overlaps(since, max(now, since))}


async def is_settled(database: Database) -> bool:
    """Tell whether no call is on its way and no webhook waits."""
    query = """
        SELECT NOT EXISTS (SELECT FROM webhook_deliveries WHERE state = 'pending') AND NOT EXISTS (
            SELECT FROM margin_calls JOIN accounts USING (agent_id)
            WHERE state IN ('noticed', 'open', 'liquidating') OR state = 'expired' AND auto_liquidate)"""
    async with database.transaction("faults") as tx:
        return bool((await tx.connection.execute(text(query))).scalar_one())


async def count_beats(database: Database) -> int:
    """Return how many workers were alive a moment ago."""
    query = "SELECT count(*) FROM workers WHERE seen_at > now() - interval '2.5 s'"
    async with database.transaction("faults") as tx:
        return int((await tx.connection.execute(text(query))).scalar_one())


def sent_of(event_id: str, body: bytes, *, is_genuine: bool) -> Sent:
    event = json.loads(body)
    return Sent(event_id, event["data"]["agent_id"], event["data"]["sequence"], event["type"], is_genuine)
