"""What does a fleet of 1,000 members with 10,000 positions cost: its risk, a look at its pool.

Run with `python -m benchmarks.fleets`.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import asyncpg
import numpy as np
import uvloop
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from app.db import embedded, migrate
from app.db.session import Database, parse_database_url
from app.domain.panel import Panel
from app.services import fleet_books, fleet_pool, fleet_risk, fleets
from app.services.fleet_risk import Asked
from app.services.fleet_watch import FleetWatch
from app.services.liquidation import Rules
from app.services.margin import Scenes
from app.services.market_cache import MarketCache
from app.services.shards import SHARDS
from app.settings import Settings
from app.telemetry import Metrics
from benchmarks.fleet import fleet, market
from benchmarks.store import store

MEMBERS, POSITIONS, DAYS, ROUNDS = 1_000, 10, 500, 5
TARGET_SECONDS = 1.0


def main() -> None:
    """Print the table."""
    _, prices = market()
    with tempfile.TemporaryDirectory() as home, embedded.start(Path(home)) as server:
        asyncio.run(migrate.upgrade(parse_database_url(server.url)))
        asyncio.run(store(server.url, fleet(MEMBERS + 1, POSITIONS, prices), prices))
        asyncio.run(_joined(server.url))
        count, rows = uvloop.run(_measured(server.url))
    table = Table("work", "s", title=f"{MEMBERS:,} members, {count:,} positions; target {TARGET_SECONDS:g} s in all")
    for name, seconds in rows:
        table.add_row(name, f"{seconds:.3f}")
    Console(width=100).print(table)


async def _joined(url: str) -> None:
    """Have the first account lead all others."""
    connection = await asyncpg.connect(url)
    try:
        for statement in (
            """INSERT INTO fleets (id, master_id, name, dry_powder, created_at)
               SELECT 'fleet_0', min(id), 'bench', 0.15, now() FROM agents""",
            """INSERT INTO fleet_members
                   (agent_id, fleet_id, max_margin, services, liquidation_priority, delegation, invited_at, joined_at)
               SELECT id, 'fleet_0', 1e6, '{}', 0, 'pooled', now(), now() FROM agents
               WHERE id <> (SELECT master_id FROM fleets)""",
            "UPDATE market_state SET version = 1 WHERE name = 'prices'",
            "ANALYZE",
        ):
            await connection.execute(statement)
    finally:
        await connection.close()


async def _measured(url: str) -> tuple[int, list[tuple[str, float]]]:
    settings = Settings(database_url=SecretStr(url), admin_key=None)
    database = Database(parse_database_url(url), settings)
    cache = MarketCache(database)
    await cache.refresh()
    scenes, panels = Scenes(cache, timedelta(days=3_650), 10_000), dict[int, Panel]()
    rows: list[tuple[str, float]] = []
    count, best = 0, float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        async with database.transaction("bench") as tx:
            books = await fleet_books.load(tx, await fleets.get(tx, "fleet_0", None))
            scene = await scenes.at(tx)
            returns = await fleet_risk.daily_returns(tx, await fleets.agents_of(tx, books.fleet), DAYS)
        read = time.perf_counter()
        names = fleet_risk.names_of(books, scene)
        panel = panels.setdefault(len(names), _panel(names))
        started = time.perf_counter()
        fleet_risk.risk(books, scene, panel, panel, returns, Asked())
        done = time.perf_counter()
        count = sum(len(held.positions) for _, held in books.members)
        if read - begun + done - started < best:
            best = read - begun + done - started
            rows = [("books read", read - begun), ("assessed", done - started), ("in all", best)]
    rows.append(("pool read and judged, whose turn it is", min([await _pool(database, scenes) for _ in range(ROUNDS)])))
    watch = FleetWatch("bench", database, scenes, Metrics())
    looks = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        await watch.look(range(SHARDS))
        looks.append(time.perf_counter() - begun)
    await database.close()
    return count, [*rows, ("a worker's look, each second", min(looks))]


async def _pool(database: Database, scenes: Scenes) -> float:
    begun = time.perf_counter()
    async with database.transaction("bench") as tx:
        pool = await fleet_pool.load(tx, await scenes.at(tx), Rules("smallest_first", Decimal(0)), "fleet_0")
        pool.line()
    return time.perf_counter() - begun


def _panel(names: list[str]) -> Panel:
    """Return a history of the right length: what it says costs nothing."""
    returns = np.random.default_rng(1).normal(0.0, 0.03, (DAYS, len(names)))
    return Panel(tuple(names), np.datetime64("2025-01-01") + np.arange(DAYS), np.clip(returns, -0.5, 0.5))


if __name__ == "__main__":
    main()
