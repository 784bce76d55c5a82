"""The worker inside a process: what one account can't do to the others."""

from __future__ import annotations

import asyncio
import contextlib

from sqlalchemy import URL, text

from app.server import worker_of
from tests.api.service import Agent, running

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
            await asyncio.sleep(2.5)  # the trailing stop has had the broken account looked at
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
