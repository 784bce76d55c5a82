"""The screen's columns out of the database: the books that `services.book` reads, all at once."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import asyncpg
import numpy as np
import pytest

from app.db.session import Database
from app.domain.book_columns import book_columns
from app.domain.screen import Screen
from app.services import book, screen_book
from benchmarks.fleet import fleet, market
from benchmarks.store import store

ACCOUNTS = 200
PARAMETERS, PRICES = market()


@pytest.fixture
async def connection(database: Database) -> asyncpg.Connection:
    url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    await store(url, fleet(ACCOUNTS, 10, PRICES), PRICES)
    opened = await asyncpg.connect(url)
    yield opened
    await opened.close()


async def _expected(database: Database, agents: list[str]) -> Screen:
    screen = Screen(PARAMETERS, PRICES)
    screen.update(book_columns([await book.read(database, agent) for agent in agents]))
    return screen


async def test_the_load_is_what_each_book_reads(database: Database, connection: asyncpg.Connection) -> None:
    loaded = await screen_book.load_all(database)
    screen = Screen(PARAMETERS, PRICES)
    screen.update(loaded.columns)
    assert len(screen) == ACCOUNTS
    expected = await _expected(database, screen.agents)
    for name in ("equity", "required_initial", "required_maintenance"):
        np.testing.assert_allclose(getattr(screen.figures(), name), getattr(expected.figures(), name), rtol=1e-9)


async def test_a_refresh_brings_what_changed_and_nothing_else(
    database: Database, connection: asyncpg.Connection
) -> None:
    loaded = await screen_book.load_all(database)
    screen = Screen(PARAMETERS, PRICES)
    screen.update(loaded.columns)
    known = screen.version_of
    none = await screen_book.load_changed(database, known, loaded.horizon)
    assert list(none.columns.agents) == []
    changed, closed = screen.agents[3], screen.agents[7]
    await connection.execute("UPDATE balances SET amount = amount / 2 WHERE agent_id = $1", changed)
    await connection.execute(
        "UPDATE positions SET size = 0, allocated = 0, closed_at = now() WHERE agent_id = $1", closed
    )
    statement = "UPDATE accounts SET version = version + 1 WHERE agent_id = ANY ($1)"
    await connection.execute(statement, [changed, closed])
    loaded = await screen_book.load_changed(database, known, none.horizon)
    assert sorted(loaded.columns.agents) == sorted([changed, closed])
    screen.update(loaded.columns)
    expected = await _expected(database, screen.agents)
    np.testing.assert_allclose(screen.figures().equity, expected.figures().equity, rtol=1e-9)
    assert screen.figures().required_initial[screen.index[closed]] == pytest.approx(
        expected.figures().required_initial[expected.index[closed]]
    )


async def test_a_change_that_commits_late_is_not_missed(database: Database, connection: asyncpg.Connection) -> None:
    loaded = await screen_book.load_all(database)
    screen = Screen(PARAMETERS, PRICES)
    screen.update(loaded.columns)
    statement = "UPDATE accounts SET version = version + 1 WHERE agent_id = $1"
    async with connection.transaction():
        await connection.execute(statement, screen.agents[0])
        other = await asyncpg.connect(database.url.set(drivername="postgresql").render_as_string(hide_password=False))
        try:
            await other.execute(statement, screen.agents[1])
        finally:
            await other.close()
        first = await screen_book.load_changed(database, screen.version_of, loaded.horizon)
        assert list(first.columns.agents) == [screen.agents[1]]
        screen.update(first.columns)
    second = await screen_book.load_changed(database, screen.version_of, first.horizon)
    assert list(second.columns.agents) == [screen.agents[0]]


async def test_an_empty_database_is_an_empty_screen(database: Database) -> None:
    loaded = await screen_book.load_all(database)
    screen = Screen(PARAMETERS, PRICES)
    screen.update(loaded.columns)
    assert len(screen) == 0
    assert len(screen.tick({"BTC": 1.0}).accounts) == 0
    assert len(screen.candidates()) == 0


def test_a_fleet_survives_its_own_columns() -> None:
    screen = Screen(PARAMETERS, PRICES)
    screen.update(fleet(ACCOUNTS, 10, PRICES))
    same = screen.under(replace(PARAMETERS, version=2))
    np.testing.assert_allclose(same.figures().equity, screen.figures().equity, rtol=1e-12)
    assert Decimal(len(same)) == ACCOUNTS
