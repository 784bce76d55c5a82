"""The stored books as the screen's columns: all of them at the start, from then on those that changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import numpy as np
from numpy.typing import NDArray

from app.db.session import Database
from app.domain.book_columns import MODES, BookColumns, HoldingColumns, PositionColumns, book_columns
from app.domain.portfolio import Rows
from app.services.shards import SHARDS

Hashes = NDArray[np.int64]

_HEADER_BYTES, _TRAILER_BYTES = 19, 2
"""Of binary COPY: signature, flags and extension before the rows; a count of -1 after them."""

# Names travel as 64-bit hashes, so that every row is as long as the next and numpy reads them all at once; a row of
# names and their hashes beside them says what they stand for.
_HASH = "hashtextextended({}, 0)"

_OPEN_CALL = """EXISTS (
    SELECT FROM margin_calls c
    WHERE c.agent_id = a.agent_id AND state IN ('noticed', 'open', 'expired', 'liquidating'))"""

_ACCOUNTS = f"""
    SELECT array_agg(a.agent_id), array_agg({_HASH.format("a.agent_id")}), array_agg(a.version),
           array_agg(array_position(ARRAY[{", ".join(f"'{mode}'" for mode in MODES)}], a.margin_mode) - 1),
           array_agg(coalesce(a.breach_utilization::float8, 'NaN')), array_agg({_OPEN_CALL})
    FROM accounts a WHERE true {{}}"""  # noqa: S608  no value from outside

# Rows that were written by transactions which the last snapshot may not have seen. Nothing is missed, whatever the
# order of commits, and no index is kept for it: that would cost each change of a book more than this scan costs.
_CHANGED = "SELECT agent_id, version FROM accounts WHERE age(xmin) <= age($2::text::xid) {}"
_MIDDLE = "SELECT pg_relation_size('positions') / current_setting('block_size')::int / 2"
"""The block at which the table of positions is cut in two, one half for each connection."""
_HORIZON = "SELECT (pg_snapshot_xmin(pg_current_snapshot())::text::bigint % 4294967296)::text"

_POSITIONS = f"""
    SELECT {_HASH.format("agent_id")}, {_HASH.format("symbol")},
           CASE side WHEN 'long' THEN size::float8 ELSE -size::float8 END, entry_price::float8,
           coalesce(leverage::float8, 'NaN'), CASE margin_mode WHEN 'isolated' THEN allocated::float8 ELSE 0 END,
           margin_mode = 'isolated'
    FROM positions WHERE closed_at IS NULL"""  # noqa: S608  no value from outside
_POSITION_FIELDS = {
    "account": "i8",
    "symbol": "i8",
    "size": "f8",
    "entry_price": "f8",
    "leverage": "f8",
    "allocated": "f8",
    "isolated": "?",
}
_LISTED = f"""
    SELECT array_agg(symbol), array_agg({_HASH.format("symbol")})
    FROM (SELECT symbol FROM instrument_parameters UNION SELECT symbol FROM market_prices) s"""  # noqa: S608
_SYMBOLS = f"""
    SELECT array_agg(symbol), array_agg({_HASH.format("symbol")})
    FROM (SELECT DISTINCT symbol FROM positions WHERE closed_at IS NULL) s"""  # noqa: S608

_HOLDINGS = f"""
    SELECT {_HASH.format("agent_id")}, {_HASH.format("asset")},
           CASE WHEN bucket IN ('owed', 'borrowed') THEN 0 ELSE amount::float8 END,
           CASE WHEN bucket IN ('owed', 'borrowed') THEN amount::float8 ELSE 0 END, 0::float8,
           CASE bucket WHEN 'lent' THEN amount::float8 ELSE 0 END
    FROM balances WHERE amount > 0 {{}}
    UNION ALL
    SELECT {_HASH.format("agent_id")}, {_HASH.format("asset")}, 0, 0, remaining::float8, 0::float8
    FROM reservations WHERE status = 'open'"""  # noqa: S608
_UNITS = ("held", "owed", "reserved", "lent")
_HOLDING_FIELDS = {"account": "i8", "asset": "i8"} | dict.fromkeys(_UNITS, "f8")
_ASSETS = f"""
    SELECT array_agg(asset), array_agg({_HASH.format("asset")})
    FROM (SELECT asset FROM balances WHERE true {{0}}
          UNION SELECT asset FROM reservations WHERE status = 'open' {{0}}) s"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Loaded:
    """Books as one snapshot saw them, and the horizon from which on the next has to look for changes."""

    columns: BookColumns
    horizon: str


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Whose rows a query is to return, as the end of its WHERE and the value of its $1: by name, by shard, or all."""

    clause: str = "AND $1::text IS NULL"
    value: object = None

    @classmethod
    def agents(cls, names: Sequence[str]) -> _Chosen:
        return cls("AND agent_id = ANY ($1::text[])", names)

    @classmethod
    def shards(cls, numbers: Collection[int] | None) -> _Chosen:
        if numbers is None:
            return cls()
        return cls(f"AND ({_HASH.format('agent_id')} & {SHARDS - 1}) = ANY ($1::bigint[])", list(numbers))


async def load_all(database: Database, shards: Collection[int] | None = None) -> Loaded:
    """Return every book, or those of some shards, read over two connections at once.

    Raises DatabaseUnavailableError.
    """
    chosen = _Chosen.shards(shards)
    async with database.snapshot() as first:
        exported = await first.fetchval("SELECT pg_export_snapshot()")
        middle = await first.fetchval(_MIDDLE)
        async with database.snapshot(exported) as second:
            # both run to their end, so that neither connection is left busy
            read = asyncio.gather(
                _positions(first, chosen, f"AND ctid < '({middle},0)'"),
                _rest(second, chosen, f"AND ctid >= '({middle},0)'"),
                return_exceptions=True,
            )
            lower, rest = await read
            if isinstance(lower, BaseException):
                raise lower
            if isinstance(rest, BaseException):
                raise rest
        upper, backing = rest
        rows = np.concatenate([lower, upper])
        return Loaded(_columns(rows, await _symbols(first, rows["symbol"]), backing), await first.fetchval(_HORIZON))


async def _rest(connection: asyncpg.Connection, chosen: _Chosen, part: str) -> tuple[NDArray[np.void], _Backing]:
    """Return a part of the positions, and what backs all of them."""
    return await _positions(connection, chosen, part), await _backing(connection, chosen)


async def _some(connection: asyncpg.Connection, chosen: _Chosen) -> BookColumns:
    rows = await _positions(connection, chosen)
    return _columns(rows, await _symbols(connection, rows["symbol"]), await _backing(connection, chosen))


async def load_some(connection: asyncpg.Connection, agents: Sequence[str]) -> BookColumns:
    """Return the books of these agents as a snapshot sees them."""
    return await _some(connection, _Chosen.agents(agents))


async def load_changed(
    database: Database,
    known: Callable[[str], int | None],
    horizon: str,
    shards: Collection[int] | None = None,
) -> Loaded:
    """Return the books that changed since a snapshot with this horizon, but for those whose `known` version it is.

    Of some shards, where they are given. Raises DatabaseUnavailableError.
    """
    among = _Chosen.shards(shards)
    async with database.snapshot() as connection:
        rows = await connection.fetch(_CHANGED.format(among.clause), among.value, horizon)
        agents = [agent for agent, version in rows if known(agent) != version]
        if not agents:
            return Loaded(book_columns([]), await connection.fetchval(_HORIZON))
        return Loaded(await _some(connection, _Chosen.agents(agents)), await connection.fetchval(_HORIZON))


@dataclass(frozen=True, slots=True)
class _Backing:
    """What was read of the accounts, by column; their names, rows of holdings, the names of assets."""

    accounts: Sequence[Sequence[Any]]
    rows: NDArray[np.void]
    assets: _Names


async def _positions(connection: asyncpg.Connection, chosen: _Chosen, part: str = "") -> NDArray[np.void]:
    """Return the open positions of the chosen agents, or those of them in a part of the table."""
    return await _copy(connection, f"{_POSITIONS} {part} {chosen.clause}", _POSITION_FIELDS, chosen)


async def _backing(connection: asyncpg.Connection, chosen: _Chosen) -> _Backing:
    """Return the accounts and holdings of the chosen agents."""
    clause = chosen.clause
    found = await connection.fetchrow(_ACCOUNTS.format(clause), chosen.value)
    accounts = [column or () for column in found]
    rows = await _copy(connection, f"{_HOLDINGS.format(clause)} {clause}", _HOLDING_FIELDS, chosen)
    assets = _Names.of(*await _pair(connection, _ASSETS.format(clause), chosen.value))
    return _Backing(accounts, rows, assets)


def _columns(positions: NDArray[np.void], symbols: _Names, backing: _Backing) -> BookColumns:
    names, hashes, version, mode, breach, open_call = backing.accounts
    accounts = _Names.of(names, hashes)
    holdings = backing.rows
    return BookColumns(
        agents=names,
        version=np.array(version, dtype=np.int64),
        mode=np.array(mode, dtype=np.int8),
        breach=np.array(breach, dtype=np.float64),
        open_call=np.array(open_call, dtype=np.bool_),
        symbols=symbols.names,
        assets=backing.assets.names,
        positions=PositionColumns(
            account=accounts.rows(positions["account"]),
            symbol=symbols.rows(positions["symbol"]),
            **{n: positions[n].astype(np.float64) for n in ("size", "entry_price", "leverage", "allocated")},
            isolated=positions["isolated"].copy(),
        ),
        holdings=HoldingColumns(
            account=accounts.rows(holdings["account"]),
            asset=backing.assets.rows(holdings["asset"]),
            **{n: holdings[n].astype(np.float64) for n in _UNITS},
        ),
    )


async def _symbols(connection: asyncpg.Connection, hashes: Hashes) -> _Names:
    """Return the names of the symbols' hashes: what is listed or priced, or, where that is not all, what is open."""
    listed = _Names.of(*await _pair(connection, _LISTED))
    return listed if listed.cover(hashes) else _Names.of(*await _pair(connection, _SYMBOLS))


async def _pair(connection: asyncpg.Connection, query: str, *arguments: object) -> tuple[Sequence[str], Sequence[int]]:
    """Return names and their hashes, none where there are none."""
    names, hashes = await connection.fetchrow(query, *arguments)
    return names or (), hashes or ()


@dataclass(frozen=True, slots=True)
class _Names:
    """Names by their hash, sorted by it."""

    names: Sequence[str]
    hashes: Hashes
    order: Rows

    @classmethod
    def of(cls, names: Sequence[str], hashes: Sequence[int]) -> _Names:
        """Return the names; ValueError where two have one hash: a million names do once in 40 million times."""
        given = np.array(hashes, dtype=np.int64)
        order = np.argsort(given)
        if (np.diff(given[order]) == 0).any():
            raise ValueError("two names have the same hash")
        return cls(names, given[order], order)

    def rows(self, hashes: Hashes) -> Rows:
        """Return the indices (n,) of the names that the hashes stand for."""
        return self.order[np.searchsorted(self.hashes, hashes.astype(np.int64))]

    def cover(self, hashes: Hashes) -> bool:
        """Whether a name is known for every hash."""
        return bool(np.isin(hashes, self.hashes, kind="sort").all())


async def _copy(
    connection: asyncpg.Connection, query: str, fields: Mapping[str, str], chosen: _Chosen
) -> NDArray[np.void]:
    """Return the rows of a query whose columns are all of a fixed width and never null."""
    parts: list[bytes] = []

    async def keep(part: bytes) -> None:
        parts.append(part)

    await connection.copy_from_query(query, chosen.value, output=keep, format="binary")
    layout: list[tuple[str, str]] = [("", ">i2")]
    for name, kind in fields.items():
        layout += [(f"{name} width", ">i4"), (name, kind if kind == "?" else f">{kind}")]
    row = np.dtype([("fields", ">i2"), *layout[1:]])
    data = b"".join(parts)
    count, rest = divmod(len(data) - _HEADER_BYTES - _TRAILER_BYTES, row.itemsize)
    table = np.frombuffer(data, row, count, _HEADER_BYTES)
    if rest or (table["fields"] != len(fields)).any():
        raise ValueError("a COPY with rows of different widths")
    return table
