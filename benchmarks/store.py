"""A fleet written to a migrated database, for its load to be measured."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import asyncpg
import numpy as np

from app.domain.book_columns import MODES, BookColumns

WRITTEN_AT = datetime(2026, 11, 22, tzinfo=UTC)


async def store(url: str, fleet: BookColumns, prices: dict[str, float]) -> None:
    """Write agents, accounts, balances, reservations, positions and prices by COPY."""
    connection = await asyncpg.connect(url)
    try:
        for table, columns, rows in _tables(fleet, prices):
            await connection.copy_records_to_table(table, records=rows, columns=columns)
        await connection.execute("ANALYZE")
    finally:
        await connection.close()


def _tables(fleet: BookColumns, prices: dict[str, float]) -> Iterable[tuple[str, list[str], Iterable[tuple[Any, ...]]]]:
    agents, p, h = fleet.agents, fleet.positions, fleet.holdings
    yield "agents", ["id", "name"], ((agent, agent) for agent in agents)
    modes = [MODES[code] for code in fleet.mode.tolist()]
    yield "accounts", ["agent_id", "margin_mode", "version"], zip(agents, modes, fleet.version.tolist(), strict=True)
    owners, assets = [agents[k] for k in h.account.tolist()], [fleet.assets[k] for k in h.asset.tolist()]
    buckets = {"free": h.held - h.reserved - h.lent, "reserved": h.reserved, "lent": h.lent, "owed": h.owed}
    for bucket, units in buckets.items():
        rows = zip(owners, assets, map(_decimal, units.tolist()), strict=True)
        kept = [(owner, asset, bucket, units) for owner, asset, units in rows if units > 0]
        yield "balances", ["agent_id", "asset", "bucket", "amount"], kept
    rows = zip(owners, assets, map(_decimal, h.reserved.tolist()), strict=True)
    held = [(o, o, "casino", a, units, units, Decimal(0), False, "open") for o, a, units in rows if units > 0]
    names = ["id", "agent_id", "service", "asset", "amount", "remaining", "settled", "reducible", "status"]
    yield "reservations", names, ((f"{k}:{row[0]}", *row[1:]) for k, row in enumerate(held))
    yield "positions", _POSITION_NAMES, _positions(fleet)
    quoted = ((symbol, Decimal(repr(price)), WRITTEN_AT, WRITTEN_AT, 1) for symbol, price in prices.items())
    yield "market_prices", ["symbol", "price", "as_of", "received_at", "version"], quoted
    del p


_POSITION_NAMES = [
    *("id", "agent_id", "symbol", "side", "size", "entry_price", "leverage", "margin_mode", "allocated"),
    *("realized_pnl", "opened_at", "updated_at"),
]


def _positions(fleet: BookColumns) -> Iterable[tuple[Any, ...]]:
    p = fleet.positions
    columns = (p.account, p.symbol, p.size, p.entry_price, p.leverage, p.isolated, p.allocated)
    for k, (account, symbol, size, entry, leverage, alone, allocated) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        yield (
            f"{k}",
            fleet.agents[account],
            fleet.symbols[symbol],
            "long" if size > 0 else "short",
            _decimal(abs(size)),
            _decimal(entry),
            None if np.isnan(leverage) else Decimal(int(leverage)),
            "isolated" if alone else "pooled",
            _decimal(allocated),
            Decimal(0),
            WRITTEN_AT,
            WRITTEN_AT,
        )


def _decimal(value: float) -> Decimal:
    return Decimal(f"{value:.6f}")
