"""Shards of the accounts: each held by one live worker, shared out evenly, taken over from whoever falls silent."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from sqlalchemy import text

from app.db.session import Database
from app.domain.screen import Screen
from app.services import heartbeat, screen_book, shards
from app.services.shards import ALL, SHARDS
from benchmarks.fleet import fleet, market
from benchmarks.store import store


async def _beat(database: Database, worker: str) -> frozenset[int]:
    async with database.transaction(worker) as tx:
        await heartbeat.beat(tx, worker)
        return await shards.hold(tx, worker)


async def _settle(database: Database, *workers: str) -> dict[str, frozenset[int]]:
    """Let each worker beat twice: the second round takes what the first has let go."""
    for _ in range(2):
        held = {worker: await _beat(database, worker) for worker in workers}
    return held


def assert_all_held_once(held: dict[str, frozenset[int]]) -> None:
    assert sum(len(mine) for mine in held.values()) == SHARDS
    assert frozenset().union(*held.values()) == ALL


async def test_one_worker_holds_all(database: Database) -> None:
    assert await _beat(database, "a") == ALL
    assert await _beat(database, "a") == ALL


async def test_workers_share_evenly_whoever_comes_and_goes(database: Database) -> None:
    await _beat(database, "a")
    assert_all_held_once(held := await _settle(database, "a", "b"))
    assert {len(mine) for mine in held.values()} == {SHARDS // 2}
    assert_all_held_once(held := await _settle(database, "a", "b", "c"))
    assert {len(mine) for mine in held.values()} <= {20, 21, 22}
    async with database.transaction("c") as tx:
        await shards.let_go(tx, "c")
        await heartbeat.leave(tx, "c")
    assert_all_held_once(await _settle(database, "a", "b"))


async def test_at_once_nothing_is_held_twice(database: Database) -> None:
    names = [f"w{k}" for k in range(6)]
    for _ in range(3):
        held = dict(zip(names, await asyncio.gather(*(_beat(database, name) for name in names)), strict=True))
        assert sum(len(mine) for mine in held.values()) == len(frozenset().union(*held.values()))
    assert_all_held_once(await _settle(database, *names))


async def test_who_falls_silent_loses_its_shards_when_the_lease_ends(database: Database) -> None:
    await _settle(database, "a", "b")
    assert len(await _beat(database, "b")) == SHARDS // 2
    async with database.transaction("time") as tx:
        for statement in (
            "UPDATE screen_shards SET lease_until = lease_until - CAST(:lease AS interval) WHERE worker_id = 'a'",
            "UPDATE workers SET seen_at = seen_at - CAST(:lease AS interval) WHERE id = 'a'",
        ):
            await tx.connection.execute(text(statement), {"lease": shards.LEASE + timedelta(milliseconds=1)})
    assert await _beat(database, "b") == ALL
    # back again, it takes no more than its share, and only what the other lets go
    assert await _beat(database, "a") == frozenset()
    assert_all_held_once(await _settle(database, "b", "a"))


async def test_the_shards_books_are_all_books_each_once(database: Database) -> None:
    parameters, prices = market()
    url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    await store(url, fleet(300, 5, prices), prices)
    everyone = await screen_book.load_all(database)
    parts = [await screen_book.load_all(database, range(start, SHARDS, 4)) for start in range(4)]
    agents = [agent for part in parts for agent in part.columns.agents]
    assert sorted(agents) == sorted(everyone.columns.agents)
    assert min(len(part.columns.agents) for part in parts) > 300 / 4 / 2
    whole, pieced = Screen(parameters, prices), Screen(parameters, prices)
    whole.update(everyone.columns)
    for part in parts:
        pieced.update(part.columns)
    order = [pieced.index[agent] for agent in whole.agents]
    assert (pieced.figures().equity[order] == whole.figures().equity).all()
    assert (pieced.figures().required_initial[order] == whole.figures().required_initial).all()


async def test_changes_are_read_of_the_shards_asked_for(database: Database) -> None:
    parameters, prices = market()
    url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    await store(url, fleet(50, 2, prices), prices)
    mine = range(0, SHARDS, 2)
    loaded = await screen_book.load_all(database, mine)
    screen = Screen(parameters, prices)
    screen.update(loaded.columns)
    async with database.transaction("test") as tx:
        await tx.connection.execute(text("UPDATE accounts SET version = version + 1"))
    changed = await screen_book.load_changed(database, screen.version_of, loaded.horizon, mine)
    assert sorted(changed.columns.agents) == sorted(screen.agents)
