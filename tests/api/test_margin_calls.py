"""Margin calls over HTTP, with a worker beside the app: called, reminded, cured, liquidated, and told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from app.server import worker_of
from app.services.ledger import imbalances
from tests.api.service import Agent, Service, problem, running, until

if TYPE_CHECKING:
    from sqlalchemy import URL


async def _breached(service: Service, **settings: Any) -> tuple[Agent, dict[str, Any]]:
    """Return an agent whose account a fall of the price has just breached, and its call."""
    await service.prices(BTC=60_000, ETH=3_000)
    alice = await service.agent("Alice")
    await alice.deposit(USDC=20_000)
    await alice.order("BTC-PERP", "buy", 0.7)
    await alice.order("ETH-PERP", "buy", 0.5)
    assert (await alice.send("PATCH", "/account/settings", json=settings)).status_code == 200
    await service.prices(BTC=48_000)

    async def call() -> Any:
        found = (await alice.get("/margin-calls"))["margin_calls"]
        return found[0] if found and found[0]["state"] != "noticed" else None

    return alice, await until(call)


async def _in_state(alice: Agent, call: dict[str, Any], state: str) -> dict[str, Any]:
    async def look() -> Any:
        found = await alice.get(f"/margin-calls/{call['id']}")
        return found if found["state"] == state else None

    seen: dict[str, Any] = await until(look)
    return seen


async def _types(alice: Agent) -> list[str]:
    return [event["type"] for event in (await alice.get("/events"))["events"]]


async def test_a_call_that_is_not_met_liquidates_the_smallest_first(worked: Service) -> None:
    alice, call = await _breached(worked, grace_period_seconds=1)
    assert (call["state"], call["cause"], call["zone"]) == ("open", "utilization", "RED")
    # required .30 x (33,600 + 1,500) = 10,530; equity 20,000 - 8,400 = 11,600
    assert call["shortfall"] == 10_530 / 0.75 - 11_600
    done = await _in_state(alice, call, "completed")
    assert (done["slices"], done["deficit"]) == (2, 0)
    account = await alice.get("/account")
    # the small one whole, of the large one what is enough for .75
    assert [p["symbol"] for p in account["positions"]] == ["BTC-PERP"]
    assert 0.7499 < account["health"]["utilization"] <= 0.75
    told = [t for t in await _types(alice) if t != "zone.changed"]
    assert told == [
        "margin_call.opened",
        "margin_call.reminded",
        "margin_call.expired",
        "liquidation.executed",
        "liquidation.executed",
        "liquidation.completed",
    ]
    orders = (await alice.get("/orders"))["orders"]
    assert [o["reason"] for o in orders[:2]] == ["liquidation", "liquidation"]
    # forced sales fill half a per cent below the mark
    assert orders[1]["fill_price"] == 2_985
    async with worked.app.state.parts.database.transaction("test") as tx:
        assert await imbalances(tx) == {}


async def test_a_deposit_cures(worked: Service) -> None:
    alice, call = await _breached(worked)
    cure = (await alice.get(f"/margin-calls/{call['id']}"))["cure"]
    assert cure["deposit"]["amount"] == 1_562.5
    await alice.deposit(USDC=str(cure["deposit"]["amount"]))
    await _in_state(alice, call, "cured")
    assert len((await alice.get("/account"))["positions"]) == 2


async def test_the_price_cures_and_a_second_breach_is_a_second_call(worked: Service) -> None:
    alice, call = await _breached(worked)
    await worked.prices(BTC=58_000)
    await _in_state(alice, call, "cured")
    await worked.prices(BTC=48_000)

    async def second() -> Any:
        found = (await alice.get("/margin-calls"))["margin_calls"]
        return found[0] if len(found) == 2 else None

    assert (await until(second))["state"] == "open"


async def test_without_auto_liquidation_nothing_is_closed(worked: Service) -> None:
    alice, call = await _breached(worked, grace_period_seconds=0, auto_liquidate=False)
    await _in_state(alice, call, "expired")
    await asyncio.sleep(0.3)
    assert len((await alice.get("/account"))["positions"]) == 2


async def test_acknowledging_records_and_strangers_find_nothing(worked: Service) -> None:
    alice, call = await _breached(worked)
    path = f"/margin-calls/{call['id']}"
    seen = await alice.post(f"{path}/acknowledge", {"note": "on it"})
    assert seen["acknowledged_at"] is not None
    assert (await alice.post(f"{path}/acknowledge"))["acknowledged_at"] == seen["acknowledged_at"]
    assert seen["deadline_at"] == call["deadline_at"]
    bob = await worked.agent("Bob")
    problem(await bob.send("GET", path), 404, "margin_call_not_found")
    problem(await bob.ask(f"{path}/acknowledge"), 404, "margin_call_not_found")
    assert (await bob.get("/margin-calls"))["margin_calls"] == []


async def test_stale_prices_open_nothing(database_url: URL) -> None:
    async with running(database_url, worker_poll_seconds=0.05, price_age_seconds_max=1) as service:
        worker = asyncio.create_task(worker_of(service.app.state.parts).run())
        alice = await service.agent("Alice")
        await alice.deposit(USDC=20_000)
        await service.prices(BTC=60_000)  # a second old, nothing is opened on it
        await alice.order("BTC-PERP", "buy", 0.7)
        await asyncio.sleep(1.2)
        old = {"prices": {"BTC": 40_000}, "as_of": (await alice.get("/account"))["as_of"]}
        await asyncio.sleep(1.2)
        assert (await service.post("/api/market/prices", key="market", json=old)).status_code == 202
        await asyncio.sleep(0.5)
        assert (await alice.get("/margin-calls"))["margin_calls"] == []
        assert "market.stale" in await _types(alice)
        worker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await worker


async def _peak(service: Service, agent: Agent, wanted: int) -> bool:
    """Tell whether the worker has written down this peak of an account's equity."""
    query = "SELECT peak_equity FROM account_watch WHERE agent_id = $1"
    found = await service.app.state.parts.database.fetch_value(query, agent.id)
    return found is not None and float(found) == pytest.approx(wanted)


async def test_a_trailing_stop_follows_profits_and_not_withdrawals(worked: Service) -> None:
    await worked.prices(BTC=60_000)
    alice = await worked.agent("Alice")
    await alice.deposit(USDC=20_000)
    await alice.order("BTC-PERP", "buy", 0.5)
    assert (await alice.send("PATCH", "/account/settings", json={"trailing_stop": 0.15})).status_code == 200
    await worked.prices(BTC=64_000)  # the peak: 22,000

    async def breach() -> Any:
        events = (await alice.get("/events"))["events"]
        return [event["data"] for event in events if event["type"] == "trailing_stop.breached"]

    await until(lambda: _peak(worked, alice, 22_000))
    await alice.post("/wallet/withdrawals", {"asset": "USDC", "amount": 5_000})  # the peak: 17,000
    await until(lambda: _peak(worked, alice, 17_000))
    assert await breach() == []
    await worked.prices(BTC=58_800)  # 14,400 is .847 of it
    told = await until(breach)
    assert len(told) == 1
    assert (told[0]["peak_equity"], told[0]["equity"]) == (17_000, 14_400)


async def test_prices_that_stop_coming_are_told_once_and_when_they_come_again(database_url: URL) -> None:
    async with running(database_url, worker_poll_seconds=0.05, price_age_seconds_max=1) as service:
        worker = asyncio.create_task(worker_of(service.app.state.parts).run())
        alice, bob = await service.agent("Alice"), await service.agent("Bob")
        await alice.deposit(USDC=20_000)
        await bob.deposit(USDC=20_000)
        await service.prices(BTC=60_000, ETH=3_000)  # a second old, nothing is opened on it
        await alice.order("BTC-PERP", "buy", 0.1)

        async def told() -> Any:
            return [t for t in await _types(alice) if t == "market.stale"]

        await until(told)
        await asyncio.sleep(1.5)
        assert await told() == ["market.stale"]
        assert "market.stale" not in await _types(bob)
        # fresh again, they may go stale again
        await service.prices(BTC=60_000)

        async def again() -> bool:
            return len(await told()) == 2

        await until(again)
        worker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await worker
