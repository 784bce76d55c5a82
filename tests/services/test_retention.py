"""What is past its time goes, by one process at a time; what is young stays."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import func, select, text

from app.db.session import Database
from app.services import idempotency, retention
from app.services.idempotency import Named
from app.services.prices import post_prices

KEPT = retention.retentions(price_history_days=2)


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
        await tx.connection.execute(select(func.pg_try_advisory_xact_lock(retention._ADVISORY_LOCK)))
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
