"""A margin call from the price that breaches to the last event, on two API processes, two workers, a real receiver."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest

from app.db.session import Database
from tests.flows.topology import Topology, process_watching
from tests.flows.trader import (
    BREACH,
    LIFE,
    Trader,
    check_liquidated_once,
    is_genuine,
    told_to_the_end,
    trading,
    wait_for,
)
from tests.receiver import Received, receiving

SLACK = timedelta(seconds=10)
"""By how much a loaded machine may be late."""


async def _only_call(trader: Trader) -> dict[str, datetime]:
    """Return the moments of the one call that there was."""
    [call] = (await trader.call("GET", "/margin-calls"))["margin_calls"]
    return {name: datetime.fromisoformat(call[name]) for name in call if name.endswith("_at") and call[name]}


async def test_from_a_price_to_a_signed_webhook_and_a_liquidation(topology: Topology, database: Database) -> None:
    async with receiving() as receiver:
        own = {"grace_period_seconds": 2}
        async with trading(topology.addresses, database, receiver, **own) as (trader, secret):
            assert receiver.received == []
            await trader.prices(BREACH)
            posted = datetime.fromisoformat((await trader.call("GET", "/market/prices/BTC"))["as_of"])
            opened = await wait_for(receiver, "margin_call.opened")
            assert is_genuine(opened, secret)
            assert opened.event["data"]["agent_id"] == trader.agent_id
            completed = await wait_for(receiver, "liquidation.completed")
            call = await _only_call(trader)
            assert posted <= call["opened_at"] < posted + SLACK
            assert call["deadline_at"] == call["opened_at"] + timedelta(seconds=2)
            assert call["deadline_at"] <= call["expired_at"] <= call["ended_at"] < call["deadline_at"] + SLACK
            orders = (await trader.call("GET", "/orders"))["orders"]
            sold = [datetime.fromisoformat(o["created_at"]) for o in orders if o["reason"] == "liquidation"]
            assert min(sold) >= call["deadline_at"], "liquidated before the deadline"
            await check_liquidated_once(trader, database, receiver)
            assert all(is_genuine(item, secret) for item in receiver.received)
            assert not is_genuine(Received(completed.headers, completed.body + b" "), secret)


async def test_cured_by_a_deposit_and_by_a_price(topology: Topology, database: Database) -> None:
    own = {"grace_period_seconds": 60}
    async with receiving() as receiver, trading(topology.addresses, database, receiver, **own) as (trader, _):
        await trader.prices(BREACH)
        await wait_for(receiver, "margin_call.opened")
        await trader.prices({"BTC": 48_000})
        await wait_for(receiver, "margin_call.cured")
        receiver.received.clear()
        await trader.prices(BREACH)
        opened = await wait_for(receiver, "margin_call.opened")
        cure = opened.event["data"]["cure"]["deposit"]
        await trader.call("POST", "/wallet/deposits", cure)
        await wait_for(receiver, "margin_call.cured")
        calls = (await trader.call("GET", "/margin-calls"))["margin_calls"]
        assert [call["state"] for call in calls] == ["cured", "cured"]
        for _ in topology.apis:
            assert (await trader.call("GET", "/account"))["health"]["utilization"] <= 0.80


@pytest.mark.parametrize("seconds", [0.0, 0.7, 2.05])
async def test_who_watches_is_killed_under_a_call_and_it_ends_once(
    topology: Topology, database: Database, seconds: float
) -> None:
    """Killed as the call is told, during the grace, and about when it liquidates; and an API process with it."""
    async with receiving() as receiver:
        own = {"grace_period_seconds": 2}
        async with trading(topology.addresses, database, receiver, **own) as (trader, secret):
            await trader.prices(BREACH)
            await wait_for(receiver, "margin_call.opened")
            await asyncio.sleep(seconds)
            watching = await process_watching(topology, database, trader.agent_id)
            for process in (watching, topology.apis[0]):
                process.kill()
                process.start()
            await trader.prices(BREACH)
            await wait_for(receiver, "liquidation.completed", 30.0)
            await check_liquidated_once(trader, database, receiver)
            assert all(is_genuine(item, secret) for item in receiver.received)


async def test_no_grace_and_a_notice_delay(topology: Topology, database: Database) -> None:
    """Both at one price: the one is liquidated at once, the other when its breach has lasted."""
    async with receiving() as receiver:
        no_grace = {"grace_period_seconds": 0}
        async with (
            trading(topology.addresses, database, receiver, **no_grace) as (hasty, _),
            trading(topology.addresses, database, receiver, notice_delay_seconds=2, **no_grace) as (patient, _),
        ):
            await hasty.prices(BREACH)
            for trader in (hasty, patient):
                assert await told_to_the_end(database, trader) == LIFE
            at_once, later = await _only_call(hasty), await _only_call(patient)
            assert at_once["noticed_at"] == at_once["opened_at"] == at_once["deadline_at"]
            assert later["opened_at"] - later["noticed_at"] >= timedelta(seconds=2)
            assert later["deadline_at"] == later["opened_at"]
