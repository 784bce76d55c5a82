"""The worker inside a process: what one account can't do to the others."""

from __future__ import annotations

import asyncio
import contextlib

from sqlalchemy import URL, text

from app.server import worker_of
from tests.api.service import Agent, running, until

OWN = {"grace_period_seconds": 0, "trailing_stop": 0.15}


async def _states(agent: Agent) -> list[str]:
    return [call["state"] for call in (await agent.get("/margin-calls"))["margin_calls"]]


async def test_an_account_that_can_t_be_read_stops_no_decision_on_others(database_url: URL) -> None:
    """The row is broken by hand, as a fault of ours or of a disk might: no route writes such a moment."""
    async with running(database_url) as service:
        broken, sound = await service.agent("broken"), await service.agent("sound")
        await service.prices(BTC=60_000)
        for agent in (broken, sound):
            await agent.deposit(USDC=20_000)
            await agent.order("BTC-PERP", "buy", 0.6, leverage=3)
            answer = await agent.send("PATCH", "/account/settings", json=OWN)
            assert answer.status_code == 200, answer.text
        async with service.app.state.parts.database.transaction("test") as tx:
            statement = text("UPDATE positions SET opened_at = 'infinity' WHERE agent_id = :agent_id")
            await tx.connection.execute(statement, {"agent_id": broken.id})
        worker = asyncio.create_task(worker_of(service.app.state.parts).run())
        try:

            async def looked_at() -> bool:
                name = "primerisk_decision_failures_total"
                return bool(service.app.state.parts.metrics.registry.get_sample_value(name))

            await until(looked_at)  # as the trailing stop asks for
            assert not worker.done()
            await service.prices(BTC=40_000)
            async with asyncio.timeout(10):
                while await _states(sound) != ["completed"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert not worker.done()
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker


_WAITS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


async def test_an_account_that_an_outage_left_undecided_is_decided_on_later(database_url: URL) -> None:
    """The decision's connection is cut while it waits for the book, and no price moves any more."""
    async with running(database_url) as service:
        agent = await service.agent("alice")
        await service.prices(BTC=60_000)
        await agent.deposit(USDC=20_000)
        await agent.order("BTC-PERP", "buy", 0.6, leverage=3)
        worker = asyncio.create_task(worker_of(service.app.state.parts).run())
        database = service.app.state.parts.database
        try:
            await asyncio.sleep(0.5)
            async with database.transaction("test") as tx:
                hold = text("SELECT 1 FROM accounts WHERE agent_id = :agent_id FOR UPDATE")
                await tx.connection.execute(hold, {"agent_id": agent.id})
                await service.prices(BTC=42_000)
                async with asyncio.timeout(10):
                    while (pid := (await tx.connection.execute(text(_WAITS))).scalars().first()) is None:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                await tx.connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
            async with asyncio.timeout(10):
                while await _states(agent) != ["open"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker


async def test_the_worker_writes_down_what_accounts_are_worth(database_url: URL) -> None:
    async with running(database_url) as service:
        agent = await service.agent("alice")
        await service.prices(BTC=60_000)
        await agent.deposit(USDC=20_000)
        await agent.order("BTC-PERP", "buy", 0.5)
        workers = [asyncio.create_task(worker_of(service.app.state.parts).run()) for _ in range(2)]
        try:
            async with asyncio.timeout(20):
                while not (found := (await agent.get("/account/snapshots"))["snapshots"]):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    assert len(found) == 1
    assert (float(found[0]["equity"]), float(found[0]["gross"])) == (20_000, 30_000)
