"""What is past its time goes, by one process at a time; what is young stays."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from app.db.session import Database
from app.services import idempotency, retention
from app.services.idempotency import Named
from app.services.prices import post_prices

KEPT = retention.retentions(price_history_days=2, event_days=10, snapshot_days=100)


async def _fill(database: Database) -> None:
    """Store a bar of 1, 2 and 3 days ago, and an idempotency key of 1, 47, 49 and 99 hours ago."""
    async with database.transaction("test") as tx:
        for days in (3, 2, 1):
            as_of = tx.now - timedelta(days=days, minutes=1)
            await post_prices(tx, {"X": Decimal(days)}, as_of, timedelta(0))
        for hours in (1, 47, 49, 99):
            await idempotency.claim(tx, Named("caller", str(hours), "POST /", b""))
        await tx.connection.execute(
            text("UPDATE idempotency_keys SET created_at = now() - make_interval(hours => key::int)")
        )


async def _left(database: Database) -> tuple[list[Decimal], list[int]]:
    async with database.transaction("test") as tx:
        bars = await tx.connection.execute(text("SELECT close FROM price_bars ORDER BY minute"))
        keys = await tx.connection.execute(text("SELECT key::int FROM idempotency_keys ORDER BY 1"))
        return list(bars.scalars()), list(keys.scalars())


async def test_what_is_past_its_time_is_deleted(database: Database) -> None:
    await _fill(database)
    await retention.purge_all(database, KEPT)
    assert await _left(database) == ([Decimal(1)], [1, 47])


async def test_batch_by_batch(database: Database) -> None:
    await _fill(database)
    async with database.transaction("test") as tx:
        assert await idempotency.purge(tx, tx.now, most=3)
        assert not await idempotency.purge(tx, tx.now, most=3)
    assert (await _left(database))[1] == []


async def test_one_process_at_a_time(database: Database) -> None:
    await _fill(database)
    before = await _left(database)
    async with database.transaction("another process") as tx:
        for place in range(len(KEPT)):
            await tx.connection.execute(select(func.pg_try_advisory_xact_lock(retention.LOCK + place)))
        await retention.purge_all(database, KEPT)
        assert await _left(database) == before
    await asyncio.gather(*(retention.purge_all(database, KEPT) for _ in range(5)))
    assert await _left(database) == ([Decimal(1)], [1, 47])


async def test_the_loop_outlives_an_outage(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    await _fill(database)
    async with database.transaction("vandal") as tx:
        await tx.connection.execute(text("ALTER TABLE price_bars RENAME TO gone"))
    loop = asyncio.create_task(retention.run(database, KEPT, first_after_seconds=0, every_seconds=0.05))
    async with asyncio.timeout(5):
        while not caplog.messages:  # noqa: ASYNC110  the loop has no event to wait for
            await asyncio.sleep(0.01)
        async with database.transaction("vandal") as tx:
            await tx.connection.execute(text("ALTER TABLE gone RENAME TO price_bars"))
        while await _left(database) != ([Decimal(1)], [1, 47]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert "ProgrammingError" in caplog.text


async def _told(database: Database) -> dict[str, list[int]]:
    queries = {
        "events": "SELECT sequence FROM events ORDER BY 1",
        "deliveries": "SELECT v.sequence FROM webhook_deliveries d JOIN events v ON v.id = d.event ORDER BY 1",
        "attempts": """
            SELECT v.sequence FROM webhook_attempts a JOIN webhook_deliveries d ON d.id = a.delivery_id
            JOIN events v ON v.id = d.event ORDER BY 1""",
    }
    async with database.transaction("test") as tx:
        return {name: list((await tx.connection.execute(text(query))).scalars()) for name, query in queries.items()}


async def test_events_go_after_their_deliveries_and_what_waits_stays(database: Database) -> None:
    """Events 1 to 4 are old: 1 was delivered, 2 waits still, 3 had no webhook; 4 failed. 5 is young and delivered."""
    async with database.transaction("test") as tx:
        for number in range(1, 6):
            await tx.connection.execute(
                text(
                    """INSERT INTO events (event_id, sequence, type, timestamp, data) VALUES
                       ('evt_' || lpad(cast(cast(:n AS int) AS text), 32, '0'), :n, 'zone.changed',
                        now() - make_interval(days => CASE WHEN :n = 5 THEN 9 ELSE 11 END), '{}')"""
                ),
                {"n": number},
            )
        await tx.connection.execute(
            text(
                """INSERT INTO webhook_endpoints (id, url, filters, secret, status, created_at)
                   VALUES ('hook', 'https://x.example', '{}', 's', 'enabled', now())"""
            )
        )
        await tx.connection.execute(
            text(
                """INSERT INTO webhook_deliveries
                       (endpoint_id, event, state, attempts, created_at, next_attempt_at, delivered_at)
                   SELECT 'hook', id, state, 1, timestamp, CASE WHEN state = 'pending' THEN now() END,
                          CASE WHEN state = 'delivered' THEN now() END
                   FROM events JOIN (VALUES (1, 'delivered'), (2, 'pending'), (4, 'failed'), (5, 'delivered'))
                       AS s (number, state) ON sequence = number"""
            )
        )
        await tx.connection.execute(
            text(
                """INSERT INTO webhook_attempts (delivery_id, at, milliseconds, status)
                   SELECT id, created_at, 1, 200 FROM webhook_deliveries"""
            )
        )
    await retention.purge_all(database, KEPT)
    assert await _told(database) == {"events": [2, 5], "deliveries": [2, 5], "attempts": [2, 5]}


async def _delete(database: Database, table: str, word: str) -> None:
    async with database.transaction("test") as tx:
        await tx.connection.execute(text(f"SET LOCAL primerisk.past_its_time = '{word}'"))
        await tx.connection.execute(text(f"DELETE FROM {table}"))


@pytest.mark.parametrize(
    ("table", "word"),
    [("events", "no"), ("events", ""), ("ledger_entries", "yes"), ("audit_log", "yes"), ("market_changes", "yes")],
)
async def test_nothing_else_is_deleted(database: Database, table: str, word: str) -> None:
    with pytest.raises(DBAPIError, match="append-only"):
        await _delete(database, table, word)
