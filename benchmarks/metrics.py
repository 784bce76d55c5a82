"""What does a scrape cost, and what do its figures, with 100,000 accounts? Run with `python -m benchmarks.metrics`."""

from __future__ import annotations

import asyncio
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import asyncpg
import numpy as np
import uvloop
from fastapi import FastAPI
from prometheus_client.exposition import generate_latest
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from app.api.deps import Parts
from app.db import embedded, migrate
from app.db.session import parse_database_url, system_now
from app.domain.screen import Screen
from app.domain.tally import Tally, tally
from app.main import create_app
from app.services import heartbeat, snapshots
from app.settings import Settings
from benchmarks.fleet import fleet, market
from benchmarks.store import store
from benchmarks.timing import best_seconds

ACCOUNTS, POSITIONS = 100_000, 10
CALLS, ENTRIES, DAYS, PENDING = 5_000, 500_000, 8, 20_000
LOANS, ESCROWS = 50_000, 20_000
SCRAPE_TARGET_MS = 20.0


def main() -> None:
    """Print the table."""
    parameters, prices = market()
    screen = Screen(parameters, prices)
    screen.update(fleet(ACCOUNTS, POSITIONS, prices))
    ranks = np.random.default_rng(3).integers(0, 4, ACCOUNTS).astype(np.int8)
    zones, levels = ("GREEN", "YELLOW", "ORANGE", "RED"), ("OK", "WARNING", "DANGER", "EMERGENCY")

    def count() -> Tally:
        return tally(screen, (zones, ranks), (levels, ranks))

    counted = best_seconds({"count": count}, rounds=5)["count"]
    with tempfile.TemporaryDirectory() as home, embedded.start(Path(home)) as server:
        asyncio.run(migrate.upgrade(parse_database_url(server.url)))
        asyncio.run(store(server.url, fleet(ACCOUNTS, 1, prices), prices))
        asyncio.run(_fill(server.url))
        rows = uvloop.run(_measured(server.url, count()))
    table = Table("work", "ms", "target, ms", title=f"{ACCOUNTS:,} accounts, {CALLS:,} live calls, {LOANS:,} loans")
    table.add_row("a worker counts the accounts on its screen", f"{counted * 1e3:,.1f}", "")
    for name, milliseconds, target in rows:
        table.add_row(name, f"{milliseconds:,.1f}", target)
    Console(width=100).print(table)


async def _fill(url: str) -> None:
    """Write live calls, ledger entries, snapshots, loans and webhooks that wait, as many of each as a bad day has."""
    connection = await asyncpg.connect(url)
    try:
        for statement in (
            f"""INSERT INTO margin_calls
                    (id, agent_id, state, cause, noticed_at, opened_at, deadline_at, next_action_at, deficit, figures)
                SELECT 'call_' || row_number() OVER (), agent_id, 'open', 'utilization', now(), now(),
                       now() + interval '5 min', now() + interval '5 min', 0, '{{}}' FROM accounts LIMIT {CALLS}""",
            f"""INSERT INTO ledger_entries (batch, agent_id, service, kind, actor, posted_at, asset, amount, from_owner,
                                            from_bucket, to_owner, to_bucket)
                SELECT n, a.agent_id, 'trading', 'deposit', 'bench', now(), 'USDC', 1, 'house', 'custody', a.agent_id,
                       'free' FROM accounts a, generate_series(1, {ENTRIES // ACCOUNTS}) n""",
            f"""INSERT INTO account_snapshots
                SELECT agent_id, current_date - d, now(), 1, 1, 0, 1, 1, 1, 0
                FROM accounts, generate_series(0, {DAYS - 1}) d""",
            """INSERT INTO webhook_endpoints (id, agent_id, url, filters, secret, status, created_at)
               SELECT 'hook', min(id), 'https://example.com', '{}', 's', 'enabled', now() FROM agents""",
            f"""INSERT INTO events (event_id, agent_id, sequence, type, timestamp, data)
                SELECT 'evt_' || md5(n::text), (SELECT min(id) FROM agents), n, 'zone.changed', now(), '{{}}'
                FROM generate_series(1, {PENDING}) n""",
            """INSERT INTO webhook_deliveries (endpoint_id, event, created_at, next_attempt_at)
               SELECT 'hook', id, now(), now() FROM events""",
            "INSERT INTO lending_markets SELECT 'USDC', 1000000, 500000, 0.05, now()",
            """INSERT INTO loan_offers
                   (id, lender_id, asset, amount, remaining, minimum_rate, notice_seconds, created_at)
               SELECT 'offer', min(agent_id), 'USDC', 1000000, 0, 0, 0, now() FROM accounts""",
            f"""INSERT INTO loans (id, offer_id, lender_id, borrower_id, asset, amount, principal, rate_kind, rate,
                                   notice_seconds, collateral_asset, collateral, accrued, accrued_to, interest_paid,
                                   interest_booked, next_interest_at, recalled, status, deficit, opened_at,
                                   next_action_at)
                SELECT 'loan_' || agent_id, o.id, o.lender_id, a.agent_id, 'USDC', 10, 10, 'floating', 0, 0, 'BTC', 1,
                       0, now(), 0, 0, now(), 0, 'active', 0, now(), now()
                FROM loan_offers o JOIN accounts a ON a.agent_id <> o.lender_id LIMIT {LOANS}""",
            f"""INSERT INTO escrows (id, payer, payee, asset, amount, fee_rate, referral_share, fee_payer, on_timeout,
                                     state, funded_at, deadline_at, next_action_at)
                SELECT 'esc_' || a.agent_id, a.agent_id, o.lender_id, 'USDC', 10, 0, 0, 'payer', 'refund', 'funded',
                       now(), now(), now()
                FROM loan_offers o JOIN accounts a ON a.agent_id <> o.lender_id LIMIT {ESCROWS}""",
            "ANALYZE",
        ):
            await connection.execute(statement)
    finally:
        await connection.close()


async def _measured(url: str, counted: Tally) -> list[tuple[str, float, str]]:
    settings = Settings(database_url=SecretStr(url), _env_file=None)  # type: ignore[call-arg]  # mypy does not see it
    app = create_app(settings)
    parts: Parts = app.state.parts
    async with parts.database.transaction("bench") as tx:
        await heartbeat.beat(tx, "bench", counted)
    for _ in range(3):
        await parts.figures_shown.round()
    rows = [
        (f"figures of {name}, taken by one process", 1e3 * seconds, "")
        for name, seconds in (await _seconds_of_figures(parts)).items()
    ]
    started = time.perf_counter()
    await parts.figures_shown.round()
    rows.append(("figures read by every other process", 1e3 * (time.perf_counter() - started), ""))
    _serve_something(app, parts)
    registry = parts.metrics.registry
    size = len(generate_latest(registry)) / 1e3
    for clock, what in ((time.perf_counter, "a scrape"), (time.process_time, "its processor time")):
        scrape = best_seconds({"scrape": lambda: generate_latest(registry)}, 5, clock)["scrape"]
        rows.append((f"{what}, {size:.0f} kB", 1e3 * scrape, f"<= {SCRAPE_TARGET_MS:.0f}"))
    await parts.database.close()
    return rows


async def _seconds_of_figures(parts: Parts) -> dict[str, float]:
    first = snapshots.day_of(system_now()) - timedelta(days=DAYS)
    async with parts.database.transaction("bench") as tx:
        started = time.perf_counter()
        await snapshots.tallies(tx, first, first + timedelta(days=DAYS))
        backfill = time.perf_counter() - started
        rows = await tx.connection.exec_driver_sql("SELECT name, seconds FROM service_figures ORDER BY name")
        return {row.name: row.seconds for row in rows} | {f"backtest, {DAYS} days at once": backfill}


def _serve_something(app: FastAPI, parts: Parts) -> None:
    """Count an answer of each route, so that the scrape has all the series that there may be."""
    for path in app.openapi()["paths"]:
        parts.metrics.request_seconds.labels(path).observe(0.01)
        for status in ("200", "400", "404", "422", "503"):
            parts.metrics.requests.labels("GET", path, status).inc()


if __name__ == "__main__":
    main()
