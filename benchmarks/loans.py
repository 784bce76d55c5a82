"""One look at all loans: the statement that names those past a level, beside reading them and valuing each in Python.

On an embedded Postgres of its own. Run with `make bench`, or `python -m benchmarks.loans`.
"""

from __future__ import annotations

import asyncio
import tempfile
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from sqlalchemy import select, text

from app.db import embedded, migrate
from app.db.lending_tables import loans as stored
from app.db.session import Database, parse_database_url
from app.services import lending, loan_steps, loans
from app.services.margin import Scene
from app.services.market_cache import MarketCache
from app.services.shards import ALL
from app.settings import Settings
from benchmarks.timing import best_seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from app.db.session import Tx

LOANS = 10_000
AGE = timedelta(days=1)
MADE = f"""
    INSERT INTO agents (id, name) SELECT 'agent_' || k, 'benchmark' FROM generate_series(0, 1000) k;
    INSERT INTO accounts (agent_id) SELECT 'agent_' || k FROM generate_series(0, 1000) k;
    INSERT INTO market_prices VALUES ('BTC', 60000, now(), now(), 1);
    UPDATE market_state SET version = 1 WHERE name = 'prices';
    INSERT INTO lending_markets VALUES ('USDC', 2e9, 1e9, 0.035, now());
    INSERT INTO loan_offers (id, lender_id, asset, amount, remaining, minimum_rate, notice_seconds, created_at)
        VALUES ('offer', 'agent_0', 'USDC', 1e9, 0, 0.02, 86400, now());
    INSERT INTO loans (id, offer_id, lender_id, borrower_id, asset, amount, principal, rate_kind, rate, notice_seconds,
            collateral_asset, collateral, accrued, accrued_to, interest_paid, interest_booked, next_interest_at,
            recalled, status, deficit, opened_at, next_action_at)
        SELECT 'loan_' || k, 'offer', 'agent_0', 'agent_' || (1 + k % 1000), 'USDC', 1000, 1000, 'floating', 0.02,
            86400, 'BTC', 0.0192 + 0.00001 * (k % 1000), 0, now(), 0, 0, now() + interval '1 day', 0, 'active', 0,
            now(), now() + interval '1 day'
        FROM generate_series(1, {LOANS}) k;
    ANALYZE
"""


async def _named(tx: Tx, market: MarketCache) -> int:
    view = await market.current(tx)
    return len(await loan_steps.named_by_prices(tx, view, AGE, ALL, LOANS))


async def _one_by_one(tx: Tx, market: MarketCache) -> int:
    """Read every loan and value it exactly, as a decision does."""
    scene = Scene(await market.current(tx), tx.now, AGE, 0)
    found = 0
    for row in (await tx.connection.execute(select(stored))).mappings():
        loan = loans.Loan(**row)
        prices = lending.prices_of(scene, loan.asset, loan.collateral_asset)
        debt = loan.principal + loan.interest(6)
        found += prices.ratio(loan.collateral, debt) < Decimal("1.04")
    return found


async def _once(database: Database, market: MarketCache, look: Callable[[Tx, MarketCache], Awaitable[int]]) -> int:
    async with database.transaction("benchmark") as tx:
        return await look(tx, market)


async def _fill(database: Database) -> None:
    async with database.transaction("benchmark") as tx:
        for statement in MADE.split(";\n"):
            await tx.connection.execute(text(statement))


def main() -> None:
    """Print the times and their ratio."""
    with tempfile.TemporaryDirectory() as home, embedded.start(Path(home)) as server, asyncio.Runner() as runner:
        url = parse_database_url(server.url)
        runner.run(migrate.upgrade(url))
        database = Database(url, Settings())
        market = MarketCache(database)
        runner.run(_fill(database))
        rivals: dict[str, Callable[[], object]] = {
            "named by the statement": lambda: runner.run(_once(database, market, _named)),
            "read and valued one by one": lambda: runner.run(_once(database, market, _one_by_one)),
        }
        best = best_seconds(rivals, rounds=5)
        runner.run(database.close())
    table = Table("10,000 loans", "ms", "times")
    least = best["named by the statement"]
    for name, seconds in best.items():
        table.add_row(name, f"{seconds * 1e3:,.1f}", f"{seconds / least:,.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
