"""The screen at work on a real database: whom it names, whatever it is told meanwhile, and whatever it loses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from asyncpg import PostgresError
from sqlalchemy import URL, text

from app.db.session import Database
from app.domain.watch import Band
from app.errors import DatabaseUnavailableError
from app.screening import Named, Watchman
from app.services.shards import ALL, SHARDS
from tests.database import make_settings
from tests.services.desk import ACTOR, Desk

AGE = timedelta(hours=1)
HALF = frozenset(range(SHARDS // 2))
GREEN, RED = (0, 0), (3, 3)


@pytest.fixture
async def desk(database_url: URL) -> AsyncIterator[Desk]:
    database = Database(database_url, make_settings(database_pool_size=8))
    made = Desk(database)
    await made.prices({"X": "100"})
    await made.market.refresh()
    yield made
    await database.close()


async def traders(desk: Desk, count: int) -> list[str]:
    """Make accounts with 10,000 USDC, long 250 X-PERP at 100: utilization .75."""
    made = []
    for _ in range(count):
        agent_id = await desk.agent("10000")
        await desk.order(agent_id, "buy", 250, "X-PERP")
        made.append(agent_id)
    return made


def everybody(named: Named) -> set[str]:
    return {*named.urgent, *named.others}


async def test_the_worst_off_come_first(desk: Desk) -> None:
    sizes = [240, 265, 235, 250, 245, 260]
    agents = [await desk.agent("10000") for _ in sizes]
    for agent, size in zip(agents, sizes, strict=True):
        await desk.order(agent, "buy", size, "X-PERP")
    watchman = Watchman(ACTOR, desk.database, desk.market, AGE)
    await watchman.look(ALL)
    await desk.prices({"X": "60"})  # a loss of 40 a contract: some are below zero
    named = (await watchman.look(ALL)).urgent
    assert named == [agent for _, agent in sorted(zip(sizes, agents, strict=True), reverse=True)]


async def test_a_breach_is_urgent_and_a_level_is_news(desk: Desk) -> None:
    agents = await traders(desk, 3)
    watchman = Watchman(ACTOR, desk.database, desk.market, AGE)
    first = await watchman.look(ALL)
    assert (set(first.urgent), set(first.others)) == (set(), set(agents))  # ORANGE, and nothing was told
    for agent in agents:
        watchman.decided(agent, (2, 0), None, waits=False)
    assert everybody(await watchman.look(ALL)) == set()
    await desk.prices({"X": "93"})  # utilization .845: ORANGE still
    assert everybody(await watchman.look(ALL)) == set()
    await desk.prices({"X": "92"})
    assert set((await watchman.look(ALL)).urgent) == set(agents)


@pytest.mark.parametrize("shards", [ALL, HALF])
async def test_what_is_told_during_a_look_is_not_lost(desk: Desk, shards: frozenset[int]) -> None:
    """With fewer shards than before the screen is built anew meanwhile."""
    await traders(desk, 12)
    watchman = Watchman(ACTOR, desk.database, desk.market, AGE)
    mine = everybody(await watchman.look(shards))
    await watchman.look(ALL)
    await desk.prices({"X": "100.1"})
    look = asyncio.create_task(watchman.look(shards))
    while not look.done():
        for agent in mine:
            watchman.decided(agent, (2, 0), None, waits=False)
        await asyncio.sleep(0)
    await look
    await desk.prices({"X": "100.2"})
    assert everybody(await watchman.look(shards)) == set()


async def test_a_look_that_was_cut_off_is_made_up_for(desk: Desk) -> None:
    agents = await traders(desk, 3)
    watchman = Watchman(ACTOR, desk.database, desk.market, AGE)
    await watchman.look(ALL)
    for agent in agents:
        watchman.decided(agent, (2, 0), None, waits=False)
    await desk.prices({"X": "90"})
    agent = await desk.agent("1")  # a change, so that books are read
    async with desk.database.transaction("vandal") as tx:
        await tx.connection.execute(text("ALTER TABLE reservations RENAME TO gone"))
    with pytest.raises((DatabaseUnavailableError, PostgresError)):
        await watchman.look(ALL)
    watchman.decided(agents[0], RED, Band(0.0, 1.0), waits=False)
    async with desk.database.transaction("vandal") as tx:
        await tx.connection.execute(text("ALTER TABLE gone RENAME TO reservations"))
    assert set((await watchman.look(ALL)).urgent) == set(agents)
    assert agent not in (await watchman.look(ALL)).urgent


async def test_shards_gained_bring_their_accounts_and_shards_lost_take_them_away(desk: Desk) -> None:
    agents = set(await traders(desk, 16))
    watchman = Watchman(ACTOR, desk.database, desk.market, AGE)
    assert everybody(await watchman.look(frozenset())) == set()
    first = everybody(await watchman.look(HALF))
    second = everybody(await watchman.look(ALL))
    assert first | second == agents
    assert not first & second
    assert everybody(await watchman.look(HALF)) == first


async def test_a_stale_price_that_is_posted_again_unchanged_brings_who_waited(desk: Desk) -> None:
    [agent] = await traders(desk, 1)
    watchman = Watchman(ACTOR, desk.database, desk.market, AGE)
    await watchman.look(ALL)
    watchman.decided(agent, (2, 0), None, waits=True)
    await asyncio.sleep(1.05)
    assert agent in everybody(await watchman.look(ALL))
    watchman.decided(agent, (2, 0), None, waits=False)
    await asyncio.sleep(1.05)
    assert everybody(await watchman.look(ALL)) == set()
