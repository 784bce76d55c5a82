"""A margin call on a `serve` that is one process, killed under it. `scaled` has the stories on more of them."""

from __future__ import annotations

import asyncio
import os
import signal

from app.db.session import Database
from tests.flows.process import ROOT, STOP_SECONDS_MAX, home, serving
from tests.flows.trader import BREACH, Trader, check_liquidated_once, is_genuine, settings_of, trading, wait_for
from tests.receiver import receiving


async def test_a_server_killed_during_the_grace_finishes_the_call_once(database: Database) -> None:
    given = {"PYTHONPATH": str(ROOT), **settings_of(database)}
    with home() as place:
        async with receiving() as receiver:
            with serving(place, **given) as served:
                own = {"grace_period_seconds": 2}
                async with trading(served.greeting.address, database, receiver, **own) as (trader, secret):
                    await trader.prices(BREACH)
                    await wait_for(receiver, "margin_call.opened")
                    await asyncio.sleep(0.7)
                    os.kill(served.process.pid, signal.SIGKILL)
                    served.process.wait(STOP_SECONDS_MAX)
            with serving(place, **given) as served:
                again = Trader(served.greeting.address, trader.key, trader.agent_id)
                await again.prices(BREACH)
                await wait_for(receiver, "liquidation.completed", 30.0)
                await check_liquidated_once(again, database, receiver)
                assert all(is_genuine(item, secret) for item in receiver.received)
