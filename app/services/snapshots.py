"""What each account is worth, written down once a UTC day with the loss that is forecast of the next.

The primary key is the guard: two workers that take the same account write one row. A day on which no worker ran, or a
price lacked, stays without one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime

import asyncpg
import numpy as np
from sqlalchemy import ARRAY, BigInteger, Date, DateTime, Double, Integer, Text, bindparam, func, select, text

from app.db.session import Database, Tx
from app.db.tables import account_snapshots
from app.domain.black76 import Floats
from app.domain.book_columns import BookColumns
from app.domain.moves import HOUSE
from app.domain.parameters import MarketParameters
from app.domain.portfolio import sums
from app.domain.snapshots import Snapshot, Worth, forecast, worth
from app.services import screen_book
from app.services.history_cache import HistoryCache
from app.services.market_cache import MarketView
from app.services.shards import SHARDS

ACCOUNTS_A_ROUND_MAX = 2_000
EVERY_SECONDS = 60.0
"""How often accounts are looked for that have no snapshot of the day."""
SNAPSHOTS_A_PAGE_MAX = 200
SNAPSHOTS_A_PURGE_MAX = 10_000

# An account that was emptied has a last one: the day on which all was lost, or taken out, counts as well.
_DUE = f"""
    SELECT a.agent_id FROM accounts a
    WHERE a.agent_id > $1 AND (hashtextextended(a.agent_id, 0) & {SHARDS - 1}) = ANY ($2::bigint[])
      AND (EXISTS (SELECT FROM balances b WHERE b.agent_id = a.agent_id AND b.amount > 0)
        OR EXISTS (
          SELECT FROM account_snapshots s
          WHERE s.agent_id = a.agent_id AND s.day = (now() AT TIME ZONE 'UTC')::date - 1 AND s.value <> 0))
      AND NOT EXISTS (
        SELECT FROM account_snapshots s
        WHERE s.agent_id = a.agent_id AND s.day = (now() AT TIME ZONE 'UTC')::date)
    ORDER BY a.agent_id LIMIT $3"""  # noqa: S608  no value from outside

# An account's entries are written under its lock, so that those which a snapshot of the database sees are the first
# ones by their ids. Profit and loss is the house's trading bucket, and interest; all else between an account and others
# is a flow.
_FLOWS = f"""
    WITH chosen AS (
        SELECT c.agent_id, before.ledger_id AS seen, greatest(
            (SELECT max(id) FROM ledger_entries e WHERE e.to_owner = c.agent_id),
            (SELECT max(id) FROM ledger_entries e WHERE e.from_owner = c.agent_id), 0) AS latest
        FROM unnest($1::text[]) AS c (agent_id)
        LEFT JOIN LATERAL (
            SELECT ledger_id FROM account_snapshots s WHERE s.agent_id = c.agent_id ORDER BY day DESC LIMIT 1
        ) AS before ON true)
    SELECT chosen.agent_id, chosen.seen, chosen.latest, moved.asset, moved.amount::float8
    FROM chosen LEFT JOIN LATERAL (
        SELECT asset, sum(amount) AS amount FROM (
            SELECT asset, amount FROM ledger_entries e
            WHERE e.to_owner = chosen.agent_id AND e.from_owner <> e.to_owner AND e.id > chosen.seen
              AND (e.from_owner, e.from_bucket) <> ('{HOUSE}', 'trading') AND e.kind <> 'loan_interest'
            UNION ALL
            SELECT asset, -amount FROM ledger_entries e
            WHERE e.from_owner = chosen.agent_id AND e.from_owner <> e.to_owner AND e.id > chosen.seen
              AND (e.to_owner, e.to_bucket) <> ('{HOUSE}', 'trading') AND e.kind <> 'loan_interest'
        ) AS entries GROUP BY asset
    ) AS moved ON true"""  # noqa: S608  no value from outside

_INSERT = text(
    """
    INSERT INTO account_snapshots
        (agent_id, day, taken_at, equity, value, flows, gross, var_95, var_99, ledger_id)
    SELECT agent_id, :day, :taken_at, equity, value, flows, gross, var_95, var_99, ledger_id
    FROM unnest(:agent_id, :equity, :value, :flows, :gross, :var_95, :var_99, :ledger_id)
        AS taken (agent_id, equity, value, flows, gross, var_95, var_99, ledger_id)
    ON CONFLICT (agent_id, day) DO NOTHING
    """
).bindparams(
    bindparam("day", type_=Date),
    bindparam("taken_at", type_=DateTime(timezone=True)),
    bindparam("agent_id", type_=ARRAY(Text)),
    bindparam("ledger_id", type_=ARRAY(BigInteger)),
    *(bindparam(n, type_=ARRAY(Double)) for n in ("equity", "value", "flows", "gross", "var_95", "var_99")),
)

_PURGE = text(
    """
    DELETE FROM account_snapshots WHERE (agent_id, day) IN (
        SELECT agent_id, day FROM account_snapshots WHERE day < :before ORDER BY day LIMIT :most)
    """
).bindparams(bindparam("before", type_=Date), bindparam("most", type_=Integer))


@dataclass(frozen=True, slots=True)
class Taken:
    """How many snapshots a round has written, and whether there may be more to take."""

    count: int
    more: bool


@dataclass(frozen=True, slots=True)
class _Ledger:
    """What has come in less what went out of accounts, by row of the account and asset; `latest` entry by account."""

    account: Sequence[int]
    asset: Sequence[str]
    amount: Sequence[float]
    latest: Mapping[str, int]
    first: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Read:
    """Accounts as one state of the database shows them."""

    now: datetime
    columns: BookColumns
    ledger: _Ledger


class Snapshots:
    """Takes the snapshots of a worker's accounts, a bounded number a round."""

    def __init__(self, actor: str, database: Database) -> None:
        self._actor = actor
        self._database = database
        self._history = HistoryCache(database)
        self._after = ""

    async def round(self, view: MarketView, shards: Collection[int]) -> Taken:
        """Take those that are due of some accounts in the shards. Raises DatabaseUnavailableError.

        An account that can't be valued is passed over, and comes again when all others have been looked at.
        """
        async with self._database.snapshot() as connection:
            rows = await connection.fetch(_DUE, self._after, sorted(shards), ACCOUNTS_A_ROUND_MAX)
            agents = [row["agent_id"] for row in rows]
            more = len(agents) == ACCOUNTS_A_ROUND_MAX
            self._after = agents[-1] if more else ""
            if not agents:
                return Taken(0, more=False)
            read = await _read(connection, agents)
        return Taken(await self._write(read, view), more)

    async def _write(self, read: _Read, view: MarketView) -> int:
        prices = {symbol: price.value for symbol, price in view.prices.items()}
        parameters = view.parameters
        book = await asyncio.to_thread(worth, read.columns, prices, parameters)
        history = await self._history.panel(book.names, int(parameters.models.var_window_days))
        limits = await asyncio.to_thread(forecast, book, history.panel, parameters)
        values = _values(read, book, limits, _flows(read, prices, parameters))
        async with self._database.transaction(self._actor) as tx:
            done = await tx.connection.execute(_INSERT, values)
        return done.rowcount


async def _read(connection: asyncpg.Connection, agents: Sequence[str]) -> _Read:
    columns = await screen_book.load_some(connection, agents)
    row = {agent: a for a, agent in enumerate(columns.agents)}
    entries = await connection.fetch(_FLOWS, agents)
    moved = [entry for entry in entries if entry["asset"] is not None]
    ledger = _Ledger(
        account=[row[entry["agent_id"]] for entry in moved],
        asset=[entry["asset"] for entry in moved],
        amount=[entry["amount"] for entry in moved],
        latest={entry["agent_id"]: entry["latest"] for entry in entries},
        first=frozenset(entry["agent_id"] for entry in entries if entry["seen"] is None),
    )
    return _Read(await connection.fetchval("SELECT now()"), columns, ledger)


def _flows(read: _Read, prices: Mapping[str, float], parameters: MarketParameters) -> list[float | None]:
    """Return the flows (A,) at the prices of the snapshot, None for an account's first."""
    ledger = read.ledger
    price = [prices.get(a, 1.0 if parameters.asset(a).kind == "stable" else np.nan) for a in ledger.asset]
    usd = np.array(ledger.amount, dtype=np.float64) * np.array(price, dtype=np.float64)
    total = sums(np.array(ledger.account, dtype=np.intp), usd, len(read.columns.agents)).tolist()
    agents = read.columns.agents
    return [None if agent in ledger.first else flow for agent, flow in zip(agents, total, strict=True)]


def _values(read: _Read, book: Worth, limits: Floats, flows: Sequence[float | None]) -> dict[str, object]:
    """Return the columns to write, of the accounts whose every price is known."""
    moved = np.array([0.0 if flow is None else flow for flow in flows], dtype=np.float64)
    known = np.isfinite(book.value + book.equity + moved)
    rows = np.flatnonzero(known).tolist()
    var = [[None if np.isnan(v) else float(v) for v in limits[rows, k]] for k in range(2)]
    agents = [read.columns.agents[a] for a in rows]
    return {
        "day": day_of(read.now),
        "taken_at": read.now,
        "agent_id": agents,
        "equity": book.equity[rows].tolist(),
        "value": book.value[rows].tolist(),
        "flows": [flows[a] for a in rows],
        "gross": book.gross[rows].tolist(),
        "var_95": var[0],
        "var_99": var[1],
        "ledger_id": [read.ledger.latest[agent] for agent in agents],
    }


def day_of(moment: datetime) -> date:
    """Return the UTC day of a time of the database's, which is UTC."""
    return moment.date()


async def list_snapshots(
    tx: Tx, agent_id: str, limit: int = SNAPSHOTS_A_PAGE_MAX, *, before: date | None = None
) -> list[Snapshot]:
    """Return an account's snapshots, newest first, from before a day."""
    return await _select(tx, agent_id, before, min(limit, SNAPSHOTS_A_PAGE_MAX))


async def recent(tx: Tx, agent_id: str, days: int) -> list[Snapshot]:
    """Return the snapshots of the last so many days, and of the day before them, oldest first."""
    return (await _select(tx, agent_id, None, days + 1))[::-1]


async def _select(tx: Tx, agent_id: str, before: date | None, limit: int) -> list[Snapshot]:
    columns = account_snapshots.c
    shown = [getattr(columns, name) for name in Snapshot.__slots__]
    query = select(*shown).where(columns.agent_id == agent_id).order_by(columns.day.desc()).limit(limit)
    if before is not None:
        query = query.where(columns.day < before)
    rows = await tx.connection.execute(query)
    return [Snapshot(**row) for row in rows.mappings()]


_TALLIES = text(
    """
    SELECT after.day, count(*), count(*) FILTER (WHERE after.value - before.value - after.flows < -before.var_95),
           count(*) FILTER (WHERE after.value - before.value - after.flows < -before.var_99)
    FROM account_snapshots after
    JOIN account_snapshots before ON before.agent_id = after.agent_id AND before.day = after.day - 1
    WHERE after.day BETWEEN :first AND :last AND after.flows IS NOT NULL AND before.var_99 IS NOT NULL
    GROUP BY after.day
    """
).bindparams(bindparam("first", type_=Date), bindparam("last", type_=Date))


async def tallies(tx: Tx, first: date, last: date) -> dict[date, tuple[int, int, int]]:
    """Return by day how many accounts had a forecast of it, and how many lost more than VaR at .95 and at .99."""
    rows = await tx.connection.execute(_TALLIES, {"first": first, "last": last})
    return {day: (forecasts, at_95, at_99) for day, forecasts, at_95, at_99 in rows}


async def first_day(tx: Tx) -> date | None:
    """Return the earliest day of any snapshot that is kept."""
    found: date | None = (await tx.connection.execute(select(func.min(account_snapshots.c.day)))).scalar_one()
    return found


async def purge(tx: Tx, before: datetime, most: int = SNAPSHOTS_A_PURGE_MAX) -> bool:
    """Delete snapshots of days before a moment's, at most so many; tell whether there may be more of them."""
    done = await tx.connection.execute(_PURGE, {"before": day_of(before), "most": most})
    return done.rowcount >= most
